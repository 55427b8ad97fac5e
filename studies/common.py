"""Shared by the studies: running commands, making each model once, keeping a row as soon as it is
measured, and the table and figure of the rows.

Importing this file lets a study import the repository's own files and tests/helpers.
"""

import abc
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning on shared cores costs 6-17x
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import train  # noqa: E402
from model import LlamaConfig, load_pretrained, save_pretrained  # noqa: E402
from recipe import ntk_rope_base  # noqa: E402
from support.huggingface.config import yarn_scaling  # noqa: E402
from support.huggingface.hashes import Hashes  # noqa: E402
from support.memory.machine import HERE, machine  # noqa: E402
from support.needles.intervals import clustered, mean_of, paired  # noqa: E402
from support.needles.summary import by_text, grouped  # noqa: E402
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


def table(header: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def cells_table(rows: list[dict[str, str]]) -> str:
    """The columns in which some row has a cell."""
    if not rows:
        return "Not run yet."
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    return table(columns, ([row[column] for column in columns] for row in rows))


# ---- trainings ----


def resolved(flags: str) -> train.Settings:
    """What train.py, as it is now, makes of these flags."""
    given, options = train.parse(flags.split())
    config = LlamaConfig.from_dir(given["model"])
    return train.resolve(given, config, machine(HERE, "cpu", options.out))


def naming_no_machine(record: dict) -> dict:
    """With paths relative to the repository."""
    return json.loads(json.dumps(record).replace(f"{ROOT}/", ""))


def recipe_in(settings: dict) -> dict:
    """The settings (as a run keeps them) that a result depends on, whatever the machine."""
    own = ("impactful", "model", "out", "plan", "resume", "device", "save_minutes", "no_saves")
    own += ("keep_stages", "optimizer", "keep_attention", "offload_inputs")  # change no result
    return naming_no_machine({k: v for k, v in settings.items() if k not in own})


def recipe_of(flags: str) -> dict:
    return recipe_in(train.as_kept(resolved(flags)))


def same_recipe(recorded: dict, flags: str) -> bool:
    """Do the flags now give the settings that were recorded? A setting that only one of the two
    versions of train.py knows is not compared."""
    now, then = recipe_of(flags), recipe_in(recorded)
    return all(now[k] == then[k] for k in now.keys() & then.keys())


def train_into(out: Path, flags: str) -> dict:
    """run.json of train.py with these flags, which is run, resumed, or found finished in `out`.
    SystemExit if the folder holds a run of other settings, or of another model."""
    made, model = read_json(out / "run.json"), train.as_kept(resolved(flags))["model"]
    if made and not (same_recipe(made["settings"], flags) and made["settings"]["model"] == model):
        sys.exit(f"error: {out} holds a run of other settings; move it away")
    if made.get("status") != "done":
        run(f"train.py {flags} --out {out} {'--resume' if made else ''}")
    return read_json(out / "run.json")


# ---- what was measured of a model ----


def answers_of(model: Path, judged: Path, texts: int) -> list[dict]:
    """The results in judged/needle.jsonl of these very weights and of the first `texts` texts of
    each length. Of two results for one prompt, by two versions of a task, the newer counts."""
    identity = Hashes(judged / "needle_hashes.json").of_model(model)
    newest = {
        (r["task"], r["length"], r["repeat"], r["depth"]): r
        for r in read_lines(judged / "needle.jsonl")
        if r["identity"] == identity and r["repeat"] < texts
    }
    return list(newest.values())


def measured(results: list[dict]) -> dict:
    """The answers of one model: "scores" (1: the whole answer was found) and "nats" (the
    log-probability of the right answer), each as length -> a list for each text; and "losses"
    (nats per token) of the texts of the old window."""
    losses = [r["score"] for r in results if r["task"] == "loss" and r["length"] == WINDOW]
    answers = sorted((r for r in results if r["task"] != "loss"), key=lambda r: r["repeat"])
    found: dict[str, dict] = {"scores": {}, "nats": {}, "losses": losses}
    for (length,), rows in grouped(answers, ("length",)).items():
        found["scores"][str(length)] = by_text(rows, lambda r: r["score"])
        found["nats"][str(length)] = by_text(rows, lambda r: r["answer_logprob"])
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

    >>> in_words("untrained, old base"), in_words("none with yarn, paper's base")
    ('original', "plain positions with yarn, paper's theta")
    """
    first, comma, theta = name.partition(", ")
    method, joint, scaling = first.partition(" with ")
    shown = f"{WORDS.get(method, method)}{joint}{scaling}{comma}{theta.replace('base', 'theta')}"
    return "original" if shown == "untrained, old theta" else shown


def reference(name: str) -> str:
    """The row whose analysis another takes: longrecipe under the same theta.

    >>> reference("pose, paper's theta")
    "longrecipe, paper's theta"
    """
    return "longrecipe" + "".join(name.partition(",")[1:])


def leader(name: str) -> str:
    """The row that another is compared with: LongRecipe under the same theta and scaling of RoPE.

    >>> leader("pose, paper's theta"), leader("pose with yarn, paper's theta")
    ("longrecipe, paper's theta", "yarn, paper's theta")
    """
    ours = reference(name)
    return ours.replace("longrecipe", "yarn") if "yarn" in name else ours


class Study(abc.ABC):
    """Rows of models in one JSON file: runs[name][seed of the training] = what was measured; beside
    it what is the same for all rows. Makes the model of each row, has it judged, keeps the row, and
    shows what is there. What differs between studies is left to them.

    args: the flags of `parser`, the `model` to start from, the folder `out` of the models made, and
    the number of `texts` that they are judged by at each length."""

    names: list[str]  # of the rows, in the order in which the figure shows them

    def __init__(self, args: argparse.Namespace, file: Path, title: str):
        self.args, self.file, self.title, self.target = args, file, title, args.target

    @abc.abstractmethod
    def flags_of(self, name: str, seed: int) -> str | None:
        """All flags that train.py is given for a row, but for --out and --resume. None: the row is
        not trained, only its theta is changed."""

    @abc.abstractmethod
    def judge(self, name: str, seed: int) -> Path:
        """Judge the row's model; the folder of its needle.jsonl."""

    @abc.abstractmethod
    def about(self) -> dict:
        """What is the same for all rows."""

    # ---- the rows that are there ----

    def runs(self) -> dict:
        return read_json(self.file).get("runs", {})

    def row(self, name: str, seed: int) -> dict:
        """{} where there is none."""
        return self.runs().get(name, {}).get(str(seed), {})

    def keep(self, name: str, seed: int, row: dict) -> None:
        """Add a row, or replace it. Read again first: another process may have added rows."""
        found, made_by = read_json(self.file) or {"runs": {}}, provenance(0)
        found["runs"].setdefault(name, {})[str(seed)] = row
        found |= self.about() | {k: made_by[k] for k in ("torch", "python", "hardware", "threads")}
        write_json(self.file, found)

    def shown(self) -> list[str]:
        """The names of the rows that are there."""
        return [name for name in self.names if name in self.runs()]

    def lead_over(self, name: str, field: str = "scores") -> dict | None:
        """By how much its `leader` is above a row at the target."""
        runs, ours = self.runs(), leader(name)
        if name == ours:
            return None
        return lead(runs.get(ours, {}), runs[name], self.target, field)

    def cells(self) -> list[dict[str, str]]:
        """For each row: column -> cell, empty where that was not measured. For each theta and
        scaling of RoPE those rows come first that find most at the target."""
        runs, names = self.runs(), self.shown()
        leaders = [leader(name) for name in names]

        def place(name: str) -> tuple[int, float]:
            return leaders.index(leader(name)), -mean_of(texts_of(runs[name], self.target))

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
        each = [mean_of(seeds[seed]["scores"][str(self.target)]) for seed in sorted(seeds)]
        row["by seed"] = ", ".join(f"{100 * found:.0f}" for found in each)
        row["LongRecipe above it by"] = gain(self.lead_over(name), 100, "+.0f")
        row["in nats"] = gain(self.lead_over(name, "nats"), 1, "+.2f")
        return row

    def draw(self) -> None:
        """Share found at both lengths: mean of the seeds, 95 % interval, and a bar each seed."""
        from matplotlib.figure import Figure

        runs, names = self.runs(), self.shown()[::-1]  # the first on top
        figure = Figure(figsize=(9, 1.3 + 0.27 * len(names)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axis, length in zip(panels, (WINDOW, self.target), strict=True):
            for y, name in enumerate(names):
                e, colour = cell(runs[name], length), "tab:blue"
                if name == "longrecipe":
                    colour = "tab:orange"
                axis.plot([100 * x for x in e["interval_95"]], (y, y), color=colour)
                axis.plot(100 * e["mean"], y, "o", color=colour)
                each = [100 * mean_of(one["scores"][str(length)]) for one in runs[name].values()]
                axis.plot(each, [y] * len(each), "k|", markersize=7)
            axis.set(xlim=(-2, 102), xlabel=f"answers found at {length:,} tokens, %")
            axis.grid(axis="x", alpha=0.3)
        labels = [f"{in_words(name)} ({cell(runs[name], self.target)['n']})" for name in names]
        panels[0].set_yticks(range(len(names)), labels, fontsize=8)
        notes = "mean and 95 % interval; bars: each seed; (n answers)"
        figure.suptitle(f"{self.title}: {notes}", fontsize=9)
        figure.savefig(self.file.with_suffix(".png"), dpi=120)

    # ---- making rows ----

    def folder(self, name: str, seed: int) -> Path:
        """Of the row's model, as in DIR/none__paper_s_theta_1."""
        return self.args.out / f"{''.join(c if c.isalnum() else '_' for c in name)}_{seed}"

    def theta_of(self, name: str) -> float:
        """The original's x T* / L0, unless the name of the row says another."""
        config, (method, _, theta) = LlamaConfig.from_dir(self.args.model), name.partition(", ")
        if "paper's" in theta:
            return ntk_rope_base(config.rope_theta, config.head_dim, WINDOW, self.target)
        stays = "yarn" in method or method == "original" or theta == "old base"
        return config.rope_theta * (1 if stays else self.target / WINDOW)

    def types_of(self, name: str, seed: int) -> Path:
        """impactful.json of `reference`, from its row if the run is gone."""
        file = self.folder(reference(name), seed) / "impactful.json"
        kept = self.row(reference(name), seed).get("impactful")
        if kept and not file.is_file():
            file = file.parent.with_suffix(".json")
            write_json(file, kept)
        return file

    def make_model(self, name: str, seed: int) -> dict:
        """Train the model of a row, or only give the original another theta; what that took."""
        out, flags = self.folder(name, seed), self.flags_of(name, seed)
        if flags is None:
            theta, window = self.theta_of(name), WINDOW if name == "original" else self.target
            scaling = yarn_scaling(WINDOW, self.target) if "yarn" in name else None
            if not (out / "config.json").is_file():
                model = load_pretrained(self.args.model)
                model.config = model.config.with_rope(theta, window, scaling)
                save_pretrained(model, out, tokenizer_from=self.args.model)
            return {"rope_theta": theta, "seconds": 0}
        if "--impactful" in flags and not self.types_of(name, seed).is_file():
            self.make_model(reference(name), seed)
        made = train_into(out, flags)
        row = {"flags": flags, "recipe": recipe_in(made["settings"])}
        if "--impactful" not in flags:  # of its own analysis, if there was one
            row["impactful"] = read_json(out / "impactful.json")
        return row | {k: made[k] for k in ("seconds", "peak_GiB", "commit", "hardware", "threads")}

    def is_done(self, row: dict, name: str, seed: int) -> bool:
        """Does the row hold as many texts as are asked for now, from a training with the settings
        of now? Rows of an older version have no nats; they get them when --again makes them."""
        texts = row.get("scores", {}).get(str(self.target), [])
        if len(texts) != self.args.texts or (self.args.again and "nats" not in row):
            return False
        return "recipe" not in row or same_recipe(row["recipe"], self.flags_of(name, seed))

    def measure(self, name: str, seed: int) -> dict:
        row, model = self.make_model(name, seed), self.folder(name, seed)
        judged = self.judge(name, seed)
        return row | measured(answers_of(model, judged, self.args.texts))

    def make_rows(self, rows: list[tuple[str, int]]) -> None:
        """Measure the rows (name, seed) that are not there yet, and keep each at once. No row
        begins that would end after --minutes if it took as long as the longest before it."""
        began, longest, minutes = time.monotonic(), 0.0, self.args.minutes
        for name, seed in rows:
            if self.is_done(self.row(name, seed), name, seed):
                continue
            started = time.monotonic()
            if minutes is not None and started - began + longest > 60 * minutes:
                log(f"--minutes {minutes:g}: stopped before {name}, seed {seed}")
                return
            self.keep(name, seed, self.measure(name, seed))
            self.draw()
            longest = max(longest, time.monotonic() - started)

    def main(self) -> None:
        """Make the rows of --only (all) and --seeds, but not with --report; print and draw all rows
        that are there."""
        os.chdir(ROOT)
        names = self.args.only or self.names
        rows = [(name, seed) for seed in self.args.seeds for name in names]
        if self.args.texts < 2:
            raise BadInput(f"--texts {self.args.texts}: an interval needs two texts or more")
        if unknown := [name for name in names if name not in self.names]:
            raise BadInput(f"{unknown[0]!r} is none of the rows: {'; '.join(self.names)}")
        if not self.args.report:
            self.make_rows(rows)
        if self.shown():
            self.draw()
        print(cells_table(self.cells()))
        there = sum(bool(self.row(*row)) for row in rows)
        log(f"{there} of {len(rows)} rows: {self.file}")


def parser(doc: str, target: int, seeds: list[int], texts: int) -> argparse.ArgumentParser:
    """With the flags that all studies have, and these defaults."""
    p = argparse.ArgumentParser(description=doc.split("\n")[0])
    p.add_argument("--target", type=int, default=target, help="window to reach, tokens")
    p.add_argument("--only", nargs="+", metavar="ROW", help="these rows, in this order")
    p.add_argument("--seeds", type=int, nargs="+", default=seeds, help="of the training")
    p.add_argument("--minutes", type=float, help="begin no row that may end after so many")
    p.add_argument("--again", action="store_true", help="also rows that have no nats yet")
    p.add_argument("--report", action="store_true", help="only the table of what is there")
    p.add_argument("--texts", "--n", type=int, default=texts, help="a length, 8 questions each")
    return p
