"""Claims of "Self-Normalizing Neural Networks" (2017, arXiv 1706.02515), measured on this machine.

The paper's numbers on Tox21, HTRU2 and the 121 tables of the UCI collection need data that is not part of this package; eight tables
that are take the place of the latter.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headway.claims.evidence import Evidence, verdict
from headway.claims.self_normalizing_depth import depth_claims
from headway.claims.self_normalizing_nets import accuracy, fit, plain
from headway.measure import paired
from headway.signals.saved import SavedBytes
from headway.weights.lecun import lecun_normal_
from headway.weights.self_normalizing import SELU, selu
from headway.weights.selu_moments import iterate, jacobian

KEY = "self-normalizing"
FEED_FORWARD = ("SNN", "ReLU", "BatchNorm", "LayerNorm", "WeightNorm", "Highway", "ResNet")


def measure(quick: bool = False) -> list[Evidence]:
    """Quick: under 25 s alone on one core; full: under 4.5 minutes."""
    with torch.random.fork_rng(devices=[]):
        return [_attraction(), _variance(1 if quick else 3), *depth_claims(quick), _tables(quick), _cost(quick)]


def _attraction() -> Evidence:
    norm = torch.linalg.matrix_norm(jacobian(0.0, 1.0), 2).item()
    rows = []
    for n in (5, 10, 20):
        mean, variance = iterate(0.1, 1.5, n)
        rows.append({"layers": n, "mean": float(mean), "variance": float(variance)})
    far = [float(iterate(0.1, 1.5, n)[1]) - 1 for n in (30, 31)]
    good = [abs(norm - 0.7877) < 5e-4, abs(rows[-1]["mean"]) < 1e-3, abs(rows[-1]["variance"] - 1) < 5e-3]
    path = ", ".join(f"({r['mean']:.4f}, {r['variance']:.3f}) after {r['layers']}" for r in rows)
    return Evidence(KEY, "mean 0 and variance 1 are a fixed point that attracts", "spectral norm of the Jacobian 0.7877",
                    f"{norm:.4f}; from (0.1, 1.5): {path}", "1, above which the map would not contract", verdict(good),
                    f"the distance of the variance shrinks by {far[1] / far[0]:.3f} a layer", rows=rows)  # fmt: skip


def _variance(seeds: int) -> Evidence:
    rows = []
    for name, seed in product(("SELU", "ReLU"), range(seeds)):
        torch.manual_seed(seed)
        x = torch.randn(256, 256)
        low, high = 1.0, 1.0
        for _ in range(100):
            w = lecun_normal_(torch.empty(256, 256))
            x = selu(x @ w.t()) if name == "SELU" else torch.relu(x @ w.t() * 2**0.5)
            now = x.square().mean().item() if name == "ReLU" else x.var().item()
            low, high = min(low, now), max(high, now)
        each = x.var(1) if name == "SELU" else x.square().mean(1)
        rows.append({"net": name, "seed": seed, "low": low, "high": high, "sample_low": each.min().item(),
                     "sample_high": each.max().item(), "largest": x.abs().max().item()})  # fmt: skip
    ours, theirs = ([r for r in rows if r["net"] == name] for name in ("SELU", "ReLU"))
    kept = [r["low"] >= 0.85 and r["high"] <= 1.15 for r in ours]
    closer = [
        abs(np.log(b["high"] / b["low"])) > abs(np.log(a["high"] / a["low"])) for a, b in zip(ours, theirs, strict=True)
    ]
    first = ours[0]
    return Evidence(KEY, "deep random nets keep unit variance", "qualitative",
                    f"over 100 layers of width 256 the variance stays in {min(r['low'] for r in ours):.2f} to "
                    f"{max(r['high'] for r in ours):.2f}; of single samples {first['sample_low']:.2f} to {first['sample_high']:.2f}",
                    f"ReLU with the He start: mean square {min(r['low'] for r in theirs):.2f} to {max(r['high'] for r in theirs):.2f}",
                    verdict([*kept, *closer]), f"within 0.15 of 1 for {sum(kept)} of {len(kept)} seed(s)", rows=rows)  # fmt: skip


def _data(count: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    from sklearn.datasets import (
        load_breast_cancer,
        load_digits,
        load_iris,
        load_wine,
        make_classification,
        make_gaussian_quantiles,
        make_hastie_10_2,
        make_moons,
    )

    moons, sides = make_moons(500, noise=0.3, random_state=0)
    noise = np.random.default_rng(0).normal(size=(500, 6))
    made: list[tuple[str, Any]] = [
        ("digits", load_digits(return_X_y=True)),
        ("breast cancer", load_breast_cancer(return_X_y=True)),
        ("wine", load_wine(return_X_y=True)),
        ("iris", load_iris(return_X_y=True)),
        ("moons and noise", (np.concatenate([moons, noise], 1), sides)),
        ("clusters", make_classification(600, 20, n_informative=8, n_classes=4, flip_y=0.05, random_state=0)),
        ("quantiles", make_gaussian_quantiles(n_samples=600, n_features=8, n_classes=3, random_state=0)),
        ("hastie", make_hastie_10_2(600, random_state=0)),
    ]
    return [(name, x[:600], np.unique(y[:600], return_inverse=True)[1]) for name, (x, y) in made[:count]]


def _tables(quick: bool) -> Evidence:
    """Every method is tuned on a validation part over the same number of settings, and judged on a test part."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC

    settings = list(product((2, 4, 8), (0.01, 0.1), (0.0, 0.05)))[:: 5 if quick else 1]
    forests = list(product((50, 100), (None, 8, 4), (1, 3)))[: len(settings)]
    vectors = list(product((0.1, 1.0, 10.0, 100.0), (0.3, 1.0, 3.0)))[: len(settings)]
    rows = []
    for name, x, y in _data(3 if quick else 8):
        train, rest = (
            np.asarray(p) for p in train_test_split(np.arange(len(x)), test_size=0.4, random_state=0, stratify=y)
        )
        held, test = (np.asarray(p) for p in train_test_split(rest, test_size=0.5, random_state=0, stratify=y[rest]))
        spread = x[train].std(0)
        x = (x - x[train].mean(0)) / np.where(spread > 0, spread, 1)
        xt, yt = torch.from_numpy(x).float(), torch.from_numpy(y)

        def net(kind: str, setting: tuple) -> Callable[[np.ndarray], float]:
            depth, rate, dropout = setting
            torch.manual_seed(0)
            model = plain(kind, xt.shape[1], int(yt.max()) + 1, depth, 32, dropout)  # noqa: B023
            fit(model, xt[train], yt[train], rate, 120, 64, 0, momentum=0.9)  # noqa: B023
            return lambda places: accuracy(model, xt[places], yt[places])  # noqa: B023

        def classic(make: Any) -> Callable[[np.ndarray], float]:
            model = make.fit(x[train], y[train])  # noqa: B023
            return lambda places: float(model.score(x[places], y[places]))  # noqa: B023

        gamma = 1 / x.shape[1]
        fits: dict[str, list[Callable[[], Callable[[np.ndarray], float]]]] = {
            kind: [lambda k=kind, s=s: net(k, s) for s in settings] for kind in FEED_FORWARD
        }
        fits["random forest"] = [
            lambda s=s: classic(RandomForestClassifier(s[0], max_depth=s[1], min_samples_leaf=s[2], random_state=0))
            for s in forests
        ]
        fits["SVM"] = [lambda s=s: classic(SVC(C=s[0], gamma=s[1] * gamma)) for s in vectors]  # noqa: B023
        for kind, runs in fits.items():
            scored = [run() for run in runs]
            best = max(scored, key=lambda score: score(held))
            rows.append({"table": name, "method": kind, "accuracy": best(test), "validation": best(held)})
    tables = list(dict.fromkeys(r["table"] for r in rows))

    def ranks(among: tuple[str, ...]) -> dict[str, float]:
        found: dict[str, list[float]] = {kind: [] for kind in among}
        for table in tables:
            here = {r["method"]: r["accuracy"] for r in rows if r["table"] == table and r["method"] in among}
            for kind, value in here.items():
                found[kind].append(
                    1 + sum(v > value for v in here.values()) + (sum(v == value for v in here.values()) - 1) / 2
                )
        return {kind: statistics.fmean(values) for kind, values in found.items()}

    mine, everyone = ranks(FEED_FORWARD), ranks((*FEED_FORWARD, "random forest", "SVM"))
    place = 1 + sum(value < mine["SNN"] for kind, value in mine.items() if kind != "SNN")
    told = ", ".join(f"{kind} {value:.2f}" for kind, value in sorted(everyone.items(), key=lambda item: item[1]))
    return Evidence(KEY, "the best of feed-forward nets on tables", "best average rank among FNNs on 121 UCI tables",
                    f"mean rank over {len(tables)} tables, {len(settings)} settings each: {told}",
                    "six other feed-forward nets, a random forest and an SVM, tuned alike",
                    "holds" if place == 1 else "partly" if place == 2 else "does not hold here",
                    f"among the {len(mine)} feed-forward nets the SNN is number {place} by mean rank ({mine['SNN']:.2f}); differences of "
                    f"few test rows decide ranks on tables this small", rows=rows)  # fmt: skip


def _saved(net: nn.Module, x: Tensor) -> int:
    counter = SavedBytes()
    counter.start(net)
    try:
        net(x).sum()
    finally:
        counter.stop()
    return counter.total


def _cost(quick: bool) -> Evidence:
    rows = []
    for width in (512,) if quick else (256, 512, 1024):
        torch.manual_seed(0)
        x = torch.randn(256, width)
        steps, saved = [], []
        for kind in ("SELU", "BatchNorm", "torch SELU"):
            layer = {"SELU": lambda w: [SELU()], "torch SELU": lambda w: [nn.SELU()],
                     "BatchNorm": lambda w: [nn.BatchNorm1d(w), nn.ReLU()]}[kind]  # fmt: skip
            net = nn.Sequential(*[part for _ in range(16) for part in (nn.Linear(width, width), *layer(width))])
            saved.append(_saved(net, x))

            def step(net: nn.Module = net, x: Tensor = x) -> None:
                net.zero_grad()
                net(x).sum().backward()

            steps.append(step)
        pair = paired(steps[0], steps[1], 4.0 if quick else 10.0)
        rows.append({"width": width, "time": 1 / pair.ratio, "memory": saved[0] / saved[1], "memory_torch_selu": saved[2] / saved[1],
                     "step_ms": pair.ours * 1e3})  # fmt: skip
    main = next(r for r in rows if r["width"] == 512)
    return Evidence(KEY, "cheaper than BatchNorm", "no number; the aim is time <= 0.95 and activation memory <= 0.55",
                    "; ".join(f"width {r['width']}: time {r['time']:.2f}, memory {r['memory']:.2f}" for r in rows),
                    "BatchNorm and ReLU in the same net (16 layers, batch 256), forward and backward",
                    verdict([main["time"] <= 0.95, main["memory"] <= 0.55]),
                    f"at width 512 time {main['time']:.2f} and kept bytes {main['memory']:.2f} of BatchNorm's (torch's own SELU "
                    f"{main['memory_torch_selu']:.2f}); the rest of the step is matrix products", rows=rows)  # fmt: skip
