"""Weights back to the norms they had: W <- rho W / ||W|| over whole lists of tensors.

The C++ body reads a tensor for its norm and scales it right after, from its far end backwards, so that what the caches still hold
of it is read from there: beyond the caches two reads and a write of the weights, three streams of memory against the seven of a step
of AdamW. A factor that would round to 1 writes nothing. :mod:`.reference` is the truth it is tested against.

Operator, in place: ``to_sphere_(params, rho, missed, near, rows)``. ``rho`` are 0-dim tensors, or (rows,) where ``rows``; ``missed``,
0-dim int64, counts norms that are not finite, whose tensors stay as they are; factors within ``near`` of 1 wait.
"""

from __future__ import annotations

from headway.kernels.library import define, load
from headway.kernels.sphere import reference

built = load("sphere")
"""Whether the C++ body is there."""


def _nothing(*_: object) -> None:
    pass


to_sphere_ = define(
    "to_sphere_(Tensor(a!)[] params, Tensor[] rho, Tensor(b!) missed, float near, bool rows) -> ()",
    reference.to_sphere_,
    _nothing,
)
