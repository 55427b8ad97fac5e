"""Figures, all with axes, units and n. matplotlib is imported only where something is drawn."""

from pathlib import Path


def draw_heatmap(
    path: Path, panels: dict, task: str, lengths: list, depths: list, windows: dict
) -> None:
    """panels: label -> {(length, depth): (mean score, n)}. One panel a model; the trained window
    is marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 0.9 * len(lengths) * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (label, cells) in zip(axes, panels.items(), strict=True):
        grid = [[cells.get((n, d), (float("nan"), 0))[0] for n in lengths] for d in depths]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for row, d in enumerate(depths):
            for column, n in enumerate(lengths):
                if (n, d) in cells:
                    axis.text(
                        column, row, f"{cells[n, d][0]:.0%}", ha="center", va="center", fontsize=8
                    )
        inside = sum(n <= windows[label] for n in lengths)
        if 0 < inside < len(lengths):
            axis.axvline(inside - 0.5, color="black", linestyle="--")
        axis.set_xticks(range(len(lengths)), [f"{n / 1024:g}k" for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        each = sorted({n for _, n in cells.values()})
        axis.set_title(f"{label}\nn = {'-'.join(map(str, each))} a cell", fontsize=9)
        axis.set_xlabel("context length (tokens)")
    axes[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=axes, label=f"{task}: share of answers found")
    figure.savefig(path, dpi=130)


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
