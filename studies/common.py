"""Shared by the studies: running commands, making each model once, keeping a row as soon as it is
measured, and the table and figure of the rows.

Importing this file lets a study import the repository's own files and tests/helpers.
"""

import dataclasses
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning on shared cores costs 6-17x
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import train  # noqa: E402
from model import LlamaConfig, load_pretrained, save_pretrained  # noqa: E402
from support.memory.machine import HERE, machine  # noqa: E402
from support.needles.intervals import clustered, mean_of, paired  # noqa: E402
from support.system.bad_input import BadInput  # noqa: E402
from support.system.console import log, provenance  # noqa: E402
from support.system.whole_files import write_atomically  # noqa: E402

RESULTS = ROOT / "assets" / "results"
OF_RUN = ("seconds", "peak_GiB", "commit", "hardware", "threads")  # of run.json, kept in a row


def run(command: str) -> None:
    """A command of this repository, written as after `python`. SystemExit if it fails."""
    log(f"$ python {command}")
    if code := subprocess.run([sys.executable, *command.split()], check=False).returncode:
        sys.exit(f"error: exit code {code} of python {command}")


def read_json(file: Path) -> dict:
    """{} where there is no such file."""
    return json.loads(file.read_text()) if file.is_file() else {}


def read_lines(file: Path) -> list[dict]:
    """The objects of a .jsonl file, one a line; none where there is no such file."""
    return [json.loads(x) for x in file.read_text().splitlines()] if file.is_file() else []


def write_json(file: Path, found: dict, indent: int | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(found, indent=indent) + "\n")


def in_processes(work, kinds: tuple[str, ...], *args) -> dict:
    """Start work(kind, *args, pipe) in a process for each kind -> kind -> our end of its pipe,
    whose recv() raises EOFError once that process is gone."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for kind in kinds:
        pipes[kind], theirs = context.Pipe()
        context.Process(target=work, args=(kind, *args, theirs), daemon=True).start()
        theirs.close()
    return pipes


# ---- models ----


def train_into(out: Path, flags: str) -> dict:
    """run.json of train.py with these flags, which is run, resumed, or found finished in `out`.
    SystemExit if the folder holds a run of other settings."""
    made = read_json(out / "run.json")
    if made and not same_recipe(made["settings"], flags):
        sys.exit(f"error: {out} holds a run of other settings; move it away")
    if made.get("status") != "done":
        run(f"train.py {flags} --out {out} {'--resume' if made else ''}")
    return read_json(out / "run.json")


def retheta(
    original: str, out: Path, theta: float, window: int, scaling: dict | None = None
) -> None:
    """The untrained row: the weights of `original` under another theta (and scaling of RoPE), for
    another window."""
    if not (out / "config.json").is_file():
        model = load_pretrained(original)
        model.config = model.config.with_rope(theta, window, scaling)
        save_pretrained(model, out, tokenizer_from=original)


def settings_of(flags: str) -> dict:
    """All settings that train.py, as it is now, makes of these flags."""
    return train.as_kept(*resolved(flags.split()))


def resolved(flags: list[str]) -> tuple[train.Settings, train.RunOptions]:
    given, options = train.parse(flags)
    config = LlamaConfig.from_dir(given["model"])
    return train.resolve(given, config, machine(HERE, "cpu", options.out)), options


def copy_record(run: Path, to: Path) -> None:
    """Copy run.json, with paths relative to the repository, so that the copy names no machine."""
    to.write_text((run / "run.json").read_text().replace(f"{ROOT}/", ""))


def recipe_in(settings: dict) -> dict:
    """The settings that a result depends on, whatever the machine; paths relative to the
    repository, so that a record names no machine."""
    own = ("impactful", "model", "out", "plan", "resume", "device", "save_minutes", "no_saves")
    own += ("keep_stages", "optimizer", "keep_attention", "offload_inputs")  # change no result
    kept = {k: v for k, v in settings.items() if k not in own}
    return json.loads(json.dumps(kept).replace(f"{ROOT}/", ""))


def same_recipe(recorded: dict, flags: str) -> bool:
    """Do the flags now give the settings that were recorded? A setting that only one of the two
    versions of train.py knows is not compared."""
    now, then = recipe_in(settings_of(flags)), recipe_in(recorded)
    return all(now[k] == then[k] for k in now.keys() & then.keys())


# ---- what was measured of a model ----


def by_text(results: list[dict], field: str = "score") -> dict[str, list[list[float]]]:
    """length -> a list for each text: `field` of each of its answers."""
    found: dict[str, dict[int, list[float]]] = {}
    for r in results:
        if r["task"] != "loss":
            found.setdefault(str(r["length"]), {}).setdefault(r["repeat"], []).append(r[field])
    return {length: [texts[i] for i in sorted(texts)] for length, texts in found.items()}


def measured(results: list[dict]) -> dict:
    """The answers of one model: hits (1: the whole answer was found) and nats (the log-probability
    of the right answer)."""
    return {"scores": by_text(results), "nats": by_text(results, "answer_logprob")}


def texts_of(seeds: dict, length: int | str, field: str = "scores") -> list[list[float]]:
    """The texts of all seeds of a row; none of a seed that has no such field."""
    rows = [one[field] for one in seeds.values() if field in one]
    return [text for row in rows for text in row[str(length)]]


def lead(ours: dict, other: dict, length: int, field: str = "scores") -> dict:
    """By how much `ours` is above `other` (seed -> row, both) on the same texts: mean of the
    differences, text by text, in the seeds that both have, and its 95 % interval (Student's t for n
    texts); and the mean of each seed, as what training owes to chance is in no interval."""
    by_seed = []
    for seed in sorted(ours.keys() & other.keys()):
        pairs = zip(*(row[seed][field][str(length)] for row in (ours, other)), strict=True)
        by_seed.append([statistics.mean(a) - statistics.mean(b) for a, b in pairs])
    gains = [gain for one in by_seed for gain in one]
    found = paired(gains)
    return {
        "mean": found["mean"],
        "interval_95": tuple(found["interval_95"]),
        "n": found["texts"],
        "by_seed": [statistics.mean(one) for one in by_seed],
    }


def gain(found: dict | None, scale: float, how: str) -> str:
    """A lead and its interval, in percentage points (scale 100) or nats; empty for None.

    >>> gain({"mean": 0.25, "interval_95": (0.125, 0.375)}, 100, "+.1f")
    '+25.0 (+12.5 to +37.5)'
    """
    if found is None:
        return ""
    mean, low, high = (format(scale * x, how) for x in (found["mean"], *found["interval_95"]))
    return f"{mean} ({low} to {high})"


# ---- rows of models ----

WORDS = {  # how a recorded row or label is shown in tables and figures, in their order
    "none": "plain positions",
    "pose": "PoSE",
    "rpes": "random positions",
    "endprompt": "EndPrompt",
    "cream": "CREAM",
    "longrecipe": "LongRecipe",
    "extended": "LongRecipe, after extend",
    "replayed": "LongRecipe, after replay",
    "prefix": "LongRecipe with prefix",
    "full": "full length",
    "yarn": "LongRecipe with yarn",
}


def in_words(name: str) -> str:
    """A row of a study; the recorded files say "base" for theta.

    >>> in_words("untrained, old base"), in_words("none, paper's base")
    ('original', "plain positions, paper's theta")
    """
    first, comma, theta = name.partition(", ")
    shown = f"{WORDS.get(first, first)}{comma}{theta.replace('base', 'theta')}"
    return "original" if shown == "untrained, old theta" else shown


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of a study in one JSON file: runs[name][seed of the training] = what was measured;
    beside it what is the same for all rows. Lengths: the old window and the target, tokens."""

    file: Path
    lengths: tuple[int, int]
    names: list[str]  # in the order in which they are shown

    def read(self) -> dict:
        return read_json(self.file) or {"runs": {}}

    def row(self, name: str, seed: int) -> dict:
        """{} where there is none."""
        return self.read()["runs"].get(name, {}).get(str(seed), {})

    def keep(self, name: str, seed: int, row: dict, **about) -> None:
        """Add a row, or replace it. Read again first: another process may have added rows."""
        found = self.read()
        found["runs"].setdefault(name, {})[str(seed)] = row
        found |= about
        found |= {k: provenance(0)[k] for k in ("torch", "python", "hardware", "threads")}
        write_json(self.file, found)

    def shown(self) -> list[str]:
        runs = self.read()["runs"]
        return [name for name in self.names if name in runs]

    def best_first(self, runs: dict) -> list[str]:
        """Names of rows that are there, for each theta those first that find most at the target."""
        names = [name for name in self.names if name in runs]
        thetas = list(dict.fromkeys(name.partition(",")[2] for name in names))

        def place(name: str) -> tuple[int, float]:
            found = mean_of(texts_of(runs[name], self.lengths[1]))
            return thetas.index(name.partition(",")[2]), -found

        return sorted(names, key=place)

    def report(self, names: list[str] | None = None) -> None:
        """Print a line for each row: means over the seeds, intervals over whole texts (clustered).
        Last columns: longrecipe under the same theta minus this row, on the same texts."""
        runs = self.read()["runs"]
        head = "".join(f"{f'found at {n:,}':>20}{'nats':>8}" for n in self.lengths)
        print(f"{'':30}{'seeds':>6}{'minutes':>9}{head}{'longrecipe leads, %':>24}{'nats':>24}")
        for name in names or self.shown():
            seeds = runs[name]
            minutes = sum(one.get("seconds", 0) for one in seeds.values()) / len(seeds) / 60
            line = f"{in_words(name):30}{len(seeds):>6}{minutes:>9.1f}"
            for length in map(str, self.lengths):
                low, high = clustered(texts := texts_of(seeds, length))
                line += f"{mean_of(texts):.1%} [{low:.0%},{high:.0%}]".rjust(20)
                nats = texts_of(seeds, length, "nats")
                line += f"{mean_of(nats):8.2f}" if nats else " " * 8
            line += gain(self.lead_over(name), 100, "+.3g").rjust(24)
            print(line + gain(self.lead_over(name, "nats"), 1, "+.3g").rjust(24))

    def lead_over(self, name: str, field: str = "scores") -> dict | None:
        """By how much longrecipe under the same theta is above a row at the target: `lead` in the
        seeds where both have the field; None if there is no such seed."""
        runs = self.read()["runs"]
        ours, other = (
            {seed: row for seed, row in runs.get(who, {}).items() if field in row}
            for who in (self.reference(name), name)
        )
        if name == self.reference(name) or not ours.keys() & other.keys():
            return None
        return lead(ours, other, self.lengths[1], field)

    @staticmethod
    def reference(name: str) -> str:
        """The row that another is compared with, and whose analysis it takes: longrecipe under the
        same theta.

        >>> Table.reference("pose, paper's theta")
        "longrecipe, paper's theta"
        """
        return "longrecipe" + "".join(name.partition(",")[1:])

    def draw(self, title: str) -> None:
        """Share found at both lengths: mean of the seeds, 95 % interval, and a bar each seed."""
        from matplotlib.figure import Figure

        runs, names = self.read()["runs"], self.shown()[::-1]  # the first on top
        figure = Figure(figsize=(9, 1.3 + 0.27 * len(names)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axis, length in zip(panels, self.lengths, strict=True):
            for y, name in enumerate(names):
                texts = texts_of(runs[name], length)
                mean, (low, high) = mean_of(texts), clustered(texts)
                colour = "tab:orange" if name == "longrecipe" else "tab:blue"
                axis.plot((100 * low, 100 * high), (y, y), color=colour)
                axis.plot(100 * mean, y, "o", color=colour)
                each = [100 * mean_of(one["scores"][str(length)]) for one in runs[name].values()]
                axis.plot(each, [y] * len(each), "k|", markersize=7)
            axis.set(xlim=(-2, 102), xlabel=f"answers found at {length:,} tokens, %")
            axis.grid(axis="x", alpha=0.3)
        answers = {name: sum(map(len, texts_of(runs[name], self.lengths[1]))) for name in names}
        labels = [f"{in_words(name)} ({answers[name]})" for name in names]
        panels[0].set_yticks(range(len(names)), labels, fontsize=8)
        notes = "mean and 95 % interval; bars: each seed; (n answers)"
        figure.suptitle(f"{title}: {notes}", fontsize=9)
        figure.savefig(self.file.with_suffix(".png"), dpi=120)


def file_name(name: str, seed: int) -> str:
    """Of a row's model.

    >>> file_name("none, paper's theta", 1)
    'none__paper_s_theta_1'
    """
    return f"{''.join(c if c.isalnum() else '_' for c in name)}_{seed}"


def check_rows(names: Iterable[str], known: Collection[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise BadInput(f"{unknown[0]!r} is none of the rows: {'; '.join(known)}")


def make_rows(
    table: Table,
    rows: list[tuple[str, int]],
    is_done: Callable,
    measure: Callable,
    args,
    title: str,
    **about,
) -> None:
    """Measure the rows (name, seed) that are not there yet, and keep each at once.

    is_done(row, name, seed, args): may what the table holds stay? measure(name, seed, args) -> row.
    args.minutes: no row begins that would end later if it took as long as the longest before it."""
    began, longest = time.monotonic(), 0.0
    minutes = getattr(args, "minutes", None)
    for name, seed in rows:
        if is_done(table.row(name, seed), name, seed, args):
            continue
        started = time.monotonic()
        if minutes is not None and started - began + longest > 60 * minutes:
            log(f"--minutes {minutes:g}: stopped before {name}, seed {seed}")
            return
        table.keep(name, seed, measure(name, seed, args), **about)
        table.draw(title)
        longest = max(longest, time.monotonic() - started)
