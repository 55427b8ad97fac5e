"""Figures, all with axes, units and n. matplotlib is imported only where something is drawn."""

import textwrap
from pathlib import Path

import numpy as np

from support.needles.haystack import fold
from support.needles.intervals import wilson
from support.needles.summary import nats


def draw_heatmap(
    path: Path,
    rows: list[dict],
    task: str,
    windows: dict,
    parts: int = 0,
    in_nats: bool = False,
) -> None:
    """One panel per model of windows (label -> trained window in tokens), in that order, from its
    rows of needle.jsonl. parts: the needle is anywhere in its part of so many; 0: at the depth
    itself. in_nats: the log-probability of an answer instead of the share found."""
    from matplotlib.figure import Figure

    rows = [r for r in rows if r["task"] == task]
    lengths, depths = (sorted({r[k] for r in rows}) for k in ("length", "depth"))
    width = max(2.1, 0.8 * len(lengths))  # of a panel, inches: its title needs some room
    figure = Figure(figsize=(1.9 + width * len(windows), 3.9), layout="constrained")
    caption = "context length, tokens"
    worst = min((nats(r) for r in rows if r["model"] in windows), default=-1) if in_nats else 0
    axes = figure.subplots(1, len(windows), squeeze=False, sharey=True)[0]
    for axis, (label, window) in zip(axes, windows.items(), strict=True):
        scores = {}
        for r in (r for r in rows if r["model"] == label):
            value = nats(r) if in_nats else r["score"]
            scores.setdefault((r["length"], r["depth"]), []).append(value)
        means = {cell: sum(found) / len(found) for cell, found in scores.items()}
        grid = [[means.get((n, d), float("nan")) for n in lengths] for d in depths]
        scale = {"vmin": worst, "vmax": 0} if in_nats else {"vmin": 0, "vmax": 1}
        image = axis.imshow(grid, cmap="RdYlGn", aspect="auto", **scale)
        for (n, d), mean in means.items():
            place = (lengths.index(n), depths.index(d))
            color = text_color(image.cmap(image.norm(mean)))
            number = f"{mean:.2f}" if in_nats else f"{mean:.0%}"
            axis.text(*place, number, color=color, ha="center", va="center", fontsize=8)
        inside = sum(n <= window for n in lengths)
        if 0 < inside < len(lengths):
            axis.axvline(inside - 0.5, color="white", linewidth=3)  # visible on dark cells too
            axis.axvline(inside - 0.5, color="black", linestyle="--")
            caption = "context length, tokens; dashed line: end of the trained window"
        axis.set_xticks(range(len(lengths)), [f"{n / 1024:.3g}k" for n in lengths], fontsize=8)
        ends = [(d - 0.5 / parts, d + 0.5 / parts) for d in depths] if parts else ()
        labels = [f"{a:.0%} to {b:.0%}" for a, b in ends] or [
            f"{round(100 * d, 1):g}%" for d in depths
        ]
        axis.set_yticks(range(len(depths)), labels)
        title = textwrap.fill(label, int(14 * width / 1.6))
        each = "-".join(map(str, sorted({len(found) for found in scores.values()})))
        axis.set_title(f"{title}\ntrained to {window / 1024:.3g}k, n = {each} per cell", fontsize=8)
    figure.supxlabel(caption, fontsize=9)
    where = "part of the text with the needle asked for" if parts else "depth of the (first) needle"
    axes[0].set_ylabel(where)
    shown = "log-probability of an answer, nats" if in_nats else "share of answers found"
    figure.colorbar(image, ax=axes, label=f"{task}: {shown}")
    figure.savefig(path, dpi=130)


def text_color(background: tuple) -> str:
    """Black or white, whichever contrasts more with an (r, g, b, ...) in 0..1 (WCAG's contrast).

    >>> text_color((1.0, 1.0, 0.7)), text_color((0.0, 0.3, 0.1))
    ('black', 'white')
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


def draw_curves(path: Path, rows: list[dict], task: str) -> None:
    """In the longest texts, one line per model. Left: share found against the distance between
    needle and question, each with Wilson's 95 % interval. Right, where --loss measured it: loss
    against position."""
    from matplotlib.figure import Figure

    longest = max(r["length"] for r in rows)
    measured = any(r["task"] == "loss" for r in rows)
    labels = list(dict.fromkeys(r["model"] for r in rows))
    size = (10 if measured else 5.5, 3.5 + 0.2 * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    left, *right = figure.subplots(1, 1 + measured, squeeze=False)[0]
    widths = np.linspace(4.5, 1.2, len(labels))  # each can be seen where several cover one another
    for label, width in zip(labels, widths, strict=True):
        own = [r for r in rows if r["model"] == label and r["length"] == longest]
        found: dict[int, list[float]] = {}  # eighth of the length -> scores
        for r in (r for r in own if r["task"] == task):
            several = len(r["expected"]) > 1 and r["true_depths"]
            depths = r["true_depths"] if several else [r["true_depth"]] * len(r["expected"])
            for depth, answer in zip(depths, r["expected"], strict=True):
                hit = fold(answer) in fold(r["output"])
                found.setdefault(min(7, int(8 * (1 - depth))), []).append(hit)
        if found:
            x = [(k + 0.5) / 8 * longest / 1024 for k in sorted(found)]
            y = [sum(found[k]) / len(found[k]) for k in sorted(found)]
            n = sum(map(len, found.values()))
            named = f"{label}, n = {n} needles in all"
            line = left.plot(x, y, "o-", markersize=3, label=named, linewidth=width)[0]
            ends = [wilson(sum(found[k]), len(found[k])) for k in sorted(found)]
            left.vlines(x, *zip(*ends, strict=True), color=line.get_color(), alpha=0.4)
        losses = [r["loss_by_1024"] for r in own if r["task"] == "loss"]
        if losses:
            per = -(-len(losses[0]) // 64)  # bins a point, for at most 64 points
            mean = [sum(column) / len(column) for column in zip(*losses, strict=True)]
            points = [mean[i : i + per] for i in range(0, len(mean), per)]
            position = [(i + 0.5) * per for i in range(len(points))]
            loss = [sum(p) / len(p) for p in points]
            right[0].plot(
                position, loss, label=f"{label}, n = {len(losses)} texts", linewidth=width
            )
    left.set(
        xlabel="distance of the needle (units of 1,024 tokens)",
        ylabel=f"{task}: share found",
    )
    left.set_title(f"texts of {longest:,} tokens", fontsize=9)
    left.set_ylim(-0.03, 1.03)
    below = {"fontsize": 8, "loc": "upper center", "bbox_to_anchor": (0.5, -0.18)}
    left.legend(**below)
    for axis in right:
        axis.set(xlabel="position (units of 1,024 tokens)", ylabel="loss, nats per token")
        axis.set_title(f"texts of {longest:,} tokens", fontsize=9)
        axis.legend(**below)
    figure.savefig(path, dpi=130)
