"""What "Training BatchNorm and Only BatchNorm" (2020, arXiv 2003.00152) claims, and what keeping less is worth, measured."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.claims.evidence import Evidence, verdict
from headway.learning.batchnorm_only.bank import NormBank
from headway.learning.batchnorm_only.gammas import gamma_report, without_disabled
from headway.learning.batchnorm_only.resnets import CIFARResNet
from headway.learning.batchnorm_only.task_files import norm_state_dict, save_norms
from headway.learning.batchnorm_only.technique import BatchNormOnly, OutputOnly, RandomParametersOnly
from headway.measure import paired
from headway.signals.saved import SavedBytes
from headway.surgery import Technique, apply
from headway.tasks.random_features import DigitsRandomFeatures

KEY = "batchnorm-only"
MODES: dict[str, Technique | None] = {
    "norm": BatchNormOnly(),
    "random": RandomParametersOnly(),
    "norm+output": BatchNormOnly(include_output=True),
    "output": OutputOnly(),
    "all": None,
}
Row = dict[str, Any]


def measure(quick: bool) -> list[Evidence]:
    """Every claim; ``quick`` takes under half a minute, otherwise some minutes."""
    with torch.random.fork_rng():
        rows = _accuracies(quick)
        return [
            _expressive(rows),
            _control(rows),
            _growth(quick, rows),
            _disabled(rows),
            _files(quick),
            _time(quick),
            _memory(),
        ]


def _trained(
    mode: str, depth: int, width: int, epochs: int, seed: int, decay: float = 1e-4
) -> tuple[nn.Module, DigitsRandomFeatures, Row]:
    task = DigitsRandomFeatures(depth, width)
    torch.manual_seed(seed)
    model, technique = task.model(seed), MODES[mode]
    if technique is not None:
        apply(model, technique)
    optimizer = task.optimizer(p for p in model.parameters() if p.requires_grad)
    batches = task.train_batches(seed, task.batch_size)
    steps = epochs * (len(task.data()[0]) // task.batch_size)
    start = time.perf_counter()
    for k in range(steps):
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = task.learning_rate * task.rate(k / steps), decay
        optimizer.zero_grad()
        task.loss(model, next(batches)).backward()
        optimizer.step()
    row = {"mode": mode, "depth": depth, "width": width, "epochs": epochs, "seed": seed, "decay": decay}
    row |= {
        "seconds": time.perf_counter() - start,
        "trainable": sum(p.numel() for g in optimizer.param_groups for p in g["params"]),
    }
    with torch.no_grad():
        row["accuracy"] = task.evaluate(model.eval())["accuracy"]
    return model, task, row


@torch.no_grad()
def _switched_off(model: nn.Module, task: DigitsRandomFeatures) -> Row:
    """Shares of gains near zero, and the accuracy once those below 0.01 are exactly zero."""
    low, high = (gamma_report(model, threshold).share for threshold in (0.01, 0.05))
    with without_disabled(model):
        return {"off": low, "off_0.05": high, "without": task.evaluate(model)["accuracy"]}


def _accuracies(quick: bool) -> list[Row]:
    epochs, seeds = (6, 1) if quick else (30, 5)
    wanted = [(mode, seed) for mode in MODES for seed in range(seeds if mode in ("norm", "random") else 1)]
    rows = []
    for mode, seed in wanted:
        model, task, row = _trained(mode, 4, 16, epochs, seed)
        rows.append(row | _switched_off(model, task))
    sample = DigitsRandomFeatures().data()[0][:128]
    for row in rows:
        model, technique = CIFARResNet(4, 16, 1, 10, 2), MODES[row["mode"]]
        row["saved"] = kept(apply(model, technique) if technique is not None else model, sample)
    return rows


def _of(rows: Sequence[Row], mode: str, what: str = "accuracy") -> list[float]:
    return [row[what] for row in rows if row["mode"] == mode]


def _setting(rows: Sequence[Row]) -> str:
    seeds = len(_of(rows, "norm"))
    return f"digits, ResNet of two stages of 4 blocks, width 16, {rows[0]['epochs']} epochs of SGD 0.1, {seeds} seed(s)"


def _expressive(rows: list[Row]) -> Evidence:
    mean = {mode: statistics.fmean(_of(rows, mode)) for mode in MODES}
    total = _of(rows, "all", "trainable")[0]
    norm, whole, linear = mean["norm"], mean["all"], mean["output"]
    return Evidence(
        KEY,
        "random features with trained gains and shifts are expressive",
        "82% on CIFAR-10 and 32% top-5 on ImageNet with deep residual nets",
        f"{norm:.1f} % with {_of(rows, 'norm', 'trainable')[0]} of {total} parameters, {mean['norm+output']:.1f} % with the output layer",
        f"all parameters {whole:.1f} %, the output layer alone {linear:.1f} %; {_setting(rows)}",
        verdict([norm >= 85, norm >= linear + 20]),
        f"asked: 85 % and 20 points above the output layer alone; it is {norm - linear:+.1f} points from that and {norm - whole:+.1f} "
        "from training everything",
        rows=rows,
    )


def _control(rows: list[Row]) -> Evidence:
    norm, random = _of(rows, "norm"), _of(rows, "random")
    gaps = [a - b for a, b in zip(norm, random, strict=True)]
    p = p_value(gaps)
    told = f"p = {p:.2g}, paired t over {len(gaps)} seeds" if len(gaps) > 1 else "one seed tells no p"
    return Evidence(
        KEY,
        "far above as many random parameters",
        '"far higher" (abstract)',
        f"{statistics.fmean(norm):.1f} % against {statistics.fmean(random):.1f} %, {statistics.fmean(gaps):.1f} points apart ({told})",
        f"two random weights of every output channel, gains and shifts at their start; {_setting(rows)}",
        verdict([min(gaps) >= 20, p < 0.01]),
        f"asked: 20 points at every seed and p < 0.01; the least gap is {min(gaps):.1f} points with "
        f"{int(_of(rows, 'norm', 'trainable')[0])} trained numbers on both sides",
        rows=[{"seed": i, "norm": a, "random": b} for i, (a, b) in enumerate(zip(norm, random, strict=True))],
    )


def p_value(gaps: Sequence[float]) -> float:
    """Of a paired t test that the mean gap is zero; NaN for one pair."""
    from scipy.stats import ttest_1samp

    found: Any = ttest_1samp(gaps, 0.0) if len(gaps) > 1 else None
    return float("nan") if found is None else float(found.pvalue)


def _growth(quick: bool, known: list[Row]) -> Evidence:
    epochs, seeds, width = known[0]["epochs"], 1 if quick else 3, 16
    depths, widths = ((1, 4), (4, 16)) if quick else ((1, 2, 4, 8), (4, 8, 16))
    wanted = [(mode, depth, width) for mode in ("norm", "random") for depth in depths if depth != 4]
    wanted += [("norm", 4, w) for w in widths if w != width]
    rows = [row for row in known if row["mode"] in ("norm", "random") and row["seed"] < seeds]
    rows += [_trained(mode, depth, w, epochs, seed)[2] for seed in range(seeds) for mode, depth, w in wanted]

    def mean(mode: str, depth: int, width: int) -> float:
        mine = [r["accuracy"] for r in rows if (r["mode"], r["depth"], r["width"]) == (mode, depth, width)]
        return statistics.fmean(mine)

    deep = {depth: (mean("norm", depth, width), mean("random", depth, width)) for depth in depths}
    wide = {w: mean("norm", 4, w) for w in widths}
    grows = [b > a for a, b in pairwise(value for value, _ in deep.values())]
    wider = [b > a for a, b in pairwise(wide.values())]
    above = [norm > random for norm, random in deep.values()]
    layers = ", ".join(f"{2 + 4 * d} layers {n:.1f} (random {r:.1f})" for d, (n, r) in deep.items())
    return Evidence(
        KEY,
        "deeper and wider networks do better by their norms alone",
        "accuracy rises with depth (14 to 866 layers) and with width, above as many random parameters",
        f"accuracy in percent at width {width}: {layers}; with 18 layers at width "
        + ", ".join(f"{w} {v:.1f}" for w, v in wide.items()),
        f"as many random parameters, the same recipe for all; digits, {epochs} epochs, {seeds} seed(s)",
        verdict([all(grows), all(wider), all(above)]),
        f"depth: {sum(grows)} of {len(grows)} steps up, width: {sum(wider)} of {len(wider)}; above random parameters at "
        f"{sum(above)} of {len(above)} depths. The paper trains 160 epochs, and deep nets are slow to start",
        rows=rows,
    )


def _disabled(known: list[Row]) -> Evidence:
    epochs, mine = known[0]["epochs"], [row for row in known if row["mode"] == "norm"]
    rows = [mine[0]]
    for decay, length in ((1e-3, epochs), (1e-4, max(2, epochs // 3))):
        model, task, row = _trained("norm", 4, 16, length, 0, decay)
        rows.append(row | _switched_off(model, task))
    drops = [row["accuracy"] - row["without"] for row in [*mine, *rows[1:]]]
    base, decayed, short = rows
    good = [base["off"] >= 0.25, max(map(abs, drops)) < 0.5]
    return Evidence(
        KEY,
        "about a third of the features are switched off",
        "about a third of all gains below 0.01 in deep ResNets on CIFAR-10",
        f"{base['off']:.1%} of the gains are below 0.01 and {base['off_0.05']:.1%} below 0.05; with ten times the weight decay "
        f"{decayed['off']:.1%} and {decayed['off_0.05']:.1%}, after a third of the epochs {short['off']:.1%} and {short['off_0.05']:.1%}",
        f"the gains' start, U(0, 1), which has 1 % below 0.01 and 5 % below 0.05; {_setting(known)}",
        verdict(good),
        f"asked: a quarter of them off ({'seen' if good[0] else 'not seen in so short a training'}), and accuracy within half a point "
        f"once they are exactly zero (it changes by at most {max(map(abs, drops)):.2f})",
        rows=rows,
    )


def _files(quick: bool) -> Evidence:
    """Everything trained on the digits 0-4, then 5-9 by norms, by the head, by both, and by everything; tasks on one trunk."""
    epochs = 4 if quick else 30
    task = DigitsRandomFeatures(gain="ones")
    x, y, held, truth = task.data()
    low, low_held = y < 5, truth < 5
    torch.manual_seed(0)
    trunk = CIFARResNet(4, 16, 1, 5, 2, "ones")
    _fit(trunk, x[low], y[low], epochs)
    first = _right(trunk, held[low_held], truth[low_held])
    found, states = {}, {}
    for mode in ("norm", "norm+output", "output", "all"):
        model, technique = copy.deepcopy(trunk), MODES[mode]
        if technique is not None:
            apply(model, technique)
        _fit(model, x[~low], y[~low] - 5, epochs)
        found[mode] = _right(model, held[~low_held], truth[~low_held] - 5)
        states[mode] = norm_state_dict(model, include_output=True)
    bank = NormBank(trunk, include_output=True)
    bank.add("0-4")
    bank.add("5-9", states["norm+output"])
    bank.add("5-9, head alone", states["output"])
    bank.use("5-9")
    bank.use("0-4")
    same = _right(trunk, held[low_held], truth[low_held]) == first
    model = CIFARResNet(18, 16)  # 110 layers
    share = _bytes(norm_state_dict(model)) / _bytes(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        size = save_norms(model, Path(folder) / "task.safetensors").stat().st_size / 1024
    return Evidence(
        KEY,
        "a task is a small file, and several share one network",
        "0.46 to 0.64 % of the parameters",
        f"{share:.2%} of a 110-layer net's bytes with running statistics (a file of {size:.0f} KiB); digits 5-9 after 0-4: "
        + ", ".join(f"{mode} {value:.1f} %" for mode, value in found.items()),
        f"the whole state; everything trained on digits 0-4 ({first:.1f} %), then fine-tuned {epochs} epochs to 5-9, one seed",
        verdict([share <= 0.015, same, found["norm+output"] > found["output"]]),
        f"asked: at most 1.5 %, 0-4 as before after two exchanges ({'so' if same else 'not so'}), and norms with the output layer above "
        f"the output layer alone ({found['norm+output'] - found['output']:+.1f} points); the norms under the old head have "
        f"{found['norm']:.1f} %",
        rows=[{"mode": mode, "accuracy": value} for mode, value in found.items()],
    )


def _bytes(state: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def _fit(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.SGD(
        (p for p in model.parameters() if p.requires_grad), 0.05, momentum=0.9, weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2, 3 * epochs // 4])
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // 64 * 64].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * float((model.eval()(x).argmax(1) == y).double().mean())


def _step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


_SIZES = ((16, 8), (32, 16), (64, 16))
"""Widths of the first stage and sides of the images, 64 of them a step."""


def _nets(width: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    full = CIFARResNet(2, width)
    lean = apply(copy.deepcopy(full), BatchNormOnly())
    return full, lean, apply(copy.deepcopy(full), BatchNormOnly(memory_saving=False))


def _products(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Nothing but the convolutions of a step in which their weights rest: forward, and the gradient of each input but the first."""
    seen: list[tuple[Any, Any, Any]] = []
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    handles = [m.register_forward_hook(lambda m, given, out: seen.append((m, given[0], out))) for m in convolutions]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()

    def run() -> None:
        with torch.no_grad():
            for conv, given, out in seen:
                settings: Any = (conv.stride, conv.padding, conv.dilation)
                F.conv2d(given, conv.weight, None, *settings)
                if given is not x:
                    torch.ops.aten.convolution_backward(
                        out, given, conv.weight, None, *settings, False, [0, 0], conv.groups, [True, False, False]
                    )

    return run


def _time(quick: bool) -> Evidence:
    rows, budget = [], 0.8 if quick else 8.0
    for width, side in _SIZES[:2] if quick else _SIZES:
        full, lean, plain = _nets(width)
        x, y = torch.randn(64, 3, side, side), torch.randint(10, (64,))
        ours = paired(_step(lean, x, y), _step(full, x, y), budget, 3)
        frozen = paired(_step(plain, x, y), _step(full, x, y), budget / 2, 3)
        bare = paired(_products(full, x), _step(full, x, y), budget / 2, 3)
        row = {"width": width, "side": side, "ratio": 1 / ours.ratio, "frozen": 1 / frozen.ratio}
        rows.append(row | {"products": 1 / bare.ratio, "ms": 1e3 * ours.ours})
    good = [row["ratio"] <= 0.7 for row in rows]
    return Evidence(
        KEY,
        "a step costs less when only norms train",
        "not claimed; forward and the gradients of inputs are two thirds of the products",
        ", ".join(f"{r['ratio']:.2f} of a full step at width {r['width']}, {r['side']}x{r['side']}" for r in rows),
        "training everything in plain torch, ResNet-14, 64 images; with the weights merely frozen "
        + ", ".join(f"{r['frozen']:.2f}" for r in rows),
        verdict(good),
        f"asked: at most 0.70; {sum(good)} of {len(good)} are; norms, ReLUs, additions, fresh memory and calls from Python come "
        "on top of the convolutions",
        "the convolutions' forward and the gradients of their inputs alone, results dropped at once: "
        + ", ".join(f"{r['products']:.2f}" for r in rows),
        rows,
    )


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that a loss keeps for backward."""
    counter = SavedBytes()
    counter.start(model)
    F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long))
    counter.stop()
    return counter.total


def _memory() -> Evidence:
    rows = []
    for width, side in _SIZES:
        full, lean, plain = _nets(width)
        x = torch.randn(16, 3, side, side)
        whole = kept(full, x)
        rows.append(
            {
                "width": width,
                "side": side,
                "full": whole,
                "ratio": kept(lean, x) / whole,
                "frozen": kept(plain, x) / whole,
            }
        )
    return Evidence(
        KEY,
        "half of what training keeps is enough when only norms train",
        "not claimed",
        ", ".join(
            f"{r['ratio']:.2f} of {r['full'] / 1e6:.1f} MB at width {r['width']}, {r['side']}x{r['side']}" for r in rows
        ),
        "bytes kept for backward when everything trains, ResNet-14, 16 images; with the weights merely frozen "
        + ", ".join(f"{r['frozen']:.2f}" for r in rows),
        verdict([r["ratio"] <= 0.6 for r in rows]),
        "asked: at most 0.6; of a convolution, a norm and a ReLU the norm's input stays, and a bit an entry of a ReLU behind an addition",
        rows=rows,
    )
