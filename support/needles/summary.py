"""From results (lines of needle.jsonl) to what is said of each model: shares found, nats, gains,
and pairs of models on the same prompts."""

import statistics
from collections.abc import Callable, Iterable

from support.needles.intervals import clustered, mean_of, paired
from support.needles.tasks import NIAH_M


def nats(result: dict) -> float:
    """Log-probability of an answer: where a prompt asks for several, their mean."""
    return result["answer_logprob"] / len(result["expected"])


def grouped(results: Iterable[dict], by: tuple[str, ...]) -> dict[tuple, list[dict]]:
    """Results with the same values of the fields `by`, under these values."""
    groups: dict[tuple, list[dict]] = {}
    for r in results:
        groups.setdefault(tuple(r[field] for field in by), []).append(r)
    return groups


def by_text(results: list[dict], value: Callable[[dict], float]) -> list[list[float]]:
    """One list for each text: `value` of its results, once for each answer (a loss counts once)."""
    texts = grouped(results, ("length", "repeat")).values()
    return [[value(r) for r in text for _ in range(max(1, len(r["expected"])))] for text in texts]


def entry_of(*groups: list[dict]) -> dict:
    """Of one task's results (or of several tasks', weighed equally): n answers, texts, mean score;
    unless it is the loss, the score's 95 % interval and the mean log-probability of an answer."""
    clusters = [by_text(results, lambda r: r["score"]) for results in groups]
    n = sum(len(text) for texts in clusters for text in texts)
    entry = {"n": n, "texts": sum(map(len, clusters)), "mean": round(mean_of(*clusters), 4)}
    if groups[0][0]["task"] != "loss":
        entry["interval_95"] = [round(x, 3) for x in clustered(*clusters)]
        entry["nats"] = round(mean_of(*(by_text(results, nats) for results in groups)), 4)
    return entry


def summarise(results: list[dict], by: tuple[str, ...] = ("model", "task", "length")) -> list[dict]:
    """An entry (entry_of) for each group of results.

    The depths (or questions) of a text share its haystack and answers: whole texts are drawn again
    for the interval, which is never narrower than Wilson's (few texts that agree prove little).
    Where multikey, multivalue and multiquery are there, so is NIAH(M), their mean."""
    groups = grouped(results, by)
    table = [dict(zip(by, key, strict=True)) | entry_of(group) for key, group in groups.items()]
    for last in [entry for entry in table if entry["task"] == NIAH_M[-1]]:
        named = {field: last[field] for field in by}
        keys = [tuple((named | {"task": task}).values()) for task in NIAH_M]
        if all(key in groups for key in keys):
            table.append(named | {"task": "NIAH(M)"} | entry_of(*(groups[key] for key in keys)))
    return table


def compared(results: list[dict], difference: Callable[[dict], float]) -> dict:
    """`paired` of the mean difference in each text."""
    return paired([statistics.mean(text) for text in by_text(results, difference)])


def versus(results: list[dict], ours: str) -> list[dict]:
    """Model `ours` against each other one on the same prompts: for each task and length the
    differences in the share found and in nats, text by text."""

    def prompt(r: dict) -> tuple:
        return tuple(r[k] for k in ("task", "length", "repeat", "depth", "prompt"))

    mine = {prompt(r): r for r in results if r["model"] == ours and r["task"] != "loss"}
    both = [r for r in results if r["model"] != ours and prompt(r) in mine]
    table = []
    for (task, length, other), rows in grouped(both, ("task", "length", "model")).items():
        entry = {"task": task, "length": length, "model": ours, "against": other}
        entry["found"] = compared(rows, lambda r: mine[prompt(r)]["score"] - r["score"])
        entry["nats"] = compared(rows, lambda r: nats(mine[prompt(r)]) - nats(r))
        table.append(entry)
    return table


def gains(results: list[dict], whole: str, without: str, alone: str) -> list[dict]:
    """By how many nats the needles raise the log-probability of an answer, for each task and
    length. whole, without, alone: labels of the whole prompts', of those without their needles,
    and of the needle alone in a short text, whose gain is what distance can take away."""

    def question(r: dict) -> tuple:
        """The same about the same text, with its needles or without, at whatever depth."""
        return r["task"], r["length"], r["repeat"], tuple(r["expected"])

    controls = {question(r): r for r in results if r["model"] == without}
    own = [
        r for m in (whole, alone) for r in results if r["model"] == m and question(r) in controls
    ]
    table = []
    for (model, task, length), rows in grouped(own, ("model", "task", "length")).items():
        entry = {"task": task, "length": length, "model": model}
        table.append(entry | compared(rows, lambda r: gain(r, controls[question(r)])))
    short = {(e["task"], e["length"]): e["mean"] for e in table if e["model"] == alone}
    for entry in table:
        most = short.get((entry["task"], entry["length"]))
        if entry["model"] == whole and most:
            entry["share_of_short_text"] = entry["mean"] / most
    return table


def gain(result: dict, control: dict) -> float:
    """Nats that the needles are worth to the model, for each answer of a prompt."""
    # [E24] gain = mean over the answers of (log p(answer | prompt) - log p(answer | no needles))
    return (result["answer_logprob"] - control["answer_logprob"]) / len(result["expected"])
