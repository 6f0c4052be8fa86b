"""What "Region Normalization for Image Inpainting" (AAAI 2020, arXiv 1911.10375) claims, measured: the shift of valid pixels,
inpainting with each norm, cost, memory."""

from __future__ import annotations

import importlib.util
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.claims.evidence import Evidence, verdict
from headway.measure import copy_bandwidth, paired
from headway.norms.region import RegionNormB2d, RegionNormL2d, region_norm
from headway.norms.region_convert import RegionNorm
from headway.signals.saved import SavedBytes
from headway.surgery import apply
from headway.tasks.digits import Digits
from headway.tasks.inpainting import DigitsInpainting, Inpainting, InstanceNorms
from headway.tasks.photos import PhotoInpainting, photographs

KEY = "region-norm"
SHAPES = [(4, 64, 48, 48), (4, 256, 16, 16), (2, 64, 128, 128)]
HOLES = (0.10, 0.25, 0.40, 0.60)
ARMS: dict[str, list[Any]] = {
    "batch norm": [],
    "instance norm": [InstanceNorms()],
    "RN-B + instance norm": [RegionNorm(late=()), InstanceNorms()],
    "RN-B + RN-L": [RegionNorm()],
}


def measure(quick: bool) -> list[Evidence]:
    """Every row; ``quick`` takes under half a minute, otherwise some minutes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [_shift(quick), _better(quick), _random_fill(quick), *_speed(quick), _memory()]


def patches(count: int) -> tuple[Tensor, str]:
    """(count, channels, 64, 64) from 0 to 1 and where they are from: the photographs that come with scikit-learn where Pillow can read
    them, its digits, enlarged, otherwise."""
    try:
        photos = photographs()
    except ImportError:
        images = (Digits().data()[0][:count] + 1) / 2
        return F.interpolate(images, size=(64, 64), mode="bilinear", align_corners=False), "digits at 64x64"
    tiles = [p.unfold(1, 64, 64).unfold(2, 64, 64).flatten(1, 2).movedim(1, 0) for p in photos]
    whole = torch.cat(tiles)
    return whole[torch.randperm(len(whole))[:count]], "64x64 patches of two photographs"


def shifts(images: Tensor, share: float) -> tuple[float, float]:
    """Median over the images of how far valid pixels move, in standard deviations of the valid ones, when a white square hole is
    normalised with them; and the same with region normalisation."""
    size = images.shape[-1]
    side = round(size * share**0.5)
    hole = torch.zeros(len(images), 1, size, size, dtype=torch.bool)
    for mask in hole:
        top, left = (int(torch.randint(size - side + 1, ())) for _ in range(2))
        mask[:, top : top + side, left : left + side] = True
    filled = torch.where(hole, 1.0, images)
    valid = (~hole).expand(images.shape)
    found: list[list[float]] = [[], []]
    for i in range(len(images)):
        own = torch.stack([c[~hole[i, 0]] for c in images[i]])
        alone = (own - own.mean(1, keepdim=True)) / (own.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        for k, y in enumerate((F.instance_norm(filled[i][None]), region_norm(filled[i][None], hole[i][None]))):
            found[k].append(float((y[0][valid[i]].reshape(alone.shape) - alone).square().mean().sqrt()))
    return statistics.median(found[0]), statistics.median(found[1])


def _shift(quick: bool) -> Evidence:
    images, source = patches(24 if quick else 96)
    rows: list[dict[str, Any]] = [
        dict(zip(("hole", "full", "region"), (share, *shifts(images, share)), strict=True)) for share in HOLES
    ]
    full, ours = [r["full"] for r in rows], max(r["region"] for r in rows)
    return Evidence(
        KEY,
        "statistics of the whole plane shift valid pixels by an amount that depends on the hole",
        "shown in figures",
        f"median shift {', '.join(f'{v:.2f}' for v in full)} standard deviations with holes of 10, 25, 40 and 60 %; RN {ours:.1e}",
        f"instance norm of {len(images)} {source} with a white square hole, against the valid pixels normalised alone",
        verdict([full == sorted(full), full[0] >= 0.1, ours <= 1e-4]),
        f"wanted: a shift of 0.1 or more that grows with the hole ({full[0]:.2f} to {full[-1]:.2f}), and none with RN, to rounding",
        rows=rows,
    )


def workload() -> tuple[Inpainting, int, str]:
    """A task, its batch size, and what it is: the photographs that come with scikit-learn, or its digits where Pillow cannot read them."""
    if importlib.util.find_spec("PIL") is None:
        return DigitsInpainting(), 32, "digits at 16x16, holes of 10 to 40 %"
    return PhotoInpainting(), 16, "32x32 patches of two photographs, two to five rectangles as holes"


def train(arm: str, seed: int, steps: int, task: Inpainting, batch_size: int = 32) -> dict[str, Any]:
    """One arm on images with holes."""
    torch.manual_seed(seed)
    model = task.model(seed)
    model = apply(model, *ARMS[arm]) if ARMS[arm] else model
    optimizer, batches = task.optimizer(model.parameters()), task.train_batches(seed, batch_size)
    for k in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = task.learning_rate * task.rate(k / steps)
        optimizer.zero_grad()
        task.loss(model.train(), next(batches)).backward()
        optimizer.step()
    with torch.no_grad():
        return {"arm": arm, "seed": seed, **task.evaluate(model.eval())}


def _table(rows: list[dict[str, Any]], metric: str) -> tuple[dict[str, float], float, str]:
    """Mean of every arm, the widest range over seeds of any of them, and both in words."""
    of = {arm: [r[metric] for r in rows if r["arm"] == arm] for arm in dict.fromkeys(r["arm"] for r in rows)}
    mean = {arm: statistics.fmean(values) for arm, values in of.items()}
    spread = {arm: max(values) - min(values) for arm, values in of.items()}
    return mean, max(spread.values()), ", ".join(f"{arm} {mean[arm]:.2f} (range {spread[arm]:.2f})" for arm in mean)


def _better(quick: bool) -> Evidence:
    steps, seeds = (60, 1) if quick else (300, 3)
    task, batch_size, images = workload()
    rows = [train(arm, seed, steps, task, batch_size) for seed in range(seeds) for arm in ARMS]
    mean, spread, table = _table(rows, "psnr")
    gains = {base: mean["RN-B + RN-L"] - mean[base] for base in ("instance norm", "batch norm")}
    return Evidence(
        KEY,
        "inpainting is better than with statistics of the whole plane",
        '"outperforms"; Places2 and CelebA, hundreds of thousands of images',
        f"PSNR in dB: {table}",
        f"the same network with batch and with instance norms, {images}, {steps} steps, {seeds} seed(s)",
        verdict([gain > spread for gain in gains.values()]),
        f"RN-B + RN-L has {', '.join(f'{gain:+.2f} dB on {base}' for base, gain in gains.items())}; wanted: more than the widest range "
        f"over seeds, {spread:.2f}; small images and a short training say little about the paper's",
        rows=rows,
    )


def _random_fill(quick: bool) -> Evidence:
    steps, seeds = (60, 1) if quick else (300, 3)
    bases = ("batch norm", "instance norm")
    arms, task = (*bases, "RN-B + RN-L"), DigitsInpainting(fill="random", share=(0.3, 0.4))
    rows = [train(arm, seed, steps, task) for seed in range(seeds) for arm in arms]
    gains, spreads, tables = [], [], []
    for metric in ("psnr", "psnr_large"):
        mean, spread, table = _table(rows, metric)
        gains.append(mean["RN-B + RN-L"] - max(mean[base] for base in bases))
        spreads.append(spread)
        tables.append(table)
    return Evidence(
        KEY,
        "what fills a hole, and holes larger than any in training, matter less",
        "follows from the shift; not tabulated",
        f"PSNR in dB: {tables[0]}; holes of 50 to 70 %: {tables[1]}",
        f"the same networks, digits at 16x16, another number in every image's hole of 30 to 40 %, {steps} steps, {seeds} seed(s)",
        verdict([gain > spread for gain, spread in zip(gains, spreads, strict=True)]),
        f"on the better of the two: {gains[0]:+.2f} dB, and {gains[1]:+.2f} dB with larger holes; wanted: more than the widest range over "
        f"seeds, {spreads[0]:.2f} and {spreads[1]:.2f}; only RN-B's statistics are free of the fill, the convolution before it is not",
        rows=rows,
    )


class _Masked(nn.Module):
    """RN-B with one mask, and perhaps an activation behind it."""

    def __init__(self, norm: nn.Module, mask: Tensor, act: bool = False) -> None:
        super().__init__()
        self.norm, self.mask, self.act = norm, mask, act

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x, self.mask)
        return y.relu() if self.act else y


def _speed(quick: bool) -> list[Evidence]:
    # glibc keeps freed memory up to twice the largest block it has seen; otherwise either side may map its pages anew in every step
    torch.empty(30 << 20, dtype=torch.uint8)
    budget, rows = (0.4 if quick else 1.5), []
    for shape in SHAPES[: 2 if quick else 3]:
        x, gy, c = torch.randn(shape, requires_grad=True), torch.randn(shape), shape[1]
        mask = torch.rand(shape[0], *shape[2:]) < 0.3

        def step(module: nn.Module, x: Tensor = x, gy: Tensor = gy) -> object:
            return torch.autograd.grad(module(x), (x, *module.parameters()), gy)

        for name, ours, theirs in (
            ("RN-B", _Masked(RegionNormB2d(c), mask), nn.BatchNorm2d(c)),
            ("RN-B, batch", _Masked(RegionNormB2d(c, "batch"), mask), nn.BatchNorm2d(c)),
            ("RN-B + ReLU", _Masked(RegionNormB2d(c), mask, True), nn.Sequential(nn.BatchNorm2d(c), nn.ReLU())),
            ("RN-L", RegionNormL2d(c), nn.BatchNorm2d(c)),
            ("RN-L + ReLU", nn.Sequential(RegionNormL2d(c), nn.ReLU()), nn.Sequential(nn.BatchNorm2d(c), nn.ReLU())),
        ):
            training = 1 / paired(lambda m=ours: step(m), lambda m=theirs: step(m), budget).ratio
            with torch.no_grad():
                forward = 1 / paired(lambda m=ours, x=x: m(x), lambda m=theirs, x=x: m(x), budget / 2).ratio
            rows.append({"layer": name, "shape": list(shape), "train": training, "forward": forward})
    limit = f"copy bandwidth {copy_bandwidth(1 << 22, budget) / 1e9:.0f} GB/s"
    threads = f"{torch.get_num_threads()} thread(s), in turn, medians"
    setting = f"nn.BatchNorm2d (with ReLU where the region norm has one) in training, 30 % hole, {threads}"

    def evidence(claim: str, kind: str, most: dict[str, float], paper: str) -> Evidence:
        chosen = [row for row in rows if row["layer"] in most]
        good = [row[kind] <= most[row["layer"]] for row in chosen]
        shown = ", ".join(f"{r['layer']} x{r[kind]:.2f} at {'x'.join(map(str, r['shape']))}" for r in chosen)
        wanted = ", ".join(f"{name} <= {value}" for name, value in most.items())
        return Evidence(
            KEY, claim, paper, shown, setting, verdict(good), f"{sum(good)} of {len(good)} stay within: {wanted}", limit, chosen
        )  # fmt: skip

    return [
        evidence(
            "a training step of RN-B costs at most 2.5 batch norms, with an activation at most 1.5 of both",
            "train",
            {"RN-B": 2.5, "RN-B, batch": 2.5, "RN-B + ReLU": 1.5},
            "none published; the released code takes 6 batch norms",
        ),
        evidence(
            "a training step of RN-L costs at most 6 batch norms, with an activation at most 1.5 of both",
            "train",
            {"RN-L": 6.0, "RN-L + ReLU": 1.5},
            "none published; the released code takes 12 to 15 batch norms",
        ),
        evidence(
            "RN-B forward costs at most 1.5 batch norms",
            "forward",
            {"RN-B": 1.5, "RN-B, batch": 1.5},
            "none published; the released code takes 4 to 6 batch norms",
        ),
    ]


def saved_share(module: nn.Module, x: Tensor) -> float:
    """Bytes kept for backward, in units of the input."""
    saved = SavedBytes()
    saved.start(module)
    module(x)
    saved.stop()
    return saved.total / (x.numel() * x.element_size())


def _memory() -> Evidence:
    x = torch.randn(4, 64, 48, 48).requires_grad_()
    mask = torch.rand(4, 48, 48) < 0.3
    ours = {"RN-B": saved_share(_Masked(RegionNormB2d(64), mask), x), "RN-L": saved_share(RegionNormL2d(64), x)}
    theirs = saved_share(nn.BatchNorm2d(64), x)
    # ten numbers a pixel: mean, maximum and its channel, importance, region, gain, offset
    wanted = {"RN-B": 1.02, "RN-L": 1.02 + 10 / 64}
    return Evidence(
        KEY,
        "keeps the input and the mask for backward",
        "none published; the released code keeps several copies",
        f"in units of the input: {', '.join(f'{name} {share:.3f}' for name, share in ours.items())}",
        f"nn.BatchNorm2d {theirs:.3f}, 4x64x48x48; wanted: RN-B 1 and the mask (<= 1.02), RN-L ten numbers a pixel more (<= "
        f"{wanted['RN-L']:.2f})",
        verdict([share <= wanted[name] for name, share in ours.items()]),
        "the mask is a byte a pixel for all channels; RN-L keeps the maps it found its regions and gains with",
        rows=[{"layer": name, "share": share} for name, share in {**ours, "BN": theirs}.items()],
    )
