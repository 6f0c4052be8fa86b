"""Plain digits into coloured ones and back, guided by exemplars: what a style layer with covariances does that one with variances does not.

The smallest setting of exemplar-guided translation (Cho et al., 2019, arXiv 1812.09912). Domain a: grey digits. Domain b: digits that are
inverted, blurred and coloured, each by its own mixing of the digit and two fields of smooth noise, so that every exemplar has its own
covariance of red, green and blue. The network has adaptive instance norms;

    headway compare digits-translation --arms "baseline,gdwct(groups=8),gdwct(groups=1)"

trains it beside its twins with group-wise whitening and colouring. A generator and its discriminators step together here, in one
optimiser, while :meth:`headway.vision.translation.GDWCTTranslator.training_step` takes turns. On photographs:
:mod:`headway.tasks.photos`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.tasks.batches import Batches, generator_of
from headway.tasks.digits import _sklearn_digits
from headway.tasks.image_files import ImageFiles, taken
from headway.tasks.task import Task
from headway.vision.translation import GDWCTTranslator

Pair = tuple[Tensor, Tensor]
Domain = tuple[Tensor | ImageFiles, Tensor | ImageFiles]


class Translation(Task):
    """Two domains of unpaired images, and :class:`headway.vision.translation.GDWCTTranslator` with adaptive instance norms between them;
    the metric is the error of the colours' covariance."""

    metric = "covariance_error"
    batch_size = 8
    budget = "600 steps"
    learning_rate = 1e-3
    base_dim: int
    blocks: int

    def data(self) -> tuple[Domain, Domain]:
        """Images (count, 3, size, size) of the domains a and b between -1 and 1, to train on and held out."""
        raise NotImplementedError

    def model(self, seed: int) -> nn.Module:
        return GDWCTTranslator(
            base_dim=self.base_dim, blocks=self.blocks, groups=4, scales=2, layers=3, style_layer="adain"
        )

    def train_batches(self, seed: int, batch_size: int) -> Iterator[Pair]:
        return _Unpaired(self.data()[0], batch_size, seed)

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        losses = model(*batch)
        return losses.generator + losses.discriminator

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=self.learning_rate, betas=(0.5, 0.999))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``covariance_error`` of held-out images of a in the style of held-out exemplars of b: the distance of the output's covariance
        of colours from the exemplar's, relative to it."""
        return {"covariance_error": covariance_error(*self.translated(model))}

    def translated(self, model: nn.Module) -> Pair:
        """Held-out images of a in the style of exemplars of b, at most 400, and those exemplars. Neither shows what the other does."""
        _, (contents, exemplars) = self.data()
        network = getattr(model, "module", model)
        assert isinstance(network, GDWCTTranslator)
        device, parts = next(model.parameters()).device, []
        for index in torch.arange(min(len(contents), 400)).split(40):
            a, b = taken(contents, index), taken(exemplars, (index - 1) % len(exemplars))
            parts.append((network.translate(a.to(device), b.to(device)).float().cpu(), b))
        made, wanted = (torch.cat(each) for each in zip(*parts, strict=True))
        return made, wanted


class DigitsTranslation(Translation):
    """scikit-learn's digits at 32x32 in two domains.

    Args:
        base_dim, blocks: of the network. size: of the images.
    """

    name = "digits-translation"

    def __init__(self, base_dim: int = 16, blocks: int = 2, size: int = 32) -> None:
        check_sizes(base_dim, size)
        self.base_dim, self.blocks, self.size = base_dim, blocks, size
        self._images: tuple[Pair, Pair] | None = None
        self._labels: Pair | None = None

    def data(self) -> tuple[Pair, Pair]:
        if self._images is None:
            train, labels, held_out, held_labels = _sklearn_digits()
            draw = torch.Generator().manual_seed(0)
            self._images = tuple((plain(x, self.size), coloured(x, self.size, draw)) for x in (train, held_out))  # type: ignore[assignment]
            self._labels = labels, held_labels
        assert self._images is not None
        return self._images

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``covariance_error``, and ``accuracy`` in percent, with which the digit is still recognised."""
        made, exemplars = self.translated(model)
        assert self._labels is not None
        return {
            "covariance_error": covariance_error(made, exemplars),
            "accuracy": self.recognised(made, self._labels[1]),
        }

    def recognised(self, images: Tensor, labels: Tensor) -> float:
        """The share in percent whose nearest training digit is of the right class. Near is a digit that is a mixture of the image's
        three colours, whatever the mixture: no style makes a digit another one."""
        (train, _), _ = self.data()
        assert self._labels is not None
        maps = F.adaptive_avg_pool2d(images, 8).flatten(2)
        span = torch.linalg.qr((maps - maps.mean(2, keepdim=True)).mT + 1e-6 * torch.eye(64, 3))[0]
        digits = F.adaptive_avg_pool2d(train[:, :1], 8).flatten(1)
        digits = F.normalize(digits - digits.mean(1, keepdim=True))
        explained = torch.einsum("bpc,kp->bkc", span, digits).square().sum(2)
        return 100 * float((self._labels[0][explained.argmax(1)] == labels).double().mean())


class _Unpaired(Iterator[Pair]):
    """Batches of both domains that have nothing to do with each other."""

    def __init__(self, images: Domain, batch_size: int, seed: int) -> None:
        self.parts = [Batches(len(x), batch_size, 2 * seed + i, _take(x, 2 * seed + i)) for i, x in enumerate(images)]

    def skip(self, steps: int) -> None:
        for part in self.parts:
            part.skip(steps)

    def __next__(self) -> Pair:
        a, b = (next(part) for part in self.parts)
        return a, b


def _take(images: Tensor | ImageFiles, seed: int) -> Callable[[Tensor], Tensor]:
    return lambda index: taken(images, index, generator_of(seed, index))


def check_sizes(base_dim: int, size: int) -> None:
    if base_dim < 4 or base_dim % 4 or size < 16 or size % 4:
        raise ValueError(f"base_dim is a multiple of 4, and size one of at least 16; they are {base_dim} and {size}")


def plain(digits: Tensor, size: int) -> Tensor:
    """Grey images (count, 3, size, size) of digits (count, 1, 8, 8)."""
    return _enlarged(digits, size).expand(-1, 3, -1, -1).contiguous()


def coloured(digits: Tensor, size: int, draw: torch.Generator) -> Tensor:
    """Inverted and blurred digits, each with two fields of noise, mixed into three colours around a colour, at random for each."""
    count = len(digits)
    ink = F.avg_pool2d(_enlarged(-digits, size), 3, 1, 1)
    fields = torch.cat([ink, _enlarged(torch.randn(count, 2, 8, 8, generator=draw), size)], 1)
    turned = torch.linalg.qr(torch.randn(count, 3, 3, generator=draw))[0]
    mixing = turned * torch.tensor([0.4, 0.2, 0.1])
    colour = 0.3 * torch.randn(count, 3, 1, 1, generator=draw)
    return (torch.einsum("bcf,bfhw->bchw", mixing, fields) + colour).clamp(-1, 1)


def _enlarged(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def covariance_error(images: Tensor, exemplars: Tensor) -> float:
    """The distance between the covariances of colours of each image and its exemplar, relative to the latter's norm, on average."""
    ours, theirs = (torch.stack([part.cov() for part in x.double().flatten(2)]) for x in (images, exemplars))
    away = (ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
    return float(away.mean())
