"""How one candidate of a layer search is judged: a quality test, a stability test, and a score in every anchor net.

Liu et al., 2020, arXiv 2004.02967, section 3; which gradient its stability test takes is not known for certain (``gradient_norm`` of
:class:`Protocol` replaces ours). The search itself: :mod:`headway.norms.evo_search`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.norms.evo_anchors import Anchor, Layer
from headway.norms.evo_graph import LayerGraph

Data = tuple[Tensor, Tensor, Tensor, Tensor]
GradientNorm = Callable[[nn.Module, Tensor, Tensor, list[Tensor]], Tensor]


@dataclass(frozen=True)
class Protocol:
    """How one candidate is judged; the fields of :func:`headway.norms.evo_search.search_layers`."""

    quality: tuple[int, float] | None = (100, 0.2)
    stability: tuple[int, float, float] | None = (100, 0.1, 1e8)
    steps: int = 150
    batch_size: int = 64
    learning_rate: float = 0.05
    seed: int = 0
    gradient_norm: GradientNorm | None = None


class NotFinite(ArithmeticError):
    """A loss or an output was not finite."""


class Training:
    """One anchor net with one layer, trained by SGD with momentum; a longer training goes on where a shorter one stopped."""

    def __init__(self, anchor: Anchor, layer: Layer, data: Data, protocol: Protocol) -> None:
        self.data, self.protocol, self.done = data, protocol, 0
        torch.manual_seed(protocol.seed)
        self.model, self.draw = anchor(layer), torch.Generator().manual_seed(protocol.seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), protocol.learning_rate, momentum=0.9)

    def score(self, steps: int) -> float:
        """Validation accuracy (0 to 1) after ``steps`` in all.

        Raises:
            ArithmeticError: a loss or an output was not finite; training stops there.
        """
        x, y, x_val, y_val = self.data
        self.model.train()
        while self.done < steps:
            at = torch.randint(len(x), (self.protocol.batch_size,), generator=self.draw)
            loss = F.cross_entropy(self.model(x[at]), y[at])
            if not torch.isfinite(loss):
                raise NotFinite(f"the loss of step {self.done + 1} is not finite")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.done += 1
        with torch.no_grad():
            out = self.model.eval()(x_val)
        if not torch.isfinite(out).all():
            raise NotFinite("an output in evaluation is not finite")
        return float((out.argmax(1) == y_val).double().mean())


def train_score(anchor: Anchor, layer: Layer, data: Data, steps: int, protocol: Protocol) -> float:
    """:meth:`Training.score` of a net of its own."""
    return Training(anchor, layer, data, protocol).score(steps)


def gradient_norm(model: nn.Module, x: Tensor, y: Tensor, weights: list[Tensor]) -> Tensor:
    """Norm of the loss gradient over ``weights``, itself differentiable."""
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), weights, create_graph=True, allow_unused=True)
    return torch.sqrt(sum((g.square().sum() for g in grads if g is not None), x.new_zeros(())) + 1e-30)


def stable(anchor: Anchor, layer: Layer, data: Data, protocol: Protocol) -> bool:
    """Whether the norm stays finite and below the limit while it is climbed from the initial convolution weights."""
    assert protocol.stability is not None
    steps, rate, limit = protocol.stability
    torch.manual_seed(protocol.seed)
    model = anchor(layer).train()
    weights = [p for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for p in [m.weight]]
    x, y = data[0][: protocol.batch_size], data[1][: protocol.batch_size]
    measure = protocol.gradient_norm or gradient_norm
    for _ in range(steps):
        norm = measure(model, x, y, weights)
        if not torch.isfinite(norm) or norm > limit:
            return False
        if not norm.requires_grad:
            return True
        ups = torch.autograd.grad(norm, weights, allow_unused=True)
        with torch.no_grad():
            for w, up in zip(weights, ups, strict=True):
                if up is not None:
                    w.add_(up, alpha=rate)
    return all(bool(torch.isfinite(w).all()) for w in weights)


def judge(graph: LayerGraph, anchors: Sequence[Anchor], data: Data, protocol: Protocol) -> tuple[str, list[float]]:
    """Why a candidate is rejected ("" if it is not), and its accuracy in every anchor."""
    layer, tests = graph.to_module, protocol.quality
    try:
        runs = []
        for anchor in anchors:
            runs.append(Training(anchor, layer, data, protocol))
            if tests is not None and runs[-1].score(tests[0]) < tests[1]:
                return "quality", []
        for anchor in anchors if protocol.stability is not None else ():
            if not stable(anchor, layer, data, protocol):
                return "stability", []
        # what the quality test has trained is trained on, unless it went further
        if tests is not None and tests[0] > protocol.steps:
            runs = [Training(anchor, layer, data, protocol) for anchor in anchors]
        return "", [run.score(protocol.steps) for run in runs]
    except NotFinite:
        return "quality", []
