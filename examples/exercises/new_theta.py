"""Answer to exercise 1: where does the new theta of [E8] come from?

    python examples/exercises/new_theta.py

Pair j of the d/2 pairs of dimensions turns by theta_j = theta^(-2j/d) radians a position [E1].
A longer window should not ask the model to read angles that it has never met, so:
  - the fastest pair (j = 0, one radian a position whatever theta is) stays as it is: it tells
    neighbours apart, and has been round its circle thousands of times;
  - the slowest pair (2j = d - 2) has not been round once, so it has to turn s times slower.
    NTK-aware scaling takes s = f * T / L0 - (f - 1), which is 1 at T = L0: nothing changes there;
  - the pairs between follow from theta alone: one number for all of them.
The second line is an equation for the new theta':
    theta'^(-(d-2)/d) = theta^(-(d-2)/d) / s     <=>     theta' = theta * s^(d/(d-2))     [E8]
Below it is solved without that last step, by bisection, and compared.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from model import inverse_frequencies
from recipe import ntk_rope_base

PAPER = {  # table 4: model and window -> (theta, d, L0, T, f), new theta in millions
    "Llama3-8B, 80k": ((5e5, 128, 8_192, 81_920, None), 48.9),
    "Llama3-8B, 128k": ((5e5, 128, 8_192, 131_072, None), 131.5),
    "Qwen2-7B, 128k": ((1e6, 128, 32_768, 131_072, 4.0), 13.5),
}


def theta_by_bisection(theta: float, d: int, L0: int, T: int, f: float | None = None) -> float:
    """The new theta, under which the slowest pair turns s times slower than under the old one."""
    f = T / L0 if f is None else f
    s = f * T / L0 - (f - 1)

    def slowest(x: float) -> float:  # radians a position
        return x ** (-(d - 2) / d)

    low, high = theta, theta * s**3  # slowest() falls as its argument grows
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slowest(middle) > slowest(theta) / s else (low, middle)
    return low


def pairs_with_new_angles(theta: float, new: float, d: int, L0: int, T: int) -> int:
    """Pairs that meet an angle in T positions under the theta `new` that they never met in L0:
    those that had not been round their circle, and now turn further than they had."""
    before = inverse_frequencies(d, theta).double() * L0
    after = inverse_frequencies(d, new).double() * T
    return int(((before < 2 * math.pi) & (after > before)).sum())


def main() -> None:
    print(f"{'':16} paper  formula  bisection  pairs with new angles: old theta, x T/L0, new theta")
    for name, ((theta, d, L0, T, f), paper) in PAPER.items():
        found, formula = theta_by_bisection(theta, d, L0, T, f), ntk_rope_base(theta, d, L0, T, f)
        new = [pairs_with_new_angles(theta, b, d, L0, T) for b in (theta, theta * T / L0, formula)]
        print(
            f"{name:16} {paper:5.1f}  {formula / 1e6:7.1f}  {found / 1e6:9.1f}"
            f"  {new[0]:26}, {new[1]:6}, {new[2]:8}    of {d // 2}"
        )


if __name__ == "__main__":
    main()
