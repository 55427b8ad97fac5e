"""From results (lines of needle.jsonl) to what is said of each model: shares found, nats, gains,
and pairs of models on the same prompts."""

import statistics

from support.needles.intervals import clustered, mean_of, paired
from support.needles.tasks import NIAH_M


def nats(result: dict) -> float:
    """Log-probability of an answer: where a prompt asks for several, their mean."""
    return result["answer_logprob"] / len(result["expected"])


def by_text(results: list[dict], value) -> list[list[float]]:
    """One list for each text: `value` of its results, once for each answer."""
    texts: dict[tuple, list[float]] = {}
    for r in results:
        answers = max(1, len(r.get("expected", ())))  # a loss has none, and counts once
        texts.setdefault((r["length"], r["repeat"]), []).extend([value(r)] * answers)
    return list(texts.values())


def entry_of(*groups: list[dict]) -> dict:
    """Of one task's results (or of several tasks', weighed equally): n answers, texts, mean score
    and its 95 % interval; the mean log-probability of an answer, where it was measured."""
    clusters = [by_text(results, lambda r: r["score"]) for results in groups]
    n = sum(len(text) for texts in clusters for text in texts)
    entry = {"n": n, "texts": sum(map(len, clusters)), "mean": round(mean_of(*clusters), 4)}
    if all(r["task"] == "loss" for results in groups for r in results):
        return entry
    entry["interval_95"] = [round(x, 3) for x in clustered(*clusters)]
    if all("answer_logprob" in r for results in groups for r in results):
        entry["nats"] = round(mean_of(*(by_text(results, nats) for results in groups)), 4)
    return entry


def summarise(results: list[dict], by: tuple[str, ...] = ("model", "task", "length")) -> list[dict]:
    """An entry (entry_of) for each group of results.

    The depths (or questions) of a text share its haystack and answers: whole texts are drawn again
    for the interval, which is never narrower than Wilson's (few texts that agree prove little).
    Where multikey, multivalue and multiquery are there, so is NIAH(M), their mean."""
    groups: dict[tuple, list[dict]] = {}
    for r in results:
        groups.setdefault(tuple(r[k] for k in by), []).append(r)
    table = [dict(zip(by, key, strict=True)) | entry_of(group) for key, group in groups.items()]
    for entry in table.copy():
        same = [tuple((entry | {"task": t})[k] for k in by) for t in NIAH_M]
        if entry["task"] == NIAH_M[-1] and all(key in groups for key in same):
            named = {k: entry[k] for k in by} | {"task": "NIAH(M)"}
            table.append(named | entry_of(*(groups[key] for key in same)))
    return table


def versus(results: list[dict], ours: str) -> list[dict]:
    """Model `ours` against each other one on the same prompts: for each task and length the
    differences in the share found and in nats, text by text (see `paired`)."""
    mine, pairs = {}, {}
    for r in results:
        if r["task"] != "loss" and r["model"] == ours:
            mine[prompt_key(r)] = r
    for r in results:
        own = mine.get(prompt_key(r)) if r["model"] != ours else None
        if own is not None:
            texts = pairs.setdefault((r["task"], r["length"], r["model"]), {})
            gains = texts.setdefault(r["repeat"], ([], []))
            gains[0].append(own["score"] - r["score"])
            gains[1].append(nats(own) - nats(r))
    table = []
    for (task, length, other), texts in pairs.items():
        found, gained = zip(*texts.values(), strict=True)
        entry = {"task": task, "length": length, "model": ours, "against": other}
        entry["found"] = paired([statistics.mean(text) for text in found])
        table.append(entry | {"nats": paired([statistics.mean(text) for text in gained])})
    return table


def prompt_key(result: dict) -> tuple:
    return tuple(result.get(k) for k in ("task", "length", "repeat", "depth", "prompt"))


def gains(results: list[dict], whole: str, without: str, alone: str) -> list[dict]:
    """By how many nats the needles raise the log-probability of an answer, for each task and
    length. whole, without, alone: labels of the whole prompts', of those without their needles,
    and of the needle alone in a short text, whose gain is what distance can take away."""
    table = []
    without_needles = {answer_key(r): r for r in results if r["model"] == without}
    for label in (whole, alone):
        groups: dict[tuple, dict[int, list[float]]] = {}
        for r in results:
            if r["model"] == label and (control := without_needles.get(answer_key(r))):
                texts = groups.setdefault((r["task"], r["length"]), {})
                texts.setdefault(r["repeat"], []).append(gain(r, control))
        for (task, length), texts in groups.items():
            named = {"task": task, "length": length, "model": label}
            table.append(named | paired([statistics.mean(text) for text in texts.values()]))
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


def answer_key(result: dict) -> tuple:
    """The same question about the same text, with its needles or without, at whatever depth."""
    return result["task"], result["length"], result["repeat"], tuple(result["expected"])
