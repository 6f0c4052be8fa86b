"""AdamP and SGDP: momentum optimisers that do not lengthen weights whose length has no meaning.

In front of a normalisation layer only the direction of a weight acts, its gradient is orthogonal to it, and every step makes it
longer. Momentum makes that far worse, because old gradients are no longer orthogonal to the new weight; longer weights turn more
slowly, so the effective step dies early. AdamP and SGDP find such weights by themselves and take the radial part out:

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  u = m / (sqrt(v) / sqrt(1 - b2^k) + eps)
    if max_r |cos(g_r, p_r)| < delta / sqrt(width):   u_r -= p_r <p_r, u_r> / (||p_r|| + eps)^2   for every row r
    p = p (1 - lr wd ratio) - lr / (1 - b1^k) u       ratio = wd_ratio where projected, else 1

first row by row (a row is an output channel), else with the whole tensor as one row, else not at all. SGDP is the same around
buf = momentum buf + (1 - dampening) g, with the decay divided by 1 - momentum.

Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha: "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights", 2021
(arXiv 2006.08217). In place of AdamW or SGD in networks with normalisation; little to gain without, and weight decay acts only a
tenth as strongly (``wd_ratio``) on the tensors that are found. A parameter whose gradient is zero, rather than None, has cosine 0
and counts as scale invariant. Complex parameters are pairs of real numbers.

Weight decay lies outside the gradient, as in AdamW. SGDP keeps its momentum unprojected, as in the paper; the official code, which
projects it in place, is ``official_inplace=True``. In several processes equal gradients (DDP) give equal steps; parameters that
FSDP2 or tensor parallelism cuts into parts are projected by their whole rows (:mod:`headway.optim.sharded`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from headway.kernels import radial
from headway.kernels.radial import reference
from headway.optim.projected import Projected, Way, delta_of, finish, rate_of


class AdamP(Projected):
    """AdamW without the radial part of the step on scale-invariant weights.

    Args:
        params, lr, betas, eps, weight_decay: as torch.optim.AdamW (the decay is decoupled, 0 by default); lr may be a tensor.
        delta: threshold on the cosine of gradient and weight, over the square root of a row's width.
        wd_ratio: share of the weight decay that projected tensors get.
        nesterov: Nesterov momentum.
        foreach, fused, capturable, maximize: as in torch.optim. ``capturable`` keeps step counts on the device.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``, as in torch.optim.AdamW, whose checkpoints load, as do the official package's.

    Raises:
        ValueError: a setting out of range. TypeError: a sparse gradient.
    """

    _loose = 1

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "delta": delta, "wd_ratio": wd_ratio,
                    "nesterov": nesterov, "projection": True, "foreach": foreach, "fused": fused, "capturable": capturable,
                    "maximize": maximize}  # fmt: skip
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if len(group["betas"]) != 2 or not all(0 <= float(beta) < 1 for beta in group["betas"]):
            raise ValueError(f"betas are two numbers in [0, 1); they are {group['betas']}")

    def _adopt(self, own: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        if "step" in own and not isinstance(own["step"], Tensor):
            own["step"] = _count(p, group, float(own["step"]))

    def _states(self, group: dict[str, Any], params: Sequence[Tensor]) -> list[list[Tensor]]:
        states = [self.state[p] for p in params]
        for p, own in zip(params, states, strict=True):
            if not own:
                own["step"] = _count(p, group, 0.0)
                own["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                own["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [[own[name] for own in states] for name in ("exp_avg", "exp_avg_sq", "step")]

    def _run(
        self, way: Way, group: dict[str, Any], lists: list[list[Tensor]], wholes: Sequence[Tensor] | None = None
    ) -> Tensor:
        lr, (beta1, beta2) = rate_of(group, way), group["betas"]
        if way == "foreach":
            return _adamp_lists(group, *lists, lr, wholes)  # type: ignore[arg-type]
        if way == "fused" and any(k.dtype != torch.float32 or k.device.type != "cpu" for k in lists[4]):
            way = "loop"
        step: Callable[..., Tensor] = radial.adamp_ if way == "fused" else reference.adamp_
        rest = float(group["eps"]), group["weight_decay"], delta_of(group), float(group["wd_ratio"])
        return step(*lists, lr, beta1, beta2, *rest, group["nesterov"], group["maximize"])


def _count(p: Tensor, group: dict[str, Any], value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=p.device if group["capturable"] else None)


def _adamp_lists(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: Any,
    wholes: Sequence[Tensor] | None = None,
) -> Tensor:
    beta1, beta2 = group["betas"]
    torch._foreach_add_(steps, 1)
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    g, m, v = ([reference.wide(x) for x in tensors] for tensors in (grads, exp_avgs, exp_avg_sqs))
    torch._foreach_lerp_(m, g, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1 - beta2)
    if m[0] is not exp_avgs[0]:
        # rounded first, so that the update is taken from what is stored
        torch._foreach_copy_(exp_avgs, m)
        torch._foreach_copy_(exp_avg_sqs, v)
        m, v = ([reference.wide(x) for x in tensors] for tensors in (exp_avgs, exp_avg_sqs))
    u = list(torch._foreach_sqrt(v))
    top = torch._foreach_lerp(m, g, 1 - beta1) if group["nesterov"] else m
    if group["capturable"]:
        count = torch.stack(steps).double()
        roots, shares = (1 - beta2**count).sqrt(), 1 - beta1**count
        torch._foreach_div_(u, list(roots.unbind()))
        torch._foreach_add_(u, group["eps"])
        sizes: list[Any] = list((lr / shares).unbind())
    else:
        # the root goes into the step size, which saves a pass: m / (sqrt(v) / r + eps) = r m / (sqrt(v) + r eps)
        counts = [float(k) for k in steps]
        roots = [(1 - beta2**k) ** 0.5 for k in counts]
        torch._foreach_add_(u, [root * group["eps"] for root in roots])
        sizes = [lr * root / (1 - beta1**k) for root, k in zip(roots, counts, strict=True)]
    for a, b in zip(top, u, strict=True):
        torch.div(a, b, out=b)
    if u[0].dtype != params[0].dtype and wholes is None:
        settings = delta_of(group), group["wd_ratio"], float(group["eps"]), False
        return reference.radial_step_(params, grads, u, sizes, lr * group["weight_decay"], *settings)
    return finish(group, params, grads, u, sizes, lr * group["weight_decay"], wholes=wholes)


class SGDP(Projected):
    """SGD with momentum without the radial part of the step on scale-invariant weights.

    Args:
        params, lr, momentum, dampening, nesterov: as torch.optim.SGD, except that dampening acts from the first step on.
        weight_decay: decoupled, and divided by 1 - momentum.
        eps: of the projection. delta, wd_ratio: as for :class:`AdamP`.
        official_inplace: project the momentum buffer itself, as the authors' code does (without nesterov).
        foreach, fused, maximize: as in torch.optim.

    State: ``momentum_buffer``, as in torch.optim.SGD, whose checkpoints load, as do the official package's.

    Raises:
        ValueError: a setting out of range, among them momentum = 1. TypeError: a sparse gradient.
    """

    follows_gradient_size = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        official_inplace: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
                    "eps": eps, "delta": delta, "wd_ratio": wd_ratio, "projection": True, "official_inplace": official_inplace,
                    "foreach": foreach, "fused": fused, "maximize": maximize}  # fmt: skip
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if not 0 <= group["momentum"] < 1:
            raise ValueError(
                f"momentum must lie in [0, 1), because the weight decay is divided by 1 - momentum; it is {group['momentum']}"
            )

    def _adopt(self, own: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        if "momentum" in own:
            own["momentum_buffer"] = own.pop("momentum")
        if own.get("momentum_buffer", 0) is None:
            del own["momentum_buffer"]

    def _states(self, group: dict[str, Any], params: Sequence[Tensor]) -> list[list[Tensor]]:
        if not group["momentum"]:
            return []
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [[self.state[p]["momentum_buffer"] for p in params]]

    def _run(
        self, way: Way, group: dict[str, Any], lists: list[list[Tensor]], wholes: Sequence[Tensor] | None = None
    ) -> Tensor:
        lr = rate_of(group, way)
        params, grads, buffers = (*lists, []) if len(lists) == 2 else lists
        # on a CPU a pass over memory for each operation is all that a step of SGD costs: lists go to the one C++ call as well
        if way == "foreach" and (wholes is not None or not (radial.native(params[0]) and radial.lie_alike(*lists))):
            return _sgdp_lists(group, params, grads, buffers, lr, wholes)
        step: Callable[..., Tensor] = reference.sgdp_ if way == "loop" else radial.sgdp_
        rest = group["weight_decay"], delta_of(group), float(group["wd_ratio"])
        flags = group["nesterov"], group["maximize"], group["official_inplace"]
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        return step(params, grads, buffers, lr, momentum, dampening, float(group["eps"]), *rest, *flags)


def _sgdp_lists(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    lr: Any,
    wholes: Sequence[Tensor] | None = None,
) -> Tensor:
    momentum, share = float(group["momentum"]), 1 - float(group["dampening"])
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    if buffers:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads, alpha=share)
    if group["nesterov"]:
        updates = list(torch._foreach_add(grads, buffers, alpha=momentum)) if buffers else grads
    else:
        updates = buffers or (grads if share == 1 else list(torch._foreach_mul(grads, share)))
    keep = bool(group["official_inplace"] and buffers and not group["nesterov"])
    decay = lr * group["weight_decay"] / (1 - momentum)
    return finish(group, params, grads, updates, [lr] * len(params), decay, keep, wholes)
