"""Safety minus utility: the weights that matter to refusals and not to ordinary answers.

Wei et al. 2024, "Assessing the Brittleness of Safety Alignment via Pruning and Low-Rank
Modifications" (arXiv 2402.05162), section 3.2: the top-q safety scores without the top-p utility
scores. Their set has what is left of q; ours is filled up to tau, so that masks of every kind can
be compared at an equal number of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from qresafe.core.masks import LazyScores, iter_top_fraction, pack_bits, unpack_bits


def set_difference(
    safety: Mapping[str, Tensor], utility: Mapping[str, Tensor], utility_tau: float
) -> LazyScores:
    """Return the safety scores, with 0 wherever the utility score is among the top `utility_tau`.

    Holds one bit per weight, and one layer's scores at a time.

    Args:
        safety: Layer name -> scores >= 0, e.g. SNIP of refusals.
        utility: The same layers, e.g. SNIP of ordinary answers.
        utility_tau: Fraction of the weights, over all layers, that utility keeps to itself; a
            later tau above 1 - `utility_tau` has to take some of them.

    Raises:
        ModelError: A utility score is not finite, or negative.
    """
    kept = {name: pack_bits(mask) for name, mask in iter_top_fraction(utility, utility_tau)}

    def maker(name: str) -> Callable[[], Tensor]:
        def scores() -> Tensor:
            mine = safety[name]
            taken = unpack_bits(kept[name], tuple(mine.shape)).to(mine.device)
            return mine.masked_fill(taken, 0.0)

        return scores

    return LazyScores({name: maker(name) for name in safety})
