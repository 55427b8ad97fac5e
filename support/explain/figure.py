"""The figure of `python recipe.py`: one sample, six panels, from the numbers of distances.py."""

import math
from pathlib import Path

import numpy as np
from torch import Tensor

from support.explain.distances import FULL, Angles, Distances
from support.huggingface.config import read_window
from support.system.bad_input import BadInput

ZOOM, BINS = 300, 128  # positions shown one by one; bins of the distances


def styles(labels: dict[str, str]) -> dict[str, dict]:
    """Label, colour and line of FULL and of each method. The first line is the widest and the last
    the narrowest, so that each can be seen where several cover one another."""
    found = {FULL: {"label": "a text of the full length", "color": "black", "linestyle": "--"}}
    widths = np.linspace(9, 1.2, len(labels)).tolist()
    for i, (name, label) in enumerate(labels.items()):
        found[name] = {"label": f"{name}: {label}", "color": f"C{i}", "linewidth": widths[i]}
    return found


def draw(
    path: str | Path,
    folder: str | Path,
    selection: tuple[Tensor, Tensor, Tensor, str],
    labels: dict[str, str],
    distances: dict[str, Distances],
    angles: Angles | str,
) -> None:
    """folder: the model's. selection: the share of impactful tokens of the text's segments (N,),
    their sizes, how many of their tokens the sample holds, and what impactful ones are called.
    labels: method -> a few words. distances: of each method and FULL. angles: or why there are
    none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 9.5), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    target_len, old_window = len(distances[FULL].counts), read_window(folder)
    draw_selection(panels[0], *selection)
    lines = styles(labels)
    draw_positions(panels[1], lines, distances, old_window)
    draw_strips(panels[2], lines, distances)
    draw_distances(panels[3], lines, distances, old_window)
    draw_coverage(panels[4], distances)
    draw_angles(panels[5], angles)
    for letter, axis in zip("ABCDEF", panels, strict=True):
        axis.set_title(f"{letter}. {axis.get_title()}", fontsize=11)
    n = len(distances["longrecipe"].positions)
    figure.suptitle(
        f"LongRecipe on one text of {int(selection[1].sum()):,} tokens: a sample of {n:,} tokens"
        f" for a window of {target_len:,} positions",
        fontsize=13,
    )
    figure.savefig(path, dpi=110)


def draw_selection(axis, share: Tensor, sizes: Tensor, held: Tensor, what: str) -> None:
    """How many tokens are in segments with this share of impactful tokens. The last segment of
    the sample may be cut: what it lost is dropped."""
    share, sizes, held = share.numpy(), sizes.numpy(), held.numpy()
    edges = np.linspace(0, 1, 26)
    taken, tokens = held > 0, (held, sizes - held)
    named = [
        f"{label}: {n.sum():,} segments, {w.sum():,} tokens"
        for label, n, w in zip(("taken", "dropped"), (taken, ~taken), tokens, strict=True)
    ]
    weights, colors = [w / 1000 for w in tokens], ("C0", "lightgray")
    axis.hist((share, share), edges, weights=weights, stacked=True, label=named, color=colors)
    axis.set_title(f"selection, n = {len(share):,} segments")
    axis.set(xlabel=f"share of a segment's tokens that are {what}", ylabel="thousand tokens")
    axis.legend(fontsize=9)


def draw_positions(axis, lines: dict, distances: dict, old_window: int | None) -> None:
    """Token index -> position id."""
    mark_window(axis.axhline, old_window, len(distances[FULL].counts))
    for method in [name for name in lines if name != FULL]:
        p = distances[method].positions.numpy() / 1024
        axis.plot(np.arange(len(p)) / 1000, p, **lines[method])
    axis.set_ylim(top=1.75 * len(distances[FULL].counts) / 1024)  # room for the legend
    axis.set_title("where the tokens of the sample are put")
    axis.set(xlabel="token in the sample (thousands)", ylabel="position id (units of 1,024)")
    axis.legend(fontsize=9)


def draw_strips(axis, lines: dict, distances: dict) -> None:
    """Which of the first positions hold a token, method by method."""
    for row, method in enumerate(lines):
        held = distances[method].positions.numpy()
        held = held[held < ZOOM]
        begins = np.flatnonzero(np.diff(held, prepend=-2) > 1)
        runs = np.diff(begins, append=len(held))
        bars = list(zip(held[begins].tolist(), runs.tolist(), strict=True))
        axis.broken_barh(bars, (row - 0.35, 0.7), color=lines[method]["color"], linewidth=0)
    axis.set_yticks(range(len(lines)), lines)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.set_xlim(0, ZOOM)
    axis.set_title(f"the first {ZOOM} positions: colour where there is a token")
    axis.set_xlabel("position id")


def draw_distances(axis, lines: dict, distances: dict, old_window: int | None) -> None:
    """Pairs of tokens in one sample at a distance: the mean of the distances in a bin."""
    target_len = len(distances[FULL].counts)
    mark_window(axis.axvline, old_window, target_len)
    edges = bin_edges(target_len)
    for method, line in lines.items():
        d = distances[method]
        y = np.add.reduceat(d.counts.numpy(), edges[:-1]) / np.diff(edges) / d.draws
        y = np.where(y > 0, y, np.nan)  # no line where there are no pairs
        axis.stairs(y, edges / 1024, baseline=None, **line)
    axis.set_yscale("log")
    axis.set_ylim(bottom=axis.get_ylim()[0] / 1000)  # room for the legend
    draws = max(d.draws for d in distances.values())
    axis.set_title(f"pairs of tokens by distance, n = {draws} samples, {FULL}: 1")
    axis.set_xlabel("distance of two tokens (units of 1,024 positions)")
    axis.set_ylabel("pairs in one sample at each distance (no line: none)")
    axis.legend(fontsize=9, loc="lower left")


def draw_coverage(axis, distances: dict[str, Distances]) -> None:
    """Which distances one sample trains: dark; the others are white."""
    target_len, draws = len(distances[FULL].counts), max(d.draws for d in distances.values())
    edges, names = bin_edges(target_len), list(distances)
    rows = [
        np.add.reduceat(distances[m].first.numpy() > 0, edges[:-1], dtype=float) / np.diff(edges)
        for m in names
    ]
    extent = (0, target_len / 1024, len(names) - 0.5, -0.5)
    image = axis.imshow(rows, vmin=0, vmax=1, cmap="Greens", aspect="auto", extent=extent)
    labels = [
        f"{m}\none: {distances[m].covered_by_one:.1%}\n{draws}: {distances[m].covered:.1%}"
        for m in names
    ]
    axis.set_yticks(range(len(names)), labels, fontsize=9)
    axis.set_title("distances that this sample trains (white: not)")
    axis.set_xlabel(
        "distance of two tokens (units of 1,024 positions)\n"
        f"%: of all distances, by one sample on average, by {draws} together"
    )
    axis.figure.colorbar(image, ax=axis, label="share of the distances with a pair of tokens")


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
    turn = (
        "a pair whose — is above this line went round\nthe whole circle: all its angles are known"
    )
    axis.axhline(1, color="gray", linestyle=":", label=turn)
    axis.plot(pairs, old, "k_", markersize=9, label=f"old window ({a.old_len:,}), old theta")
    for y, new, color, name in ((far, a.before, "C1", "old"), (slowed, a.after, "C0", "new")):
        new = new.numpy()
        label = f"target ({a.target_len:,}), {name} theta"
        axis.plot(pairs, y, ".", color=color, markersize=5, label=label)
        label = f"angles never met: {new.sum()} of {len(new)} pairs, {name} theta"
        axis.plot(pairs[new], y[new], "o", color=color, fillstyle="none", markersize=9, label=label)
    axis.set_yscale("log")
    axis.set_title("RoPE: how far each pair of dimensions turns")
    axis.set_xlabel(f"pair of dimensions, fast to slow, n = {len(pairs)}")
    axis.set_ylabel("turns within the window")
    axis.set_ylim(bottom=axis.get_ylim()[0] / 1000)  # room for the legend
    axis.legend(fontsize=9, loc="lower left")


def bin_edges(target_len: int) -> np.ndarray:
    """(BINS + 1,) distances, or as many as there are: bin i holds edges[i] .. edges[i + 1] - 1."""
    return np.unique(np.linspace(1, target_len, BINS + 1).astype(int))


def mark_window(line, old_window: int | None, target_len: int) -> None:
    if old_window and old_window < target_len:
        style = {"color": "gray", "linestyle": ":", "label": f"old window ({old_window:,})"}
        line(old_window / 1024, **style)


def check_path(path: str | Path) -> None:
    """BadInput, before any work, if no figure can be written to `path` (--figure)."""
    from matplotlib.backend_bases import FigureCanvasBase

    path, formats = Path(path), FigureCanvasBase.get_supported_filetypes()
    if not path.parent.is_dir():
        raise BadInput(f"--figure {path}: folder {path.parent} does not exist")
    if path.suffix[1:].lower() not in formats:
        raise BadInput(f"--figure {path} must end in one of .{', .'.join(sorted(formats))}")
