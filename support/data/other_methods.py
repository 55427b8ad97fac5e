"""The position methods that LongRecipe is compared with; recipe.METHODS has them. Each: sample
length L, target T*, starts of the sample's segments (not used here), generator -> position ids
(L,) int64."""

from collections.abc import Callable

import torch
from torch import Tensor

from support.system.bad_input import BadInput


def uniform(low: int, high: int, generator: torch.Generator | None) -> int:
    """A random integer, both ends included."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def one_jump(L: int, T: int, starts: Tensor | None, generator) -> Tensor:
    """pose (Zhu et al., 2309.10400): two contiguous pieces with one jump between them."""
    # [E7] pos(i) = i for i < r, i + u for i >= r;   r ~ U{1..(L+1)//2}, u ~ U{0..T*-L}
    r, u = uniform(1, (L + 1) // 2, generator), uniform(0, T - L, generator)
    plain = torch.arange(L)
    return torch.cat((plain[:r], plain[r:] + u))


END_TOKENS = 20  # m of endprompt


def end_at_target(L: int, T: int, starts: Tensor | None, generator) -> Tensor:
    """endprompt (2605.14589): plain positions, but the last m tokens end at the target."""
    if L <= END_TOKENS:
        raise BadInput(f"method endprompt needs more than {END_TOKENS} tokens (--train_len {L})")
    # [E25] pos(i) = i for i < L - m, i + T* - L for i >= L - m;   m = 20: the end is at T*-m..T*-1
    positions = torch.arange(L)
    positions[-END_TOKENS:] += T - L
    return positions


def gaussian_middle(L: int, T: int, starts: Tensor | None, generator) -> Tensor:
    """cream (Wu et al., 2406.07138): the head of the sample at 0.., its tail at the end of the
    target, and the middle in one piece between them, at a place drawn by a truncated Gaussian.

    T* / L need not be whole, as it is in their code, so a is not rounded; head and tail are at most
    a third of a sample each. docs/differences.md tells where their code and our way differ."""
    mean, sigma = 1 + T / L, 3.0
    bounds = torch.tensor([2, 2 * T / L], dtype=torch.float64)
    # [E26] h = L // 3 or 4 T* / L tokens of head and of tail, a coin says which;   m = L - 2 h
    #       a ~ N(1 + T* / L, 3^2), truncated to 2 .. 2 T* / L;   W = a L / 2, so L <= W <= T*
    #       last position of the middle ~ U{h + (m - 1) W / L .. W - h - 1}
    h = L // 3 if uniform(0, 1, generator) == 0 else min(4 * T // L, L // 3)
    m = L - 2 * h
    below, above = torch.special.ndtr((bounds - mean) / sigma)  # N's probability up to the bounds
    u = below + (above - below) * torch.rand((), dtype=torch.float64, generator=generator)
    a = (mean + sigma * torch.special.ndtri(u)).clamp(*bounds)
    # subtle: with W a whole number in L..T*, the range of the middle can be neither empty nor
    # overlap head or tail, whatever rounding does.
    W = min(max(int(a * L / 2), L), T)
    last = uniform(h + (m - 1) * W // L, W - h - 1, generator)
    positions = torch.arange(L)
    positions[h : h + m] += last - (h + m - 1)
    positions[h + m :] += T - L
    return positions


def random_subset(L: int, T: int, starts: Tensor | None, generator) -> Tensor:
    """rpes (Ruoss et al., 2305.16843): random positions in order, a jump at nearly every token."""
    # [E15] pos(0) < pos(1) < ... : every subset of L of the T* positions is equally likely
    return torch.randperm(T, generator=generator)[:L].sort().values


# --method: what the figures call it, and its function
OTHERS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "pose": ("one jump", one_jump),
    "endprompt": (f"the last {END_TOKENS} tokens jump", end_at_target),
    "cream": ("head, middle and tail", gaussian_middle),
    "rpes": ("random positions", random_subset),
}
