"""Weights back to the norms they had: W <- rho W / ||W|| over whole lists of tensors.

The C++ body reads a tensor for its norm and scales it right after, from its far end backwards, so that what the caches still hold
of it is read from there: beyond the caches two reads and a write of the weights, three streams of memory against the seven of a step
of AdamW. A factor that would round to 1 writes nothing. :mod:`.reference` is the truth it is tested against.

``adam_to_sphere_`` makes a step of Adam first and sums the squares of what it writes, which saves the reading, and the writing of
what the caches still hold.

Operators, in place: ``to_sphere_(params, rho, missed, near, rows)`` and ``adam_to_sphere_(params, grads, exp_avgs, exp_avg_sqs, steps,
rho, missed, lr, beta1, beta2, eps, maximize, rows)``, float32 or float64. ``rho`` are 0-dim tensors, or (rows,) where ``rows``;
``missed``, 0-dim int64, counts norms that are not finite, whose tensors stay as they are; factors within ``near`` of 1 wait.
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

adam_to_sphere_ = define(
    "adam_to_sphere_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor[] rho, Tensor(e!) missed, float lr, float beta1, float beta2, float eps, bool maximize, bool rows) -> ()",
    reference.adam_to_sphere_,
    _nothing,
)
