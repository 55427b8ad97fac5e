"""Exercise 3, what is wrong with these samples: `python examples/exercises/pose_defect.py`

`black_box` draws position ids as the released code's PoSE does; you may not look inside. PoSE as
published [E7] puts one jump of u ~ U{0..T-L} at r ~ U{1..(L+1)//2}. What a set of samples tells:
  1. How many are plain, 0..L-1? As published, u = 0: one in T - L + 1. Here: more than half.
  2. Where the others jump. As published, in the first half; here anywhere in the sample, every
     place equally likely. So the split is drawn from a range that the sample does not cover, and is
     beyond its end in the other cases. If the range holds R places, L of them within the sample,
     then plain = 1 - L / R, so R = L / (1 - plain). That comes out as T - L + 1: the range of the
     SKIP, taken for the split.
  3. How far they jump. As published, independent of the place; here the skip is never below the
     split: it is drawn from {r..T-L}. So short jumps are missing as well.
A baseline trained on these sees plain samples more than half of the time.
"""

import random
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from recipe import sample_position_ids

L, T, N = 600, 2000, 4000  # tokens, positions (the paper's 24k and 80k, made smaller), samples


def diagnose(samples: Tensor, target_len: int) -> dict[str, float]:
    """Position ids (N, L) -> share that is plain, size of the range of the split, the last split in
    units of L, smallest (skip - split) of those that jump, and what the published PoSE would give
    for the first."""
    n, length = samples.shape
    skip = samples[:, -1] - (length - 1)  # whatever is skipped, is skipped before the last token
    jumps = skip > 0
    split = (samples == torch.arange(length)).long().cumprod(1).sum(1)  # tokens before the jump
    plain = 1 - jumps.double().mean()
    return {
        "plain": float(plain),
        "plain, as published": 1 / (target_len - length + 1),
        "range of the split": float(length / (1 - plain)),
        "last split / L": float(split[jumps].max() / length),
        "least skip - split": int((skip - split)[jumps].min()),
    }


def published(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([sample_position_ids("pose", L, T, None, generator) for _ in range(N)])


def main() -> None:
    rows = {"black box": diagnose(black_box(), T), "published": diagnose(published(), T)}
    print(f"{N:,} samples of {L} tokens, target {T:,}; T - L + 1 = {T - L + 1:,}")
    for name in rows["published"]:
        print(f"{name:20}" + "".join(f"  {who}: {row[name]:10.4g}" for who, row in rows.items()))


def black_box(seed: int = 0) -> Tensor:
    """Position ids (N, L). Do not read on before you have looked at the samples."""
    rng, rows = random.Random(seed), []
    for _ in range(N):
        split = rng.randint(0, T - L)
        skip = rng.randint(split, T - L)
        rows.append([*range(split), *range(split + skip, L + skip)][:L])
    return torch.tensor(rows)


if __name__ == "__main__":
    main()
