"""The figures of `python recipe.py`: where each method puts a sample's tokens (--positions PNG);
and the same above what was selected, which distances that trains, and RoPE's angles."""

import math

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from support.explain.distances import DRAWS, Angles, Distances, Samples

FONT = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}
OURS, OTHERS = "#c1272d", "#30507a"
ZOOM = 120  # tokens that the lower row shows
BINS = 128  # of the distances


@matplotlib.rc_context(FONT)
def draw_positions(
    samples: Samples, starts: Tensor, target_len: int, old_window: int | None = None
) -> Figure:
    """A column for each method: the whole sample above, its first tokens below. starts (M,): where
    the sentences of the sample begin."""
    figure = Figure(figsize=(2.75 * len(samples), 6.8), layout="constrained")
    position_panels(figure, samples, starts, target_len, old_window)
    return figure


@matplotlib.rc_context(FONT)
def draw(
    samples: Samples,
    starts: Tensor,
    old_window: int | None,
    selection: tuple[Tensor, Tensor, Tensor],
    distances: dict[str, Distances],
    angles: Angles | str,
) -> Figure:
    """draw_positions above three panels. selection: the share of impactful tokens of the text's
    segments (N,), their sizes, and how many of their tokens the sample holds. distances: of each
    method. angles: or why there are none."""
    target_len = len(samples["full"][1])
    figure = Figure(figsize=(2.75 * len(samples), 13), layout="constrained")
    above, below = figure.subfigures(2, 1)
    position_panels(above, samples, starts, target_len, old_window)
    panels = below.subplots(1, 3)
    draw_selection(panels[0], *selection)
    draw_coverage(panels[1], distances, target_len)
    if isinstance(angles, str):
        panels[2].text(0.5, 0.5, angles, ha="center", va="center", wrap=True)
        panels[2].set_axis_off()
    else:
        draw_angles(panels[2], angles)
    return figure


def position_panels(
    figure, samples: Samples, starts: Tensor, target_len: int, old_window: int | None
) -> None:
    """What draw_positions says, in a figure or a part of one."""
    whole, zoom = figure.subplots(2, len(samples), sharex="row", sharey="row")
    end, old_end = target_len / 1000, (old_window or target_len) / 1000
    for above, below, (name, (label, positions)) in zip(whole, zoom, samples.items(), strict=True):
        color, middle = OURS if name == "longrecipe" else OTHERS, {"ha": "center"}
        above.set_title(name, fontsize=17, fontweight="bold", color=color, pad=24)
        above.annotate(label, (0.5, 1.03), xycoords="axes fraction", **middle)
        draw_sample(above, positions.numpy() / 1000, end, color)
        draw_sentences(below, positions[:ZOOM].numpy(), starts, color)
        if old_end < end:
            above.axhspan(0, old_end, color="gold", alpha=0.35, linewidth=0)
            text = {"ha": "right", "va": "bottom", "fontsize": 11}
            above.annotate(f"old window {old_window:,}", (end, old_end), **text)
    whole[0].set(xlim=(0, 1.04 * end), ylim=(0, 1.04 * end), ylabel="position id (thousands)")
    top = max(int(positions[:ZOOM][-1]) for _, positions in samples.values())
    zoom[0].set(xlim=(0, ZOOM), ylim=(0, 1.05 * top), ylabel="position id", xticks=(0, 50, 100))
    note = {"xycoords": "axes fraction", "va": "top", "fontsize": 12}
    zoom[0].annotate("grey: every\nsecond sentence", (0.03, 0.97), **note)
    train_len = min(len(positions) for _, positions in samples.values())
    figure.suptitle(
        f"One sample of {train_len:,} tokens for a window of {target_len:,} positions: where each"
        " method puts its tokens",
        fontsize=16,
    )


def draw_sample(axis, p, end: float, color: str) -> None:
    """Token against position id p, in thousands; dotted: that of the full length, to `end`."""
    axis.plot((0, end), (0, end), color="0.8", linestyle=":", linewidth=1.5)
    jumps = np.flatnonzero(np.diff(p) > end / 20) + 1
    for piece in np.split(np.arange(len(p)), jumps):  # no line across a large jump
        # a piece too short for a line is a dot
        style = {"marker": "o", "markersize": 8} if len(piece) < len(p) / 100 else {}
        style |= {"color": color, "linewidth": 4, "solid_capstyle": "round"}
        axis.plot(piece / 1000, p[piece], **style)
    axis.annotate(f"{len(p):,} tokens", (0.98, 0.27), xycoords="axes fraction", ha="right")
    axis.set_xlabel("token (thousands)")


def draw_sentences(axis, p, starts: Tensor, color: str) -> None:
    """The first tokens, a dot each; grey: every second sentence."""
    borders = [*starts[starts < ZOOM].tolist(), ZOOM]
    for begin, end in list(zip(borders, borders[1:], strict=False))[1::2]:
        axis.axvspan(begin - 0.5, end - 0.5, color="0.92", linewidth=0)
    axis.plot(np.arange(len(p)), p, ".", color=color, markersize=4)
    axis.set_xlabel(f"token (the first {ZOOM})")


def draw_selection(axis, share: Tensor, sizes: Tensor, held: Tensor) -> None:
    """How many tokens are in segments with this share of impactful tokens. The last segment of
    the sample may be cut: what it lost is dropped."""
    bars = (("taken", held > 0, held), ("dropped", held == 0, sizes - held))
    axis.hist(
        [share.numpy()] * 2,
        bins=np.linspace(0, 1, 26),
        weights=[tokens.numpy() / 1000 for _, _, tokens in bars],
        label=[f"{word}: {some.sum():,} segments, {n.sum():,} tokens" for word, some, n in bars],
        color=["C0", "lightgray"],
        stacked=True,
    )
    axis.set_title(f"selection, n = {len(share):,} segments")
    axis.set(xlabel="share of a segment's tokens that are impactful", ylabel="thousand tokens")
    axis.legend(fontsize=11)


def draw_coverage(axis, distances: dict[str, Distances], target_len: int) -> None:
    """Which distances one sample trains: dark; the others are white."""
    edges = np.unique(np.linspace(1, target_len, BINS + 1).astype(int))
    rows = [
        np.add.reduceat(d.pairs.numpy() > 0, edges[:-1], dtype=float) / np.diff(edges)
        for d in distances.values()
    ]
    extent = (0, target_len / 1000, len(rows) - 0.5, -0.5)
    image = axis.imshow(rows, vmin=0, vmax=1, cmap="Greens", aspect="auto", extent=extent)
    labels = [
        f"{name}\none: {d.covered_by_one:.1%}\n{DRAWS}: {d.covered:.1%}"
        for name, d in distances.items()
    ]
    axis.set_yticks(range(len(rows)), labels)
    axis.set_title("distances that this sample trains (white: not)")
    axis.set_xlabel(
        "distance of two tokens (thousands)\n"
        f"%: of all distances, by one sample on average, by {DRAWS} together"
    )
    axis.figure.colorbar(image, ax=axis, label="share of the distances with a pair of tokens")


def draw_angles(axis, a: Angles) -> None:
    """How far each pair of dimensions turns within a window: old; target before and after."""
    pairs, turn = np.arange(len(a.old)), 2 * math.pi
    axis.axhline(1, color="gray", linestyle=":", label="above: went round the whole circle")
    label = f"old window ({a.old_len:,}), old theta"
    axis.plot(pairs, a.old * a.old_len / turn, "k_", markersize=9, label=label)
    lines = (("old", "C1", a.old, a.before), ("new", "C0", a.new, a.after))
    for theta, color, frequencies, new in lines:
        turns = frequencies * a.target_len / turn
        label = f"target ({a.target_len:,}), {theta} theta"
        axis.plot(pairs, turns, ".", color=color, markersize=5, label=label)
        label = f"angles never met: {new.sum()} of {len(new)} pairs, {theta} theta"
        circle = {"color": color, "fillstyle": "none", "markersize": 9, "label": label}
        axis.plot(pairs[new], turns[new], "o", **circle)
    axis.set_yscale("log")
    axis.set_title("RoPE: how far each pair of dimensions turns")
    axis.set_xlabel(f"pair of dimensions, fast to slow, n = {len(pairs)}")
    axis.set_ylabel("turns within the window")
    axis.set_ylim(bottom=axis.get_ylim()[0] / 1000)  # room for the legend
    axis.legend(fontsize=11, loc="lower left")
