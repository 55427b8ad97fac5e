"""Rows of an evaluation on disk, append-only JSONL that survives a kill; intervals and tables."""

import contextlib
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

from support.atomic import check_unlocked, only_writer, write_atomically
from support.cli import log, telling

KEY = ("identity", "task", "length", "depth", "repeat", "prompt", "dtype")


class Results:
    """needle.jsonl: what an earlier, perhaps interrupted run measured is not measured again."""

    def __init__(self, folder: Path):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {folder} is a file; a folder for the results is needed")
        check_unlocked(folder)  # another one's half-written line is not ours to mend
        path = folder / "needle.jsonl"
        self.path, self.rows = path, {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for i, line in enumerate(lines):
            try:
                row = json.loads(line)
                self.rows[self.key(row)] = row
            except (json.JSONDecodeError, KeyError, TypeError):
                if i + 1 < len(lines):
                    raise ValueError(
                        f"{path}, line {i + 1} is no result of ours; move the file away"
                    ) from None
                write_atomically(path, "".join(x + "\n" for x in lines[:-1]))  # killed in mid-line

    @staticmethod
    def key(row: dict) -> tuple:
        return tuple(row[k] for k in KEY)

    def find(self, row: dict) -> dict | None:
        return self.rows.get(self.key(row))

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
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return row


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. Unlike the textbook one it is right at 0 and 1 and for
    small n.

    >>> [round(x, 3) for x in wilson(10, 10)]
    [0.722, 1.0]
    """
    p, z2 = successes / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def resampled(clusters: list[list[float]], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean score where the scores of a cluster (one haystack) stand or fall
    together: whole clusters are drawn again, with replacement (percentile bootstrap).

    >>> resampled([[1, 1, 0, 1], [1, 1, 0, 1]])  # clusters that agree
    (0.75, 0.75)
    """
    rng, means = random.Random(0), []
    for _ in range(draws):
        scores = [score for c in rng.choices(clusters, k=len(clusters)) for score in c]
        means.append(sum(scores) / len(scores))
    means.sort()
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def clustered(clusters: list[list[float]]) -> tuple[float, float]:
    """The wider at each end of `resampled` and Wilson's interval: clustering can only add doubt."""
    scores = [score for c in clusters for score in c]
    pairs = zip(resampled(clusters), wilson(sum(scores), len(scores)), strict=True)
    (low, low_w), (high, high_w) = pairs
    return min(low, low_w), max(high, high_w)


def summarise(rows: list[dict]) -> list[dict]:
    """One entry per (model, task, length): n, mean score, 95 % interval (loss: mean only).

    multiquery asks several questions about one haystack, so there whole haystacks are drawn again
    for the interval, which is then never narrower than Wilson's (few haystacks that agree prove
    little); every other task gets Wilson's, although its depths share a haystack too."""
    table = []
    groups: dict[tuple, dict[int, list[float]]] = {}
    for r in rows:
        haystacks = groups.setdefault((r["model"], r["task"], r["length"]), {})
        haystacks.setdefault(r["repeat"], []).append(r["score"])
    for (model, task, length), haystacks in groups.items():
        scores = [score for group in haystacks.values() for score in group]
        entry = {"model": model, "task": task, "length": length, "n": len(scores)}
        entry["haystacks"] = len(haystacks)
        entry["mean"] = round(sum(scores) / len(scores), 4)
        if task != "loss":
            low, high = wilson(sum(scores), len(scores))
            if task == "multiquery":
                low, high = clustered(list(haystacks.values()))
            entry["interval_95"] = [round(low, 3), round(high, 3)]
        table.append(entry)
    return table


def print_table(table: list[dict]) -> None:
    """Models down, lengths across, one block per task."""
    lengths = sorted({e["length"] for e in table})
    for task in dict.fromkeys(e["task"] for e in table):
        unit = "nats per token" if task == "loss" else "found, 95 % interval"
        if task == "multiquery":
            print("\nmultiquery: several needles in one text, asked for in turn from one prefill;")
            print("harder than one needle per text, as the others can be taken for it", end="")
        print(f"\n{task} ({unit})\n{'':24}" + "".join(f"{n:>24,}" for n in lengths))
        for model in dict.fromkeys(e["model"] for e in table):
            line = f"{model[-23:]:24}"
            for n in lengths:
                cell = (model, task, n)
                found = [e for e in table if (e["model"], e["task"], e["length"]) == cell]
                if not found:
                    text = "-"
                elif task == "loss":
                    text = f"{found[0]['mean']:.3f} (n={found[0]['n']})"
                else:
                    low, high = found[0]["interval_95"]
                    text = f"{found[0]['mean']:.0%} [{low:.0%},{high:.0%}] n={found[0]['n']}"
                line += f"{text:>24}"
            print(line)
