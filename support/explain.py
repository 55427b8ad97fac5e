"""What `python recipe.py` counts on one sample, and the words for it. support/explain_figure.py
draws the same numbers."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from support.config_files import read_json
from support.toy import TINY

# what was found for SmolLM2, as an example, and for the embedded model
EXAMPLE = "assets/results/smollm2_16k/longrecipe/impactful.json"
OF_THE_TOY = Path(TINY).parent / "results" / "tiny_128k" / "impactful.json"
NO_ANALYSIS = f"""\
no --impactful FILE: tokens with a digit stand in for the impactful ones here, as in the released
code; train.py finds them by its analysis. What it found for SmolLM2:
    --model models/smollm2 --impactful {EXAMPLE}
"""
FULL = "full length"  # what the methods are to replace: plain positions over the whole target

# ---- which distances are trained ---------------------------------------------------------------


def distance_counts(positions: Tensor, target_len: int) -> Tensor:
    """How many pairs i < j of a sample have p_j - p_i = d, exactly: strictly increasing positions
    (L,) below T* -> (T*,) int64 by d; the entry of d = 0 is 0.

    >>> distance_counts(torch.tensor([0, 1, 3]), 5).tolist()
    [0, 1, 1, 1, 0]
    """
    # With x[p] = 1 where a token stands, count(d) = sum over p of x[p] x[p + d]: a correlation,
    # taken by FFT. Twice as long, for it is cyclic; integers below 2^53, so rounding is exact.
    present = torch.zeros(2 * target_len, dtype=torch.float64)
    present[positions] = 1
    power = torch.fft.rfft(present).abs().square()
    counts = torch.fft.irfft(power, n=2 * target_len)[:target_len].round().long()
    counts[0] = 0
    return counts


@dataclass(frozen=True)
class Distances:
    """The pairs of `draws` samples, by distance."""

    draws: int
    counts: Tensor  # (T*,) int64, all draws together
    covered_by_one: float  # share of the distances 1..T*-1 that a sample holds, on average
    covered: float  # that all draws together hold
    mean: float  # distance of two tokens

    @classmethod
    def of(cls, draws: list[Tensor], target_len: int) -> "Distances":
        each = [distance_counts(p, target_len) for p in draws]
        counts = torch.stack(each).sum(0)
        shares = [float((c[1:] > 0).double().mean()) for c in (*each, counts)]
        mean = float((counts * torch.arange(target_len)).sum() / counts.sum())
        return cls(len(draws), counts, sum(shares[:-1]) / len(draws), shares[-1], mean)


# ---- which angles are new ----------------------------------------------------------------------


def meets_new_angles(old: Tensor, now: Tensor, old_len: int, target_len: int) -> Tensor:
    """Which pairs of dimensions meet angles below target_len that they never met below old_len?

    old, now: radians per position of each pair (d/2,) before and after, now <= old -> bool (d/2,).
    In its old window L0 a pair met the angles 0, w, 2w .. (L0-1)w. A wavelength 2 pi / w of at
    most L0 positions: they go round the whole circle, in steps of at most w, and nothing is new.
    A longer one: they end at (L0-1)w, short of a turn by more than a step; what is beyond is new."""
    old, now = old.double(), now.double()
    whole_circle = old * old_len >= 2 * math.pi
    return ~whole_circle & (now * (target_len - 1) > old * (old_len - 1))


@dataclass(frozen=True)
class Angles:
    """The pairs of dimensions before and after the change of the RoPE base."""

    old_len: int
    target_len: int
    bases: tuple[float, float]
    old: Tensor  # (d/2,) radians per position
    new: Tensor

    @property
    def before(self) -> Tensor:
        return meets_new_angles(self.old, self.old, self.old_len, self.target_len)

    @property
    def after(self) -> Tensor:
        return meets_new_angles(self.old, self.new, self.old_len, self.target_len)


# ---- the words ---------------------------------------------------------------------------------


def known_analysis(folder: str) -> Path | None:
    """The impactful.json beside a model that train.py made, or of a kept run of the toy."""
    if (Path(folder) / "impactful.json").is_file():
        return Path(folder) / "impactful.json"
    return OF_THE_TOY if Path(folder).resolve() == Path(TINY).resolve() else None


def by_count(table: Tensor, ids: Tensor) -> dict[int, str]:
    """The types of a table, bool (V,), those first that the text holds most often."""
    count = torch.bincount(ids, minlength=len(table))
    types = table.nonzero()[:, 0]
    return dict.fromkeys(types[count[types].argsort(descending=True)].tolist(), "")


def ranked_types(file: str | Path) -> dict[int, str]:
    """token id -> mean shift, in words, of an impactful.json, largest first; a table made by hand
    may have no shifts."""
    found = read_json(Path(file)).items()
    with_shift = {i: v[1] for i, v in found if isinstance(v, list) and len(v) == 2}
    return {int(i): f"{with_shift[i]:+.1f}" if i in with_shift else "" for i, _ in found}


def tell_types(ranked: dict[int, str], source: str, ids: Tensor, starts: Tensor, tokenizer) -> None:
    """The first of the impactful types that the text holds, each with a sentence that it is in."""
    count = torch.bincount(ids, minlength=tokenizer.vocab_size)
    table = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    table[list(ranked)] = True
    print(
        f"impactful types: {len(ranked):,} of {tokenizer.vocab_size:,}, {source};"
        f" {table[ids].double().mean():.1%} of this text's tokens are of them"
    )
    print("   shift  times  type, in [] within a sentence of the text")
    for v in [v for v in ranked if count[v]][:8]:
        t = int((ids == v).nonzero()[0])
        segment = int(torch.searchsorted(starts, t, right=True)) - 1
        begin, end = starts.tolist()[segment], [*starts.tolist(), len(ids)][segment + 1]
        before, own, after = (
            tokenizer.decode(part.tolist())
            for part in (ids[begin:t], ids[t : t + 1], ids[t + 1 : end])
        )
        sentence = f"{before[-30:]}[{own}]{after[:30]}"
        print(f"{ranked[v]:>8}  {count[v]:>5,}  {' '.join(sentence.split())}")


def tell_selection(
    ids: Tensor, starts: Tensor, share: Tensor, taken: Tensor, kept: int, tokenizer, select: str
) -> None:
    """What became of the segments (N,) of a text, and why: share of impactful tokens, taken."""
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


def tell_positions(positions: dict[str, Tensor], found: dict[str, Distances]) -> None:
    """Where each method puts the tokens of the sample, and which distances it trains."""
    draws = max(d.draws for d in found.values())
    print(
        f"\n{'':>54}share of all distances that are trained\n"
        f"{'method':>12}  {'position ids':<12}  {'jumps':>8}  {'mean distance':>13}"
        f"  {'by one sample':>13}  {f'by {draws}':>6}"
    )
    for method, d in found.items():
        p = positions.get(method)
        last = len(d.counts) - 1 if p is None else int(p[-1])
        jumps = 0 if p is None else int((p.diff() > 1).sum())
        print(
            f"{method:>12}  {f'0..{last:,}':<12}  {jumps:>8,}  {d.mean:>13,.0f}"
            f"  {d.covered_by_one:>13.1%}  {d.covered:>6.1%}"
        )


def tell_angles(angles: Angles | str) -> None:
    """How many pairs of dimensions meet angles that the base model never saw."""
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
        f"pairs that meet angles at {a.target_len:,} tokens which the base model never saw:\n"
        f"   before: {int(a.before.sum())} of {pairs}, with the old base {a.bases[0]:,.0f}\n"
        f"   after:  {int(a.after.sum())} of {pairs}, with the new base {a.bases[1]:,.0f}"
    )
