"""Rows of an evaluation on disk, append-only JSONL that survives a kill; means and intervals."""

import contextlib
import hashlib
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

from support.needles.tasks import NIAH_M
from support.system.bad_input import BadInput, read_text
from support.system.console import log, telling
from support.system.whole_files import check_unlocked, only_writer, write_atomically

KEY = ("identity", "task", "length", "depth", "repeat", "prompt", "dtype")


class Results:
    """needle.jsonl: what an earlier, perhaps interrupted run measured is not measured again."""

    def __init__(self, folder: Path):
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"--out {folder} is a file; a folder for the results is needed")
        check_unlocked(folder)  # another one's half-written line is not ours to mend
        path = folder / "needle.jsonl"
        self.path, self.rows = path, {}
        text = read_text(path) if path.is_file() else ""
        self.cut = text != "" and not text.endswith("\n")  # a last line without its end
        # not splitlines(): an answer may hold U+2028
        lines = text.removesuffix("\n").split("\n") if text else []
        for i, line in enumerate(lines):
            try:
                row = json.loads(line)
                self.rows[self.key(row)] = row
            except (ValueError, KeyError, TypeError, RecursionError):
                if i + 1 < len(lines):
                    raise BadInput(
                        f"{path}, line {i + 1} is no result of ours; move the file away"
                    ) from None
                write_atomically(path, "".join(x + "\n" for x in lines[:-1]))  # killed in mid-line
                self.cut = False

    @staticmethod
    def key(row: dict) -> tuple:
        return tuple(row[k] for k in KEY)

    def find(self, row: dict) -> dict | None:
        """What was measured for the prompt of `row`; None also where an older version did not yet
        measure `answer_logprob`."""
        known = self.rows.get(self.key(row))
        return known if known is not None and is_complete(known) else None

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around the measuring, alone in the folder; whatever stops it, the last line says what is
        kept."""
        before = len(self.rows)
        with only_writer(self.path.parent), telling(self.what_is_saved):
            yield
        if len(self.rows) == before:
            log("every row was measured before: nothing was run")

    def what_is_saved(self) -> str:
        return f"the rows written are kept in {self.path}; the same command goes on from there"

    def add(self, row: dict) -> dict:
        self.rows[self.key(row)] = row
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" * self.cut + json.dumps(row, ensure_ascii=False) + "\n")
        self.cut = False
        return row

    def of_setup(self, rows: list[dict], setups: dict[str, str], judged: list, args) -> list[dict]:
        """`rows` and what earlier runs measured of the same models in the same way (wording,
        haystack, seed, dtype), so that a small run does not hide a larger one before it. judged:
        (identity, label) of each model; setups: task -> setup_of."""
        found = {(self.key(row), row["model"]): row for row in rows}
        others = 0
        for row in self.rows.values():
            labels = [label for identity, label in judged if identity == row["identity"]]
            same = row.get("setup") == setups.get(row["task"]) and row["seed"] == args.seed
            same = same and is_complete(row)
            for label in labels if same and row["dtype"] == str(args.torch_dtype) else ():
                found.setdefault((self.key(row), label), row | {"model": label})
            others += not any((self.key(row), label) in found for label in labels)
        if len(found) > len(rows):
            log(f"{len(found) - len(rows)} rows of earlier runs in {self.path} are counted too")
        if others:
            log(f"{others} rows there are of other models or settings, and not counted")
        order = [label for _, label in judged], list(setups)
        place = {k: i for names in order for i, k in enumerate(names)}
        return sorted(
            found.values(), key=lambda r: (place[r["model"]], place[r["task"]], r["length"])
        )


def is_complete(row: dict) -> bool:
    return row["task"] == "loss" or "answer_logprob" in row


def setup_of(task, text: str) -> str:
    """Tells one way of testing from another, whatever lengths, depths and repeats. task None: the
    loss on the text."""
    text = text if task is None or task.haystack == "text" else ""
    return hashlib.sha256(f"{task}{text}".encode(errors="replace")).hexdigest()[:12]


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. Unlike the textbook one it is right at 0 and 1 and for
    small n.

    >>> [round(x, 3) for x in wilson(10, 10)]
    [0.722, 1.0]
    """
    # [E20] (p + z2/2n +- z sqrt(p(1 - p)/n + z2/4n2)) / (1 + z2/n),   z2 = z * z, n2 = n * n
    p, z2 = successes / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_of(*groups: list[list[float]]) -> float:
    """Mean over the groups (tasks) of the mean score of each; a group is a list of clusters."""
    # [E21] NIAH(M) = (mean of multikey + mean of multivalue + mean of multiquery) / 3
    means = [sum(map(sum, clusters)) / sum(map(len, clusters)) for clusters in groups]
    return sum(means) / len(means)


def resampled(*groups: list[list[float]], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of mean_of(*groups) where the scores of a cluster (one haystack) stand or fall
    together: whole clusters are drawn again, with replacement (percentile bootstrap).

    >>> resampled([[1, 1, 0, 1], [1, 1, 0, 1]])  # clusters that agree
    (0.75, 0.75)
    """
    # [E22] the means of `draws` sets of whole clusters, from their 2.5th to their 97.5th percentile
    rng = random.Random(0)
    means = sorted(mean_of(*(rng.choices(g, k=len(g)) for g in groups)) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def clustered(*groups: list[list[float]]) -> tuple[float, float]:
    """The wider at each end of `resampled` and Wilson's interval: clustering can only add doubt."""
    n = sum(len(cluster) for clusters in groups for cluster in clusters)
    low, high = wilson(mean_of(*groups) * n, n)
    if n == sum(map(len, groups)):  # a score a haystack: they are independent
        return low, high
    return min(low, (again := resampled(*groups))[0]), max(high, again[1])


def entry_of(*groups: list[list[float]], loss: bool = False) -> dict:
    """n, number of haystacks, mean and, but for a loss, the 95 % interval."""
    n = sum(len(cluster) for clusters in groups for cluster in clusters)
    entry = {"n": n, "haystacks": sum(map(len, groups)), "mean": round(mean_of(*groups), 4)}
    return entry if loss else entry | {"interval_95": [round(x, 3) for x in clustered(*groups)]}


def summarise(rows: list[dict], by: tuple[str, ...] = ("model", "task", "length")) -> list[dict]:
    """One entry per group of rows: n, haystacks, mean score, 95 % interval (loss: mean only).

    The depths (or questions) of a haystack share its text and answer: whole haystacks are drawn
    again for the interval, which is never narrower than Wilson's (few haystacks that agree prove
    little). Where multikey, multivalue and multiquery are there, so is NIAH(M), their mean."""
    found: dict[tuple, dict[tuple, list[float]]] = {}
    for r in rows:
        haystacks = found.setdefault(tuple(r[k] for k in by), {})
        haystacks.setdefault((r["length"], r["repeat"]), []).append(r["score"])
    groups = {key: list(haystacks.values()) for key, haystacks in found.items()}
    table = [
        dict(zip(by, key, strict=True)) | entry_of(g, loss="loss" in key)
        for key, g in groups.items()
    ]
    for entry in table.copy():
        same = [tuple((entry | {"task": t})[k] for k in by) for t in NIAH_M]
        if entry["task"] == NIAH_M[-1] and all(key in groups for key in same):
            named = {k: entry[k] for k in by} | {"task": "NIAH(M)"}
            table.append(named | entry_of(*(groups[key] for key in same)))
    return table
