"""One technique that moves the norms of an existing transformer to any place: see :mod:`headway.residual.placements`.

The function the model computes changes, so reach for it before training from scratch; a trained model has to be trained again.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from headway.anatomy import Block, Stack, UnknownFamily, describe
from headway.checkpoints import record
from headway.residual.deepnorm import starting_weights
from headway.residual.placement_record import RecordPlacement
from headway.residual.placements import SCHEMES, placements
from headway.residual.rewiring import KINDS, can_rewire, places_itself, rewire
from headway.residual.transformer import make_norm
from headway.surgery import Edit, SetAttribute, Site, Swap, Technique, nested_tensors_off


class PretrainedWeightsWarning(UserWarning):
    """The placement of a model with trained weights was changed: the weights now compute another function."""


@dataclass(frozen=True)
class Placement(Technique):
    """Places the norms of every layer as ``scheme`` says.

    Works on stacks of ``nn.TransformerEncoderLayer``/``DecoderLayer``, headway's own transformer, and Hugging Face GPT-2,
    Llama, Mistral, Qwen2, Qwen3, Gemma, Phi-3, OPT, GPT-NeoX (sequential), ViT, CLIP, BERT and RoBERTa. Several stacks are placed
    each by its own depth. Parameter names stay; "peri" adds output norms, and the state says where norms sit.

    Args:
        scheme: "pre", "post", "peri", "output", "deepnorm", "layernorm_scaling" or "mix".
        alpha, order, n_post: for "mix", see :func:`headway.residual.placements.placements`.
        output_gain: start of the gains of the output norms under "peri".
        norm: "layernorm" or "rmsnorm" for the output norms; the kind the layer already uses by default.
        eps: of the output norms; that of the layer's norms by default.
        copy_gains: keep the gains the input norms have; False starts them afresh.
        deepnorm_start: under "deepnorm", start the weights as DeepNet does, see :mod:`headway.residual.deepnorm`.

    Raises:
        ValueError: unknown scheme or settings out of range.
        UnknownFamily: the model holds no layer of a known family.
        TypeError: a layer's residual structure cannot be rewired (parallel branches, or a family that is not listed).
    """

    looks_for: ClassVar[str] = "transformer layers whose norms are not yet placed so"

    scheme: str = "peri"
    alpha: float = 0.25
    order: str = "post_pre"
    n_post: int | None = None
    output_gain: float = 1.0
    norm: str | None = None
    eps: float | None = None
    copy_gains: bool = True
    deepnorm_start: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in (*SCHEMES, "mix"):
            raise ValueError(f"unknown placement {self.scheme!r}; choose one of {', '.join((*SCHEMES, 'mix'))}")
        if self.norm not in (None, "layernorm", "rmsnorm"):
            raise ValueError(f"norm must be 'layernorm' or 'rmsnorm'; {self.norm!r} was given")
        if self.deepnorm_start and self.scheme != "deepnorm":
            raise ValueError(f"deepnorm_start belongs to the scheme 'deepnorm'; scheme={self.scheme!r} was given")

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        allowed = {site.name for site in sites}
        found: list[Edit] = []
        stacks = describe(model).stacks
        for stack in stacks:
            wanted = placements(len(stack.blocks), self.scheme, self.alpha, self.order, self.n_post)
            chosen = [
                placement if block.name in allowed else block.placement
                for block, placement in zip(stack.blocks, wanted, strict=True)
            ]
            moves = [self._move(model, stack, *pair) for pair in zip(stack.blocks, chosen, strict=True)]
            found += [edit for edits in moves for edit in edits]
            owner = model.get_submodule(stack.name)
            # headway's own layers keep the record themselves
            if any(moves) and stack.blocks[0].name and not places_itself(model.get_submodule(stack.blocks[0].name)):
                found.append(RecordPlacement(owner, chosen, stack.name))
            if any(moves) and self.deepnorm_start:
                found += starting_weights(model, stack)
        if not found:
            return []
        self._warn(model, stacks)
        return [*found, *nested_tensors_off(model), *record(model, self, sites)]

    def _move(self, model: nn.Module, stack: Stack, block: Block, placement: str) -> list[Edit]:
        layer = model.get_submodule(block.name)
        if block.placement == placement:
            return []
        if block.placement == "parallel" or not can_rewire(layer):
            parallel = block.placement == "parallel"
            why = (
                "its branches are parallel"
                if parallel
                else "how its forward strings the branches together is not known"
            )
            raise TypeError(
                f"the norms of {type(layer).__name__} ({block.name}) cannot be moved: {why}; layers that can be rewired: "
                f"{', '.join(KINDS)}"
            )
        closing = self._closing(model, stack, block, placement)
        # torch's own layers have a switch for these two
        plain = stack.family == "torch.nn" and not hasattr(type(layer), "original")
        if plain and placement in ("pre", "post") and closing is None:
            return [SetAttribute(layer, "norm_first", placement == "pre", name=block.name)]
        new = rewire(layer, placement, block.index, len(stack.blocks))
        # what an earlier placement added does not belong to this one
        added = ("_output_norm", "closing_norm") if placement in ("post", "deepnorm") else ("_output_norm",)
        new._modules = {key: child for key, child in new._modules.items() if not key.endswith(added)}
        if closing is not None:
            new.closing_norm = closing
        for sublayer in block.sublayers:
            norm = model.get_submodule(sublayer.norm) if sublayer.norm else None
            if norm is None:
                raise TypeError(f"{block.name} has no norm on its {sublayer.kind} branch that could be moved")
            if placement == "peri":
                name = f"{sublayer.kind}_output_norm"
                setattr(new, name, self._fresh(norm, stack.hidden_size, self.output_gain))
        found: list[Edit] = [Swap(model, block.name, layer, new)]
        if not self.copy_gains:
            for sublayer in block.sublayers:
                old = model.get_submodule(sublayer.norm or "")
                found.append(Swap(new, sublayer.norm or "", old, self._fresh(old, stack.hidden_size, 1.0)))
        return found

    def _fresh(self, like: nn.Module, width: int, gain: float) -> nn.Module:
        """A norm of the kind, type and device of ``like`` with its gain started at ``gain``."""
        reference = next(like.parameters(), torch.empty(0))
        if self.norm is None:
            new = copy.deepcopy(like)
            if self.eps is not None:
                for attribute in ("eps", "variance_epsilon"):
                    if hasattr(new, attribute):
                        setattr(new, attribute, self.eps)
        else:
            new = make_norm(self.norm, width, self.eps).to(reference.device, reference.dtype)
        if isinstance(weight := getattr(new, "weight", None), nn.Parameter):
            nn.init.constant_(weight, gain - getattr(new, "gain_offset", 0.0))
        if isinstance(bias := getattr(new, "bias", None), nn.Parameter):
            nn.init.zeros_(bias)
        return new.train(like.training)

    def _closing(self, model: nn.Module, stack: Stack, block: Block, placement: str) -> nn.Module | None:
        """A final norm for a stack that has none and whose last layer no longer ends in one."""
        last = block.name == stack.blocks[-1].name and bool(block.name)
        if not last or stack.final_norm is not None or placement in ("post", "deepnorm"):
            return None
        if block.placement not in ("post", "deepnorm"):
            return None
        return self._fresh(model.get_submodule(block.sublayers[-1].norm or ""), stack.hidden_size, 1.0)

    def _warn(self, model: nn.Module, stacks: Sequence[Stack]) -> None:
        if getattr(model, "name_or_path", ""):
            warnings.warn(
                f"{type(model).__name__} was loaded from trained weights; with its norms placed {self.scheme!r} they compute "
                "another function and need training",
                PretrainedWeightsWarning,
                stacklevel=6,
            )
        if self.scheme != "peri":
            return
        for depth, block in ((len(stack.blocks), block) for stack in stacks for block in stack.blocks):
            for sublayer in block.sublayers:
                writer = getattr(model.get_submodule(sublayer.writer), "weight", None)
                readers = [getattr(model.get_submodule(name), "weight", None) for name in sublayer.readers]
                if writer is None or not writer.numel():
                    continue
                if not writer.detach().any():
                    warnings.warn(
                        f"{sublayer.writer} is all zeros: its output norm amplifies the gradient by 1/sqrt(eps); start it at random",
                        stacklevel=6,
                    )
                    return
                spread = [w.detach().std().item() for w in readers if w is not None and w.numel() > 1]
                ratio = writer.detach().std().item() / max(spread[0], 1e-12) if spread else 1.0
                if depth > 1 and abs(ratio * (2 * depth) ** 0.5 - 1) < 0.1:
                    warnings.warn(
                        f"{sublayer.writer} was started 1/sqrt(2L) smaller; under Peri-LN its output norm cancels that scale",
                        stacklevel=6,
                    )
                    return


__all__ = ["Placement", "PretrainedWeightsWarning", "UnknownFamily"]
