"""The figures of an evaluation: heat-maps by length and depth, curves by distance and position.
matplotlib is imported only where something is drawn."""

import textwrap
from pathlib import Path

import numpy as np

from support.needles.haystack import fold
from support.needles.intervals import wilson

LIGHT = ("#f08a80", "#ffffc8", "#8ccf8c")  # red, yellow, green: black can be read on each


def draw_heatmap(
    path: Path,
    cells: list[dict],
    windows: dict[str, int],
    parts: int = 0,
    in_nats: bool = False,
) -> None:
    """One panel for each model of windows (label -> trained window in tokens), in that order.
    cells: of one task, an entry of summary.summarise for each model, length and depth. parts: the
    needle is anywhere in its part of so many; 0: at the depth itself. in_nats: the log-probability
    of an answer instead of the share found."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    value, digits, low, high, shown = "mean", ".0%", 0, 1, "share of answers found"
    if in_nats:
        value, digits, shown = "nats", ".2f", "log-probability of an answer, nats"
        low, high = min(e["nats"] for e in cells), 0
    lengths, depths = (sorted({e[k] for e in cells}) for k in ("length", "depth"))
    width = max(2.1, 0.8 * len(lengths))  # of a panel, inches: its title needs some room
    figure = Figure(figsize=(1.9 + width * len(windows), 3.9), layout="constrained")
    axes = figure.subplots(1, len(windows), squeeze=False, sharey=True)[0]
    colors = LinearSegmentedColormap.from_list("found", LIGHT)
    caption = "context length, tokens"
    for axis, (label, window) in zip(axes, windows.items(), strict=True):
        own = [e for e in cells if e["model"] == label]
        grid = np.full((len(depths), len(lengths)), np.nan)
        for e in own:
            x, y = lengths.index(e["length"]), depths.index(e["depth"])
            grid[y, x] = e[value]
            axis.text(x, y, f"{e[value]:{digits}}", ha="center", va="center", fontsize=8)
        image = axis.imshow(grid, cmap=colors, aspect="auto", vmin=low, vmax=high)
        inside = sum(n <= window for n in lengths)
        if 0 < inside < len(lengths):
            axis.axvline(inside - 0.5, color="black", linestyle="--")
            caption = "context length, tokens; dashed line: end of the trained window"
        axis.set_xticks(range(len(lengths)), [f"{n / 1024:.3g}k" for n in lengths], fontsize=8)
        title = textwrap.fill(label, int(14 * width / 1.6))
        each = "-".join(map(str, sorted({e["n"] for e in own})))
        about = f"trained to {window / 1024:.3g}k\nn = {each} answers a cell"
        axis.set_title(f"{title}\n{about}", fontsize=8)
    ticks = [f"{round(100 * d, 1):g}%" for d in depths]
    if parts:
        ticks = [f"{d - 0.5 / parts:.0%} to {d + 0.5 / parts:.0%}" for d in depths]
    axes[0].set_yticks(range(len(depths)), ticks)
    where = "part of the text with the needle asked for" if parts else "depth of the (first) needle"
    axes[0].set_ylabel(where)
    figure.supxlabel(caption, fontsize=9)
    figure.colorbar(image, ax=axes, label=f"{cells[0]['task']}: {shown}")
    figure.savefig(path, dpi=130)


def draw_curves(path: Path, results: list[dict], task: str) -> None:
    """In the longest texts, one line per model. Left: share found against the distance between
    needle and question, each with Wilson's 95 % interval. Right, where --loss measured it: loss
    against position."""
    from matplotlib.figure import Figure

    longest = max(r["length"] for r in results if r["task"] == task)
    labels = list(dict.fromkeys(r["model"] for r in results))
    results = [r for r in results if r["length"] == longest]
    measured = any(r["task"] == "loss" for r in results)
    size = (10 if measured else 5.5, 3.5 + 0.2 * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, 1 + measured, squeeze=False)[0]
    widths = np.linspace(4.5, 1.2, len(labels))  # each can be seen where several cover one another
    colors = [f"C{i}" for i in range(len(labels))]  # the same in both panels
    for label, width, color in zip(labels, widths, colors, strict=True):
        own = [r for r in results if r["model"] == label]
        hits = hits_by_distance([r for r in own if r["task"] == task])
        if hits:
            x = [(eighth + 0.5) / 8 * longest / 1024 for eighth in hits]
            y = [np.mean(found) for found in hits.values()]
            named = f"{label}, n = {sum(map(len, hits.values()))} answers in all"
            axes[0].plot(x, y, "o-", color=color, markersize=3, label=named, linewidth=width)
            ends = [wilson(sum(found), len(found)) for found in hits.values()]
            axes[0].vlines(x, *zip(*ends, strict=True), color=color, alpha=0.4)
        losses = [r["loss_by_1024"] for r in own if r["task"] == "loss"]
        if losses:
            mean = np.mean(losses, axis=0)
            per = -(-len(mean) // 64)  # bins a point, for at most 64 points
            y = [mean[i : i + per].mean() for i in range(0, len(mean), per)]
            x = [(i + 0.5) * per for i in range(len(y))]
            axes[1].plot(x, y, color=color, label=f"{label}, texts: {len(losses)}", linewidth=width)
    axes[0].set_xlabel("distance of the needle (units of 1,024 tokens)")
    axes[0].set(ylabel=f"{task}: share found", ylim=(-0.03, 1.03))
    for axis in axes[1:]:
        axis.set(xlabel="position (units of 1,024 tokens)", ylabel="loss, nats per token")
    for axis in axes:
        axis.set_title(f"texts of {longest:,} tokens", fontsize=9)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    figure.savefig(path, dpi=130)


def hits_by_distance(results: list[dict]) -> dict[int, list[bool]]:
    """Whether each needle was found, by its distance from the question in eighths of the length
    (0: the last eighth of the text), increasing."""
    hits: dict[int, list[bool]] = {}
    for r in results:
        several = len(r["expected"]) > 1 and r["true_depths"]
        depths = r["true_depths"] if several else [r["true_depth"]] * len(r["expected"])
        for depth, answer in zip(depths, r["expected"], strict=True):
            eighth = min(7, int(8 * (1 - depth)))
            hits.setdefault(eighth, []).append(fold(answer) in fold(r["output"]))
    return dict(sorted(hits.items()))
