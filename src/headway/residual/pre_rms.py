"""Pre-RMSNorm: the same predictions from a trained Pre-LN transformer, with RMS norms in place of its layer norms.

    P = I - (1/d) 1 1^T,      LN0(x) = (x - mean(x)) / sqrt(var(x) + eps) = RMS0(P x),      RMS0(x) = x / sqrt(mean(x^2) + eps)

All that is added to the residual stream is recentred: ``W <- P W`` and ``b <- P b`` for the output projections, ``E <- E P`` for
tables and tokens. The stream then has mean zero, where layer norm is RMS norm with the same eps. Gain g and bias beta of a norm go
into the linear maps that read it, ``W' = W diag(g)``, ``b' = b + W beta``. Of a zero-mean stream the last channel is minus the sum
of the others: Pre-CRMSNorm leaves it out, ``CRMS0(z) = z / sqrt((sum(z^2) + sum(z)^2) / d + eps)`` over d - 1 channels, with
``W'[:, :d-1] - W'[:, d-1:]`` in what reads it.

Jiang et al.: Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers, 2023 (arXiv 2305.14858).
Reach for the baked form before inference, export, quantisation or rotation. Training afterwards is not Pre-LN training: the
gradient through an RMS norm has a part along 1 that brings the mean back. The parametrised form keeps the raw weights, recentres
inside the graph and follows the Pre-LN trajectory under any optimiser; :func:`finalize` bakes it. Not for Post-LN models, nor where
something else than a layer norm reads the stream. Hidden states differ from the original's by their mean, and embeddings passed in
by hand (``inputs_embeds``) must have mean zero under the baked form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from headway.anatomy import UnknownFamily
from headway.checkpoints import record
from headway.models import made_up_batch
from headway.norms.rms import CRMSNorm, RMSNorm
from headway.residual.crms import CompletingRMSNorm, narrow_attention
from headway.residual.described import described
from headway.residual.equivalence import Verified, verify_equivalence
from headway.residual.foldable import foldable
from headway.residual.recentring import (
    Bake,
    CentreActivation,
    Parametrize,
    Uncentre,
    parametrized_places,
    recentre_embedding_,
    recentre_linear_,
)
from headway.residual.reweighting import Reweighting
from headway.residual.stream import NotPreNormError, Place, Stream
from headway.surgery import Edit, SetAttribute, Site, Swap, Technique, apply, fused_paths_off

_MARK = "_pre_rms_stream"


@dataclass(frozen=True)
class PreRMSNorm(Technique):
    """Turns a Pre-LN transformer into a Pre-RMSNorm (or Pre-CRMSNorm) transformer that computes the same.

    Works on Hugging Face GPT-2, GPT-J, GPT-NeoX, OPT (Pre-LN sizes), Phi, ViT, CLIP and Whisper, on timm's ViT, on
    ``nn.TransformerEncoder``/``Decoder`` with ``norm_first=True`` and a final norm, and on headway's own decoder placed "pre"; any
    other Pre-LN model is traced on ``example_inputs`` (:mod:`headway.residual.foldable`), a Hugging Face model on a batch made up
    for it. A head tied to the token table keeps the old table as its own when the table is recentred. Where a stream comes from
    outside the model, from a nonlinearity or from a norm, the first layer takes the mean off it.

    Args:
        mode: "baked" recentres the weights once, for inference; "parametrized" recentres them inside the graph at every forward,
            and the stream itself where it enters the first block and after dropout, for training.
        compress: keep the stream without its last channel (Pre-CRMSNorm); the heads of attentions keep number and size. A norm
            whose output is not only read by linear maps gives the full width again.
        fold_affine: move gain and bias of the norms into the linear maps that read them; True under "baked" and False under
            "parametrized" (where it would change what is trained) by default. Norms read by anything else keep theirs.
        example_inputs: what the model is called with: a tuple, a mapping, or one tensor.
        verify: with ``example_inputs``, run the model before and after and refuse a difference.
        atol: allowed difference relative to the output's standard deviation: 1e-5 in float32, 3e-2 in bfloat16 by default.
        refuse_dropout: under "baked", refuse a model in training mode whose dropout on the stream is above 0; False converts it
            all the same, for use after ``model.eval()``.

    Raises:
        NotPreNormError: Post-LN or Peri-LN layers, RMS norms of other libraries, no final norm, a reader of the stream without a
            norm, a writer of an unknown kind, or dropout as above; the message names the first.
        UnknownFamily: the model holds no layer of a known family and no ``example_inputs`` were given.
        ValueError: an unknown mode; ``compress`` with ``fold_affine=False`` or in the parametrised mode; ``fold_affine`` in that
            mode; ``where`` leaves out a part of the model; the outputs differ by more than ``atol``.
    """

    looks_for: ClassVar[str] = "layer norms that read a residual stream"

    mode: str = "baked"
    compress: bool = False
    fold_affine: bool | None = None
    example_inputs: Any = field(default=None, repr=False, compare=False)
    verify: bool = True
    atol: float | None = None
    refuse_dropout: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("baked", "parametrized"):
            raise ValueError(f"mode is 'baked' (inference) or 'parametrized' (training), not {self.mode!r}")
        if self.compress and self.fold_affine is False:
            raise ValueError(
                "compress=True needs fold_affine=True: a gain on d - 1 channels cannot express that of the one left out"
            )
        if self.mode == "parametrized" and (self.compress or self.fold_affine):
            option = "compress" if self.compress else "fold_affine"
            raise ValueError(
                f"{option}=True changes which numbers are trained; finalize the parametrised model and convert it afterwards"
            )

    def label(self) -> str:
        return replace(self, example_inputs=None)._label() if self.example_inputs is not None else self._label()

    def _label(self) -> str:
        return super().label()

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        stream = self._stream(model)
        if stream is None:
            return []
        if {id(site.module) for site in sites} != {id(module) for module in model.modules()}:
            raise ValueError("PreRMSNorm converts the whole residual stream; apply it without where=")
        found = self._baked(model, stream) if self.mode == "baked" else self._parametrized(model, stream)
        for name in stream.entries:
            found.append(CentreActivation(model, name, "entry", self.compress))
        for name in stream.outputs:
            found.append(CentreActivation(model, name, "exit", self.compress))
        found += [Kept(model.get_submodule(name), name, reason) for name, reason in stream.skipped]
        found += fused_paths_off(model, [model.get_submodule(norm.name) for norm in stream.norms])
        found += record(model, replace(self, example_inputs=None, refuse_dropout=False))
        if self.verify and self.example_inputs is not None:
            found.append(Verified(model, self.example_inputs, self.atol))
        return found

    def _stream(self, model: nn.Module) -> Stream | None:
        training = self.mode == "parametrized"
        if self.example_inputs is not None:
            return foldable(model, self.example_inputs, training, self.refuse_dropout)
        try:
            return described(model, training, self.refuse_dropout)
        except UnknownFamily as error:
            if not hasattr(model, "config"):
                raise UnknownFamily(f"{error}; with example_inputs=... it is traced instead") from None
        return foldable(model, made_up_batch(model), training, self.refuse_dropout)

    def _baked(self, model: nn.Module, stream: Stream) -> list[Edit]:
        weights = Reweighting(model)
        fold = self.fold_affine is not False
        for norm in stream.norms:
            for reader in norm.readers or () if fold else ():
                weights.fold(model.get_submodule(norm.name), norm.name, reader)
        for place in stream.writers:
            weights.recentre(place)
        narrow: list[Edit] = []
        if self.compress:
            narrow = self._compress(model, stream, weights)
        found = [*weights.edits([edit.old for edit in narrow] + [edit.old.out_proj for edit in narrow]), *narrow]  # type: ignore[attr-defined]
        for norm in stream.norms:
            old: Any = model.get_submodule(norm.name)
            if norm.readers is None or not fold:
                full = CompletingRMSNorm(old.normalized_shape[0], old.eps, old.weight, old.bias)
                new = full if self.compress else rms_like(old, affine=True)
            else:
                new = CRMSNorm(old.normalized_shape[0] - 1, old.eps) if self.compress else rms_like(old, affine=False)
            found.append(Swap(model, norm.name, old, _hooked(new, old)))
        return found

    def _compress(self, model: nn.Module, stream: Stream, weights: Reweighting) -> list[Edit]:
        """Cuts writers and readers, and returns the attentions that have to be others."""
        attentions = {
            id(module): (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
        }
        outs = {id(module.out_proj): key for key, (_, module) in attentions.items()}
        cuts: dict[int, list[bool]] = {}
        for place in stream.writers:
            owner: Any = model.get_submodule(place.owner)
            if getattr(owner, place.attribute).shape[place.axis] < 2:
                raise ValueError(f"{place.name} writes one channel, and a stream of one channel has none to leave out")
            if getattr(owner, "groups", 1) > 1:
                raise ValueError(f"{place.owner} is a grouped convolution, whose last output alone cannot be left out")
            weights.cut(place)
            if id(owner) in outs:
                cuts.setdefault(outs[id(owner)], [False] * 3)
        for norm in stream.norms:
            for reader in norm.readers or ():
                owner = model.get_submodule(reader.owner)
                if id(owner) in attentions:
                    short = cuts.setdefault(id(owner), [False] * 3)
                    first, end = reader.rows or (0, 3 * owner.embed_dim)
                    for i in range(3):
                        short[i] = short[i] or first <= i * owner.embed_dim < end
                else:
                    weights.read_cut(reader)
        found: list[Edit] = []
        for key, short in cuts.items():
            name, old = attentions[key]
            out = tuple(
                None if (new := weights.changed(f"{name}.out_proj", part)) is None else new.detach()
                for part in ("weight", "bias")
            )
            new = narrow_attention(old, lambda part, n=name: weights.changed(n, part), tuple(short), out)  # type: ignore[arg-type]
            found.append(Swap(model, name, old, _hooked(new, old)))
        return found

    def _parametrized(self, model: nn.Module, stream: Stream) -> list[Edit]:
        found: list[Edit] = []
        weights = Reweighting(model)
        seen: set[tuple[int, str]] = set()
        for place in stream.writers:
            owner = model.get_submodule(place.owner)
            if place.after is not None or (id(owner), place.attribute) in seen:
                continue
            if place.gate is not None:
                raise NotPreNormError(
                    f"{'.'.join(place.gate)} scales what {place.owner} writes and is no module of its own, so nothing can be "
                    "recentred after it; use mode='baked'"
                )
            seen.add((id(owner), place.attribute))
            if place.attribute in owner._buffers:
                weights.recentre(place)
            else:
                found.append(Parametrize(owner, place.attribute, place.axis, place.name))
        found += weights.edits()
        for name in dict.fromkeys(place.after for place in stream.writers if place.after is not None):
            found.append(CentreActivation(model, name, "exit"))
        for norm in stream.norms:
            old: Any = model.get_submodule(norm.name)
            found.append(Swap(model, norm.name, old, _hooked(rms_like(old, affine=True), old)))
        return [*found, _Marked(model, stream)]


class _Marked(SetAttribute):
    """Notes the stream of a parametrised model in it, for :func:`finalize`."""

    def __init__(self, model: nn.Module, stream: Stream | None) -> None:
        super().__init__(model, _MARK, stream)

    def describe(self) -> tuple[str, str]:
        return ("plain", "parametrised") if self.value is not None else ("parametrised", "plain")


class Kept(Edit):
    """A norm that stays as it is, with the reason."""

    def __init__(self, module: nn.Module, name: str, reason: str) -> None:
        self.name, self._kind, self._reason = name, type(module).__name__, reason

    def do(self) -> None:
        pass

    def undo(self) -> None:
        pass

    def describe(self) -> tuple[str, str]:
        return self._kind, f"kept: {self._reason}"


@dataclass(frozen=True)
class Finalized(Technique):
    """Bakes what :class:`PreRMSNorm` with ``mode="parametrized"`` does at every forward into plain weights.

    The stream still loses its mean where it enters the first block, so that tables stay as they are, and tied.
    """

    looks_for: ClassVar[str] = "weights that are recentred at every forward"

    def edits(self, model: nn.Module, sites: Sequence[Site]) -> list[Edit]:
        found: list[Edit] = [Bake(owner, attribute, name) for name, owner, attribute in parametrized_places(model)]
        stream: Stream | None = getattr(model, _MARK, None)
        if stream is not None:
            late = [place for place in stream.writers if place.after is not None]
            weights = Reweighting(model)
            for place in late:
                weights.recentre(place)
            found += weights.edits()
            found += [
                Uncentre(model.get_submodule(name), name)
                for name in dict.fromkeys(place.after for place in late)
                if name is not None
            ]
            found.append(_Marked(model, None))
        return [*found, *record(model, self)] if found else []


def finalize(model: nn.Module) -> nn.Module:
    """Bakes a parametrised model in place and returns it: plain tensors, for inference; ``hw.undo`` takes it back.

    Raises:
        NothingToChange: the model holds no weight that is recentred at every forward.
    """
    return apply(model, Finalized())


def rms_like(norm: Any, affine: bool) -> RMSNorm:
    """The RMS norm of the shape and eps of a layer norm, with its very parameters or with none."""
    new = RMSNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
    if affine:
        new.elementwise_affine = norm.weight is not None
        new.weight, new.bias = norm.weight, norm.bias
    return new


def _hooked(new: nn.Module, old: nn.Module) -> nn.Module:
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(new, hooks).update(getattr(old, hooks))
    return new.train(old.training)


__all__ = [
    "Finalized",
    "NotPreNormError",
    "Place",
    "PreRMSNorm",
    "UnknownFamily",
    "finalize",
    "recentre_embedding_",
    "recentre_linear_",
    "rms_like",
    "verify_equivalence",
]
