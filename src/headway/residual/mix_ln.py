"""Mix-LN: Post-LN in the first quarter of the layers, Pre-LN above.

    i <  n_post:  x <- N_a(x + Attn(x)),  x <- N_m(x + MLP(x))          n_post = floor(alpha * L), alpha = 0.25
    i >= n_post:  x <- x + Attn(N_a(x)),  x <- x + MLP(N_m(x))          and the usual final norm

Under Pre-LN the deep layers receive small gradients and come close to the identity; under Post-LN the early ones starve. One
boundary between the two makes gradients more even. Li, Yin, Liu: Mix-LN: Unleashing the Power of Deeper Layers by Combining
Pre-LN and Post-LN, 2024 (arXiv 2412.13795). Reach for it when training a decoder of moderate depth from scratch with warm-up; a
later study could not train it at 350M and 1B parameters (arXiv 2502.05795), and under stochastic depth a skipped Post-LN
sub-layer must still be normalised.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from headway.residual.placement import Placement


@dataclass(frozen=True)
class MixLN(Placement):
    """Makes the first ``floor(alpha * L)`` layers Post-LN and the rest Pre-LN; parameters and their names stay as they are.

    Args:
        alpha: share of Post-LN layers, 0 (plain Pre-LN) to 1 (plain Post-LN).
        order: "post_pre", or the reverse "pre_post".
        n_post: the number of Post-LN layers itself, instead of ``alpha``.
    """

    scheme: str = field(default="mix", init=False)
