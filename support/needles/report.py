"""What an evaluation leaves behind: tables in the terminal, needle_results.json, figures."""

import dataclasses
import json
from pathlib import Path

from support.needles.figures import draw_curves, draw_heatmap
from support.needles.settings import NEEDLE_ALONE, NO_NEEDLES
from support.needles.summary import gains, summarise, versus
from support.system.console import log, provenance
from support.system.whole_files import write_atomically

CONTROLS = (NO_NEEDLES, NEEDLE_ALONE)
REMARKS = {
    "each": "several needles in one text, a question and an answer for each;\n"
    "harder than one needle per text, as the others can be taken for it",
    "NIAH(M)": "the mean of multikey, multivalue and multiquery",
}


def print_table(table: list[dict], tasks: dict, candidates: list) -> None:
    """Models down, lengths across; for each task a block of shares found and one of nats."""
    lengths = sorted({e["length"] for e in table})
    wide = max(len(c.label) for c in candidates) + 2
    for task in dict.fromkeys(e["task"] for e in table):
        ask = tasks[task].ask if task in tasks else task
        name = f"{task}, each in turn" if ask == "each" else task  # else multiquery asks for all
        if ask in REMARKS:
            print(f"\n{name}: {REMARKS[ask]}", end="")
        blocks = NEEDLE_BLOCKS if task != "loss" else {"nats per token": loss_cell}
        for unit, cell in blocks.items():
            print(f"\n{name} ({unit})")
            print(f"{'':{wide}}{'theta':>12}{'window':>9}" + "".join(f"{n:>24,}" for n in lengths))
            for c in candidates:
                own = {e["length"]: e for e in table if (e["model"], e["task"]) == (c.label, task)}
                line = f"{c.label:{wide}}{c.config.rope_theta:>12,.0f}{c.window:>9,}"
                cells = [cell(own[n]) if n in own else "-" for n in lengths]
                if own:
                    print(line + "".join(f"{text:>24}" for text in cells))


def found_cell(entry: dict) -> str:
    low, high = entry["interval_95"]
    return f"{entry['mean']:.0%} [{low:.0%},{high:.0%}] n={entry['n']}"


def nats_cell(entry: dict) -> str:
    return f"{entry['nats']:.2f}"


def loss_cell(entry: dict) -> str:
    return f"{entry['mean']:.3f} (n={entry['n']})"


NEEDLE_BLOCKS = {
    "found, 95 % interval; n answers": found_cell,
    "log-probability of an answer, nats": nats_cell,
}


def print_pairs(pairs: list[dict]) -> None:
    """One line for each pair of models, task, length and measure."""
    if pairs:
        print("\non the same prompts, mean difference per text [95 % interval, Student's t]")
    for e in pairs:
        print(f"{e['task']} at {e['length']:,}: {e['model']} against {e['against']}")
        print(f"    found {verdict(e['found'], 100, ' points')}")
        print(f"    nats  {verdict(e['nats'])}")


def print_gains(table: list[dict], whole: str) -> None:
    """Print what the needles add to the log-probability of an answer: see summary.gain."""
    for e in (e for e in table if e["model"] == whole):
        line = f"{e['task']} at {e['length']:,}: with its needles {whole} gains, nats an answer: "
        share = e.get("share_of_short_text")
        line += verdict(e).partition(":")[0]
        print(line + (f"; {share:.0%} of the gain in a short text" if share is not None else ""))


def verdict(found: dict, scale: float = 1.0, unit: str = "") -> str:
    """A result of intervals.paired in words.

    >>> verdict({"mean": 0.25, "interval_95": [-0.1, 0.6], "texts": 4, "texts_needed": 9,
    ...          "verdict": "not told apart"}, 100, " points")
    '+25.0 points [-10.0, +60.0], 4 texts: not told apart (about 9 texts would)'
    """
    line = f"{scale * found['mean']:+.{1 if unit else 2}f}{unit}"
    if found["interval_95"] is None:
        return f"{line}, 1 text: not told apart (--n 2 or more)"
    low, high = (f"{scale * end:+.{1 if unit else 2}f}" for end in found["interval_95"])
    line += f" [{low}, {high}], {found['texts']} texts: {found['verdict']}"
    if found["verdict"] == "not told apart" and found["texts_needed"]:
        line += f" (about {found['texts_needed']} texts would)"
    return line


def warn(results: list[dict], tasks: dict) -> None:
    """Log what makes the numbers doubtful."""
    found = [r for r in results if r["model"] == NO_NEEDLES and r["score"] > 0]
    if any(r["task"] in tasks for r in found):
        log(
            f"warning: {len(found)} answers without a needle are right, e.g. {found[0]['output']!r}"
        )
    off = [
        abs(r["true_depth"] - r["depth"])
        for r in results
        if r["task"] in tasks and tasks[r["task"]].ask != "each" and r["model"] not in CONTROLS
    ]
    if off and max(off) > 0.05:
        log(f"warning: a needle is {max(off):.0%} of the text before its depth: the haystack")
        log("has few sentence ends (. ! ?) there; true_depth in needle.jsonl tells where")


def write_report(
    results: list[dict], candidates: list, tasks: dict, source: str, settings, started: float
) -> None:
    """results: of this run and of earlier ones of the same setup (Results.of_setup)."""
    out, own = Path(settings.out), next(c.label for c in candidates if c.folder == settings.model)
    models = [c for c in candidates if c.control is None]
    labels = {c.label for c in models}
    shown = [r for r in results if r["model"] in labels]
    needles = [r for r in results if r["task"] != "loss"]
    table, pairs = summarise(results), versus(shown, own)
    gained = gains(needles, own, *CONTROLS)
    print_table(table, tasks, candidates)
    print_pairs(pairs)
    print_gains(gained, own)
    warn(results, tasks)
    summary = {
        "settings": dataclasses.asdict(settings),
        "haystack": source,
        "models": {c.label: c.described() for c in models},
        "table": table,
        "pairs": pairs,
        "gains": gained,
        "overall": summarise(needles, ("model", "task")),
        "cells": summarise(needles, ("model", "task", "length", "depth")),
        "seconds_of_all_rows": round(sum(r["seconds"] for r in results), 1),
        **provenance(started),
    }
    write_atomically(out / "needle_results.json", json.dumps(summary, indent=2) + "\n")
    trained = {c.label: c.trained_window for c in models}
    drawn = [  # a task without needles has no depth to draw
        name
        for name, task in tasks.items()
        if task.needles and any(r["task"] == name for r in shown)
    ]
    for task in drawn:
        name = "needle.png" if len(drawn) == 1 else f"needle_{task}.png"
        parts = tasks[task].needles if tasks[task].ask == "each" else 0
        draw_heatmap(out / name, shown, task, trained, parts)
        in_nats = name.replace("needle", "nats", 1)
        draw_heatmap(out / in_nats, shown, task, trained, parts, in_nats=True)
        curves = name.replace("needle", "curves", 1)
        draw_curves(out / curves, shown, task)
        log(f"figures: {out / name}, {in_nats} and {curves}")
