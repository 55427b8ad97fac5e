"""The figure of `python recipe.py`: one sample, six panels, from the numbers of explain.py."""

import math
from pathlib import Path

import numpy as np
from torch import Tensor

from support.explain import FULL, Angles, Distances

# The methods for the legend, in drawing order: longrecipe comes last, on top.
METHODS = {
    "none": "none: consecutive",
    "pose": "pose: one jump",
    "rpes": "rpes: random positions",
    "longrecipe": "longrecipe: jumps between sentences",
}
COLORS = {"none": "C0", "pose": "C1", "rpes": "C2", "longrecipe": "C3", FULL: "black"}
ZOOM, BINS = 300, 128  # positions shown one by one; bins of the distances


def draw(
    path: str | Path,
    share: Tensor,
    sizes: Tensor,
    taken: Tensor,
    what: str,
    positions: dict[str, Tensor],
    distances: dict[str, Distances],
    angles: Angles | str,
    old_window: int | None,
) -> None:
    """share, sizes, taken (N,): the text's segments, `what` their impactful tokens are; positions:
    method -> (L,); distances: method (and FULL) -> Distances; angles: or why there are none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 9.5), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    target_len = len(distances[FULL].counts)
    draw_selection(panels[0], share.numpy(), sizes.numpy(), taken.numpy(), what)
    draw_positions(panels[1], positions, target_len, old_window)
    draw_strips(panels[2], positions)
    draw_distances(panels[3], distances, old_window)
    draw_coverage(panels[4], distances)
    draw_angles(panels[5], angles)
    for letter, axis in zip("ABCDEF", panels, strict=True):
        axis.set_title(f"{letter}. {axis.get_title()}", fontsize=11)
    n = len(next(iter(positions.values())))
    figure.suptitle(
        f"LongRecipe on one text of {int(sizes.sum()):,} tokens: a sample of {n:,} tokens for a"
        f" window of {target_len:,} positions",
        fontsize=13,
    )
    figure.savefig(path, dpi=110)


def draw_selection(axis, share, sizes, taken, what: str) -> None:
    """How many tokens stand in segments with this share of impactful tokens."""
    edges = np.linspace(0, 1, 26)
    parts, labels = (share[taken], share[~taken]), ("taken", "dropped")
    weights = [sizes[taken] / 1000, sizes[~taken] / 1000]
    named = [
        f"{label}: {len(p):,} segments, {w.sum() * 1000:,.0f} tokens"
        for label, p, w in zip(labels, parts, weights, strict=True)
    ]
    axis.hist(parts, edges, weights=weights, stacked=True, label=named, color=("C3", "lightgray"))
    axis.set_title(f"selection, n = {len(share):,} segments")
    axis.set(xlabel=f"share of a segment's tokens that are {what}", ylabel="thousand tokens")
    axis.legend(fontsize=9)


def draw_positions(axis, positions: dict, target_len: int, old_window: int | None) -> None:
    """Token index -> position id."""
    mark_window(axis.axhline, old_window, target_len)
    for method in sorted(positions, key=list(METHODS).index):
        p = positions[method].numpy() / 1024
        thick = {"linewidth": 3, "alpha": 0.7} if method == "longrecipe" else {"linewidth": 1.3}
        axis.plot(np.arange(len(p)) / 1000, p, label=METHODS[method], color=COLORS[method], **thick)
    axis.set_title("where each method puts the tokens of the sample")
    axis.set(xlabel="token in the sample (thousands)", ylabel="position id (units of 1,024)")
    axis.legend(fontsize=9)


def draw_strips(axis, positions: dict) -> None:
    """Which of the first positions hold a token, method by method."""
    names = [FULL, *METHODS]
    for row, method in enumerate(names):
        held = np.arange(ZOOM) if method == FULL else positions[method].numpy()
        held = held[held < ZOOM]
        begins = np.flatnonzero(np.diff(held, prepend=-2) > 1)
        runs = np.diff(begins, append=len(held))
        bars = list(zip(held[begins].tolist(), runs.tolist(), strict=True))
        axis.broken_barh(bars, (row - 0.35, 0.7), color=COLORS[method], linewidth=0)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(0, ZOOM)
    axis.set_title(f"the first {ZOOM} positions: colour where a token stands")
    axis.set_xlabel("position id")


def draw_distances(axis, distances: dict[str, Distances], old_window: int | None) -> None:
    """Pairs of tokens in one sample at a distance: the mean of the distances in a bin."""
    target_len = len(distances[FULL].counts)
    mark_window(axis.axvline, old_window, target_len)
    edges = bin_edges(target_len)
    for method in (FULL, *METHODS):
        d = distances[method]
        y = np.add.reduceat(d.counts.numpy(), edges[:-1]) / np.diff(edges) / d.draws
        style = {"linestyle": "--"} if method == FULL else {}
        style |= {"linewidth": 3, "alpha": 0.7} if method == "longrecipe" else {"linewidth": 1.3}
        y = np.where(y > 0, y, np.nan)  # never: no line
        label = "a text of the full length" if method == FULL else METHODS[method]
        axis.stairs(y, edges / 1024, baseline=None, label=label, color=COLORS[method], **style)
    axis.set_yscale("log")
    draws = max(d.draws for d in distances.values())
    axis.set_title(f"pairs of tokens by distance, exact, n = {draws} samples a method")
    axis.set_xlabel("distance of two tokens (units of 1,024 positions)")
    axis.set_ylabel("pairs in one sample at each distance (no line: none)")
    axis.legend(fontsize=9, loc="lower left")


def draw_coverage(axis, distances: dict[str, Distances]) -> None:
    """Which distances are trained at all: dark, and which never: white."""
    target_len = len(distances[FULL].counts)
    edges, names = bin_edges(target_len), [FULL, *METHODS]
    rows = [
        np.add.reduceat(distances[m].counts.numpy() > 0, edges[:-1], dtype=float) / np.diff(edges)
        for m in names
    ]
    extent = (0, target_len / 1024, len(names) - 0.5, -0.5)
    image = axis.imshow(rows, vmin=0, vmax=1, cmap="Greens", aspect="auto", extent=extent)
    axis.set_yticks(range(len(names)), [f"{m}\n{distances[m].covered:.1%}" for m in names])
    draws = max(d.draws for d in distances.values())
    axis.set_title(f"distances trained by n = {draws} samples, white: never")
    axis.set_xlabel("distance of two tokens (units of 1,024 positions)")
    axis.figure.colorbar(image, ax=axis, label="share of the distances with a pair")


def draw_angles(axis, angles: Angles | str) -> None:
    """How far each pair of dimensions turns within a window: old; target before and after."""
    axis.set_title("RoPE")
    if isinstance(angles, str):
        axis.text(0.5, 0.5, angles, ha="center", va="center", wrap=True)
        axis.set_axis_off()
        return
    a, pairs = angles, np.arange(len(angles.old))
    old = a.old.double().numpy() * a.old_len / (2 * math.pi)
    far, slowed = (f.double().numpy() * a.target_len / (2 * math.pi) for f in (a.old, a.new))
    axis.axhline(1, color="gray", linestyle=":", label="one turn: above, every angle is known")
    axis.plot(pairs, old, "k_", markersize=9, label=f"old window ({a.old_len:,}), old base")
    for y, new, color, name in ((far, a.before, "C1", "old"), (slowed, a.after, "C0", "new")):
        new = new.numpy()
        label = f"target ({a.target_len:,}), {name} base"
        axis.plot(pairs, y, ".", color=color, markersize=5, label=label)
        label = f"angles never met: {new.sum()} of {len(new)} pairs, {name} base"
        axis.plot(pairs[new], y[new], "o", color=color, fillstyle="none", markersize=9, label=label)
    axis.set_yscale("log")
    axis.set_title("RoPE: how far each pair of dimensions turns")
    axis.set(xlabel=f"pair of dimensions, n = {len(pairs)}", ylabel="turns within the window")
    axis.legend(fontsize=9)


def bin_edges(target_len: int) -> np.ndarray:
    """(BINS + 1,) distances, or as many as there are: bin i holds edges[i] .. edges[i + 1] - 1."""
    return np.unique(np.linspace(1, target_len, BINS + 1).astype(int))


def mark_window(line, old_window: int | None, target_len: int) -> None:
    if old_window and old_window < target_len:
        style = {"color": "gray", "linestyle": ":", "label": f"old window ({old_window:,})"}
        line(old_window / 1024, **style)
