"""Claims of "Peri-LN: Revisiting Normalization Layer in the Transformer Architecture" (2025, arXiv 2502.02732), measured here.

Growth of the stream, range in half precision, stability at high rates, loss, cost, and what the probe sees of three placements
at three depths; the model is that of :mod:`headway.claims.byte_lm`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from headway.claims.byte_lm import DEPTH, Run, train_all
from headway.claims.evidence import Evidence, Verdict, verdict
from headway.claims.native import natively
from headway.measure import paired
from headway.residual.transformer import TransformerDecoder

KEY = "peri-ln"
HIGH, HALF = 3e-2, 65504.0


def measure(quick: bool) -> list[Evidence]:
    """Every claim; ``quick`` takes about a quarter of a minute on two cores, otherwise under five minutes."""
    rates, seeds, steps = ((3e-3, HIGH), 1, 60) if quick else ((1e-3, 3e-3, 1e-2, HIGH), 5, 200)
    pair = [Run(p, rate, seed, steps) for rate, seed, p in product(rates, range(seeds), ("pre", "peri"))]
    others = [Run(p, HIGH, seed, steps) for p, seed in product(("post", "mix", "output"), range(1 if quick else 3))]
    longer = [] if quick else [Run(p, 3e-3, seed, 600) for p, seed in product(("pre", "peri"), range(3))]
    depths = [
        Run(p, 1e-2, seed, 20 if quick else 100, depth=depth, corpus="stdlib-text")
        for seed, depth, p in product(range(1 if quick else 3), (4, 12, 24), ("pre", "peri", "post"))
    ]
    runs = [*pair, *others, *longer, *depths]
    results = train_all(runs)
    ends = [len(pair), len(pair) + len(others), len(pair) + len(others) + len(longer)]
    trained, placed, long, deep = results[: ends[0]], results[: ends[1]], results[ends[1] : ends[2]], results[ends[2] :]
    return [
        _growth(trained),
        _range(trained),
        _stability(trained),
        _loss(trained, long),
        _placements(placed),
        _depths(deep),
        _cost(quick),
    ]


def of(results: Sequence[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Those results that have these values, in order of their seeds."""
    return [r for r in results if all(r[name] == value for name, value in wanted.items())]


def _setting(results: Sequence[dict[str, Any]]) -> str:
    seeds, steps = len({r["seed"] for r in results}), results[0]["steps"]
    return f"{DEPTH} blocks, d=64, {steps} steps, {seeds} seed{'s' if seeds > 1 else ''}"


def straightness(values: Sequence[float]) -> float:
    """R^2 of the least squares line through the values by depth."""
    return statistics.correlation(range(len(values)), values) ** 2


def _growth(results: Sequence[dict[str, Any]]) -> Evidence:
    high = of(results, rate=HIGH)
    rows = [
        {"placement": r["placement"], "seed": r["seed"], "R2 at the start": straightness(r["start"]["variance"]),
         "R2 in the end": straightness(r["end"]["variance"]), "last block, start": r["start"]["variance"][-1],
         "last block, end": r["end"]["variance"][-1], "by block": r["end"]["variance"]}
        for r in high
    ]  # fmt: skip

    def median(placement: str, name: str) -> float:
        return statistics.median(row[name] for row in rows if row["placement"] == placement)

    start, end = median("peri", "R2 at the start"), median("peri", "R2 in the end")
    pre, peri = median("pre", "last block, end"), median("peri", "last block, end")
    return Evidence(
        KEY,
        "the variance of the stream grows in balance, linearly with depth, also at a high rate",
        "qualitative (abstract)",
        f"after training at {HIGH:g} the last block's variance is {pre:.3g} (pre) against {peri:.3g} (peri); Peri-LN by depth: "
        f"R^2 of a line {start:.3f} before and {end:.3f} after training",
        "Pre-LN, same start, same bytes",
        verdict([start > 0.95, end > 0.95, pre >= 30 * peri]),
        f"asked for: R^2 above 0.95 before ({_yes(start > 0.95)}) and after ({_yes(end > 0.95)}), a variance 30 times lower "
        f"({_yes(pre >= 30 * peri)}); {_setting(high)}; after training deep blocks add less than early ones, so the line bends",
        rows=rows,
    )


def _yes(good: bool) -> str:
    return "yes" if good else "no"


def _range(results: Sequence[dict[str, Any]]) -> Evidence:
    rows = []
    for rate in sorted({r["rate"] for r in results}):
        pre, peri = of(results, rate=rate, placement="pre"), of(results, rate=rate, placement="peri")
        rows += [
            {
                "rate": rate,
                "seed": a["seed"],
                "pre": a["largest"],
                "peri": b["largest"],
                "ratio": a["largest"] / b["largest"],
            }
            for a, b in zip(pre, peri, strict=True)
        ]
    high = [row for row in rows if row["rate"] == HIGH]
    ratio, pre, peri = (statistics.median(row[name] for row in high) for name in ("ratio", "pre", "peri"))
    inside = max(row["peri"] for row in rows) < HALF
    return Evidence(
        KEY,
        "hidden states stay inside the range of half precision",
        "Pre-LN leaves the range of float16 in training, Peri-LN stays inside (figure)",
        f"largest |hidden state| at any step at rate {HIGH:g}: {pre:.0f} (pre), {peri:.0f} (peri), {ratio:.0f} times less",
        f"Pre-LN; float16 ends at {HALF:.0f}",
        verdict([inside and ratio > 1, ratio >= 30]),
        f"a factor of 30 was to be reached; at this size Pre-LN uses {max(row['pre'] for row in rows) / HALF:.1%} of the range at "
        f"most and does not overflow either; {_setting(of(results, rate=HIGH))}",
        f"largest number of float16: {HALF:.0f}",
        rows,
    )


def spikes(gradients: Sequence[float], after: int = 20) -> int:
    """How many gradient norms behind the warm-up pass three times their median."""
    later = gradients[after:]
    return sum(not norm <= 3 * statistics.median(later) for norm in later)


def _stability(results: Sequence[dict[str, Any]]) -> Evidence:
    rows = [
        {"rate": r["rate"], "placement": r["placement"], "seed": r["seed"], "mean loss": statistics.fmean(r["losses"]),
         "last losses": statistics.fmean(r["losses"][-20:]), "spikes": spikes(r["gradients"]), "diverged": r["diverged"]}
        for r in results
    ]  # fmt: skip

    def mean(rate: float, placement: str, name: str) -> float:
        return statistics.fmean(row[name] for row in rows if (row["rate"], row["placement"]) == (rate, placement))

    rates = sorted({row["rate"] for row in rows})
    area = {rate: (mean(rate, "pre", "mean loss"), mean(rate, "peri", "mean loss")) for rate in rates}
    count = {rate: (mean(rate, "pre", "spikes"), mean(rate, "peri", "spikes")) for rate in rates}
    better, calmer = area[HIGH][1] < area[HIGH][0], count[HIGH][1] <= count[HIGH][0]
    return Evidence(
        KEY,
        "training is steadier at high rates: a lower curve and fewer gradient spikes",
        "steadier gradient flow, fewer spikes (abstract)",
        "mean training loss, pre / peri: "
        + ", ".join(f"{pre:.3f} / {peri:.3f} at {rate:g}" for rate, (pre, peri) in area.items())
        + "; gradient norms over 3 medians: "
        + ", ".join(f"{pre:.1f} / {peri:.1f} at {rate:g}" for rate, (pre, peri) in count.items()),
        "Pre-LN at the same rate, same start, same bytes",
        verdict([better, calmer]),
        f"at {HIGH:g} the curve is {'lower' if better else 'not lower'} and the spikes are {'no more' if calmer else 'more'}; "
        f"Peri-LN's curve is the lower one at {sum(b < a for a, b in area.values())} of {len(rates)} rates; {_setting(results)}",
        rows=rows,
    )


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean of theirs - ours over pairs, and its standard error: 0 for a single pair, infinite where a run diverged."""
    gaps = [b - a for a, b in zip(ours, theirs, strict=True)]
    if not all(math.isfinite(gap) for gap in gaps):
        return sum(gaps), math.inf
    return statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0


def best_rate(results: Sequence[dict[str, Any]], placement: str) -> tuple[float, list[float]]:
    """The rate with the lowest mean held-out loss, and those losses by seed."""
    chosen = of(results, placement=placement)
    by_rate = {
        rate: [_finite(r["held_out"]) for r in of(chosen, rate=rate)] for rate in sorted({r["rate"] for r in chosen})
    }
    rate = min(by_rate, key=lambda rate: statistics.fmean(by_rate[rate]))
    return rate, by_rate[rate]


def _finite(loss: float | None) -> float:
    return loss if loss is not None and math.isfinite(loss) else math.inf


def compared(ours: Sequence[float], theirs: Sequence[float]) -> Verdict:
    """ "holds" where ours is lower by more than two standard errors, "partly" where it is lower on average."""
    gap, error = difference(ours, theirs)
    return verdict([gap > 0, gap > 2 * error and len(ours) > 1])


def _loss(results: Sequence[dict[str, Any]], longer: Sequence[dict[str, Any]]) -> Evidence:
    (pre_rate, pre), (peri_rate, peri) = best_rate(results, "pre"), best_rate(results, "peri")
    gap, error = difference(peri, pre)
    told = f"best rate of each: {statistics.fmean(peri):.3f} at {peri_rate:g} (peri), {statistics.fmean(pre):.3f} at {pre_rate:g} (pre)"
    if longer:
        long = {p: statistics.fmean(r["held_out"] for r in of(longer, placement=p)) for p in ("pre", "peri")}
        told += f"; 600 steps at 0.003: {long['peri']:.3f} (peri), {long['pre']:.3f} (pre)"
    return Evidence(
        KEY,
        "the loss is lower than Pre-LN's",
        "400M parameters: loss 3.34 against 3.43, mean of five tasks 51.57 against 49.69 (as listed by others)",
        f"held-out nats a byte, {told}",
        "Pre-LN at its own best rate",
        compared(peri, pre),
        f"Peri-LN is {abs(gap):.3f} nats {'ahead' if gap > 0 else 'behind'}, standard error {error:.3f}; {_setting(results)}; "
        "the paper's gain is one of 400M parameters and billions of tokens, and is not expected at this size",
        rows=[
            {
                "placement": r["placement"],
                "rate": r["rate"],
                "seed": r["seed"],
                "steps": r["steps"],
                "held out": r["held_out"],
            }
            for r in [*results, *longer]
        ],
    )


def _placements(results: Sequence[dict[str, Any]]) -> Evidence:
    high = of(results, rate=HIGH)
    names = list(dict.fromkeys(r["placement"] for r in high))
    shared = set.intersection(*({r["seed"] for r in of(high, placement=name)} for name in names))
    loss = {
        name: statistics.fmean(_finite(r["held_out"]) for r in of(high, placement=name) if r["seed"] in shared)
        for name in names
    }
    best = min(loss, key=loss.__getitem__)
    near, stuck = loss["peri"] <= loss[best] + 0.05, loss["post"] > loss["peri"] + 0.5
    return Evidence(
        KEY,
        "at a high rate Peri-LN is the best placement or close to it, where Post-LN does not learn",
        "Post-LN unstable, Peri-LN ahead (figures)",
        f"held-out nats a byte at {HIGH:g}: " + ", ".join(f"{name} {loss[name]:.3f}" for name in sorted(loss, key=loss.__getitem__)),
        "pre, post, mix and output placement, same start, same bytes",
        verdict([near, stuck]),
        f"best: {best}; Peri-LN {loss['peri'] - loss[best]:.3f} above it (0.05 allowed), Post-LN {loss['post'] - loss['peri']:.2f} "
        f"above Peri-LN; {len(shared)} seed(s), {results[0]['steps']} steps",
        rows=[
            {"placement": r["placement"], "rate": r["rate"], "seed": r["seed"], "held out": r["held_out"], "largest": r["largest"],
             "variance of the last block": r["end"]["variance"][-1]}
            for r in results
        ],
    )  # fmt: skip


def _depths(results: Sequence[dict[str, Any]]) -> Evidence:
    rows, good, told = [], [], []
    for depth in sorted({r["depth"] for r in results}):
        by: dict[str, dict[str, float]] = {}
        for placement in ("pre", "peri", "post"):
            chosen = of(results, depth=depth, placement=placement)
            by[placement] = {
                moment + name: statistics.median(_finite(r[moment][field]) for r in chosen)
                for moment in ("start", "end")
                for name, field in ((" slope", "slope"), (" gradient", "gradient_ratio"))
            }
            last = {
                f"last variance, {m}": statistics.median(r[m]["variance"][-1] for r in chosen) for m in ("start", "end")
            }
            laws = [r["end"]["law"] for r in chosen]
            rows.append({"depth": depth, "placement": placement, "law": statistics.mode(laws), **by[placement], **last})
        pre, peri, post = by["pre"], by["peri"], by["post"]
        grown = {name: by[name]["end slope"] / by[name]["start slope"] for name in ("pre", "peri")}
        good += [grown["pre"] >= 3 * grown["peri"], post["end gradient"] < 0.1 * pre["end gradient"]]
        told.append(
            f"depth {depth}: variance a block {pre['start slope']:.2g} to {pre['end slope']:.2g} (pre), {peri['start slope']:.2g} to "
            f"{peri['end slope']:.2g} (peri); gradient first / last block {pre['end gradient']:.2g} (pre), {peri['end gradient']:.2g} "
            f"(peri), {post['end gradient']:.2g} (post)"
        )
    seeds, steps = len({r["seed"] for r in results}), results[0]["steps"]
    return Evidence(
        KEY,
        "the probe shows it at any depth: training makes Pre-LN's stream grow and Peri-LN's hardly, and Post-LN's gradient vanishes",
        "qualitative (figures)",
        "; ".join(told),
        "one another: Pre-LN, Peri-LN and Post-LN on stdlib-text, by hw.probe before and after training",
        verdict(good),
        f"asked for at every depth: training multiplies Pre-LN's growth at least 3 times as much as Peri-LN's "
        f"({sum(good[::2])} of {len(good[::2])}), Post-LN's gradient reaches the first block 10 times weaker than Pre-LN's "
        f"({sum(good[1::2])} of {len(good[1::2])}; few blocks shrink it little); rate 0.01, {steps} steps, median of {seeds} seed(s)",
        rows=rows,
    )


def step(model: nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    """A forward and a backward pass of a language model on tokens (B, T)."""

    def call() -> None:
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        model.zero_grad(set_to_none=True)

    return call


def _cost(quick: bool) -> Evidence:
    rows = []
    for dim in (64, 192, 384):
        tokens = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(0))
        row: dict[str, Any] = {"width": dim}
        for name, norm in (("fused", "layernorm"), ("plain", nn.LayerNorm)):
            pre, peri = (TransformerDecoder(256, dim, 4, dim // 32, p, norm, max_length=32) for p in ("pre", "peri"))
            pre, peri = natively(pre), natively(peri)
            times = paired(step(peri, tokens), step(pre, tokens), 0.4 if quick else 4.0)
            row |= {name: 1 / times.ratio, f"{name} low": 1 / times.high, f"{name} high": 1 / times.low}
        rows.append(row)
    good = [row["fused"] <= 1.03 for row in rows] + [row["plain"] <= 1.10 for row in rows]
    return Evidence(
        KEY,
        "two more norms a block cost little",
        "no number",
        "step time peri / pre: "
        + ", ".join(f"{row['fused']:.3f} fused and {row['plain']:.3f} plain at width {row['width']}" for row in rows),
        "Pre-LN with the same norms, fused or plain: forward and backward, float32, 4 blocks",
        verdict(good),
        f"at most 1.03 fused ({sum(good[:3])} of 3 widths) and 1.10 plain ({sum(good[3:])} of 3) were to be reached; fused: "
        "headway's norm-add-norm as one operator; plain: nn.LayerNorm",
        "a norm reads and writes the stream once: its share falls like 1 / width",
        rows,
    )
