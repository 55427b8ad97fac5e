"""RoPE scalings that a checkpoint may bring along: `linear` (position interpolation) and
`llama3`."""

import math

from torch import Tensor


def scale_frequencies(inv_freq: Tensor, scaling: dict) -> Tensor:
    """inv_freq (d/2,) fp32 radians per position -> the same, scaled as config.json says."""
    slow = inv_freq / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    # llama3: pairs that turn often within the original window stay as they are, those that turn
    # rarely slow down by the factor, the ones between are blended.
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    stay = ((turns - low) / (high - low)).clamp(0, 1)
    return stay * inv_freq + (1 - stay) * slow
