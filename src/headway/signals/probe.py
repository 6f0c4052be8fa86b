"""Signal propagation probe: one batch, one pass, a row for every layer, and what is wrong with them.

A network trains well if (1) its activations do not grow exponentially with depth, (2) different samples stay different, and
(3) the gradient in early layers neither explodes nor fades. All three are seen at initialisation, from one batch:

    flow = hw.probe(model, batch, loss=loss_fn, targets=y)
    print(flow)                     # a table, the law of growth, the findings
    flow.save("flow.html")

Paper: "Beyond BatchNorm: Towards a Unified Understanding of Normalization in Deep Learning", 2021, arXiv 2106.05956.
It is a diagnostic of propagation, not a predictor of final accuracy. Nothing of the model is left changed: buffers, gradients,
random generators, training modes and hooks are as before, also after an exception.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headway.anatomy import Anatomy
from headway.signals.batch import call_model, check_batch, objective, split_targets
from headway.signals.calls import Settings
from headway.signals.findings import Traits, findings
from headway.signals.flow import Flow
from headway.signals.growth import growth
from headway.signals.hooks import Recorder
from headway.signals.long_skips import long_skips
from headway.signals.points import KINDS, Layers, anatomy_of, find, kind_of, plain_name, unwrapped
from headway.signals.reading import scale_of


def probe(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[..., Tensor] | None = None,
    targets: Any = None,
    layers: Layers | None = None,
    kinds: Sequence[str] = KINDS,
    max_samples: int = 64,
    max_features: int = 65536,
    centered: bool = False,
    backward: bool = True,
    mode: Literal["train", "eval"] | None = None,
    grad_scale: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    unwrap: bool = False,
    sync: bool = False,
    exact: bool = False,
    batch_dim: int | Callable[[str, nn.Module, Tensor], int] = 0,
    channel_dim: int | None = None,
    select: Callable[[str, Any], Any] | None = None,
    saved: bool = True,
    collapse_at: float = 0.95,
    seed: int = 0,
    **keywords: Any,
) -> Flow:
    """Runs one forward and one backward pass and reports what every layer did to the signal and to its gradient.

    Args:
        model: any ``nn.Module``.
        *inputs: what the model is called with: tensors, or one batch: a tuple, a mapping, a Hugging Face ``BatchEncoding``.
            A batch (x, y) is split when ``loss`` takes an output and a target.
        loss: ``loss(output, targets)``, ``loss(output)``, or ``loss()``, which runs the model itself. Without it the loss of a
            Hugging Face output is used (give labels), else the output times a fixed random vector of unit variance.
        layers: restricts the modules: a glob on names, several, or a predicate (name, module).
        kinds: of "pre" (linear, convolution, attention, recurrent), "post" (activations), "stream" (residual blocks), "skip"
            (what long skips carry), "norm".
        max_samples: at most this many samples for likeness, evenly spaced over the batch.
        max_features: longer samples are represented by this many features at fixed random places; ``exact=True`` takes all.
        centered: subtract the mean sample before likeness is measured.
        backward: also run the backward pass.
        mode: "train" or "eval" for this pass; None leaves the modes as they are.
        grad_scale: the factor by which the loss was scaled (a number or a GradScaler); gradients are divided by it.
        optimizer: for the effective learning rates.
        unwrap: probe the plain code of a ``torch.compile``d model; otherwise such a model is refused.
        sync: put the statistics of all ranks of the process group together (likeness stays this rank's).
        batch_dim: axis of the samples, or a function (name, module, tensor) -> axis.
        channel_dim: axis of the channels where the default (1 after convolutions, last after linear layers) is wrong.
        select: ``select(name, output)`` picks the tensor out of a module's output (default: the first floating one).
        saved: count the bytes that autograd keeps for backward.
        collapse_at: mean cosine above which samples count as collapsed.
        **keywords: passed on to the model.

    Returns:
        A :class:`headway.signals.flow.Flow` with the rows, the law of growth and the findings; print it, or save it as a page.

    Raises:
        ValueError: an empty batch, a ``layers`` filter without a match, a loss that is no scalar or carries no gradient.
        TypeError: the model is no module, or compiled or scripted.
        RuntimeError: a hook could not be removed.
    """
    _check(model, unwrap, mode)
    core = unwrapped(model)
    anatomy, skips = anatomy_of(core), long_skips(core)
    points = find(core, layers, kinds, anatomy, skips)
    inputs, targets = split_targets(inputs, loss, targets)
    check_batch(inputs, keywords)
    settings = Settings(
        max_samples,
        None if exact else max_features,
        centered,
        backward,
        batch_dim,
        channel_dim,
        select,
        grad_scale,
        saved,
        sync,
        seed,
    )
    if max_samples < 2:
        raise ValueError(f"max_samples={max_samples} leaves nothing to compare; give at least 2")
    if backward and torch.is_inference_mode_enabled():
        raise ValueError("backward=True cannot run inside torch.inference_mode(); leave it or pass backward=False")
    scale_of(grad_scale)
    recorder = Recorder(points, settings, optimizer)
    with ExitStack() as stack:
        stack.enter_context(_restored(model, mode))
        if unwrap:
            stack.enter_context(_eager(model))
        stack.enter_context(torch.enable_grad() if backward else torch.no_grad())
        stack.enter_context(recorder)
        recorder.count_saved(model)
        output = None if _runs_itself(loss, inputs, keywords) else call_model(model, inputs, keywords)
        value, words, start = objective(output, loss, targets, backward, seed)
        recorder.begin_backward()
        if backward and value is not None:
            torch.autograd.backward(value if start is None else start[0], None if start is None else start[1])
        loss_value = math.nan if value is None else float(value.detach())
        del output, value, start
        rows = recorder.rows()
    law = growth(rows, collapse_at)
    notes = (
        []
        if loss is not None or "random" not in words
        else ["no loss was given: gradients are those of a random projection"]
    )
    return Flow(
        rows,
        law,
        findings(rows, law, traits(core, anatomy, skips), collapse_at, recorder.saved_total),
        loss_value / scale_of(grad_scale),
        words,
        recorder.saved_total,
        type(core).__name__,
        notes,
    )


def traits(model: nn.Module, anatomy: Anatomy | None, skips: Sequence[str] = ()) -> Traits:
    """What of the model's make the advice depends on."""
    kinds = [type(module).__name__ for module in model.modules() if kind_of(module) == "norm"]
    attention = any("Attention" in type(m).__name__ or "Attn" in type(m).__name__ for m in model.modules())
    placements = {block.placement for block in anatomy.blocks} if anatomy is not None else set()
    placement = placements.pop() if len(placements) == 1 else "mixed" if placements else ""
    return Traits(attention, len(kinds), kinds.count("LayerNorm"), placement, tuple(map(plain_name, skips)))


def _runs_itself(loss: Any, inputs: tuple, keywords: dict) -> bool:
    from headway.signals.batch import required_arguments

    return loss is not None and not inputs and not keywords and required_arguments(loss) == 0


def _check(model: nn.Module, unwrap: bool, mode: str | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module was expected, not {type(model).__name__}")
    if mode not in (None, "train", "eval"):
        raise ValueError(f"mode={mode!r} is unknown; choose 'train', 'eval' or None")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError("a TorchScript module runs without Python hooks; probe the Python model it was made from")
    if not unwrap and is_compiled(model):
        raise TypeError(
            "the model is compiled, and compiled code runs no hooks; probe the plain model, or pass unwrap=True"
        )


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it runs through ``torch.compile``."""
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Runs compiled parts as the plain Python they were made from."""
    held = [m for m in model.modules() if getattr(m, "_compiled_call_impl", None) is not None]
    kept = [m._compiled_call_impl for m in held]
    try:
        for module in held:
            module._compiled_call_impl = None
        with torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext():
            yield
    finally:
        for module, call in zip(held, kept, strict=True):
            module._compiled_call_impl = call


@contextmanager
def _restored(model: nn.Module, mode: str | None) -> Iterator[None]:
    """Whatever happens inside, the model's buffers, gradients and modes and the random generators are as before after it."""
    from headway.signals.snapshot import Snapshot

    before = Snapshot(model)
    try:
        if mode is not None:
            model.train(mode == "train")
        yield
    finally:
        before.restore()
