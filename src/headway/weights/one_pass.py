"""Adam's step and the way back to the sphere in one pass over the weights, for ``torch.optim.Adam`` and ``AdamW`` as they are.

Projecting after the step reads every weight once more and writes it once more. Where the optimiser was built with ``fused=True`` on a
CPU, a hook before its step moves the weights on spheres itself (:mod:`headway.kernels.sphere`), in the optimiser's own state and with
its own settings, and keeps their gradients from it until the step is over; everything else is stepped as ever. Whatever the one pass
does not do (AMSGrad, weight decay, low precision, a closure, a GradScaler at work, parts in several processes, hooks that come after
it) is left to the optimiser, and projected afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from headway.kernels import sphere
from headway.kernels.radial import runs_of_rows
from headway.weights import spheres

if TYPE_CHECKING:
    from headway.weights.project import NaP

_KINDS = (torch.optim.Adam, torch.optim.AdamW)
_OFF = ("amsgrad", "differentiable", "capturable", "weight_decay")


class OnePass:
    """Steps the weights of a :class:`headway.weights.NaP` in place of their optimiser. ``done``: names of those of the last step."""

    def __init__(self, nap: NaP) -> None:
        self.nap = nap
        self.done: set[str] = set()
        self._held: list[tuple[Tensor, Tensor]] = []

    def attach(self, optimizer: Optimizer) -> list[Any]:
        """Returns the hooks' handles; gradients are given back before any other hook after the step sees them."""
        if type(optimizer) not in _KINDS or not sphere.built:
            return []
        self._before_hook = optimizer.register_step_pre_hook(self._before)
        after = optimizer.register_step_post_hook(self._give_back)
        hooks: Any = optimizer._optimizer_step_post_hooks
        hooks.move_to_end(after.id, last=False)
        return [self._before_hook, after]

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.done.clear()
        given = any(value is not None for value in (*args[1:], *kwargs.values()))
        if not self.nap.due() or given or torch.compiler.is_compiling():
            return
        scaled = getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None
        # a hook after this one may yet change the gradients
        if scaled or next(reversed(optimizer._optimizer_step_pre_hooks)) != self._before_hook.id:
            return
        names = {id(p): name for name, p in self.nap.weights.items()}
        for group in optimizer.param_groups:
            if not group["fused"] or any(group[name] for name in _OFF):
                continue
            kinds: dict[torch.dtype, list[tuple[Tensor, ...]]] = {}
            for p in group["params"]:
                if id(p) in names and (lists := self._lists(optimizer, p)):
                    kinds.setdefault(p.dtype, []).append((*lists, self.nap.rho[names[id(p)]]))
                    self.done.add(names[id(p)])
                    self._held.append((p, p.grad))
            for rows in kinds.values():
                settings = float(group["lr"]), *map(float, group["betas"]), float(group["eps"]), group["maximize"]
                columns = [list(column) for column in zip(*rows, strict=True)]
                sphere.adam_to_sphere_(*columns, self.nap.missed(rows[0][0].device), *settings, self.nap.per == "row")
        for p, _ in self._held:
            p.grad = None

    def _lists(self, optimizer: Optimizer, p: Tensor) -> tuple[Tensor, ...] | None:
        """Weight, gradient, both moments and count of steps, or None where the optimiser has to see to it."""
        g = p.grad
        if g is None or p.dtype not in (torch.float32, torch.float64) or spheres.served(p) != "native" or g.is_sparse:
            return None
        state = optimizer.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        m, v, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
        alike = runs_of_rows(p, g, m, v) and step.dtype == torch.float32 and step.device.type == "cpu"
        return (p.detach(), g, m, v, step) if alike else None

    def _give_back(self, *_: Any) -> None:
        for p, gradient in self._held:
            p.grad = gradient
        self._held.clear()
