"""The words of `python recipe.py`; support/explain/figure.py draws the same numbers."""

import math
from pathlib import Path

import torch
from torch import Tensor

from support.data.toy import TINY
from support.explain.distances import DRAWS, Angles, Distances, Samples
from support.huggingface.config import read_json

# the recorded analyses of SmolLM2 and of the embedded model
EXAMPLE = "assets/results/smollm2_16k/longrecipe/impactful.json"
OF_THE_TOY = Path(TINY).parent / "results" / "tiny_128k" / "impactful.json"
NO_ANALYSIS = f"""\
no --impactful FILE: tokens with a digit count as impactful here, as in the released
code; train.py finds them by its analysis. What it found for SmolLM2:
    --model models/smollm2 --impactful {EXAMPLE}
"""


def known_analysis(folder: str) -> Path | None:
    """The impactful.json beside a model that train.py made, or of a kept run of the toy."""
    if (Path(folder) / "impactful.json").is_file():
        return Path(folder) / "impactful.json"
    return OF_THE_TOY if Path(folder).resolve() == Path(TINY).resolve() else None


def mean_shifts(file: str | Path) -> dict[int, str]:
    """token id -> mean shift of an impactful.json, in its order: largest first. A table made by
    hand may have no shifts."""
    shifts = {}
    for name, row in read_json(Path(file)).items():
        shift = row[1] if isinstance(row, list) and len(row) == 2 else None
        shifts[int(name)] = f"{shift:+.1f}" if isinstance(shift, int | float) else ""
    return shifts


def tell_types(file: str | Path | None, impactful: Tensor, ids: Tensor, tokenizer) -> None:
    """Print the first impactful types, bool (V,), that occur in the text, with what is around them.
    file: where they are from, in order of mean shift; None: types with a digit, by count."""
    count = torch.bincount(ids, minlength=len(impactful))
    if file is None:
        print(NO_ANALYSIS)
        shifts = dict.fromkeys(count.argsort(descending=True).tolist(), "")
    else:
        shifts = mean_shifts(file)
    print(
        f"impactful types: {int(impactful.sum()):,} of {len(impactful):,}"
        f" ({file or 'those with a digit'}); {impactful[ids].double().mean():.1%} of this text's"
        " tokens are of them\n"
        "   shift  times  type, in [] where the text has it first (shift: mean, in logits, or in"
        " nats after --log_softmax)"
    )
    for v in [v for v in shifts if count[v] and impactful[v]][:8]:
        first = int((ids == v).nonzero()[0])
        parts = ids[max(0, first - 8) : first], ids[first : first + 1], ids[first + 1 : first + 9]
        before, own, after = (tokenizer.decode(part.tolist()) for part in parts)
        print(f"{shifts[v]:>8}  {count[v]:>5,}  {' '.join(f'{before}[{own}]{after}'.split())}")


def tell_selection(
    ids: Tensor, starts: Tensor, share: Tensor, taken: Tensor, kept: int, tokenizer, select: str
) -> None:
    """Print what selection keeps of a text's segments (N,), by their share of impactful tokens."""
    hit = share > 0
    print(
        f"\ntext: {len(ids):,} tokens in {len(starts):,} segments;"
        f" {(~hit).double().mean():.1%} hold no impactful token (the paper drops those)\n"
        f"sample: {kept:,} tokens in {int(taken.sum()):,} segments, chosen by {select}\n"
        f"   keep: {int((taken & hit).sum()):,} that hold impactful tokens; their share of such"
        f" tokens is {mean_share(share, taken & hit)}\n"
        f"   fill: {int((taken & ~hit).sum()):,} that hold none, where the others are too few\n"
        f"   drop: {int((~taken).sum()):,}; their share of impactful tokens is"
        f" {mean_share(share, ~taken)}\n\n"
        "verdict  impactful  segment (the first 12; impactful: share of its tokens)"
    )
    for i, segment in enumerate(ids.tensor_split(starts[1:13])[:12]):
        verdict = ("keep" if hit[i] else "fill") if taken[i] else "drop"
        print(f"{verdict:>7}  {share[i]:>9.0%}  {tokenizer.decode(segment.tolist())!r}")


def mean_share(share: Tensor, of: Tensor) -> str:
    return f"{share[of].mean():.0%} on average" if of.any() else "none"


def tell_positions(samples: Samples, found: dict[str, Distances]) -> None:
    """Print where each method puts the tokens of the sample, and which distances it trains."""
    print(
        f"\n{'':>54}share of all distances that are trained\n"
        f"{'method':>12}  {'position ids':<12}  {'jumps':>8}  {'mean distance':>13}"
        f"  {'by one sample':>13}  {f'by {DRAWS}':>6}"
    )
    for method, d in found.items():
        _, positions = samples[method]
        last, jumps = int(positions[-1]), int((positions.diff() > 1).sum())
        print(
            f"{method:>12}  {f'0..{last:,}':<12}  {jumps:>8,}  {d.mean:>13,.0f}"
            f"  {d.covered_by_one:>13.1%}  {d.covered:>6.1%}"
        )


def tell_angles(angles: Angles | str) -> None:
    """Print how many pairs of dimensions meet angles that the original model never met."""
    if isinstance(angles, str):
        print(f"\n{angles}")
        return
    a, pairs = angles, len(angles.old)
    part = int((a.old * a.old_len < 2 * math.pi).sum())
    longest = 2 * math.pi / float(a.old[-1])
    print(
        f"\nRoPE: {pairs} pairs of dimensions turn with the position. Within the old window of"
        f" {a.old_len:,} tokens, {pairs - part} of\nthem went round the whole circle; {part} did"
        f" not (the slowest takes {longest:,.0f} tokens for a turn).\n"
        f"pairs that meet angles at {a.target_len:,} tokens which the original model never saw:\n"
        f"   before: {int(a.before.sum())} of {pairs}, with the old theta {a.thetas[0]:,.0f}\n"
        f"   after:  {int(a.after.sum())} of {pairs}, with the new theta {a.thetas[1]:,.0f}"
    )
