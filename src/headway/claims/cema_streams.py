"""What the claims of CEMA are measured on: digits that drift, networks for device and cloud, and what a device could do by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.learning.cloud_edge.affine import affine_parameters
from headway.learning.cloud_edge.cloud import CloudServer
from headway.learning.cloud_edge.distillation import entropy_loss
from headway.learning.cloud_edge.simulation import Simulation, simulate

Stream = list[tuple[Tensor, Tensor]]
SHIFTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise": lambda x, draw: x + 0.35 * torch.randn(x.shape, generator=draw),
    "blur": lambda x, draw: F.avg_pool2d(x, 3, 1, 1),
}


def network(width: int) -> nn.Sequential:
    """Digits (n, 1, 8, 8) -> logits (n, 10): three convolutions, each with batch norm."""
    layers: list[nn.Module] = []
    before = 1
    for after, stride in ((width, 1), (2 * width, 2), (2 * width, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Half to train on and half to stream, from 0 to 1."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    images, labels = torch.tensor(X / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    train, test = order[:898], order[898:]
    return images[train], labels[train], images[test], labels[test]


@cache
def trained(width: int, noise: float, seed: int, epochs: int = 30) -> nn.Sequential:
    """A network trained on the clean half with a little noise; in evaluation mode, never to be changed."""
    images, labels = digits()[:2]
    torch.manual_seed(seed)
    net = network(width)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    with torch.enable_grad():
        for _ in range(epochs):
            for index in torch.randperm(len(images)).split(64):
                x = images[index] + noise * torch.randn(len(index), 1, 8, 8)
                loss = F.cross_entropy(net(x), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return net.eval()


def stream(shift: str, seed: int, batches: int, size: int = 32) -> Stream:
    """Batches drawn from the other half, shifted."""
    images, labels = digits()[2:]
    draw = torch.Generator().manual_seed(1000 + seed)
    found = []
    for _ in range(batches):
        index = torch.randint(len(images), (size,), generator=draw)
        found.append((SHIFTS[shift](images[index], draw), labels[index]))
    return found


# what a device could do by itself


def accuracy(predict: Callable[[Tensor], Tensor], batches: Stream) -> float:
    right = sum(int((predict(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def refreshed(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """Batch norm with the statistics of the batch at hand: no gradient, but a batch is needed."""
    net = copy.deepcopy(net).train()
    return torch.no_grad()(net)


def tent(net: nn.Module, lr: float = 2.5e-3) -> Callable[[Tensor], Tensor]:
    """Tent (2021, arXiv 2006.10726): a step on the batch's entropy before the next one, with batch statistics; on the device."""
    net = copy.deepcopy(net).train().requires_grad_(False)
    parameters = affine_parameters(net)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters, lr, 0.9)

    def predict(x: Tensor) -> Tensor:
        with torch.enable_grad():
            logits = net(x)
            optimizer.zero_grad()
            entropy_loss(logits).backward()
        optimizer.step()
        return logits.detach()

    return predict


def adapted(
    shift: str, seed: int, batches: Stream, *, cloud: dict[str, Any] | None = None, **client: Any
) -> Simulation:
    """The stream through device and cloud; ``cloud`` are settings of the latter."""
    edge, foundation = pair(seed)
    server = CloudServer(edge, foundation, seed=seed, **(cloud or {}))
    return simulate(copy.deepcopy(edge), server, batches, codec="fp16", **client)


def pair(seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    return trained(8, 0.05, seed), trained(48, 0.15, seed)
