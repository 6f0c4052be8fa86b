"""The residual streams of a model of a known family, as its :mod:`headway.anatomy` tells them.

Every part that could break the equivalence is looked at: what places its norms otherwise, a norm that is no layer norm or is not
listed, a writer of an unknown kind, dropout on the stream. The first one found is named.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from headway.anatomy import Block, Stack, Sublayer, describe
from headway.anatomy.families import pattern_of
from headway.norms.rms import CRMSNorm, RMSNorm
from headway.residual.crms import CompletingRMSNorm
from headway.residual.recentring import output_axis
from headway.residual.stream import (
    NotPreNormError,
    Place,
    Reader,
    ReadingNorm,
    Stream,
    is_conv1d,
    is_layer_norm,
    linear_reader,
)

_CONVERTED = (RMSNorm, CRMSNorm, CompletingRMSNorm)


def described(model: nn.Module, training: bool = False, refuse_dropout: bool = True) -> Stream | None:
    """The streams of a model of a known family; None where all its norms are converted already.

    Args:
        training: the stream is to be recentred where it enters the first block, and after dropout; else in all weights.
        refuse_dropout: for the latter, whether dropout that is active now is an obstacle.

    Raises:
        UnknownFamily: the model holds no layer of a known family.
        NotPreNormError: something that writes to the stream or reads it is in the way.
    """
    stacks = describe(model).stacks
    norms = [name for stack in stacks for name in _norms(stack)]
    if all(type(model.get_submodule(name)) in _CONVERTED for name in norms):
        return None
    parts = [_StackOf(model, stack, training, refuse_dropout) for stack in stacks]
    for part in parts:
        part.check()
    return Stream(
        norms=tuple(norm for part in parts for norm in part.norms()),
        writers=tuple(writer for part in parts for writer in part.writers()),
        entries=tuple(part.stack.blocks[0].name for part in parts if part.from_outside),
    )


def _norms(stack: Stack) -> list[str]:
    """The norms that read a stack's stream, each once (parallel branches may share one)."""
    inner = [part.norm for block in stack.blocks for part in block.sublayers if part.norm]
    return list(dict.fromkeys([*inner, *([stack.final_norm] if stack.final_norm else [])]))


def _inputs(module: nn.Module) -> int | None:
    """How many channels a linear layer reads; None for any other module."""
    return module.in_features if isinstance(module, nn.Linear) else int(module.nx) if is_conv1d(module) else None  # type: ignore[arg-type]


class _StackOf:
    """One stack of a model, looked at for the conversion."""

    def __init__(self, model: nn.Module, stack: Stack, training: bool, refuse_dropout: bool) -> None:
        self.model, self.stack, self.training, self.refuse_dropout = model, stack, training, refuse_dropout
        # torch's stacks are given their stream; a nonlinearity or a norm's gain cannot be recentred in a weight
        bent = stack.bent or stack.embedding_norm is not None
        self.from_outside = bool(training or stack.family == "torch.nn" or bent)

    def norms(self) -> list[ReadingNorm]:
        readers: dict[str, tuple[Reader, ...] | None] = {}
        for block in self.stack.blocks:
            unlisted = self._unlisted(block)
            for part in block.sublayers:
                listed = [None if unlisted else self._reader(name, part) for name in part.readers]
                before = readers.get(part.norm or "", ())
                known = before is not None and listed and None not in listed
                readers[part.norm or ""] = (*before, *listed) if known else None  # type: ignore[misc, assignment]
        readers[self.stack.final_norm or ""] = self._heads()
        for name, known in readers.items():
            shifts = self.model.get_submodule(name)._parameters.get("bias") is not None
            if shifts and known and not all(reader.bias for reader in known):
                readers[name] = None
        return [ReadingNorm(name, known) for name, known in readers.items()]

    def _unlisted(self, block: Block) -> bool:
        """Whether a layer holds linear maps that may read its norms and are not known to (a gate on the attention)."""
        known = {name for part in block.sublayers for name in (*part.readers, *part.memory_readers, part.writer)}
        prefix = f"{block.name}." if block.name else ""
        return any(
            prefix + name not in known and _inputs(module) == self.stack.hidden_size
            for name, module in self.model.get_submodule(block.name).named_modules()
        )

    def writers(self) -> list[Place]:
        found = [place for block in self.stack.blocks for part in block.sublayers for place in self._written(part)]
        if not self.from_outside:
            for name in self.stack.embeddings:
                found += self._places(name)
            # ViT's mask token takes the place of patches
            masks = [n for n, _ in self.model.named_parameters() if n.rpartition(".")[2] == "mask_token"]
            for name in (*self.stack.parameters, *(masks if self.stack.family == "vit" else ())):
                owner, _, attribute = name.rpartition(".")
                found.append(Place(owner, attribute, -1))
        return found

    def _written(self, part: Sublayer) -> list[Place]:
        dropping = [n for n in part.dropouts if getattr(self.model.get_submodule(n), "p", 0.0) > 0]
        gate = None
        if part.gain is not None:
            (name,) = dict(self.model.get_submodule(part.gain).named_parameters(recurse=False))
            gate = part.gain, name
        return self._places(part.writer, gate, part.gain or (dropping[-1] if dropping else None))

    def _places(self, name: str, gate: tuple[str, str] | None = None, after: str | None = None) -> list[Place]:
        module = self.model.get_submodule(name)
        axis = output_axis(module)
        assert axis is not None
        found = [Place(name, "weight", axis, gate, after)]
        return [*found, Place(name, "bias", 0, gate, after)] if module._parameters.get("bias") is not None else found

    def _reader(self, name: str, part: Sublayer) -> Reader | None:
        found = linear_reader(self.model, name)
        if found is None or name not in part.memory_readers:
            return found
        # keys and values come from another stack
        return Reader(name, found.weight, found.bias, rows=(0, self.stack.hidden_size))

    def _heads(self) -> tuple[Reader, ...] | None:
        """The linear heads that read the final norm; None where its output also leaves the model, or is read by something else."""
        owner, width = (self.stack.final_norm or "").rpartition(".")[0], self.stack.hidden_size
        backbone = hasattr(self.model, "config") and not owner
        # CLIP gives out what its heads read as well
        if backbone or self.stack.family in ("torch.nn", "clip") or not self.stack.heads:
            return None
        found = [linear_reader(self.model, name) for name in self.stack.heads]
        if any(r is None or self.model.get_submodule(r.owner).weight.shape[r.axis] != width for r in found):  # type: ignore[union-attr]
            return None
        inside = tuple(f"{block.name}." for block in self.stack.blocks)
        others = {
            name
            for name, module in self.model.named_modules()
            if _inputs(module) == width and not name.startswith(inside)
        }
        pooled = getattr(self.model.get_submodule(owner), "attn_pool", None) is not None
        return None if pooled or others - {*self.stack.heads, *self.stack.embeddings} else tuple(found)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raises :class:`NotPreNormError` for the first part that breaks the equivalence."""
        stack, listed = self.stack, {id(self.model.get_submodule(name)) for name in _norms(self.stack)}
        for block in stack.blocks:
            layer = self.model.get_submodule(block.name)
            where, kind = block.name or "the model", type(layer)
            if block.placement not in ("pre", "parallel"):
                raise NotPreNormError(f"{where} places its norms {block.placement!r}, and only 'pre' can be converted")
            pattern = pattern_of(layer)
            if pattern is None or pattern.family != stack.family:
                raise NotPreNormError(f"{where} is of another family than the first layer ({stack.family})")
            plain = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
            if stack.family == "torch.nn" and kind not in plain:
                raise NotPreNormError(f"{where} is {kind.__name__}, which may do more than torch's own layer")
            for part in block.sublayers:
                if part.norm is None:
                    raise NotPreNormError(f"the {part.kind} branch of {where} reads the stream without a norm")
                self._check_norm(part.norm)
                self._check_writer(part.writer)
            for name, module in layer.named_modules():
                shape = getattr(module, "normalized_shape", ())
                if id(module) not in listed and tuple(shape) == (stack.hidden_size,):
                    raise NotPreNormError(f"{where}.{name} is a norm of which it is not known what it reads")
        self._check_ends()
        self._check_dropout()

    def _check_ends(self) -> None:
        stack = self.stack
        name = stack.name or "the model"
        if not (self.from_outside or stack.embeddings):
            raise NotPreNormError(f"{name} has no embedding, so what enters the stream is not known")
        if stack.final_norm is None:
            raise NotPreNormError(f"{name} has no final norm, so the mean of the stream is part of its output")
        vision = stack.family == "clip" and stack.final_norm.endswith("post_layernorm")
        if vision and not any(head.endswith("visual_projection") for head in stack.heads):
            raise NotPreNormError(f"{name} gives out its stream before {stack.final_norm}, so its mean is seen")
        self._check_norm(stack.final_norm)
        for writer in () if self.from_outside else stack.embeddings:
            self._check_writer(writer)

    def _check_dropout(self) -> None:
        parts = [part for block in self.stack.blocks for part in block.sublayers]
        inner = [name for part in parts for name in part.dropout_rates]
        if self.training:
            for name in inner:
                if self._attribute(name) > 0:
                    raise NotPreNormError(
                        f"{name} is the rate of a dropout that is no module, so nothing can be recentred after it; set it to 0"
                    )
            return
        if not self.refuse_dropout:
            return
        modules = [name for part in parts for name in part.dropouts]
        outside = () if self.from_outside else (self.stack.dropouts, self.stack.dropout_rates)
        rates = [(n, getattr(self.model.get_submodule(n), "p", 0.0), n) for n in (*modules, *(outside and outside[0]))]
        rates += [(n, self._attribute(n), n.rpartition(".")[0]) for n in (*inner, *(outside and outside[1]))]
        for name, rate, module in rates:
            if rate > 0 and self.model.get_submodule(module).training:
                raise NotPreNormError(
                    f"{name} drops entries of the stream in training mode, which gives it a mean; call model.eval() first"
                )

    def _attribute(self, name: str) -> float:
        owner, _, attribute = name.rpartition(".")
        return float(getattr(self.model.get_submodule(owner), attribute, 0.0) or 0.0)

    def _check_norm(self, name: str) -> None:
        norm: Any = self.model.get_submodule(name)
        if not is_layer_norm(norm):
            raise NotPreNormError(f"{name} is {type(norm).__name__}, not a layer norm over the last axis")
        if tuple(norm.normalized_shape) != (self.stack.hidden_size,):
            raise NotPreNormError(
                f"{name} normalises {tuple(norm.normalized_shape)}, not the {self.stack.hidden_size} channels of the stream"
            )

    def _check_writer(self, name: str) -> None:
        module: Any = self.model.get_submodule(name)
        table = isinstance(module, nn.Embedding) and module.max_norm is None
        if not table and (isinstance(module, nn.Embedding) or output_axis(module) is None):
            raise NotPreNormError(f"{name} writes to the stream, and {type(module).__name__} cannot be recentred")
