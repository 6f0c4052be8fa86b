"""Pre-RMSNorm: the same predictions from a trained Pre-LN transformer, with RMS norms in place of its layer norms.

    P = I - (1/d) 1 1^T,      LN0(x) = (x - mean(x)) / sqrt(var(x) + eps) = RMS0(P x),      RMS0(x) = x / sqrt(mean(x^2) + eps)

All that is added to the residual stream is recentred once, in float64: ``W <- P W`` and ``b <- P b`` for the output projections,
``E <- E P`` for tables and tokens. The stream then has mean zero, where layer norm is RMS norm with the same eps, gain and bias.

Jiang et al.: Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers, 2023 (arXiv 2305.14858).
Reach for it before inference, export, quantisation or rotation. Training afterwards is not Pre-LN training: the gradient through
an RMS norm has a part along 1 that brings the mean back, and dropout on a branch breaks it at once. Hidden states differ from the
original's by their mean, and embeddings passed in by hand (``inputs_embeds``) must have mean zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from headway.anatomy import Anatomy, describe
from headway.anatomy.families import pattern_of
from headway.checkpoints import record
from headway.norms.layer import LayerNorm
from headway.norms.rms import RMSNorm
from headway.residual.placement import _shallow
from headway.surgery import Edit, SetAttribute, SetParameter, Site, Swap, Technique, nested_tensors_off

_LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EMBEDDING_DROPOUTS = ("drop", "emb_dropout", "embeddings.dropout")


class NotPreNormError(ValueError):
    """The model is no Pre-LN transformer whose stream can be recentred; the message names the first part that is in the way."""


@dataclass(frozen=True)
class PreRMSNorm(Technique):
    """Turns a Pre-LN transformer into a Pre-RMSNorm transformer that computes the same.

    Works on Hugging Face GPT-2, GPT-NeoX and ViT, on ``nn.TransformerEncoder``/``Decoder`` with ``norm_first=True`` and a final
    norm, and on headway's own decoder placed "pre". A head tied to the token table keeps the old table as its own. torch's
    stacks get their stream from outside, so their first layer takes the mean off it; their fused inference path, which holds a
    layer norm, is switched off.

    Args:
        refuse_dropout: refuse a model in training mode whose dropout on the stream is above 0; False converts it all the same,
            for use after ``model.eval()``.

    Raises:
        NotPreNormError: Post-LN or Peri-LN layers, RMS norms of other libraries, a norm on the embedding, no final norm, a
            writer of an unknown kind, or dropout as above.
        UnknownFamily: the model holds no layer of a known family.
        ValueError: ``where`` leaves out a part of the model; half a conversion would change the predictions.
    """

    looks_for: ClassVar[str] = "layer norms that read a residual stream"

    refuse_dropout: bool = True

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        anatomy = describe(model)
        norms = [name for names in _stream_norms(model, anatomy) for name in names]
        if all(type(model.get_submodule(name)) is RMSNorm for name in norms):
            return []
        _check(model, anatomy, norms, self.refuse_dropout)
        if {id(site.module) for site in sites} != {id(module) for module in model.modules()}:
            raise ValueError("PreRMSNorm converts the whole residual stream; apply it without where=")
        writers = [*anatomy.embeddings, *(part.writer for block in anatomy.blocks for part in block.sublayers)]
        found: list[Edit] = []
        if anatomy.family == "torch.nn":
            found += _entrances(model, anatomy)
        found += self._recentre(model, writers)
        for name in _parameters(model, anatomy):
            owner, _, attribute = name.rpartition(".")
            old = model.get_parameter(name)
            new = nn.Parameter(_centred(old, -1), old.requires_grad)
            found.append(_RecentredParameter(model.get_submodule(owner), attribute, new, name=name))
        for name in dict.fromkeys(norms):
            old_norm: Any = model.get_submodule(name)
            found.append(Swap(model, name, old_norm, _rms(old_norm)))
        return [*found, *nested_tensors_off(model), *record(model, replace(self, refuse_dropout=False))]

    def _recentre(self, model: nn.Module, names: Iterable[str]) -> list[Edit]:
        modules = {id(model.get_submodule(name)): name for name in reversed(list(names))}
        owners: dict[int, list[tuple[str, nn.Module]]] = {}
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append((name, module))
        found: list[Edit] = []
        untied = False
        for name in reversed(list(modules.values())):
            old = model.get_submodule(name)
            new = _recentred_copy(old)
            others = [
                other
                for parameter in old._parameters.values()
                for other, owner in owners.get(id(parameter), [])
                if id(owner) not in modules
            ]
            untied = untied or bool(others)
            found.append(_Untie(model, name, old, new, others) if others else _Recentred(model, name, old, new))
        if untied:
            found += _forget_ties(model)
        return found


class _Recentred(Swap):
    """Swaps a writer for its recentred copy, and says so in the plan."""

    def describe(self) -> tuple[str, str]:
        before, after = super().describe()
        return before, f"{after} recentred"


class _RecentredParameter(SetParameter):
    """Swaps a token or table for its recentred copy, and says so in the plan."""

    def describe(self) -> tuple[str, str]:
        before, after = super().describe()
        return before, f"{after} recentred"


class _Untie(Swap):
    """Swaps a table for a recentred one of its own; whoever shared the old one keeps it."""

    def __init__(self, model: nn.Module, name: str, old: nn.Module, new: nn.Module, others: Sequence[str]) -> None:
        super().__init__(model, name, old, new, untie=True)
        self._others = ", ".join(others)

    def moved(self) -> dict[nn.Parameter, nn.Parameter]:
        return {}

    def describe(self) -> tuple[str, str]:
        before, after = super().describe()
        return f"{before} tied to {self._others}", f"{after} recentred, untied from {self._others}"


class _Recentring(SetAttribute):
    """Makes a layer of torch's one that recentres its input; the object and all it holds stay."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        encoder = isinstance(layer, nn.TransformerEncoderLayer)
        super().__init__(layer, "__class__", RecentringEncoderLayer if encoder else RecentringDecoderLayer, name=name)

    def describe(self) -> tuple[str, str]:
        return self.before.__name__, self.value.__name__  # type: ignore[attr-defined]


def recentre_linear_(linear: nn.Module) -> nn.Module:
    """Takes the mean over the outputs off the weight and bias of a linear layer, in place and in float64; returns the layer.

    Args:
        linear: ``nn.Linear``, ``nn.Conv1d``/``2d``/``3d`` (over its output channels), or transformers' ``Conv1D``.

    Raises:
        TypeError: any other module, whose output axis is not known.
    """
    axis = _output_axis(linear)
    if axis is None:
        raise TypeError(f"the output axis of {type(linear).__name__} is not known; nn.Linear, nn.ConvNd or Conv1D is")
    with torch.no_grad():
        for key, along in (("weight", axis), ("bias", 0)):
            if (parameter := linear._parameters.get(key)) is not None:
                parameter.copy_(_centred(parameter, along))
    return linear


def recentre_embedding_(embedding: nn.Embedding) -> nn.Embedding:
    """Takes the mean off every row of an embedding, in place and in float64; returns the embedding."""
    with torch.no_grad():
        embedding.weight.copy_(_centred(embedding.weight, -1))
    return embedding


def verify_equivalence(original: nn.Module, converted: nn.Module, *inputs: Any) -> float:
    """The largest absolute difference between the outputs of two models, both in evaluation mode (put back afterwards).

    Of a structured output the logits are compared, else the last hidden state, else the first tensor.
    """
    outputs = []
    for model in (original, converted):
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                outputs.append(_main_tensor(model(*inputs)))
        finally:
            for module, training in modes:
                module.training = training
    if outputs[0].shape != outputs[1].shape:
        raise ValueError(f"the outputs differ in shape: {tuple(outputs[0].shape)} and {tuple(outputs[1].shape)}")
    difference = (outputs[0].double() - outputs[1].double()).abs()
    return difference.max().item() if difference.numel() else 0.0


class RecentringEncoderLayer(nn.TransformerEncoderLayer):
    """The first layer of a converted stack: takes the mean off the stream it is given."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(_without_mean(src), *args, **kwargs)


class RecentringDecoderLayer(nn.TransformerDecoderLayer):
    """The first layer of a converted decoder stack: takes the mean off the stream it is given."""

    def forward(self, tgt: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(_without_mean(tgt), *args, **kwargs)


def _without_mean(x: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide - wide.mean(-1, keepdim=True)).to(x.dtype)


def _main_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for key in ("logits", "last_hidden_state"):
            if isinstance(found := output.get(key), Tensor):
                return found
        output = tuple(output.values())
    for part in output:
        if isinstance(part, Tensor):
            return part
    raise TypeError("the model's output holds no tensor that could be compared")


def _centred(tensor: Tensor, dim: int) -> Tensor:
    wide = tensor.detach().double()
    return (wide - wide.mean(dim, keepdim=True)).to(tensor.dtype)


def _is_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _output_axis(module: nn.Module) -> int | None:
    if type(module) in (*_LINEARS, *_CONVOLUTIONS):
        return 0
    # transformers' Conv1D keeps its weight as (in, out)
    return -1 if _is_conv1d(module) else None


def _recentred_copy(old: nn.Module) -> nn.Module:
    new = _shallow(old)
    new._parameters = {
        key: None if p is None else nn.Parameter(p.detach().clone(), p.requires_grad)
        for key, p in old._parameters.items()
    }
    return recentre_embedding_(new) if isinstance(new, nn.Embedding) else recentre_linear_(new)


def _rms(norm: Any) -> RMSNorm:
    new = RMSNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
    new.elementwise_affine = norm.weight is not None
    new.weight, new.bias = norm.weight, norm.bias
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(new, hooks).update(getattr(norm, hooks))
    return new.train(norm.training)


def _stacks(anatomy: Anatomy) -> list[str]:
    """The owner of each list of layers ("encoder" for "encoder.layers.0")."""
    return list(dict.fromkeys(block.name.rpartition(".")[0].rpartition(".")[0] for block in anatomy.blocks))


def _stream_norms(model: nn.Module, anatomy: Anatomy) -> tuple[list[str], list[str]]:
    """The norms of the branches, and the final norms."""
    inner = [part.norm for block in anatomy.blocks for part in block.sublayers if part.norm]
    if anatomy.family != "torch.nn":
        return inner, [anatomy.final_norm] if anatomy.final_norm else []
    names = [f"{stack}.norm" if stack else "norm" for stack in _stacks(anatomy)]
    modules = dict(model.named_modules(remove_duplicate=False))
    return inner, [name for name in names if name in modules]


def _parameters(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """The bare parameters that write to the stream; ViT's mask token takes the place of patches."""
    masks = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "mask_token"]
    return [*anatomy.parameters, *(masks if anatomy.family == "vit" else [])]


def _entrances(model: nn.Module, anatomy: Anatomy) -> list[Edit]:
    """torch's stacks: the first layer recentres what comes in, and no layer takes the fused path with its layer norm."""
    found: list[Edit] = []
    started: set[str] = set()
    for block in anatomy.blocks:
        layer: Any = model.get_submodule(block.name)
        stack = block.name.rpartition(".")[0]
        if stack not in started:
            started.add(stack)
            found.append(_Recentring(layer, block.name))
        if getattr(layer, "activation_relu_or_gelu", 0):
            name = f"{block.name}.activation_relu_or_gelu"
            found.append(SetAttribute(layer, "activation_relu_or_gelu", 0, name=name))
    return found


def _forget_ties(model: nn.Module) -> list[Edit]:
    """Keeps Hugging Face models from tying head and table again when they are saved, loaded or resized."""
    found: list[Edit] = []
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        found.append(SetAttribute(config, "tie_word_embeddings", False, name="config.tie_word_embeddings"))
    if getattr(model, "all_tied_weights_keys", None):
        found.append(SetAttribute(model, "all_tied_weights_keys", {}, name="all_tied_weights_keys"))
    return found


def _check(model: nn.Module, anatomy: Anatomy, norms: Sequence[str], refuse_dropout: bool) -> None:
    """Raises :class:`NotPreNormError` for the first part that breaks the equivalence."""
    if anatomy.embedding_norm is not None:
        raise NotPreNormError(f"{anatomy.embedding_norm} norms the embedding itself, so its output has a mean")
    stacks, listed = _stacks(anatomy), {id(model.get_submodule(name)) for name in norms}
    for block in anatomy.blocks:
        layer = model.get_submodule(block.name)
        where, kind = block.name or "the model", type(layer)
        if block.placement not in ("pre", "parallel"):
            raise NotPreNormError(f"{where} places its norms {block.placement!r}, and only 'pre' can be converted")
        pattern = pattern_of(layer)
        if pattern is None or pattern.family != anatomy.family:
            raise NotPreNormError(f"{where} is of another family than the first layer ({anatomy.family})")
        plain = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
        if anatomy.family == "torch.nn" and kind not in plain:
            raise NotPreNormError(f"{where} is {kind.__name__}, which may do more than torch's own layer")
        for part in block.sublayers:
            if part.norm is None:
                raise NotPreNormError(f"the {part.kind} branch of {where} reads the stream without a norm")
            _check_norm(model, part.norm, anatomy.hidden_size)
            _check_writer(model, part.writer)
            for name in part.dropouts:
                _check_dropout(name, model.get_submodule(name), refuse_dropout)
        for name, module in layer.named_modules():
            shape = getattr(module, "normalized_shape", ())
            if id(module) not in listed and tuple(shape) == (anatomy.hidden_size,):
                raise NotPreNormError(f"{where}.{name} is a norm of which it is not known what it reads")
    if anatomy.family != "torch.nn":
        if len(stacks) > 1:
            raise NotPreNormError(f"{stacks[1]} is a second stack of layers, and only one can be converted")
        if not anatomy.embeddings:
            raise NotPreNormError(
                f"{stacks[0] or 'the model'} has no embedding, so what enters the stream is not known"
            )
    finals = _stream_norms(model, anatomy)[1]
    if len(finals) < len(stacks):
        bare = next((s for s in stacks if f"{s}.norm".lstrip(".") not in finals), "")
        raise NotPreNormError(
            f"{bare or 'the model'} has no final norm, so the mean of the stream is part of its output"
        )
    for name in finals:
        _check_norm(model, name, anatomy.hidden_size)
    for name in anatomy.embeddings:
        _check_writer(model, name)
    inside = tuple(block.name + "." for block in anatomy.blocks)
    for name, module in model.named_modules():
        ends = any(name == end or name.endswith("." + end) for end in _EMBEDDING_DROPOUTS)
        if ends and not name.startswith(inside) and anatomy.family != "torch.nn":
            _check_dropout(name, module, refuse_dropout)


def _check_norm(model: nn.Module, name: str, width: int) -> None:
    norm: Any = model.get_submodule(name)
    known = type(norm) is nn.LayerNorm or (type(norm) is LayerNorm and norm.dims is None)
    if not known:
        raise NotPreNormError(f"{name} is {type(norm).__name__}, not a layer norm")
    if tuple(norm.normalized_shape) != (width,):
        raise NotPreNormError(
            f"{name} normalises {tuple(norm.normalized_shape)}, not the {width} channels of the stream"
        )


def _check_writer(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    table = type(module) is nn.Embedding and module.max_norm is None
    if not table and _output_axis(module) is None:
        raise NotPreNormError(f"{name} writes to the stream, and {type(module).__name__} cannot be recentred")


def _check_dropout(name: str, module: nn.Module, refuse: bool) -> None:
    if refuse and module.training and getattr(module, "p", 0.0) > 0:
        raise NotPreNormError(
            f"{name} drops entries of the stream in training mode, which gives it a mean; call model.eval() first"
        )


__all__ = [
    "NotPreNormError",
    "PreRMSNorm",
    "recentre_embedding_",
    "recentre_linear_",
    "verify_equivalence",
]
