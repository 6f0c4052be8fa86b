"""The feed-forward nets that self-normalising ones are held against, and how all of them are trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.tabular.self_normalizing import SNN
from headway.tasks.tables import mlp


def plain(kind: str, inputs: int, outputs: int, depth: int, width: int, dropout: float = 0.0) -> nn.Module:
    """One of the nets by its name, with ``depth`` hidden layers, at its own start."""
    if kind == "SNN":
        return SNN(inputs, outputs, width, depth, dropout=dropout)
    if kind in ("Highway", "ResNet"):
        block = _Highway if kind == "Highway" else _Block
        return nn.Sequential(
            nn.Linear(inputs, width), *(block(width, dropout) for _ in range(depth - 1)), nn.Linear(width, outputs)
        )
    norm: Any = {"BatchNorm": "batch", "LayerNorm": "layer"}.get(kind, "none")
    net = mlp(inputs, outputs, depth, width, norm)
    if kind == "WeightNorm":
        for layer in net:
            if isinstance(layer, nn.Linear):
                nn.utils.parametrizations.weight_norm(layer)
    if not dropout:
        return net
    parts: list[nn.Module] = []
    for layer in net:
        parts += [layer, nn.Dropout(dropout)] if isinstance(layer, nn.ReLU) else [layer]
    return nn.Sequential(*parts)


class _Highway(nn.Module):
    """x + t * (relu(H x) - x), t = sigmoid(T x), started near the identity ("Highway Networks", 2015, arXiv 1505.00387)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.transform, self.gate, self.dropout = nn.Linear(width, width), nn.Linear(width, width), nn.Dropout(dropout)
        nn.init.constant_(self.gate.bias, -1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.gate(x)) * (self.dropout(torch.relu(self.transform(x))) - x)


class _Block(nn.Module):
    """x + W relu(BN(x))."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.linear, self.dropout = nn.BatchNorm1d(width), nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.linear(torch.relu(self.norm(x))))


def fit(
    net: nn.Module, x: Tensor, y: Tensor, rate: float, steps: int, batch: int, seed: int, momentum: float = 0.0
) -> nn.Module:
    """Trains by SGD for ``steps`` batches and returns the net in evaluation mode."""
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=momentum)
    random = torch.Generator().manual_seed(seed)
    net.train()
    done = 0
    while done < steps:
        for rows in torch.randperm(len(x), generator=random).split(batch):
            if len(rows) < 2 or done == steps:  # BatchNorm takes no single row
                continue
            loss = F.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
    return net.eval()


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of rows whose class the net names."""
    with torch.no_grad():
        return (net(x).argmax(1) == y).double().mean().item()
