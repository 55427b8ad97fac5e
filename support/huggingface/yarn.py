"""RoPE type yarn (Peng et al., 2309.00071): which pairs of dimensions slow down, and by what factor
all cosines and sines are multiplied. model.py calls both with the rope_scaling of its config."""

import math

import torch
from torch import Tensor


def share(head_dim: int, theta: float, scaling: dict) -> Tensor:
    """How much of its own frequency each pair keeps under yarn (Peng et al., 2309.00071, section
    3.2), (d/2,) fp32 in 0..1. Fields that `scaling` lacks are transformers' defaults."""
    L0 = scaling["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        # [E27] pair(n) = d ln(L0 / (2 pi n)) / (2 ln theta)    turns n times within L0 positions
        return head_dim * math.log(L0 / (2 * math.pi * turns)) / (2 * math.log(theta))

    first, last = pair(scaling.get("beta_fast", 32)), pair(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    i = torch.arange(head_dim // 2, dtype=torch.float32)
    # [E27] share(i) = 1 for i <= first, 0 for i >= last, and falls linearly in between
    return 1 - ((i - first) / ((last - first) or 0.001)).clamp(0, 1)


def attention_factor(scaling: dict) -> float:
    """What the cosines and sines of RoPE are multiplied by (2309.00071, section 3.4)."""
    if "attention_factor" in scaling:
        return scaling["attention_factor"]

    def growth(m: float) -> float:
        # [E28] a(m) = 1 + 0.1 m ln(factor);   attention factor = a(mscale) / a(mscale_all_dim),
        #       or a(1) unless both are given
        return 1 + 0.1 * m * math.log(max(1, scaling["factor"]))

    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return growth(scaling["mscale"]) / growth(scaling["mscale_all_dim"])
    return growth(1)
