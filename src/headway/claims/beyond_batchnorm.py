"""Claims of "Beyond BatchNorm: Towards a Unified Understanding of Normalization in Deep Learning", 2021, arXiv 2106.05956."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.claims.evidence import Evidence, Verdict
from headway.signals.comparison import Normalizer, compare_normalizers, plain_net, residual_net
from headway.signals.cost import memory, time_ratio

KEY = "beyond-batchnorm"
GROUPS = ("group:32", "group:16", "group:8", "group:4", "group:2", "group:1")


def measure(quick: bool = False) -> list[Evidence]:
    """Every row of the paper's claims that a CPU can measure; ``quick`` takes about 30 seconds."""
    x, y = digits()
    batch = x[:64], y[:64]
    seeds = 1 if quick else 3
    likeness, gradients = _groups(batch, seeds)
    return [_growth(batch, seeds), likeness, gradients, _speed(x, y, quick), _cost(quick)]


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits, standardised, (B, 1, 8, 8), and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    return (x - x.mean()) / x.std(), torch.as_tensor(labels)


def _verdict(full: bool, part: bool) -> Verdict:
    return "holds" if full else "partly" if part else "does not hold here"


def _growth(batch: tuple[Tensor, Tensor], seeds: int) -> Evidence:
    names = ("none", "batch", "layer", "instance")
    table = compare_normalizers(residual_net(27), batch, names, seeds)
    laws = {name: table.flows[name, 0].growth for name in names}
    normed = [laws[name].law == "linear" for name in names[1:]]
    exponential = laws["none"].law == "exponential"
    numbers = ", ".join(f"{name} {table[name].variance:.3g} ({laws[name].law})" for name in names)
    return Evidence(
        KEY,
        "Normalised residual branches stop the exponential growth of activations with depth.",
        "qualitative",
        f"variance after 27 residual blocks (32 channels, 8x8), mean of {seeds} seeds: {numbers}",
        "the same network without normalisation",
        _verdict(exponential and all(normed), exponential and any(normed)),
        f"without norm x{laws['none'].factor:.2f} a block; with BatchNorm +{laws['batch'].slope:.2f} a block.",
        rows=[
            {"normalizer": n, "variance": table[n].variance, "factor": laws[n].factor, "slope": laws[n].slope}
            for n in names
        ],
    )


def _groups(batch: tuple[Tensor, Tensor], seeds: int) -> tuple[Evidence, Evidence]:
    table = compare_normalizers(plain_net(12), batch, (*GROUPS, "batch", "none"), seeds)
    cos, grad = [table[g].cos for g in GROUPS], [table[g].gradient_ratio for g in GROUPS]
    rows = [
        {"normalizer": r.normalizer, "cos": r.cos, "cos_spread": r.cos_spread, "gradient_ratio": r.gradient_ratio}
        for r in table.rows
    ]
    rho_cos, rho_grad = spearman(range(len(cos)), [-c for c in cos]), spearman(range(len(grad)), grad)
    setting = f"12 convolutions, 32 channels, 64 digits, {seeds} seeds, group size 32, 16, 8, 4, 2, 1"
    return (
        Evidence(
            KEY,
            "Normalising over larger groups makes different samples alike.",
            "qualitative, monotone",
            f"cosine at the last layer: {_list(cos)}; BatchNorm {table['batch'].cos:.2f}, none {table['none'].cos:.2f} ({setting})",
            "BatchNorm and no normalisation",
            _verdict(rho_cos > 0.99, rho_cos >= 0.8),
            f"rank correlation of group size and likeness {rho_cos:.2f}.",
            rows=rows,
        ),
        Evidence(
            KEY,
            "Normalising over small groups makes the gradient in early layers large.",
            "qualitative, monotone",
            f"gradient norm first / last: {_list(grad)}; BatchNorm {table['batch'].gradient_ratio:.2f} ({setting})",
            "BatchNorm",
            _verdict(rho_grad > 0.99, rho_grad >= 0.8),
            f"rank correlation of smaller groups and larger early gradients {rho_grad:.2f}.",
            rows=rows,
        ),
    )


def _speed(x: Tensor, y: Tensor, quick: bool) -> Evidence:
    names = ("none", "batch", "layer", "group:8", "group:2", "instance")
    x, y = (x[:768], y[:768]) if quick else (x, y)
    if not quick:
        names = (
            *names,
            "group:16",
            "group:4",
            "filter-response",
            "variance",
            "evo-b0",
            "evo-s0",
            "weight",
            "scaled-weight-std",
        )
    seeds, depth = (1, 12) if quick else (3, 12)
    cos = compare_normalizers(plain_net(depth), (x[:64], y[:64]), names, seeds)
    losses = {name: statistics.fmean(_train(name, x, y, seed, depth) for seed in range(seeds)) for name in names}

    def related(among: Sequence[str]) -> float:
        return spearman([cos[name].cos for name in among], [losses[name] for name in among])

    rho, others = related(names), related([name for name in names if name != "instance"])
    numbers = ", ".join(f"{name} {losses[name]:.3f}" for name in sorted(names, key=losses.__getitem__))
    stuck = (
        "; InstanceNorm keeps samples apart and is still guessing: it takes out the channel means that the mean over space reads"
        if losses["instance"] > 2
        else ""
    )
    return Evidence(
        KEY,
        "Likeness of samples at initialisation predicts how fast a normaliser trains.",
        "correlated (figure)",
        f"Spearman {rho:.2f} between cosine at initialisation and training loss after 3 epochs, {others:.2f} without InstanceNorm; "
        f"losses {numbers}",
        "0 (no relation); 0.7 was to be reached",
        _verdict(rho >= 0.7, rho >= 0.4),
        f"{len(names)} normalisers, plain net of {depth} convolutions on digits, SGD 0.01 with momentum 0.9, batch 16, {seeds} seed(s)"
        + stuck,
        rows=[{"normalizer": name, "cos": cos[name].cos, "loss": losses[name]} for name in names],
    )


def _train(name: str, x: Tensor, y: Tensor, seed: int, depth: int) -> float:
    """Mean training loss of the third epoch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = plain_net(depth)(Normalizer(name)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        last: list[float] = []
        for epoch in range(3):
            # with fewer, larger steps no net of this depth gets far enough from guessing to be told apart
            for index in torch.randperm(len(x)).split(16):
                if len(index) < 2:
                    continue
                loss = F.cross_entropy(model(x[index]), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if epoch == 2:
                    last.append(float(loss.detach()))
    mean = statistics.fmean(last)
    return mean if math.isfinite(mean) else 1e9


def _cost(quick: bool) -> Evidence:
    sizes = ((16, 64),) if quick else ((16, 16), (16, 64), (32, 128))
    rows = []
    for width, batch in sizes:
        pair = time_ratio(width, batch, 3.0)
        # one process alone peaks a tenth higher by chance
        plain, probed = (memory(which, width, batch, processes=1 if quick else 5) for which in ("plain", "probed"))
        rows.append(
            {
                "width": width,
                "batch": batch,
                "time": 1 / pair.ratio,
                "memory": probed / plain,
                "plain_seconds": pair.theirs,
            }
        )
    main = next(row for row in rows if row["batch"] == 64)
    text = "; ".join(
        f"width {r['width']}, batch {r['batch']}: time x{r['time']:.2f}, memory x{r['memory']:.2f}" for r in rows
    )
    return Evidence(
        KEY,
        "The probe is cheap.",
        "-",
        f"probed / plain pass of a 20-layer residual net: {text}",
        "a plain forward and backward pass",
        _verdict(main["time"] <= 1.5 and main["memory"] <= 1.1, main["time"] <= 2 or main["memory"] <= 1.1),
        f"at batch 64 the time is x{main['time']:.2f} (1.5 allowed) and the peak memory x{main['memory']:.2f} (1.1 allowed).",
        rows=rows,
    )


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation of two series (ties get their mean rank)."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]

    return statistics.correlation(ranks(a), ranks(b))


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
