"""Image classification: scikit-learn's digits (embedded), and MNIST's and CIFAR's files from a folder of yours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.tasks.batches import Batches
from headway.tasks.cifar import read_cifar_folder
from headway.tasks.files import DataError, find_file
from headway.tasks.idx import read_images_and_labels
from headway.tasks.networks import ResidualNet, VisionTransformer
from headway.tasks.task import Task


class Images(Task):
    """Images in memory, cross-entropy, held-out accuracy in percent."""

    metric = "accuracy"
    lower_is_better = False
    batch_size = 64
    budget = "200 steps"
    learning_rate = 2e-3

    def __init__(self) -> None:
        self._data: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training images (count, channels, height, width) float32 and labels int64, then the held-out ones."""
        raise NotImplementedError

    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self._data is None:
            self._data = self.load()
        return self._data

    def train_batches(self, seed: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.data()[:2]
        return Batches(len(images), batch_size, seed, lambda index: (images[index], labels[index]))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images).float(), labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``accuracy`` in percent and ``loss`` in nats over the held-out images."""
        images, labels = self.data()[2:]
        device = next(model.parameters()).device
        logits = torch.cat([model(part.to(device)).float().cpu() for part in images.split(512)])
        right = (logits.argmax(1) == labels).double().mean()
        return {"accuracy": 100 * float(right), "loss": float(F.cross_entropy(logits, labels))}


def _sklearn_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.asarray(bunch.images, np.float32))[:, None] / 8 - 1  # type: ignore[union-attr]
    labels = torch.from_numpy(np.asarray(bunch.target, np.int64))  # type: ignore[union-attr]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, train = order[:360], order[360:]
    return images[train], labels[train], images[held_out], labels[held_out]


class Digits(Images):
    """scikit-learn's 1,797 digits of 8x8 (360 held out) and a residual convolutional network.

    Args:
        depth, width: of the network.
        norm: "layer" (nn.LayerNorm over the channels) or "batch" (nn.BatchNorm2d).
    """

    name = "digits"

    def __init__(self, depth: int = 4, width: int = 32, norm: Literal["layer", "batch"] = "layer") -> None:
        super().__init__()
        _check_norm(norm)
        self.depth, self.width, self.norm = depth, width, norm

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _sklearn_digits()

    def model(self, seed: int) -> nn.Module:
        return ResidualNet(1, 10, self.depth, self.width, self.norm)


class DigitsViT(Images):
    """scikit-learn's digits as 16 patches of 2x2, and a small Pre-LN vision transformer."""

    name = "digits-vit"

    def __init__(self, depth: int = 4, dim: int = 48, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.depth, self.dim, self.heads, self.dropout = depth, dim, heads, dropout

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _sklearn_digits()

    def model(self, seed: int) -> nn.Module:
        return VisionTransformer(1, 8, 2, 10, self.depth, self.dim, self.heads, self.dropout)


class MNIST(Images):
    """MNIST or Fashion-MNIST from its four IDX files, plain or gzipped.

    Where a folder holds only the test pair, its last fifth is held out and the rest is trained on.

    Args:
        folder: where the files lie.
        depth, width, norm: of the residual convolutional network, as for ``digits``.
    """

    name = "mnist"
    learning_rate = 2e-3

    def __init__(self, folder: str, depth: int = 4, width: int = 32, norm: Literal["layer", "batch"] = "layer") -> None:
        super().__init__()
        _check_norm(norm)
        self.folder, self.depth, self.width, self.norm = str(folder), depth, width, norm

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        test = self._pair("t10k")
        try:
            find_file(self.folder, "train-images-idx3-ubyte", "train-images.idx3-ubyte")
        except DataError:
            cut = len(test[0]) - len(test[0]) // 5
            return test[0][:cut], test[1][:cut], test[0][cut:], test[1][cut:]
        return *self._pair("train"), *test

    def _pair(self, part: str) -> tuple[Tensor, Tensor]:
        images = find_file(self.folder, f"{part}-images-idx3-ubyte", f"{part}-images.idx3-ubyte")
        labels = find_file(self.folder, f"{part}-labels-idx1-ubyte", f"{part}-labels.idx1-ubyte")
        pixels, marks = read_images_and_labels(images, labels)
        if marks.size and not 0 <= marks.min() <= marks.max() <= 9:
            raise DataError(f"{labels} holds the label {marks.max()}; MNIST's go from 0 to 9")
        return torch.from_numpy(pixels).float()[:, None] / 127.5 - 1, torch.from_numpy(marks)

    def model(self, seed: int) -> nn.Module:
        return ResidualNet(1, 10, self.depth, self.width, self.norm, stride=2)


class CIFAR(Images):
    """CIFAR-10 or CIFAR-100 from the files of the binary version.

    Args:
        folder: where ``data_batch_1.bin`` ... ``test_batch.bin`` (or ``train.bin``, ``test.bin``) lie.
        classes: 10 or 100.
        depth, width, norm: of the residual convolutional network, as for ``digits``.
    """

    name = "cifar"

    def __init__(
        self,
        folder: str,
        classes: Literal[10, 100] = 10,
        depth: int = 6,
        width: int = 64,
        norm: Literal["layer", "batch"] = "layer",
    ) -> None:
        super().__init__()
        _check_norm(norm)
        self.classes: Literal[10, 100] = classes
        self.folder, self.depth, self.width, self.norm = str(folder), depth, width, norm

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pixels, labels, test_pixels, test_labels = read_cifar_folder(self.folder, self.classes)
        images = [torch.from_numpy(part).float() / 127.5 - 1 for part in (pixels, test_pixels)]
        return images[0], torch.from_numpy(labels), images[1], torch.from_numpy(test_labels)

    def model(self, seed: int) -> nn.Module:
        return ResidualNet(3, self.classes, self.depth, self.width, self.norm, stride=2)


def _check_norm(norm: str) -> None:
    if norm not in ("layer", "batch"):
        raise ValueError(f'norm is "layer" or "batch", not {norm!r}')
