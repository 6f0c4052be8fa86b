"""What AdamP and SGDP share: checking settings, choosing an implementation, and saying what was projected.

Three implementations give the same results: the loop (``foreach=False``, plain torch, the truth), ``foreach`` (lists of tensors,
no question to the device, fit for CUDA graphs), and ``fused`` (one C++ call on the CPU). Left to itself the optimiser takes the
fused one where it is built, lists on a GPU, and the loop otherwise. Matrices spread over processes (``DTensor``) take the lists
and the end of :mod:`headway.optim.sharded`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from headway.kernels import radial
from headway.kernels.radial import reference
from headway.optim import sharded

Way = Literal["loop", "foreach", "fused"]
KINDS = ("none", "channel", "layer")


class Projected(Optimizer):
    """Base of optimisers that take the radial part out of their step where a weight looks scale invariant."""

    follows_gradient_size = False
    _inherited: dict[str, Any]

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        if defaults["foreach"] and defaults["fused"]:
            raise RuntimeError("foreach and fused cannot both be True; choose one, or leave both to the optimiser")
        self._kinds: list[tuple[list[int], Tensor]] = []
        super().__init__(params, defaults)
        # a GradScaler hands its scale and its found_inf to a step that can read them without waiting for a device
        self._step_supports_amp_scaling = bool(defaults["fused"])

    # --- settings

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's; a group may override any setting, ``projection=False`` switches the projection off.

        Raises:
            ValueError: a setting out of range, or a parameter that FSDP flattened: its rows are gone.
            RuntimeError: ``fused=True`` for parameters the C++ body does not serve.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        bounds = {
            "lr": (0.0, None),
            "eps": (0.0, None),
            "weight_decay": (0.0, None),
            "delta": (0.0, None),
            "wd_ratio": (0.0, 1.0),
        }
        for name, (low, high) in bounds.items():
            value = group[name]
            if not low <= float(value) or (high is not None and float(value) > high):
                between = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
                raise ValueError(f"{name} must be {between}; it is {value}")
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError(f"lr must be a number or a tensor of one; its shape is {tuple(group['lr'].shape)}")
        if any(type(p).__name__ == "FlatParameter" for p in group["params"]):
            raise ValueError(
                "a flattened parameter of FSDP has lost its rows, which the projection needs; use fully_shard (FSDP2), or "
                "FullyShardedDataParallel(..., use_orig_params=True) with projection=False"
            )
        if group["fused"] and not all(map(radial.native, group["params"])):
            raise RuntimeError(
                "fused=True needs the C++ kernels (python -m headway.kernels.build) and real float32, float64, bfloat16 or "
                "float16 parameters on the CPU; leave fused out to let the optimiser choose"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_kinds", [])
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name not in ("lr", "params"):
                    group.setdefault(name, value)
            for p in group["params"]:
                if own := self.state.get(p):
                    self._adopt(own, p, group)

    def _adopt(self, own: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        """Brings the state of one parameter, perhaps from a checkpoint of torch or of the official package, to our names."""

    # --- one step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` is called with gradients on, and its loss returned.

        Raises:
            TypeError: a gradient is sparse.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and bool(found_inf):
            return loss
        self._kinds = []
        first = 0
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            index: list[int] = []
            for p in group["params"]:
                if (grad := p.grad) is not None:
                    params.append(p)
                    grads.append(grad)
                    index.append(first)
                first += 1
            if not params:
                continue
            spread = sharded.any_spread(params)
            if spread:
                grads = [sharded.here(g, p) for g, p in zip(grads, params, strict=True)]
            if any(g.is_sparse for g in grads):
                raise TypeError(
                    f"{type(self).__name__} takes no sparse gradients, whose rows it cannot compare with the weights; build the "
                    "embedding with sparse=False"
                )
            if scale is not None:
                torch._foreach_div_(grads, scale.to(grads[0].device))
            states = self._states(group, params)
            if spread:
                self._step_spread(group, params, [grads, *states], index)
            else:
                self._step_group(group, [params, grads, *states], index)
        return loss

    def _step_spread(
        self, group: dict[str, Any], params: list[Tensor], others: list[list[Tensor]], index: list[int]
    ) -> None:
        """Parameters of which every process has a part: cut matrices together, so that processes speak once, the rest alone."""
        lists = [list(map(sharded.here, tensors)) for tensors in (params, *others)]
        shared = [bool(delta_of(group) and p.dim() > 1 and p.numel() and sharded.cuts(p)) for p in params]
        alone = [i for i, cut in enumerate(shared) if not cut]
        if alone:
            self._step_group(group, [[tensors[i] for i in alone] for tensors in lists], [index[i] for i in alone])
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, p in enumerate(lists[0]):
            if shared[i]:
                kinds.setdefault((p.device, p.dtype), []).append(i)
        for rows in kinds.values():
            part = [[tensors[i] for i in rows] for tensors in lists]
            found = self._run("foreach", group, part, [params[i] for i in rows])
            self._kinds.append(([index[i] for i in rows], found))

    def _step_group(self, group: dict[str, Any], lists: list[list[Tensor]], index: list[int]) -> None:
        if torch.compiler.is_compiling():
            self._run("loop", group, lists)
            return
        for part, where in self._group_tensors_by_device_and_dtype(lists, with_indices=True).values():  # type: ignore
            way = self._way(group, part[0][0])  # type: ignore[arg-type]
            shaped = part[: len(part) - self._loose]
            if way == "loop" or (radial.lie_alike(*shaped) and not part[0][0].is_complex()):  # type: ignore
                parts = [(way, list(range(len(where))))]
            else:
                fits = [self._fits(way, *each) for each in zip(*shaped, strict=True)]
                parts = [
                    (way, [i for i, fit in enumerate(fits) if fit]),
                    ("loop", [i for i, fit in enumerate(fits) if not fit]),
                ]
            for chosen, rows in parts:
                if rows:
                    kinds = self._run(chosen, group, [[tensors[i] for i in rows] for tensors in part])  # type: ignore
                    self._kinds.append(([index[where[i]] for i in rows], kinds))

    def _way(self, group: dict[str, Any], p: Tensor) -> Way:
        foreach, fused = group["foreach"], group["fused"]
        if fused or (fused is None and foreach is None and not group.get("capturable") and radial.native(p)):
            return "fused"
        return "foreach" if foreach or (foreach is None and p.is_cuda) else "loop"

    _loose = 0
    """How many of the lists at the end of :meth:`_states` hold no tensor of the parameter's shape (the step counts)."""

    def _fits(self, way: Way, p: Tensor, g: Tensor, *state: Tensor) -> bool:
        if p.is_complex():
            return False
        return way == "foreach" or radial.runs_of_rows(p, g, *state)

    def _states(self, group: dict[str, Any], params: Sequence[Tensor]) -> list[list[Tensor]]:
        raise NotImplementedError

    def _run(
        self, way: Way, group: dict[str, Any], lists: list[list[Tensor]], wholes: Sequence[Tensor] | None = None
    ) -> Tensor:
        """One step of some parameters; ``wholes`` are those of which ``lists`` hold this process's parts alone."""
        raise NotImplementedError

    def projection_report(self) -> dict[int, str]:
        """{index of a parameter, as in ``state_dict``: "channel", "layer" or "none"} of the last step; waits for the device.
        Parameters without a gradient are left out, and so is everything under ``torch.compile``."""
        pairs = ((i, kind) for index, kinds in self._kinds for i, kind in zip(index, kinds.tolist(), strict=True))
        return {i: KINDS[kind] for i, kind in sorted(pairs)}


def delta_of(group: dict[str, Any]) -> float:
    """The threshold, 0 where the projection is switched off: no cosine lies below it."""
    return float(group["delta"]) if group["projection"] else 0.0


def rate_of(group: dict[str, Any], way: Way) -> Any:
    """The learning rate; a number wherever that asks no other device for it."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and (way == "fused" or (lr.device.type == "cpu" and not torch.compiler.is_compiling())):
        return float(lr)
    return lr


def finish(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    updates: list[Tensor],
    steps: Sequence[Any],
    decay: Any,
    keep: bool = False,
    wholes: Sequence[Tensor] | None = None,
) -> Tensor:
    """Projects, decays and moves a list of parameters by given updates, in C++ where it can. ``keep`` writes the projected
    updates back; ``wholes`` are the parameters of which ``params`` are this process's parts. Returns the kinds."""
    settings = delta_of(group), float(group["wd_ratio"]), float(group["eps"]), keep
    if wholes is not None:
        return sharded.radial_step_(wholes, params, grads, updates, steps, decay, *settings)
    plain = not isinstance(decay, Tensor) and not isinstance(steps[0], Tensor)
    if (
        plain
        and radial.native(params[0])
        and (
            radial.lie_alike(params, grads, updates)
            or all(radial.runs_of_rows(*each) for each in zip(params, grads, updates, strict=True))
        )
    ):
        return radial.radial_step_(params, grads, updates, list(steps), decay, *settings)
    from headway.kernels.radial import batched

    if params[0].dtype not in (torch.float32, torch.float64):
        return reference.radial_step_(params, grads, updates, steps, decay, *settings)
    return batched.radial_step_(params, grads, updates, steps, decay, *settings)
