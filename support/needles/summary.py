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


def matched(results: list[dict], reference: str, same: tuple[str, ...]) -> list[dict]:
    """Results of other models than `reference` that it has one for, too, with equal fields `same`;
    under "other" is that one."""

    def key(r: dict) -> str:
        return str([r[field] for field in same])  # a field may be a list

    known = {key(r): r for r in results if r["model"] == reference}
    found = [r for r in results if r["model"] != reference and key(r) in known]
    return [r | {"other": known[key(r)]} for r in found]


def compared(results: list[dict], difference: Callable[[dict], float]) -> dict:
    """`paired` of the mean difference in each text."""
    return paired([statistics.mean(text) for text in by_text(results, difference)])


def versus(results: list[dict], ours: str) -> list[dict]:
    """Model `ours` against each other one on the same prompts: for each task and length the
    differences in the share found and in nats, text by text."""
    needles = [r for r in results if r["task"] != "loss"]
    pairs = matched(needles, ours, ("task", "length", "repeat", "depth", "prompt"))
    table = []
    for (task, length, other), rows in grouped(pairs, ("task", "length", "model")).items():
        entry = {"task": task, "length": length, "model": ours, "against": other}
        entry["found"] = compared(rows, lambda r: r["other"]["score"] - r["score"])
        entry["nats"] = compared(rows, lambda r: nats(r["other"]) - nats(r))
        table.append(entry)
    return table


def gains(results: list[dict], whole: str, without: str, alone: str) -> list[dict]:
    """By how many nats the needles raise the log-probability of an answer, for each task and
    length. whole, without, alone: labels of the whole prompts', of those without their needles,
    and of the needle alone in a short text, whose gain is what distance can take away."""
    # a question has one prompt without needles, at whatever depth they are
    rows = matched(results, without, ("task", "length", "repeat", "expected"))
    rows = [r for r in rows if r["model"] in (whole, alone)]
    table = []
    for (model, task, length), own in grouped(rows, ("model", "task", "length")).items():
        entry = {"task": task, "length": length, "model": model}
        table.append(entry | compared(own, lambda r: gain(r, r["other"])))
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
