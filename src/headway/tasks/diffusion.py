"""Denoising diffusion on scikit-learn's digits: predict the noise in a noisy digit with a network that has long skips.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,   loss = mean |eps - network(x_t, t)|^2,   abar_t = prod_{s <= t} (1 - beta_s)

with beta from 1e-4 to 0.02 over T steps ("Denoising Diffusion Probabilistic Models", 2020, arXiv 2006.11239). The smallest workload on
which scaled long skips (arXiv 2310.13545) can be told from plain ones: ``hw.compare("digits-diffusion", ["baseline", "scale-long",
"scale-long(mode='ls')"])``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.tasks.batches import Batches, generator_for
from headway.tasks.digits import _sklearn_digits
from headway.tasks.task import Task
from headway.tasks.unets import UNet, UViT

Batch = tuple[Tensor, Tensor, Tensor]


class NoisyImages(Iterator[Batch]):
    """Batches of (noisy image, time, noise); the k-th depends on the seed and k alone."""

    def __init__(self, images: Tensor, schedule: Tensor, seed: int, batch_size: int) -> None:
        self.images, self.schedule, self.seed = images, schedule, seed
        self.clean = Batches(len(images), batch_size, seed, lambda index: images[index])

    def skip(self, steps: int) -> None:
        """Passes over ``steps`` batches at no cost."""
        self.clean.skip(steps)

    def __next__(self) -> Batch:
        step = self.clean.position
        images = next(self.clean)
        draw = generator_for(self.seed + 1, step)
        return noisy(images, torch.randint(len(self.schedule), (len(images),), generator=draw), self.schedule, draw)


def noisy(images: Tensor, t: Tensor, schedule: Tensor, draw: torch.Generator) -> Batch:
    """(x_t, t, eps) for clean images."""
    eps = torch.randn(images.shape, generator=draw)
    kept = schedule[t].reshape(-1, 1, 1, 1)
    return kept.sqrt() * images + (1 - kept).sqrt() * eps, t, eps


class DigitsDiffusion(Task):
    """Noise prediction on the digits; the metric is the mean squared error on 360 held-out digits at four fixed times and noises each.

    Args:
        network: "uvit", a transformer over 2x2 patches, or "unet", a convolutional UNet.
        skips: N, long skips of the transformer, which has 2 N + 1 blocks; the UNet has 6.
        dim, heads: of the transformer.
        timesteps: T.
    """

    name = "digits-diffusion"
    metric = "loss"
    batch_size = 64
    budget = "300 steps"
    learning_rate = 1e-3

    def __init__(
        self, network: str = "uvit", skips: int = 6, dim: int = 64, heads: int = 4, timesteps: int = 1000
    ) -> None:
        if network not in ("uvit", "unet"):
            raise ValueError(f'network is "uvit" or "unet", not {network!r}')
        if timesteps < 2:
            raise ValueError(f"timesteps is at least 2, not {timesteps}")
        self.network, self.skips, self.dim, self.heads, self.timesteps = network, skips, dim, heads, timesteps
        self._schedule = torch.cumprod(1 - torch.linspace(1e-4, 0.02, timesteps), 0)
        self._images: tuple[Tensor, Tensor] | None = None

    def images(self) -> tuple[Tensor, Tensor]:
        """Digits in [-1, 1] to train on, and those held out."""
        if self._images is None:
            train, _, held_out, _ = _sklearn_digits()
            self._images = train, held_out
        return self._images

    def model(self, seed: int) -> nn.Module:
        return UNet(1) if self.network == "unet" else UViT(8, 1, 2, self.dim, self.heads, self.skips, conv=False)

    def train_batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        return NoisyImages(self.images()[0], self._schedule, seed, batch_size)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x, t, eps = batch
        return F.mse_loss(model(x, t).float(), eps)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        images, device = self.images()[1], next(model.parameters()).device
        draw, total = torch.Generator().manual_seed(0), 0.0
        for part in range(4):
            # each digit at one time of every quarter
            t = (torch.arange(len(images)) * 97 % self.timesteps + part * self.timesteps) // 4
            x, t, eps = (value.to(device) for value in noisy(images, t, self._schedule, draw))
            total += float(F.mse_loss(model(x, t).float(), eps)) / 4
        return {"loss": total}

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=self.learning_rate, betas=(0.99, 0.999), weight_decay=0.03)
