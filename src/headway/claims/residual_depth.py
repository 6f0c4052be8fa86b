"""Claims of "On residual network depth" (2025, arXiv 2510.03470), measured on this machine.

Depth explosion and its taming, training without normalisation, capacity, step time against batch norm, cost of the expansion.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.claims.evidence import Evidence, Verdict
from headway.measure import paired
from headway.residual.complexity import geometric_complexity
from headway.residual.expansion import Tower, residual_expansion

KEY = "residual-depth"


def measure(quick: bool) -> list[Evidence]:
    """Quick: under 25 s alone on one core; full: under 4.5 minutes."""
    with torch.random.fork_rng():
        return [*_variance(quick), *_training(quick), _step_time(quick), _expansion_cost(quick)]


def _branch(dim: int, hidden: int, zero_mean: bool = False) -> nn.Sequential:
    first, last = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
    # He start on both, so that a branch preserves the variance of the stream
    nn.init.normal_(first.weight, std=math.sqrt((1 if zero_mean else 2) / dim))
    nn.init.normal_(last.weight, std=math.sqrt(2 / hidden))
    for linear in (first, last):
        nn.init.zeros_(linear.bias)
    return nn.Sequential(first, nn.ReLU(), last)


def _ratio(n: int, scale: str | float, seed: int) -> float:
    torch.manual_seed(seed)
    tower = Tower([_branch(64, 64, True) for _ in range(n)], scale).double()
    x = torch.randn(256, 64, dtype=torch.float64)
    with torch.no_grad():
        return (tower(x).var() / x.var()).item()


def _variance(quick: bool) -> list[Evidence]:
    depths, seeds = (8, 32, 128, 512), 1 if quick else 5
    rows = [
        {"n": n, "scale": str(scale), "ratio": statistics.median(_ratio(n, scale, s) for s in range(seeds))}
        for scale in (1.0, "1/sqrt(n)", "1/n")
        for n in depths
    ]
    wild = [row for row in rows if row["scale"] == "1.0"]
    near = [abs(math.log10(row["ratio"]) - row["n"] * math.log10(2)) <= math.log10(200) for row in wild]
    root = [row["ratio"] for row in rows if row["scale"] == "1/sqrt(n)"]
    full = [row["ratio"] for row in rows if row["scale"] == "1/n"]
    tamed = [2 <= r <= 3.5 for r in root] + [0.8 <= r <= 1.3 for r in full]
    setting = f"random ReLU branches, d=64, float64, n={list(depths)}, median of {seeds} seeds"
    return [
        Evidence(KEY, "an unscaled residual net explodes with depth, as its 2^n paths do", "qualitative",
                 "variance ratio " + ", ".join(f"{row['ratio']:.3g} at n={row['n']}" for row in wild),
                 "2^n", _verdict(near), f"{sum(near)} of {len(near)} depths lie within a factor 200 of 2^n; {setting}",
                 rows=wild),
        Evidence(KEY, "a factor on the branches tames the explosion", "qualitative",
                 f"1/sqrt(n): {min(root):.2f} to {max(root):.2f}; 1/n: {min(full):.2f} to {max(full):.2f}",
                 "the same nets without a factor", _verdict(tamed),
                 f"{sum(tamed)} of {len(tamed)} ratios lie near (1 + lam^2)^n; {setting}", rows=rows),
    ]  # fmt: skip


def _verdict(good: list[bool]) -> Verdict:
    return "holds" if all(good) else "partly" if any(good) else "does not hold here"


class _NormedBranch(nn.Module):
    """x + branch(norm(x)), the normalised peer."""

    def __init__(self, norm: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.norm, self.branch = norm, branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.norm(x))


def _net(mode: str, n: int) -> nn.Module:
    branches = [_branch(64, 32) for _ in range(n)]
    encoder, decoder = nn.Linear(64, 64), nn.Linear(64, 10)
    if mode in ("batch norm", "layer norm"):
        kind = nn.BatchNorm1d if mode == "batch norm" else nn.LayerNorm
        return nn.Sequential(encoder, *(_NormedBranch(kind(64), b) for b in branches), decoder)
    scale: Any = {"none": 1.0, "SkipInit": "zero"}.get(mode, mode)
    return Tower(branches, scale, encoder, decoder)


def _train(mode: str, n: int, rate: float, seed: int, epochs: int, data: tuple[Tensor, ...]) -> dict[str, Any]:
    inputs, labels, test_inputs, test_labels = data
    torch.manual_seed(seed)
    net = _net(mode, n)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    diverged = False
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(32):
            if len(rows) < 2:
                continue
            loss = F.cross_entropy(net(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if diverged := not math.isfinite(loss.item()):
            break
    net.eval()
    row: dict[str, Any] = {"mode": mode, "n": n, "rate": rate, "seed": seed, "diverged": diverged}
    if diverged:
        return {**row, "accuracy": 0.1, "complexity": math.nan}
    with torch.no_grad():
        accuracy = (net(test_inputs).argmax(1) == test_labels).float().mean().item()
    return {**row, "accuracy": accuracy, "complexity": geometric_complexity(net, test_inputs[:128])}


def _training(quick: bool) -> list[Evidence]:
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(targets)[order]
    x = (x - x[:1400].mean()) / x[:1400].std()
    data = (x[:1400], y[:1400], x[1400:], y[1400:])
    modes = ("none", "1/n", "1/sqrt(n)", "SkipInit", "batch norm", "layer norm")
    epochs = 2 if quick else 6
    grid = [(64, 0.01, s) for s in range(1 if quick else 3)]
    if not quick:
        grid += [(n, r, 0) for n, r in ((16, 0.01), (64, 0.003), (64, 0.03), (64, 0.1))]
    rows = [_train(mode, n, rate, seed, epochs, data) for mode in modes for n, rate, seed in grid]
    main = {mode: [r for r in rows if r["mode"] == mode and r["n"] == 64 and r["rate"] == 0.01] for mode in modes}
    accuracy = {mode: statistics.mean(r["accuracy"] for r in main[mode]) for mode in modes}
    steep = {mode: statistics.mean(r["complexity"] for r in main[mode]) for mode in modes}
    good = [accuracy[mode] >= accuracy["batch norm"] - 0.02 for mode in modes[1:4]]
    good.append(accuracy["none"] < 0.5)
    less = [steep[mode] < steep["batch norm"] for mode in modes[1:4]]
    seeds = len(main["none"])
    return [
        Evidence(KEY, "scaled branches train a 64-block net without normalisation, and unscaled ones do not", "qualitative",
                 "; ".join(f"{mode} {value:.1%}" for mode, value in accuracy.items()), "batch norm, layer norm", _verdict(good),
                 f"within 2 points of batch norm for {sum(good[:3])} of 3 factors; digits, SGD 0.01, {epochs} epochs, {seeds} seed(s)",
                 rows=rows),
        Evidence(KEY, "the factor limits the capacity used: lower geometric complexity after training", "qualitative",
                 "; ".join(f"{mode} {value:.3g}" for mode, value in steep.items()), "batch norm", _verdict(less),
                 f"{sum(less)} of 3 factors end below batch norm, at the accuracies above; {seeds} seed(s)", rows=rows),
    ]  # fmt: skip


class _ConvBlock(nn.Module):
    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, width, 3, padding=1, bias=not norm)
        self.b = nn.Conv2d(width, width, 3, padding=1, bias=not norm)
        self.first = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.second = nn.BatchNorm2d(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.second(self.a(F.relu(self.first(x))))))


def _step_time(quick: bool) -> Evidence:
    rows = []
    for width, size, batch in ((8, 16, 16), (16, 16, 32), (32, 16, 32)):
        torch.manual_seed(0)
        scaled = Tower([_ConvBlock(width, False) for _ in range(6)])
        normed = Tower([_ConvBlock(width, True) for _ in range(6)], 1.0)
        x = torch.randn(batch, width, size, size)
        times = paired(
            lambda: scaled(x).sum().backward(),  # noqa: B023
            lambda: normed(x).sum().backward(),  # noqa: B023
            0.7 if quick else 8.0,
            3 if quick else 7,
        )
        rows.append({"width": width, "size": size, "batch": batch, "ratio": 1 / times.ratio, "ms": times.ours * 1e3})
    good = [row["ratio"] <= 0.85 for row in rows]
    return Evidence(KEY, "a scaled net trains in less time a step than one with batch norm", "no number; the aim is <= 0.85",
                    "time ratio " + ", ".join(f"{r['ratio']:.2f} (width {r['width']})" for r in rows),
                    "the same pre-activation convolutional net with nn.BatchNorm2d, forward and backward",
                    _verdict(good), f"{sum(good)} of {len(good)} widths reach 0.85; the rest of the step is convolution",
                    rows=rows)  # fmt: skip


def _expansion_cost(quick: bool) -> Evidence:
    rows = []
    for n in (16, 64, 256):
        torch.manual_seed(0)
        tower, x = Tower([_branch(64, 128) for _ in range(n)], "1/n"), torch.randn(128, 64)
        with torch.no_grad():
            budget, rounds = (0.7, 3) if quick else (4.0, 7)
            times = paired(lambda: residual_expansion(tower, x, 2), lambda: tower(x), budget, rounds)  # noqa: B023
        rows.append({"n": n, "ratio": 1 / times.ratio, "ms": times.ours * 1e3})
    good = [row["ratio"] <= 4 for row in rows]
    return Evidence(KEY, "the terms up to order 2 cost a few forwards, linear in n", "no number; the aim is <= 4 forwards",
                    ", ".join(f"{r['ratio']:.1f} at n={r['n']}" for r in rows), "one forward of the same tower",
                    _verdict(good), f"{sum(good)} of {len(good)} depths within 4 forwards; three evaluations a branch "
                    "are computed (the forward, and the branch at c_0 with its derivative), the rest is Python", rows=rows)  # fmt: skip
