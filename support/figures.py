"""Figures, all with axes, units and n. matplotlib is imported only where something is drawn."""

import textwrap
from pathlib import Path


def draw_heatmap(path: Path, rows: list[dict], task: str, windows: dict, names: dict) -> None:
    """One panel per model of windows (label -> trained window in tokens), in that order, from its
    rows of needle.jsonl. names: label -> title, where the label itself is none."""
    from matplotlib.figure import Figure

    rows = [r for r in rows if r["task"] == task]
    lengths, depths = (sorted({r[k] for r in rows}) for k in ("length", "depth"))
    width = max(2.1, 0.8 * len(lengths))  # of a panel, inches: its title needs some room
    figure = Figure(figsize=(1.9 + width * len(windows), 3.9), layout="constrained")
    caption = "context length, tokens"
    axes = figure.subplots(1, len(windows), squeeze=False, sharey=True)[0]
    for axis, (label, window) in zip(axes, windows.items(), strict=True):
        scores = {}
        for r in rows:
            if r["model"] == label:
                scores.setdefault((r["length"], r["depth"]), []).append(r["score"])
        means = {cell: sum(found) / len(found) for cell, found in scores.items()}
        grid = [[means.get((n, d), float("nan")) for n in lengths] for d in depths]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (n, d), mean in means.items():
            place = (lengths.index(n), depths.index(d))
            color = text_color(image.cmap(mean))
            axis.text(*place, f"{mean:.0%}", color=color, ha="center", va="center", fontsize=8)
        inside = sum(n <= window for n in lengths)
        if 0 < inside < len(lengths):
            axis.axvline(inside - 0.5, color="white", linewidth=3)  # seen on dark cells too
            axis.axvline(inside - 0.5, color="black", linestyle="--")
            caption = "context length, tokens; dashed line: end of the trained window"
        axis.set_xticks(range(len(lengths)), [f"{n / 1024:.3g}k" for n in lengths], fontsize=8)
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        title = textwrap.fill(names.get(label, label), int(14 * width / 1.6))
        each = "-".join(map(str, sorted({len(found) for found in scores.values()})))
        axis.set_title(f"{title}\ntrained to {window / 1024:.3g}k, n = {each} per cell", fontsize=8)
    figure.supxlabel(caption, fontsize=9)
    axes[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=axes, label=f"{task}: share of answers found")
    figure.savefig(path, dpi=130)


def text_color(background: tuple) -> str:
    """Black or white, whichever contrasts more with an (r, g, b, ...) in 0..1 (WCAG's contrast).

    >>> text_color((1.0, 1.0, 0.7)), text_color((0.0, 0.3, 0.1))
    ('black', 'white')
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


def draw_positions(path: str | Path, positions: dict, target_len: int) -> None:
    """positions: method -> (L,). Left: token index -> position id. Right: which distances get
    trained."""
    import torch
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    strip, histogram = figure.subplots(1, 2)
    generator = torch.Generator().manual_seed(0)
    for method, p in positions.items():
        strip.plot(p.numpy() / 1024, label=method, linewidth=1.2)
        pairs = p[torch.randint(len(p), (2, 400_000), generator=generator)]
        distance = (pairs[0] - pairs[1]).abs() / 1024
        histogram.hist(distance.numpy(), bins=64, range=(0, target_len / 1024), density=True,
                       histtype="step", label=method)  # fmt: skip
    edge = target_len / 1024
    histogram.plot([0, edge], [2 / edge, 0], "k--", linewidth=1, label="full length")
    strip.set_xlabel("token index in the sample")
    strip.set_ylabel("position id (units of 1,024)")
    strip.legend()
    histogram.set_xlabel("distance of two tokens (units of 1,024 positions)")
    histogram.set_ylabel("density over pairs of one sample")
    histogram.legend()
    n = len(next(iter(positions.values())))
    figure.suptitle(f"one sample of {n:,} tokens, target {target_len:,}")
    figure.savefig(path, dpi=130)
