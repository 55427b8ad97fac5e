"""What an evaluation leaves behind: the table in the terminal, needle_results.json, the figures."""

import json
from pathlib import Path

from support.needles.figures import draw_curves, draw_heatmap
from support.needles.results import summarise
from support.system.console import log, provenance
from support.system.whole_files import write_atomically

REMARKS = {
    "each": "several needles in one text, a question and an answer for each;\n"
    "harder than one needle per text, as the others can be taken for it",
    "NIAH(M)": "the mean of multikey, multivalue and multiquery",
}


def print_table(table: list[dict], tasks: dict) -> None:
    """Models down, lengths across, one block per task."""
    lengths = sorted({e["length"] for e in table})
    for task in dict.fromkeys(e["task"] for e in table):
        unit = "nats per token" if task == "loss" else "found, 95 % interval"
        ask = tasks[task].ask if task in tasks else task
        name = f"{task}, each in turn" if ask == "each" else task  # else multiquery asks for all
        if ask in REMARKS:
            print(f"\n{name}: {REMARKS[ask]}", end="")
        print(f"\n{name} ({unit})\n{'':24}" + "".join(f"{n:>24,}" for n in lengths))
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


def warn(rows: list[dict], candidates: list, tasks: dict) -> None:
    """What makes the numbers doubtful."""
    removed = {c.label for c in candidates if c.removed}
    found = [r for r in rows if r["model"] in removed and r["score"] > 0]
    if found:
        log(
            f"warning: {len(found)} answers without a needle are right, e.g. {found[0]['output']!r}"
        )
    off = [
        abs(r["true_depth"] - r["depth"])
        for r in rows
        if r["task"] in tasks and tasks[r["task"]].ask != "each" and r["model"] not in removed
    ]
    if off and max(off) > 0.05:
        log(f"warning: a needle stands {max(off):.0%} of the text before its depth: the haystack")
        log("has few sentence ends (. ! ?) there; true_depth in needle.jsonl tells where")


def write_report(
    rows: list[dict], candidates: list, tasks: dict, source: str, out: Path, args, started: float
) -> None:
    """rows: of this run and of earlier ones of the same setup (Results.of_setup)."""
    table = summarise(rows)
    print_table(table, tasks)
    warn(rows, candidates, tasks)
    models, trained = {}, {}
    for c in candidates:
        if not c.removed:
            theta = c.rope[0] if c.rope else c.config.rope_theta
            models[c.label] = {"rope_theta": theta, "window": c.window}
            trained[c.label] = c.config.max_position_embeddings
    needles = [r for r in rows if r["task"] != "loss"]
    summary = {
        "settings": vars(args) | {"torch_dtype": str(args.torch_dtype)},
        "haystack": source,
        "models": models,
        "table": table,
        "overall": summarise(needles, ("model", "task")),
        "cells": summarise(needles, ("model", "task", "length", "depth")),
        "seconds_of_all_rows": round(sum(r["seconds"] for r in rows), 1),
        **provenance(started),
    }
    write_atomically(out / "needle_results.json", json.dumps(summary, indent=2) + "\n")
    shown = [r for r in rows if r["model"] in trained]
    drawn = [task for task in tasks if any(r["task"] == task for r in shown)]
    for task in drawn:
        name = "needle.png" if len(drawn) == 1 else f"needle_{task}.png"
        parts = tasks[task].needles if tasks[task].ask == "each" else 0
        draw_heatmap(out / name, shown, task, trained, {}, parts)
        draw_curves(out / name.replace("needle", "curves", 1), shown, task)
        log(f"figures: {out / name} and {name.replace('needle', 'curves', 1)}")
