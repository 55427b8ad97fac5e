"""What an evaluation leaves behind: tables in the terminal, needle_results.json, figures."""

import dataclasses
import json
from pathlib import Path

from support.needles.figures import draw_curves, draw_heatmap
from support.needles.settings import NEEDLE_ALONE, NO_NEEDLES
from support.needles.summary import gains, summarise, versus
from support.system.console import log, provenance
from support.system.whole_files import write_atomically

REMARKS = {
    "each": "several needles in one text, a question and an answer for each;\n"
    "harder than one needle per text, as the others can be taken for it",
    "NIAH(M)": "the mean of multikey, multivalue and multiquery",
}
NEEDLE_BLOCKS = {  # heading -> the cell of an entry
    "found, 95 % interval; n answers": "{mean:.0%} "
    "[{interval_95[0]:.0%},{interval_95[1]:.0%}] n={n}",
    "log-probability of an answer, nats": "{nats:.2f}",
}
LOSS_BLOCKS = {"nats per token; number of texts": "{mean:.3f} ({n})"}


def print_table(table: list[dict], tasks: dict, candidates: list) -> None:
    """Models down, lengths across; for each task a block of shares found and one of nats."""
    lengths = sorted({e["length"] for e in table})
    wide = max(len(c.label) for c in candidates) + 2
    for task in dict.fromkeys(e["task"] for e in table):
        ask = tasks[task].ask if task in tasks else task
        name = f"{task}, each in turn" if ask == "each" else task  # else multiquery asks for all
        if ask in REMARKS:
            print(f"\n{name}: {REMARKS[ask]}", end="")
        for heading, cell in (LOSS_BLOCKS if task == "loss" else NEEDLE_BLOCKS).items():
            print(f"\n{name} ({heading})")
            print(f"{'':{wide}}{'theta':>12}{'window':>9}" + "".join(f"{n:>24,}" for n in lengths))
            for c in candidates:
                own = {e["length"]: e for e in table if (e["model"], e["task"]) == (c.label, task)}
                line = f"{c.label:{wide}}{c.config.rope_theta:>12,.0f}{c.window:>9,}"
                cells = [cell.format(**own[n]) if n in own else "-" for n in lengths]
                if own:
                    print(line + "".join(f"{text:>24}" for text in cells))


def print_pairs(pairs: list[dict]) -> None:
    """One line for each pair of models, task, length and measure."""
    if pairs:
        print("\non the same prompts, mean difference per text [95 % interval, Student's t]")
    for e in pairs:
        print(f"{e['task']} at {e['length']:,}: {e['model']} against {e['against']}")
        print(f"    found {verdict(e['found'], 100, ' points')}")
        print(f"    nats  {verdict(e['nats'])}")


def print_gains(table: list[dict], whole: str) -> None:
    """What the needles add to the log-probability of an answer: see summary.gain."""
    for e in (e for e in table if e["model"] == whole):
        line = f"{e['task']} at {e['length']:,}: with its needles {whole} gains, nats an answer: "
        line += verdict(e).partition(":")[0]
        if "share_of_short_text" in e:
            line += f"; {e['share_of_short_text']:.0%} of the gain in a short text"
        print(line)


def verdict(found: dict, scale: float = 1.0, unit: str = "") -> str:
    """A result of intervals.paired in words.

    >>> verdict({"mean": 0.25, "interval_95": [-0.1, 0.6], "texts": 4, "texts_needed": 9,
    ...          "verdict": "not told apart"}, 100, " points")
    '+25.0 points [-10.0, +60.0], 4 texts: not told apart (about 9 texts would)'
    """
    digits = 1 if unit else 2
    line = f"{scale * found['mean']:+.{digits}f}{unit}"
    if found["interval_95"] is None:
        return f"{line}, 1 text: not told apart (--n 2 or more)"
    low, high = (f"{scale * end:+.{digits}f}" for end in found["interval_95"])
    line += f" [{low}, {high}], {found['texts']} texts: {found['verdict']}"
    if found["verdict"] == "not told apart" and found["texts_needed"]:
        line += f" (about {found['texts_needed']} texts would)"
    return line


def warn(needles: list[dict], tasks: dict) -> None:
    """Log what makes the numbers doubtful."""
    if found := [r["output"] for r in needles if r["model"] == NO_NEEDLES and r["score"] > 0]:
        log(f"warning: {len(found)} answers without a needle are right, e.g. {found[0]!r}")
    placed = [r for r in needles if r["model"] not in (NO_NEEDLES, NEEDLE_ALONE)]
    placed = [r for r in placed if tasks[r["task"]].ask != "each"]
    off = max((abs(r["true_depth"] - r["depth"]) for r in placed), default=0)
    if off > 0.05:
        where = "few sentences end there (true_depth in needle.jsonl says where it is)"
        log(f"warning: a needle is {off:.0%} of the text before its depth: {where}")


def write_report(
    results: list[dict], candidates: list, tasks: dict, source: str, settings, started: float
) -> None:
    """results: of this run and of earlier ones of the same setup (Results.add_earlier)."""
    models = {c.label: c for c in candidates if c.control is None}
    own = next(label for label, c in models.items() if c.folder == settings.model)
    shown = [r for r in results if r["model"] in models]
    needles = [r for r in results if r["task"] != "loss"]
    cells = summarise(needles, ("model", "task", "length", "depth"))
    summary = {
        "settings": dataclasses.asdict(settings),
        "haystack": source,
        "models": {
            label: {
                "folder": c.folder,
                "rope_theta": c.config.rope_theta,
                "rope_scaling": c.config.rope_scaling,
                "window": c.window,
            }
            for label, c in models.items()
        },
        "table": summarise(results),
        "pairs": versus(shown, own),
        "gains": gains(needles, own, NO_NEEDLES, NEEDLE_ALONE),
        "overall": summarise(needles, ("model", "task")),
        "cells": cells,
        "seconds_of_all_results": round(sum(r["seconds"] for r in results), 1),
        **provenance(started),
    }
    print_table(summary["table"], tasks, candidates)
    print_pairs(summary["pairs"])
    print_gains(summary["gains"], own)
    warn(needles, tasks)
    out = Path(settings.out)
    write_atomically(out / "needle_results.json", json.dumps(summary, indent=2) + "\n")
    windows = {label: c.trained_window for label, c in models.items()}
    measured = {r["task"] for r in shown}
    # a task without needles has no depth to draw
    drawn = [task for task in tasks if task in measured and tasks[task].needles]
    for task in drawn:
        end = ".png" if len(drawn) == 1 else f"_{task}.png"
        parts = tasks[task].needles if tasks[task].ask == "each" else 0
        of_task = [e for e in cells if e["task"] == task and e["model"] in models]
        draw_heatmap(out / f"needle{end}", of_task, windows, parts)
        draw_heatmap(out / f"nats{end}", of_task, windows, parts, in_nats=True)
        draw_curves(out / f"curves{end}", shown, task)
        log(f"figures: {out / f'needle{end}'}, nats{end} and curves{end}")
