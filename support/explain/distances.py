"""Which distances of two tokens, and which angles of RoPE, does a sample of positions train?"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from support.huggingface.config import read_config
from support.system.bad_input import BadInput

DRAWS = 16  # samples of each method whose distances are counted
Samples = dict[str, tuple[str, Tensor]]  # method -> a few words, position ids (L,)

# ---- which distances are trained ---------------------------------------------------------------


def distance_counts(positions: Tensor, target_len: int) -> Tensor:
    """How many pairs i < j of a sample have p_j - p_i = d, exactly: strictly increasing positions
    (L,) below T* -> (T*,) int64 by d; the entry of d = 0 is 0.

    >>> distance_counts(torch.tensor([0, 1, 3]), 5).tolist()
    [0, 1, 1, 1, 0]
    """
    # With x[p] = 1 where there is a token, count(d) = sum over p of x[p] x[p + d]: a correlation by
    # FFT, twice as long since that is cyclic. Integers below 2^53: rounding gives them exactly.
    present = torch.zeros(2 * target_len, dtype=torch.float64)
    present[positions] = 1
    power = torch.fft.rfft(present).abs().square()
    counts = torch.fft.irfft(power, n=2 * target_len)[:target_len].round().long()
    counts[0] = 0
    return counts


@dataclass(frozen=True)
class Distances:
    """The pairs of tokens of some samples, by distance."""

    pairs: Tensor  # (T*,) int64, of the first sample
    covered_by_one: float  # share of the distances 1..T*-1 that a sample holds, on average
    covered: float  # that all samples together hold
    mean: float  # distance of two tokens

    @classmethod
    def of(cls, samples: list[Tensor], target_len: int) -> "Distances":
        each = [distance_counts(positions, target_len) for positions in samples]
        counts = torch.stack(each).sum(0)
        *shares, covered = (float((c[1:] > 0).double().mean()) for c in (*each, counts))
        mean = int((counts * torch.arange(target_len)).sum()) / int(counts.sum())
        return cls(each[0], sum(shares) / len(samples), covered, mean)


# ---- which angles are new ----------------------------------------------------------------------


def meets_new_angles(old: Tensor, now: Tensor, old_len: int, target_len: int) -> Tensor:
    """Which pairs of dimensions meet angles below target_len that they never met below old_len?

    old, now: radians per position of each pair (d/2,) before and after, now <= old -> bool (d/2,).
    In its old window L0 a pair met the angles 0, w, 2w .. (L0-1)w. Wavelength 2 pi / w of at most
    L0 positions: they go round the whole circle, in steps of at most w, and nothing is new. A
    longer one: they end at (L0-1)w, short of a turn by more than a step; what is beyond is new."""
    old, now = old.double(), now.double()
    whole_circle = old * old_len >= 2 * math.pi
    return ~whole_circle & (now * (target_len - 1) > old * (old_len - 1))


@dataclass(frozen=True)
class Angles:
    """The pairs of dimensions before and after the change of rope_theta."""

    old_len: int
    target_len: int
    thetas: tuple[float, float]
    old: Tensor  # (d/2,) radians per position
    new: Tensor
    before: Tensor  # (d/2,) bool: pairs that meet new angles under the old theta
    after: Tensor  # under the new one


def angles_of(folder: str, target_len: int, frequencies: Callable, new_theta: Callable) -> Angles:
    """Those of a model folder, by inverse_frequencies of model.py and ntk_rope_base of recipe.py.
    BadInput says why there are none."""
    c = read_config(folder)
    if c["rope_scaling"]:
        raise BadInput("the model already scales it (train.py then needs --rope_base)")
    head_dim, theta, old_len = c["head_dim"], c["rope_theta"], c["max_position_embeddings"]
    thetas = theta, new_theta(theta, head_dim, old_len, target_len)
    old, new = (frequencies(head_dim, t) for t in thetas)
    met = (meets_new_angles(old, now, old_len, target_len) for now in (old, new))
    return Angles(old_len, target_len, thetas, old, new, *met)
