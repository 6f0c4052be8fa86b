"""Two things every change to the layers of a stack needs: a twin that shares all parts, and torch's nested tensors switched off."""

from __future__ import annotations

from typing import Any

from torch import nn

from headway.surgery import Edit, SetAttribute


def twin(module: nn.Module) -> Any:
    """Another module of the same class that holds the very same children, parameters and buffers in tables of its own."""
    new = type(module).__new__(type(module))
    new.__dict__.update(module.__dict__)
    for table in ("_modules", "_parameters", "_buffers"):
        new.__dict__[table] = dict(module.__dict__[table])
    return new


def nested_tensors_off(model: nn.Module) -> list[Edit]:
    """torch's encoder packs padded batches into nested tensors, which only its own layer's forward understands."""
    return [
        SetAttribute(module, attribute, False, name=f"{name}.{attribute}" if name else attribute)
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoder)
        for attribute in ("enable_nested_tensor", "use_nested_tensor")
        if getattr(module, attribute, False)
    ]


def fused_layers_off(model: nn.Module, norms: set[str]) -> list[Edit]:
    """torch's encoder layers compute a layer norm inside their fused inference path; those that hold one of ``norms`` leave it."""
    return [
        SetAttribute(module, "activation_relu_or_gelu", 0, name=f"{name}.activation_relu_or_gelu".lstrip("."))
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        and getattr(module, "activation_relu_or_gelu", 0)
        and any(f"{name}.{norm}".lstrip(".") in norms for norm in ("norm1", "norm2"))
    ]
