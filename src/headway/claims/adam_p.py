"""What "AdamP" (2021, arXiv 2006.08217) claims, measured here: accuracy, norms that stop growing, and the cost of a step."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.claims.evidence import Evidence, Verdict
from headway.measure import copy_bandwidth, paired
from headway.optim.adamp import SGDP, AdamP
from headway.optim.effective import follows_gradient_size

KEY = "adam-p"
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "SGDP": lambda p: SGDP(p, 0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.0),
    "AdamP": lambda p: AdamP(p, 1e-2),
}


def measure(quick: bool) -> list[Evidence]:
    """Every claim; ``quick`` takes under half a minute, otherwise a few minutes."""
    return [*_training(quick), *_speed(quick)]


def _net() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def _train(name: str, seed: int, epochs: int, data: tuple[Tensor, ...]) -> dict[str, Any]:
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    net = _net()
    optimizer = OPTIMIZERS[name](net.parameters())
    convolutions = [m.weight for m in net if isinstance(m, nn.Conv2d)]  # type: ignore[union-attr]
    start = [float(w.detach().norm()) for w in convolutions]
    # as in the paper: what has kept its effective step needs a schedule to settle, what has lost it decays by itself
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(images) // 64))
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(net(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    growth = [float(w.detach().norm()) / s for w, s in zip(convolutions, start, strict=True)]
    with torch.no_grad():
        accuracy = 100 * float((net.eval()(test_images).argmax(1) == test_labels).double().mean())
    # eta / ||W||^2 or eta / ||W||, beside the schedule's own decay of eta
    left = growth[1] ** -(2 if follows_gradient_size(optimizer) else 1)
    return {
        "optimizer": name,
        "seed": seed,
        "epochs": epochs,
        "accuracy": accuracy,
        "growth": growth,
        "effective_step_left": left,
    }


def _training(quick: bool) -> list[Evidence]:
    from headway.tasks.task import get

    task: Any = get("digits")
    images, labels, test_images, test_labels = task.data()
    count, epochs, seeds = (512, 4, 1) if quick else (900, 15, 5)
    data = images[:count], labels[:count], test_images, test_labels
    with torch.random.fork_rng():
        rows = [_train(name, seed, epochs, data) for seed in range(seeds) for name in OPTIMIZERS]
    accuracy = {n: [r["accuracy"] for r in rows if r["optimizer"] == n] for n in OPTIMIZERS}
    mean = {n: statistics.fmean(values) for n, values in accuracy.items()}
    gains = {"SGDP": mean["SGDP"] - mean["SGD"], "AdamP": mean["AdamP"] - mean["AdamW"]}
    spread = {n: statistics.stdev(values) if len(values) > 1 else float("nan") for n, values in accuracy.items()}
    up = sum(gain > 0 for gain in gains.values())
    growth = {
        n: max(statistics.fmean(r["growth"][i] for r in rows if r["optimizer"] == n) for i in range(3))
        for n in OPTIMIZERS
    }
    left = {n: statistics.fmean(r["effective_step_left"] for r in rows if r["optimizer"] == n) for n in OPTIMIZERS}
    still = {
        "SGDP": growth["SGDP"] - 1 <= 0.3 * (growth["SGD"] - 1),
        "AdamP": growth["AdamP"] - 1 <= 0.3 * (growth["AdamW"] - 1),
    }
    setting = (
        f"digits, {count} images, three convolutions with batch norm, {epochs} epochs, cosine to 0, {seeds} seed(s)"
    )
    return [
        Evidence(
            KEY,
            "accuracy rises wherever AdamP or SGDP takes the place of AdamW or SGD",
            "gains on 13 benchmarks, a few tenths of a point on ImageNet",
            "; ".join(f"{n} {mean[n]:.2f} % (sd {spread[n]:.2f})" for n in OPTIMIZERS),
            f"torch.optim.SGD and AdamW of the same settings; {setting}",
            _verdict([gain > 0 for gain in gains.values()]),
            f"SGDP {gains['SGDP']:+.2f} points, AdamP {gains['AdamP']:+.2f} points on {len(test_labels)} held-out images, "
            f"where one image is {100 / len(test_labels):.2f} points: {up} of 2 means rise",
            rows=rows,
        ),
        Evidence(
            KEY,
            "norms of scale-invariant weights stop growing, and the effective step lives on",
            "qualitative (figures)",
            "largest growth of a convolution's norm: " + ", ".join(f"{n} {g:.2f}" for n, g in growth.items()),
            f"SGD and AdamW; {setting}",
            _verdict(list(still.values())),
            f"at most 0.3 of the baseline's growth is left for {sum(still.values())} of 2; effective step of the second "
            "convolution at the end over the start, but for the schedule: "
            + ", ".join(f"{n} {x:.2f}" for n, x in left.items()),
            rows=rows,
        ),
    ]


def _verdict(good: list[bool]) -> Verdict:
    return "holds" if all(good) else "partly" if any(good) else "does not hold here"


RESNET_18 = [
    (64, 3, 7, 7), *[(64, 64, 3, 3)] * 4,
    (128, 64, 3, 3), *[(128, 128, 3, 3)] * 3, (128, 64, 1, 1),
    (256, 128, 3, 3), *[(256, 256, 3, 3)] * 3, (256, 128, 1, 1),
    (512, 256, 3, 3), *[(512, 512, 3, 3)] * 3, (512, 256, 1, 1),
    (1000, 512), (1000,), *[(64,)] * 10, *[(128,)] * 10, *[(256,)] * 10, *[(512,)] * 10,
]  # fmt: skip


def model_shapes(count: int, width: int) -> list[tuple[int, ...]]:
    """``count`` tensors as a convolutional net has them: convolutions, matrices, and as many gains and offsets."""
    kinds: list[tuple[int, ...]] = [
        (width, width, 3, 3),
        (width,),
        (2 * width, width),
        (width,),
        (width, 2 * width),
        (width,),
    ]
    return [kinds[i % len(kinds)] for i in range(count)]


def small_shapes() -> list[tuple[int, ...]]:
    """600 tensors, 0.64 M numbers."""
    return [(32, 7, 3, 3) if i % 2 else (100,) for i in range(600)]


MODELS = {
    "50 tensors, 0.1 M": model_shapes(50, 16),
    "50 tensors, 1.6 M": model_shapes(50, 64),
    "50 tensors, 14 M": model_shapes(50, 192),
    "600 tensors, 0.6 M": small_shapes(),
    "ResNet-18, 11.7 M": RESNET_18,
}


def parameters(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Parameters with gradients; half of the matrices have one without a radial part, as in front of a normalisation."""
    draw, made = torch.Generator().manual_seed(0), []
    for i, shape in enumerate(shapes):
        p, g = nn.Parameter(torch.randn(shape, generator=draw)), torch.randn(shape, generator=draw)
        if p.dim() > 1 and i % 4 < 2:
            rows, flat = p.detach().flatten(1), g.flatten(1)
            g = (flat - rows * (flat * rows).sum(1, True) / rows.square().sum(1, True)).view(shape)
        p.grad = g
        made.append(p)
    return made


RATE = 1e-9
PEERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], float]] = {
    "AdamP / Adam(foreach)": (lambda p: AdamP(p, RATE), lambda p: torch.optim.Adam(p, RATE, foreach=True), 1.35),
    "SGDP / SGD(foreach)": (
        lambda p: SGDP(p, RATE, 0.9),
        lambda p: torch.optim.SGD(p, RATE, 0.9, foreach=True),
        1.35,
    ),
    "AdamP(foreach) / Adam(foreach)": (
        lambda p: AdamP(p, RATE, foreach=True),
        lambda p: torch.optim.Adam(p, RATE, foreach=True),
        1.35,
    ),
    "AdamP / AdamW(fused)": (lambda p: AdamP(p, RATE), lambda p: torch.optim.AdamW(p, RATE, fused=True), 1.6),
    "SGDP / SGD(fused)": (lambda p: SGDP(p, RATE, 0.9), lambda p: torch.optim.SGD(p, RATE, 0.9, fused=True), 1.8),
    "AdamP / its loop": (lambda p: AdamP(p, RATE), lambda p: AdamP(p, RATE, foreach=False), 1 / 3),
    "SGDP / its loop": (lambda p: SGDP(p, RATE, 0.9), lambda p: SGDP(p, RATE, 0.9, foreach=False), 1 / 3),
}
"""What is timed: our step, the peer's, and the largest share of the peer's time that is aimed at."""


def step_times(peer: str, model: str, seconds: float) -> dict[str, Any]:
    """Our step and the peer's in turn; ``ratio`` is our time over theirs."""
    ours, theirs = (make(parameters(MODELS[model])) for make in PEERS[peer][:2])
    r = paired(ours.step, theirs.step, seconds)
    return {"model": model, "peer": peer, "ratio": 1 / r.ratio, "low": 1 / r.high, "high": 1 / r.low,
            "ours_ms": r.ours * 1e3, "theirs_ms": r.theirs * 1e3}  # fmt: skip


def _speed(quick: bool) -> list[Evidence]:
    found, budget = [], 0.1 if quick else 1.5
    models = [name for name in MODELS if not quick or name not in ("50 tensors, 1.6 M", "50 tensors, 14 M")]
    bandwidth = f"copy bandwidth {copy_bandwidth(1 << 26) / 1e9:.0f} GB/s"
    for peer, (_, _, aim) in PEERS.items():
        rows = [step_times(peer, model, budget) for model in models]
        good = [row["ratio"] <= aim for row in rows]
        found.append(
            Evidence(
                KEY,
                f"a step is cheap: {peer}",
                f"about 8 % of the training time, with the official loop; the aim is at most {aim:.2f} times the peer's step",
                ", ".join(f"{row['ratio']:.2f} ({row['model']})" for row in rows),
                f"{peer.split(' / ')[1]}, one step, float32, {torch.get_num_threads()} thread(s)",
                _verdict(good),
                f"{sum(good)} of {len(good)} models within the aim",
                f"memory: {'7 streams against 5 of fused SGD' if 'SGD' in peer else '10 streams against 7 of fused AdamW'}; {bandwidth}",
                rows,
            )
        )
    return found
