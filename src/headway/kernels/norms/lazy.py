"""Triton bodies that are imported when the first CUDA tensor comes; the plain body where there is no Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec


@cache
def _triton_bodies():
    if os.environ.get("HEADWAY_KERNELS") == "reference" or find_spec("triton") is None:
        return None
    return import_module("headway.kernels.norms.cuda")


def on_cuda(name: str, plain: Callable) -> Callable:
    """The CUDA body ``headway.kernels.norms.cuda.<name>``, or ``plain``, decided at the first call."""

    def body(*arguments):
        bodies = _triton_bodies()
        return plain(*arguments) if bodies is None else getattr(bodies, name)(*arguments)

    return body
