"""Shared by the studies: running commands, making each model once, keeping a row as soon as it is
measured, and the table and figure of the rows.

Importing this file lets a study import the repository's own files and tests/helpers.
"""

import abc
import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning on shared cores costs 6-17x
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import train  # noqa: E402
from model import LlamaConfig, load_pretrained, save_pretrained  # noqa: E402
from recipe import ntk_rope_base  # noqa: E402
from support.huggingface.config import yarn_scaling  # noqa: E402
from support.memory.machine import HERE, machine  # noqa: E402
from support.needles.intervals import clustered, mean_of, paired  # noqa: E402
from support.system.bad_input import BadInput  # noqa: E402
from support.system.console import log, provenance  # noqa: E402
from support.system.whole_files import write_atomically  # noqa: E402

RESULTS = ROOT / "assets" / "results"
WINDOW = 8192  # of every model that a study starts from, tokens


# ---- commands and files ----


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


# ---- trainings ----


def resolved(flags: list[str]) -> tuple[train.Settings, train.RunOptions]:
    """What train.py, as it is now, makes of these flags."""
    given, options = train.parse(flags)
    config = LlamaConfig.from_dir(given["model"])
    return train.resolve(given, config, machine(HERE, "cpu", options.out)), options


def settings_of(flags: str) -> dict:
    return train.as_kept(*resolved(flags.split()))


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


def train_into(out: Path, flags: str) -> dict:
    """run.json of train.py with these flags, which is run, resumed, or found finished in `out`.
    SystemExit if the folder holds a run of other settings."""
    made = read_json(out / "run.json")
    if made and not same_recipe(made["settings"], flags):
        sys.exit(f"error: {out} holds a run of other settings; move it away")
    if made.get("status") != "done":
        run(f"train.py {flags} --out {out} {'--resume' if made else ''}")
    return read_json(out / "run.json")


# ---- what was measured of a model ----


def measured(results: list[dict]) -> dict:
    """The answers of one model: "scores" (1: the whole answer was found) and "nats" (the
    log-probability of the right answer), each as length -> a list for each text."""
    found: dict[str, dict] = {"scores": {}, "nats": {}}
    answers = [r for r in results if r["task"] != "loss"]
    for r in sorted(answers, key=lambda r: r["repeat"]):
        for name, value in (("scores", r["score"]), ("nats", r["answer_logprob"])):
            texts = found[name].setdefault(str(r["length"]), {})
            texts.setdefault(r["repeat"], []).append(value)
    for lengths in found.values():
        lengths |= {length: list(texts.values()) for length, texts in lengths.items()}
    return found


def texts_of(seeds: dict, length: int | str, field: str = "scores") -> list[list[float]]:
    """The texts of all seeds of a row; none of a seed that has no such field."""
    rows = [one[field] for one in seeds.values() if field in one]
    return [text for row in rows for text in row[str(length)]]


def cell(seeds: dict, length: int) -> dict:
    """Share of answers found in all texts of all seeds, its 95 % interval over whole texts, and n,
    the number of answers."""
    texts = texts_of(seeds, length)
    n = sum(map(len, texts))
    return {"mean": mean_of(texts), "interval_95": clustered(texts), "n": n}


def share(e: dict | None, n: int | None = None) -> str:
    """A cell in words; with its number of answers where that is not n.

    >>> share({"mean": 0.5, "interval_95": (0.25, 0.75), "n": 8}, n=16)
    '50 % (25-75), n = 8'
    """
    if e is None:
        return "not run"
    low, high = e["interval_95"]
    told = f"{100 * e['mean']:.0f} % ({100 * low:.0f}-{100 * high:.0f})"
    return told if n in (None, e["n"]) else f"{told}, n = {e['n']}"


def lead(ours: dict, other: dict, length: int, field: str = "scores") -> dict | None:
    """By how much `ours` is above `other` (seed -> row, both) on the same texts: `paired` of the
    differences, text by text, in the seeds where both have the field (None: there is no such seed);
    and the mean of each seed, because an interval over texts holds no luck of the training."""
    by_seed = []
    for seed in sorted(ours.keys() & other.keys()):
        if field in ours[seed] and field in other[seed]:
            pairs = zip(*(row[seed][field][str(length)] for row in (ours, other)), strict=True)
            by_seed.append([statistics.mean(a) - statistics.mean(b) for a, b in pairs])
    if not by_seed:
        return None
    found = paired([gain for one in by_seed for gain in one])
    return found | {"by_seed": [statistics.mean(one) for one in by_seed]}


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


def reference(name: str) -> str:
    """The row that another is compared with, and whose analysis it takes: longrecipe under the same
    theta.

    >>> reference("pose, paper's theta")
    "longrecipe, paper's theta"
    """
    return "longrecipe" + "".join(name.partition(",")[1:])


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of a study in one JSON file: runs[name][seed of the training] = what was measured;
    beside it what is the same for all rows."""

    file: Path
    target: int  # the new window, tokens
    names: list[str]  # in the order in which the figure shows them

    def read(self) -> dict:
        return read_json(self.file) or {"runs": {}}

    def row(self, name: str, seed: int) -> dict:
        """{} where there is none."""
        return self.read()["runs"].get(name, {}).get(str(seed), {})

    def keep(self, name: str, seed: int, row: dict, **about) -> None:
        """Add a row, or replace it. Read again first: another process may have added rows."""
        found = self.read()
        found["runs"].setdefault(name, {})[str(seed)] = row
        found |= about | {k: provenance(0)[k] for k in ("torch", "python", "hardware", "threads")}
        write_json(self.file, found)

    def shown(self) -> list[str]:
        """The names of the rows that are there."""
        runs = self.read()["runs"]
        return [name for name in self.names if name in runs]

    def lead_over(self, name: str, field: str = "scores") -> dict | None:
        """By how much longrecipe under the same theta is above a row at the target."""
        runs, ours = self.read()["runs"], reference(name)
        if name == ours:
            return None
        return lead(runs.get(ours, {}), runs[name], self.target, field)

    def cells(self) -> list[dict[str, str]]:
        """For each row: column -> cell, empty where that was not measured. For each theta those
        rows come first that find most at the target."""
        runs, names = self.read()["runs"], self.shown()
        thetas = [name.partition(",")[2] for name in names]

        def place(name: str) -> tuple[int, float]:
            found = mean_of(texts_of(runs[name], self.target))
            return thetas.index(name.partition(",")[2]), -found

        return [self.cells_of(name, runs) for name in sorted(names, key=place)]

    def cells_of(self, name: str, runs: dict) -> dict[str, str]:
        seeds, original = runs[name], runs.get("untrained, old base", {})

        def mean(values: list[float], how: str) -> str:
            return format(statistics.mean(values), how) if values else ""

        kept, pairs = (
            mean([100 * row[key] for row in seeds.values() if key in row], ".0f")
            for key in ("questions_kept", "their_pair_kept")
        )
        losses = [
            statistics.mean(row["losses"]) - statistics.mean(original[seed]["losses"])
            for seed, row in seeds.items()
            if row.get("losses") and original.get(seed, {}).get("losses")
        ]
        row = {"setting": in_words(name)}
        row["steps"] = str(next(iter(seeds.values())).get("recipe", {}).get("steps", ""))
        row["questions kept, %"] = kept
        row["with their pair, %"] = "" if kept == "0" else pairs  # a pair needs a question
        row["loss above the original's"] = mean(losses, "+.3f")
        for length in (WINDOW, self.target):
            row[f"at {length:,}"] = share(cell(seeds, length))
            found = texts_of(seeds, length, "nats")
            row[f"nats at {length:,}"] = f"{mean_of(found):.2f}" if found else ""
        each = [mean_of(texts_of({s: seeds[s]}, self.target)) for s in sorted(seeds)]
        row["by seed"] = ", ".join(f"{100 * found:.0f}" for found in each)
        row["LongRecipe above it by"] = gain(self.lead_over(name), 100, "+.0f")
        row["in nats"] = gain(self.lead_over(name, "nats"), 1, "+.2f")
        return row

    def report(self) -> None:
        """Print the cells, in columns."""
        cells = self.cells()
        lines = [list(cells[0]), *(list(row.values()) for row in cells)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(map(str.ljust, line, widths)).rstrip())

    def draw(self, title: str) -> None:
        """Share found at both lengths: mean of the seeds, 95 % interval, and a bar each seed."""
        from matplotlib.figure import Figure

        runs, names = self.read()["runs"], self.shown()[::-1]  # the first on top
        figure = Figure(figsize=(9, 1.3 + 0.27 * len(names)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axis, length in zip(panels, (WINDOW, self.target), strict=True):
            found = {name: cell(runs[name], length) for name in names}
            for y, (name, e) in enumerate(found.items()):
                colour = "tab:orange" if name == "longrecipe" else "tab:blue"
                axis.plot([100 * x for x in e["interval_95"]], (y, y), color=colour)
                axis.plot(100 * e["mean"], y, "o", color=colour)
                each = [100 * mean_of(one["scores"][str(length)]) for one in runs[name].values()]
                axis.plot(each, [y] * len(each), "k|", markersize=7)
            axis.set(xlim=(-2, 102), xlabel=f"answers found at {length:,} tokens, %")
            axis.grid(axis="x", alpha=0.3)
        labels = [f"{in_words(name)} ({e['n']})" for name, e in found.items()]
        panels[0].set_yticks(range(len(names)), labels, fontsize=8)
        notes = "mean and 95 % interval; bars: each seed; (n answers)"
        figure.suptitle(f"{title}: {notes}", fontsize=9)
        figure.savefig(self.file.with_suffix(".png"), dpi=120)


# ---- a study ----


def parser(doc: str, target: int, seeds: list[int]) -> argparse.ArgumentParser:
    """With the flags that all studies have, and these defaults."""
    p = argparse.ArgumentParser(description=doc.split("\n")[0])
    p.add_argument("--target", type=int, default=target, help="window to reach, tokens")
    p.add_argument("--only", nargs="+", metavar="ROW", help="these rows, in this order")
    p.add_argument("--seeds", type=int, nargs="+", default=seeds, help="of the training")
    p.add_argument("--minutes", type=float, help="begin no row that may end after so many")
    p.add_argument("--again", action="store_true", help="also rows that have no nats yet")
    p.add_argument("--report", action="store_true", help="only the table of what is there")
    return p


class Study(abc.ABC):
    """Makes the model of each row, has it judged, and keeps the row. What differs between studies
    is left to them: which rows are not trained, the flags of the others, and the judge.

    args: the flags of `parser`, the `model` to start from, the folder `out` of the models made, and
    the number of `texts` that they are judged by at each length."""

    def __init__(self, args: argparse.Namespace, table: Table):
        self.args, self.table = args, table

    @abc.abstractmethod
    def flags_of(self, name: str, seed: int) -> str | None:
        """All flags that train.py is given for a row, but for --out and --resume. None: the row is
        not trained, only its theta is changed."""

    @abc.abstractmethod
    def judge(self, name: str, seed: int) -> list[dict]:
        """The results (lines of needle.jsonl) of the row's model."""

    def folder(self, name: str, seed: int) -> Path:
        """Of the row's model, as in DIR/none__paper_s_theta_1."""
        return self.args.out / f"{''.join(c if c.isalnum() else '_' for c in name)}_{seed}"

    def theta_of(self, name: str) -> float:
        """The original's x T* / L0, unless the name of the row says another."""
        config, target = LlamaConfig.from_dir(self.args.model), self.args.target
        method, _, theta = name.partition(", ")
        if "paper's" in theta:
            return ntk_rope_base(config.rope_theta, config.head_dim, WINDOW, target)
        stays = "yarn" in method or method == "original" or theta == "old base"
        return config.rope_theta * (1 if stays else target / WINDOW)

    def types_of(self, name: str, seed: int) -> Path:
        """impactful.json of `reference`, from its row if the run is gone."""
        file = self.folder(reference(name), seed) / "impactful.json"
        kept = self.table.row(reference(name), seed).get("impactful")
        if kept and not file.is_file():
            file = file.parent.with_suffix(".json")
            write_json(file, kept)
        return file

    def make_model(self, name: str, seed: int) -> dict:
        """Train the model of a row, or only give the original another theta; what that took."""
        out, flags = self.folder(name, seed), self.flags_of(name, seed)
        if flags is None:
            theta, target = self.theta_of(name), self.args.target
            window = WINDOW if name == "original" else target
            scaling = yarn_scaling(WINDOW, target) if "yarn" in name else None
            if not (out / "config.json").is_file():
                model = load_pretrained(self.args.model)
                model.config = model.config.with_rope(theta, window, scaling)
                save_pretrained(model, out, tokenizer_from=self.args.model)
            return {"rope_theta": theta, "seconds": 0}
        if "--impactful" in flags and not self.types_of(name, seed).is_file():
            self.make_model(reference(name), seed)
        made = train_into(out, flags)
        row = {"flags": flags, "recipe": recipe_in(made["settings"])}
        if name == reference(name):
            row["impactful"] = read_json(out / "impactful.json")
        return row | {k: made[k] for k in ("seconds", "peak_GiB", "commit", "hardware", "threads")}

    def is_done(self, row: dict, name: str, seed: int) -> bool:
        """Does the row hold as many texts as are asked for now, from a training with the settings
        of now? Rows of an older version have no nats; they get them when --again makes them."""
        texts = row.get("scores", {}).get(str(self.args.target), [])
        if len(texts) != self.args.texts or (self.args.again and "nats" not in row):
            return False
        return "recipe" not in row or same_recipe(row["recipe"], self.flags_of(name, seed))

    def measure(self, name: str, seed: int) -> dict:
        row, results = self.make_model(name, seed), self.judge(name, seed)
        losses = [r["score"] for r in results if r["task"] == "loss" and r["length"] == WINDOW]
        return row | measured(results) | {"losses": losses}

    def make_rows(self, rows: list[tuple[str, int]], title: str, **about) -> None:
        """Measure the rows (name, seed) that are not there yet, and keep each at once. No row
        begins that would end after --minutes if it took as long as the longest before it."""
        began, longest, minutes = time.monotonic(), 0.0, self.args.minutes
        for name, seed in rows:
            if self.is_done(self.table.row(name, seed), name, seed):
                continue
            started = time.monotonic()
            if minutes is not None and started - began + longest > 60 * minutes:
                log(f"--minutes {minutes:g}: stopped before {name}, seed {seed}")
                return
            self.table.keep(name, seed, self.measure(name, seed), **about)
            self.table.draw(title)
            longest = max(longest, time.monotonic() - started)

    def main(self, title: str, **about) -> None:
        """Make the rows of --only (all) and --seeds, but not with --report; print and draw all rows
        that are there."""
        names = self.args.only or self.table.names
        rows = [(name, seed) for seed in self.args.seeds for name in names]
        if self.args.texts < 2:
            told = f"{self.args.texts} text(s) a length, but an interval needs two or more"
            raise BadInput(f"{told} (--n of tiny_study.py, --texts of real_study.py)")
        if unknown := [name for name in names if name not in self.table.names]:
            raise BadInput(f"{unknown[0]!r} is none of the rows: {'; '.join(self.table.names)}")
        if not self.args.report:
            self.make_rows(rows, title, **about)
        if self.table.shown():
            self.table.report()
            self.table.draw(title)
        there = sum(bool(self.table.row(*row)) for row in rows)
        log(f"{there} of {len(rows)} rows: {self.table.file}")
