"""The figure of `python recipe.py --positions PNG`: where each method puts a sample's tokens."""

import numpy as np
from torch import Tensor

FONT = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}
OURS, OTHERS = "#c1272d", "#30507a"
ZOOM = 120  # tokens that the lower row shows


def draw(
    samples: dict[str, tuple[str, Tensor]],
    starts: Tensor,
    target_len: int,
    old_window: int | None = None,
):
    """A Figure with a column for each method: the whole sample above, its first tokens below.

    samples: method -> (a few words, position ids (L,)); starts (M,): where the sentences of the
    sample begin."""
    import matplotlib
    from matplotlib.figure import Figure

    train_len = min(len(positions) for _, positions in samples.values())
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(2.75 * len(samples), 6.8), layout="constrained")
        whole, zoom = figure.subplots(2, len(samples), sharex="row", sharey="row")
        for i, (name, (label, positions)) in enumerate(samples.items()):
            color = OURS if name == "longrecipe" else OTHERS
            draw_sample(whole[i], positions, target_len, color)
            draw_sentences(zoom[i], positions, starts, color)
            whole[i].set_title(name, fontsize=17, fontweight="bold", color=color, pad=24)
            whole[i].annotate(label, (0.5, 1.03), xycoords="axes fraction", ha="center")
            if old_window and old_window < target_len:
                mark_window(whole[i], old_window, target_len)
        end = target_len / 1000
        whole[0].set(xlim=(0, 1.04 * end), ylim=(0, 1.04 * end), ylabel="position id (thousands)")
        top = max(int(positions[:ZOOM][-1]) for _, positions in samples.values())
        zoom[0].set(xlim=(0, ZOOM), ylim=(0, 1.05 * top), ylabel="position id", xticks=(0, 50, 100))
        note = {"xycoords": "axes fraction", "va": "top", "fontsize": 12}
        zoom[0].annotate("grey: every\nsecond sentence", (0.03, 0.97), **note)
        figure.suptitle(
            f"One sample of {train_len:,} tokens for a window of {target_len:,} positions: where"
            " each method puts its tokens",
            fontsize=16,
        )
    return figure


def draw_sample(axis, positions: Tensor, target_len: int, color: str) -> None:
    """Token index against position id of the whole sample; dotted: that of the full length."""
    p, end = positions.numpy() / 1000, target_len / 1000
    axis.plot((0, end), (0, end), color="0.8", linestyle=":", linewidth=1.5)
    jumps = np.flatnonzero(np.diff(p) > end / 20) + 1
    for piece in np.split(np.arange(len(p)), jumps):  # no line across a large jump
        # a piece too short for a line is a dot
        style = {"marker": "o", "markersize": 8} if len(piece) < len(p) / 100 else {}
        style |= {"color": color, "linewidth": 4, "solid_capstyle": "round"}
        axis.plot(piece / 1000, p[piece], **style)
    axis.annotate(f"{len(p):,} tokens", (0.98, 0.27), xycoords="axes fraction", ha="right")
    axis.set_xlabel("token (thousands)")


def mark_window(axis, old_window: int, target_len: int) -> None:
    top, end = old_window / 1000, target_len / 1000
    axis.axhspan(0, top, color="gold", alpha=0.35, linewidth=0)
    axis.annotate(f"old window {old_window:,}", (end, top), ha="right", va="bottom", fontsize=11)


def draw_sentences(axis, positions: Tensor, starts: Tensor, color: str) -> None:
    """The first tokens, a dot each; grey: every second sentence."""
    p, borders = positions[:ZOOM].numpy(), [*starts[starts < ZOOM].tolist(), ZOOM]
    for begin, end in list(zip(borders, borders[1:], strict=False))[1::2]:
        axis.axvspan(begin - 0.5, end - 0.5, color="0.92", linewidth=0)
    axis.plot(np.arange(len(p)), p, ".", color=color, markersize=4)
    axis.set_xlabel(f"token (the first {ZOOM})")
