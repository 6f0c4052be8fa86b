"""How a hot operation becomes a ``torch.library`` operator with several bodies.

An operation ``name`` lives in ``kernels/name/``: ``reference.py`` is plain torch (the truth), ``csrc/name.cpp`` the CPU body,
``cuda.py`` the Triton body, ``__init__.py`` the public function. The schema, the fake implementation and the backward are
registered here, once, so that ``torch.compile``, autocast and ``opcheck`` hold whichever body runs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache

import torch

from headway.kernels.build import NATIVE, is_fresh

_LIBRARY = torch.library.Library("headway", "FRAGMENT")
# entering this guard skips the autograd dispatch keys; it costs a fraction of a microsecond
below_autograd = torch._C._AutoDispatchBelowAutograd


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` with an ``apply`` of a third the cost: without the steps that serve functorch's transforms alone.

    Those transforms are refused with PyTorch's own words, as for any ``Function`` without ``setup_context``.
    """

    @classmethod
    def apply(cls, *args):
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


@cache
def load(operation: str) -> bool:
    """Loads the C++ body of ``operation`` if it was built; False (and plain torch) otherwise.

    A body built from other sources than those beside it may not fit the operators; it is left alone, with a warning.
    ``HEADWAY_KERNELS=reference`` in the environment keeps every operation on plain torch.
    """
    library = NATIVE / f"{operation}.so"
    if os.environ.get("HEADWAY_KERNELS") == "reference" or not library.exists():
        return False
    if not is_fresh(operation):
        warnings.warn(
            f"the {operation} kernel was built from other sources than those here and plain PyTorch runs instead; build it again "
            "with `python -m headway.kernels.build`",
            stacklevel=2,
        )
        return False
    try:
        torch.ops.load_library(str(library))
    except OSError:
        return False
    return True


def define(
    schema: str,
    reference: Callable,
    fake: Callable | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    native: str | None = None,
    cuda: Callable | None = None,
) -> torch._ops.OpOverload:
    """Registers ``headway::<schema>`` and returns the operator.

    Args:
        schema: e.g. ``"rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)"``.
        reference: plain torch on plain tensors; the body of every device that has no better one.
        fake: shapes and dtypes only, for ``torch.compile`` (default: the reference on meta tensors).
        setup_context, backward: as in ``torch.library.register_autograd``.
        native: stem of the ``csrc/`` file whose library holds the CPU body (``STABLE_TORCH_LIBRARY_IMPL(headway, CPU, m)``).
        cuda: the Triton body, if any.
    """
    name = schema.split("(", 1)[0].strip()
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if native is not None:
        load(native)
    if cuda is not None:
        _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"headway::{name}", fake or reference, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"headway::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.headway, name).default


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd has to see the call: gradients are on and one of the tensors asks for one."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def status() -> dict[str, bool]:
    """Which operations run in C++ here: {operation: loaded}."""
    from headway.kernels.build import BuildError, sources

    try:
        known = {source.stem for source in sources().glob("*.cpp")}
    except BuildError:
        known = {library.stem for library in NATIVE.glob("*.so")}
    return {operation: load(operation) for operation in sorted(known)}
