"""What depth does to self-normalising nets and to others ("Self-Normalizing Neural Networks", 2017, arXiv 1706.02515): accuracy by
depth on tables, at one rate and at tuned ones, and the moments of the activations layer by layer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from headway.claims.evidence import Evidence, verdict
from headway.claims.self_normalizing_nets import accuracy, fit, plain
from headway.tasks.tables import Name, load_table
from headway.weights.self_normalizing import SELU

KEY = "self-normalizing"
KINDS = ("SNN", "ReLU", "BatchNorm", "LayerNorm")
RATE, EPOCHS, SMALL_STEPS = 0.01, 15, 300
LAYERS = (1, 8, 16, 32)


def depth_claims(quick: bool) -> list[Evidence]:
    """Both claims from one set of runs."""
    seeds = range(1 if quick else 5)
    if quick:
        rows = runs("digits", KINDS[:3], (32,), seeds) + runs("wine", KINDS, (2, 32), seeds)
        return [deep(rows, []), flat(rows, [], moments())]
    tables: tuple[Name, ...] = ("digits", "breast-cancer", "wine")
    rows = [row for table in tables for row in runs(table, KINDS, (2, 4, 8, 16, 32), seeds)]
    tuned = [row for rate in (0.001, 0.003, 0.03, 0.1) for row in runs("digits", KINDS[:3], (32,), range(1), rate)]
    return [deep(rows, tuned), flat(rows, classics(tables), moments())]


def runs(
    table: Name, kinds: Sequence[str], depths: Sequence[int], seeds: Sequence[int], rate: float = RATE
) -> list[dict[str, Any]]:
    """Nets of width 64 trained by SGD on one table: 15 epochs of the digits, 300 steps of the small ones."""
    x, y, test_x, test_y = load_table(table)
    steps = EPOCHS * -(-len(x) // 32) if table == "digits" else SMALL_STEPS
    rows = []
    for depth, seed, kind in product(depths, seeds, kinds):
        torch.manual_seed(seed)
        net = fit(plain(kind, x.shape[1], int(y.max()) + 1, depth, 64), x, y, rate, steps, 32, seed)
        row = {"table": table, "net": kind, "depth": depth, "rate": rate, "seed": seed}
        rows.append({**row, "accuracy": accuracy(net, test_x, test_y)})
    return rows


def classics(tables: Sequence[Name]) -> list[dict[str, Any]]:
    """A random forest and a support vector machine on the same parts."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.svm import SVC

    rows = []
    for table in tables:
        x, y, test_x, test_y = (part.numpy() for part in load_table(table))
        for name, model in (("random forest", RandomForestClassifier(random_state=0)), ("SVM", SVC())):
            rows.append({"table": table, "net": name, "accuracy": float(model.fit(x, y).score(test_x, test_y))})
    return rows


@torch.no_grad()
def moments() -> list[dict[str, Any]]:
    """Mean and variance of the activations of nets of 32 layers at their start, on the digits."""
    x = load_table("digits")[0]
    rows = []
    for kind in KINDS:
        torch.manual_seed(0)
        net = plain(kind, x.shape[1], 10, LAYERS[-1], 64)
        outputs = _activations(net, x)
        rows += [
            {"net": kind, "layer": n, "mean": outputs[n - 1].mean().item(), "variance": outputs[n - 1].var().item()}
            for n in LAYERS
        ]
    return rows


def _activations(net: nn.Module, x: Tensor) -> list[Tensor]:
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        outputs.append(out)

    for layer in net.modules():
        if isinstance(layer, SELU | nn.ReLU):
            layer.register_forward_hook(keep)
    net(x)
    return outputs


def mean_of(rows: Sequence[dict[str, Any]], table: str, kind: str, depth: int) -> float:
    """Mean accuracy over the seeds; one net, one table, one depth."""
    return statistics.fmean(r["accuracy"] for r in rows if (r["table"], r["net"], r["depth"]) == (table, kind, depth))


def deep(rows: list[dict[str, Any]], tuned: list[dict[str, Any]]) -> Evidence:
    """Whether the SNN of 32 layers is ahead of ReLU and BatchNorm by 20 points, and not behind either at its best rate."""
    digits, kinds = [r for r in rows if r["table"] == "digits"], KINDS[:3]
    seeds = len({r["seed"] for r in digits})
    depths = [depth for depth in (8, 32) if any(r["depth"] == depth for r in digits)]
    gaps = {kind: mean_of(digits, "digits", "SNN", 32) - mean_of(digits, "digits", kind, 32) for kind in kinds[1:]}
    good = [gap >= 0.2 for gap in gaps.values()]
    told = "; ".join(
        f"depth {d}: " + ", ".join(f"{k} {mean_of(digits, 'digits', k, d):.1%}" for k in kinds) for d in depths
    )
    if tuned:
        first = [r for r in digits if r["depth"] == 32 and r["seed"] == 0]
        best = {kind: max(r["accuracy"] for r in [*first, *tuned] if r["net"] == kind) for kind in kinds}
        good += [best["SNN"] >= best[kind] for kind in kinds[1:]]
        told += "; best of five rates at depth 32: " + ", ".join(f"{k} {v:.1%}" for k, v in best.items())
    return Evidence(
        KEY,
        "deep self-normalising nets train where others do not",
        "qualitative",
        f"digits, width 64, SGD {RATE}, {EPOCHS} epochs, {seeds} seed(s): {told}",
        "the same net with ReLU and the He start, and with BatchNorm and ReLU",
        verdict(good),
        "at depth 32 ahead by "
        + ", ".join(f"{100 * gap:.1f} points of {kind}" for kind, gap in gaps.items())
        + " (20 are asked for"
        + (", and at its best rate to be behind neither)" if tuned else "; other rates only without --quick)"),
        rows=[*digits, *tuned],
    )


def flat(rows: list[dict[str, Any]], beside: list[dict[str, Any]], layers: list[dict[str, Any]]) -> Evidence:
    """Whether the SNN loses at most 3 points from 2 to 32 layers, where each of the others loses more; and whether its activations
    keep mean 0 and variance 1."""
    told: list[str] = []
    kept: list[bool] = []
    others: list[bool] = []
    for table in dict.fromkeys(r["table"] for r in rows):
        depths = sorted({r["depth"] for r in rows if r["table"] == table})
        if len(depths) < 2:
            continue
        lost = {k: mean_of(rows, table, k, depths[0]) - mean_of(rows, table, k, depths[-1]) for k in KINDS}
        kept.append(lost["SNN"] <= 0.03)
        others += [lost[kind] > max(lost["SNN"], 0.03) for kind in KINDS[1:]]
        lines = [f"{k} {', '.join(f'{100 * mean_of(rows, table, k, d):.0f}' for d in depths)}" for k in KINDS]
        lines += [f"{r['net']} {100 * r['accuracy']:.0f}" for r in beside if r["table"] == table]
        told.append(f"{table} at depth {', '.join(map(str, depths))}: {'; '.join(lines)}")
    mine = [r for r in layers if r["net"] == "SNN"]
    steady = [abs(r["mean"]) <= 0.1 and abs(r["variance"] - 1) <= 0.3 for r in mine]
    shown = {k: ", ".join(f"{r['mean']:.2f} / {r['variance']:.2g}" for r in layers if r["net"] == k) for k in KINDS}
    return Evidence(
        KEY,
        "accuracy stays with depth, and so do the moments",
        "qualitative",
        f"accuracy in percent, {len({r['seed'] for r in rows})} seed(s). {'. '.join(told)}. Mean / variance of the activations at layer "
        f"{', '.join(map(str, LAYERS))} of 32 at the start: {'; '.join(f'{k} {v}' for k, v in shown.items())}",
        f"nets of width 64 trained alike (SGD {RATE}); a random forest and an SVM as scikit-learn sets them",
        verdict([*kept, *others, all(steady)]),
        f"from the shallowest to the deepest the SNN loses at most 3 points on {sum(kept)} of {len(kept)} table(s), and the others lose "
        f"more than 3 and more than it in {sum(others)} of {len(others)} cases; its moments {'stay' if all(steady) else 'do not stay'} "
        "within 0.1 of 0 and 0.3 of 1",
        rows=[*rows, *beside, *layers],
    )
