"""Which weights a network feels the direction of alone: found by their place, or by doubling them and looking at the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headway.weights import transformer_norms

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.Tanh,
               nn.Sigmoid, nn.Softplus, nn.Hardswish, nn.Hardtanh)  # fmt: skip
HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.Identity)


@dataclass(frozen=True)
class Link:
    """A linear map and what its output goes into next: names of modules, None where that is no module. ``alone``: that module is
    used nowhere else. ``head_dim``: the output is queries or keys, of heads so wide."""

    linear: str
    next: str | None
    after: str | None
    alone: bool
    head_dim: int | None = None


def is_norm(module: nn.Module) -> bool:
    """One of torch's normalisations, or a module that is named as one (LlamaRMSNorm)."""
    return isinstance(module, NORMS) or type(module).__name__.endswith(
        ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm", "HeadNorm")
    )


def links(model: nn.Module) -> list[Link]:
    """Every linear map or convolution with the single consumer of its output and that one's consumer: from the traced graph where
    the model can be traced, otherwise from its ``nn.Sequential`` parts and, in transformers of known families, from
    :mod:`headway.weights.transformer_norms`."""
    try:
        graph = torch.fx.Tracer().trace(model)
    except Exception:
        return _links_by_name(model)
    modules, found = dict(model.named_modules()), []
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1

    def only_user(node: torch.fx.Node) -> torch.fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def name(node: torch.fx.Node | None) -> str | None:
        return str(node.target) if node is not None and node.op == "call_module" else None

    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], LINEAR) and calls[node.target] == 1:
            user = only_user(node)
            after = only_user(user) if user is not None and user.op == "call_module" else None
            consumer = name(user)
            functional = consumer is None and user is not None and _is_activation_call(user)
            if consumer is not None or functional:
                found.append(Link(str(node.target), consumer, name(after), calls.get(consumer or "", 0) == 1))
    # the tracer does not look into torch's own transformer layers
    return found + [link for link in _links_by_name(model) if link.linear not in calls]


def _is_activation_call(node: torch.fx.Node) -> bool:
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return called in {
        "relu",
        "gelu",
        "silu",
        "tanh",
        "sigmoid",
        "elu",
        "selu",
        "leaky_relu",
        "mish",
        "softplus",
        "relu_",
    }


def _links_by_name(model: nn.Module) -> list[Link]:
    found = {link.linear: link for link in _sequential_links(model)}
    for place in transformer_norms.places(model):
        found.setdefault(place.linear, Link(place.linear, None, None, False, place.head_dim))
    return list(found.values())


def _sequential_links(model: nn.Module) -> Iterator[Link]:
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            inner = [(f"{prefix}.{name}" if prefix else name, child) for name, child in module.named_children()]
            for i, (name, child) in enumerate(inner[:-1]):
                if isinstance(child, LINEAR) or transformer_norms.is_conv1d(child):
                    after = inner[i + 2][0] if i + 2 < len(inner) else None
                    yield Link(name, inner[i + 1][0], after, True)


def followed_by_norm(model: nn.Module) -> dict[str, str]:
    """{name of a weight: name of the normalisation its output goes straight into}, e.g. ``{"0.weight": "1"}``."""
    modules, found = dict(model.named_modules()), transformer_norms.followed(model)
    for link in links(model):
        norm = link.next
        if norm is None:
            continue
        first = modules[norm]
        if isinstance(first, nn.Sequential) and len(first):
            norm, first = f"{norm}.{next(iter(dict(first.named_children())))}", first[0]
        linear = modules[link.linear]
        # a bias in between shifts what the norm sees: only the direction of (W, b) together would be free
        bias: Any = getattr(linear, "bias", None)
        if is_norm(first) and (transformer_norms.fixed_at_zero(bias) or _removes_shift(first)):
            found[f"{link.linear}.weight"] = norm
    return found


def _removes_shift(norm: nn.Module) -> bool:
    """Batch and instance norm subtract a bias of the layer before."""
    return isinstance(norm, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm)


@torch.no_grad()
def output_changes(model: nn.Module, example_input: Any, names: list[str] | None = None) -> dict[str, float]:
    """{name of a matrix or convolution: relative change of the output when it is doubled}, in evaluation, but for norms, so that
    batch norm takes the batch's statistics. Weights, buffers, modes and the random generator are left as they were."""
    params = {n: p for n, p in model.named_parameters() if p.dim() > 1 and (names is None or n in names)}
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    try:
        model.eval()
        for module in model.modules():
            module.training = is_norm(module)
        with torch.random.fork_rng():
            base, found = _flat(_call(model, example_input)), {}
            size = float(base.norm())
            for name, p in params.items():
                p.mul_(2)
                found[name] = float((_flat(_call(model, example_input)) - base).norm()) / max(size, 1e-30)
                p.mul_(0.5)
        return found
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


def find_scale_invariant(model: nn.Module, example_input: Any, tol: float = 1e-4) -> list[str]:
    """Names of the matrices and convolutions whose doubling changes the output by less than ``tol`` of its norm.

    Args:
        example_input: a tensor, a tuple of arguments, or a mapping of keyword arguments.
    """
    return [name for name, change in output_changes(model, example_input).items() if change < tol]


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _flat(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out.double().flatten()
    values = out.values() if isinstance(out, Mapping) else out
    return torch.cat([_flat(v) for v in values if isinstance(v, Tensor | Mapping | tuple | list)])
