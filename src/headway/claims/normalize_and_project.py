"""What "Normalization and effective learning rates in reinforcement learning" (2024, arXiv 2407.01800) claims, measured here."""

from __future__ import annotations

import copy
import statistics
import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from headway.claims.evidence import Evidence, Verdict
from headway.measure import copy_bandwidth, paired, seconds
from headway.surgery import apply
from headway.tasks.relabelled import DigitsRelabelled
from headway.weights.normalize import NormalizeAndProject, normalize_
from headway.weights.project import NaP, rescaled_lr

KEY = "normalize-and-project"


def measure(quick: bool) -> list[Evidence]:
    """Every claim; ``quick`` takes under half a minute, otherwise a few minutes."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [*_plasticity(quick), _twin(), _stationary(quick), _cost(quick)]


def _verdict(good: list[bool]) -> Verdict:
    return "holds" if all(good) else "partly" if any(good) else "does not hold here"


ARMS = ("plain", "L2 0.01", "LayerNorm", "projection only", "NaP", "NaP + cosine", "shrink and perturb")


def _relabelled(arm: str, seed: int, labellings: int, rate: float) -> dict[str, Any]:
    task = DigitsRelabelled()
    torch.manual_seed(seed)
    model = task.model(seed)
    if arm in ("LayerNorm", "NaP", "NaP + cosine"):
        normalize_(model)
    optimizer = torch.optim.Adam(model.parameters(), rate, weight_decay=0.01 if arm == "L2 0.01" else 0.0)
    hidden = [m.weight for m in model.modules() if isinstance(m, nn.Linear)][:2]
    start = [float(w.detach().norm()) for w in hidden]
    if arm in ("NaP", "NaP + cosine"):
        NaP(model).attach(optimizer)
    elif arm == "projection only":
        NaP([(str(i), w) for i, w in enumerate(hidden)], scale_offset="none").attach(optimizer)
    batches, accuracies = task.train_batches(seed, 64), []
    for _ in range(labellings):
        if arm == "shrink and perturb":
            fresh = task.model(seed)
            with torch.no_grad():
                for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
                    p.mul_(0.8).add_(q, alpha=0.1)
        for k in range(task.every):
            if arm == "NaP + cosine":
                part = k / task.every
                optimizer.param_groups[0]["lr"] = rate * (min(1.0, part / 0.1) if part < 0.1 else 1.1 - part)
            optimizer.zero_grad()
            task.loss(model, next(batches)).backward()
            optimizer.step()
        with torch.no_grad():
            accuracies.append(task.evaluate(model)["accuracy"])
    growth = [float(w.detach().norm()) / s for w, s in zip(hidden, start, strict=True)]
    return {"arm": arm, "seed": seed, "rate": rate, "first": statistics.fmean(accuracies[:3]),
            "last": statistics.fmean(accuracies[-5:]), "growth": growth}  # fmt: skip


def _plasticity(quick: bool) -> list[Evidence]:
    labellings, seeds = (9, 1) if quick else (30, 3)
    arms = ("plain", "LayerNorm", "projection only", "NaP") if quick else ARMS
    rows = [_relabelled(arm, seed, labellings, 1e-3) for arm in arms for seed in range(seeds)]
    if not quick:
        rows += [_relabelled(arm, 0, labellings, rate) for arm in ("LayerNorm", "NaP") for rate in (3e-4, 3e-3)]
    main = {arm: [r for r in rows if r["arm"] == arm and r["rate"] == 1e-3] for arm in arms}
    first = {arm: statistics.fmean(r["first"] for r in main[arm]) for arm in arms}
    last = {arm: statistics.fmean(r["last"] for r in main[arm]) for arm in arms}
    growth = {arm: [statistics.fmean(r["growth"][i] for r in main[arm]) for i in range(2)] for arm in arms}
    setting = f"1,000 digits, 64-256-256-10, Adam 1e-3, {labellings} labellings of 150 steps, {seeds} seed(s)"
    good = [last["NaP"] >= first["NaP"] - 2, last["NaP"] > last["plain"], last["NaP"] > last["LayerNorm"]]
    other = "; ".join(
        f"{r['arm']} at {r['rate']:g}: {r['first']:.1f}/{r['last']:.1f}" for r in rows if r["rate"] != 1e-3
    )
    still = [max(abs(g - 1) for g in growth["NaP"]) < 1e-4, min(growth["plain"]) > 1.05]
    return [
        Evidence(
            KEY,
            "the ability to learn is kept under repeated random relabelling",
            "flat curve with NaP, decay without (CIFAR-10, 200 resets, figure)",
            "accuracy of the first 3 / last 5 labellings: "
            + "; ".join(f"{arm} {first[arm]:.1f}/{last[arm]:.1f}" for arm in arms),
            f"the same network without norms and with LayerNorm alone; {setting}",
            _verdict(good),
            "asked: no decay with NaP, and above plain and LayerNorm at the end"
            + (f"; other rates: {other}" if other else ""),
            rows=rows,
        ),
        Evidence(
            KEY,
            "norms stay where they began, and grow otherwise",
            "qualitative (figure)",
            "; ".join(f"{arm} {g[0]:.2f}x, {g[1]:.2f}x" for arm, g in growth.items()),
            setting,
            _verdict(still),
            "asked: NaP within 1e-4 of 1 and plain weights above 1.05",
            rows=rows,
        ),
    ]


def _twin() -> Evidence:
    torch.manual_seed(0)
    x = torch.randn(64, 8, dtype=torch.float64)
    y = x[:, :4].argmax(1)
    rows = []
    for name, make in (("SGD", lambda p: torch.optim.SGD(p, 0.3)), ("Adam", lambda p: torch.optim.Adam(p, 1e-2))):
        model = nn.Sequential(
            nn.Linear(8, 32, bias=False), nn.LayerNorm(32, 0.0), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.LayerNorm(32, 0.0),
            nn.ReLU(), nn.Linear(32, 4),
        ).double()  # fmt: skip
        twin = copy.deepcopy(model)
        optimizer, other = make(model.parameters()), make(twin.parameters())
        NaP(model, scale_offset="none").attach(optimizer)
        rescaled_lr(other, NaP(twin, scale_offset="none"))
        gap = 0.0
        for _ in range(60):
            losses = []
            for net, opt in ((model, optimizer), (twin, other)):
                opt.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                opt.step()
                losses.append(float(loss.detach()))
            gap = max(gap, abs(losses[0] - losses[1]))
        rows.append({"optimizer": name, "gap": gap})
    good = [rows[0]["gap"] < 1e-10, rows[1]["gap"] > 1e-10]
    return Evidence(
        KEY, "projecting equals rescaling each layer's rate by its norm", "same curves (figure)",
        ", ".join(f"{r['optimizer']}: losses apart by {r['gap']:.1e} over 60 steps" for r in rows), "the rescaled-rate twin, float64",
        _verdict(good), "exact for plain SGD; with Adam only nearly, because its history mixes gradients of different scales", rows=rows,
    )  # fmt: skip


def _conv() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.GroupNorm(1, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def _stationary(quick: bool) -> Evidence:
    from headway.tasks.task import get

    task: Any = get("digits")
    images, labels, test_images, test_labels = task.data()
    steps, seeds, rows = (120, 1, []) if quick else (600, 5, [])
    for seed in range(seeds):
        for arm in ("norms alone", "NaP"):
            torch.manual_seed(seed)
            model = _conv()
            optimizer = torch.optim.Adam(model.parameters(), 3e-3)
            if arm == "NaP":
                apply(model, NormalizeAndProject(normalize=False), optimizer=optimizer)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for _ in range(steps):
                index = torch.randint(len(images), (64,))
                optimizer.zero_grad()
                F.cross_entropy(model(images[index]), labels[index]).backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                right = float((model(test_images).argmax(1) == test_labels).double().mean())
            rows.append({"arm": arm, "seed": seed, "accuracy": 100 * right})
    values = {arm: [r["accuracy"] for r in rows if r["arm"] == arm] for arm in ("norms alone", "NaP")}
    mean = {arm: statistics.fmean(v) for arm, v in values.items()}
    loss = mean["norms alone"] - mean["NaP"]
    verdict: Verdict = "holds" if loss <= 0.3 else "partly" if loss <= 1.0 else "does not hold here"
    return Evidence(
        KEY, "no harm on a stationary task", "on par or slightly better",
        ", ".join(f"{arm} {m:.2f} %" for arm, m in mean.items()),
        f"the same convolutional net with norms alone, digits, Adam 3e-3 with a cosine, {steps} steps, {seeds} seed(s)", verdict,
        f"{0.0 - loss:+.2f} points against a tolerance of 0.3; one of {len(test_labels)} images is {100 / len(test_labels):.2f} points",
        rows=rows,
    )  # fmt: skip


def _cost(quick: bool) -> Evidence:
    budget, rows = (0.5 if quick else 3.0), []
    for width in (256, 1024, 1792):
        torch.manual_seed(0)
        blocks: list[nn.Module] = []
        for _ in range(3):
            blocks += [nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ReLU()]
        model, x = nn.Sequential(*blocks, nn.Linear(width, 10)), torch.randn(64, width)

        def backward(model: nn.Module, x: torch.Tensor = x) -> None:
            model.zero_grad()
            model(x).square().mean().backward()

        def fused(own: nn.Module, project: dict[str, Any] | None) -> torch.optim.Optimizer:
            # a rate at which every norm moves, so that every projection has something to write
            optimizer = torch.optim.AdamW(own.parameters(), 1e-3, fused=True)
            if project is not None:
                NaP(own, scale_offset="none", **project).attach(optimizer)
            backward(own)
            return optimizer

        def steps(optimizer: torch.optim.Optimizer, count: int) -> None:
            for _ in range(count):
                optimizer.step()

        plain, added = fused(model, None), {}
        for name, count, project in (("each", 1, {}), ("third", 3, {"every": 3}), ("rows", 1, {"per": "row"})):
            ours = fused(copy.deepcopy(model), project)
            added[name] = paired(partial(steps, ours, count), partial(steps, plain, count), budget)
        whole = seconds(lambda b=backward, model=model, plain=plain: (b(model), plain.step()), budget)
        more = {name: 1 / pair.ratio - 1 for name, pair in added.items()}
        rows.append({"parameters": sum(p.numel() for p in model.parameters()), "of_optimizer": more["each"],
                     "every_third": more["third"], "by_row": more["rows"], "of_training": more["each"] * added["each"].theirs / whole,
                     "ms": added["each"].ours * 1e3})  # fmt: skip
    good = [r["of_optimizer"] <= 0.15 for r in rows] + [r["of_training"] <= 0.02 for r in rows]
    return Evidence(
        KEY, "projecting is cheap", "no number; the aim is 15 % of the optimiser's step and 2 % of a training step",
        ", ".join(f"{r['of_optimizer']:+.0%} and {r['of_training']:+.1%} ({r['parameters'] / 1e6:.1f} M)" for r in rows),
        "a step of torch's fused AdamW with a projection after every step against one without, and its share of forward, backward and "
        "step at batch 64", _verdict(good),
        f"{sum(good)} of {len(good)} shares within the aim. Adam and the norm are one pass over W; scaling W is a second one, which costs "
        "memory where the caches no longer hold it: 2 streams beside AdamW's 7, 29 % at most. Row by row there is no second one: "
        + ", ".join(f"{r['by_row']:+.0%}" for r in rows) + "; projecting every third step: "
        + ", ".join(f"{r['every_third']:+.0%}" for r in rows),
        f"copy bandwidth {copy_bandwidth(1 << 26) / 1e9:.0f} GB/s", rows,
    )  # fmt: skip
