"""Claims of "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN" (2024, arXiv 2412.13795), measured
here: perplexity, evenness of gradients, what deep layers do, cost, and the caution of a later study.

The model is that of :mod:`headway.claims.byte_lm`, trained with the same clipping and warm-up under every placement.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import nn

from headway.claims.byte_lm import DEPTH, Run, train_all
from headway.claims.evidence import Evidence, verdict
from headway.claims.native import natively
from headway.claims.peri_ln import best_rate, compared, difference, of, step
from headway.measure import paired
from headway.residual.transformer import TransformerDecoder

KEY = "mix-ln"
LOW, HIGH = 1e-3, 3e-2


def measure(quick: bool) -> list[Evidence]:
    """Every claim; ``quick`` takes about a quarter of a minute on two cores, otherwise under five minutes."""
    steps, warmup, seeds = (80, 20, 1) if quick else (500, 100, 3)
    compare = [
        Run(p, rate, seed, steps, warmup, layers=rate == LOW)
        for rate, seed, p in product((LOW, 3e-3) if quick else (LOW, 3e-3, 1e-2), range(seeds), ("pre", "mix"))
    ]
    looked = [Run("post", LOW, seed, steps, warmup, layers=True) for seed in range(1 if quick else 5)]
    if not quick:
        looked += [Run(p, LOW, seed, steps, warmup, layers=True) for p, seed in product(("pre", "mix"), (3, 4))]
    others = (
        [] if quick else [Run(p, LOW, s, steps, warmup) for p, s in product(("layernorm_scaling", "peri"), range(3))]
    )
    steep = [Run(p, HIGH, seed, 50 if quick else 200) for p, seed in product(("pre", "mix"), range(seeds))]
    runs = [*compare, *looked, *others, *steep]
    results = train_all(runs)
    first, second = len(compare), len(compare) + len(looked)
    third = second + len(others)
    low = [r for r in results[:second] if r["rate"] == LOW]
    return [
        _perplexity(results[:first], results[second:third]),
        _even(low),
        *_deep(low),
        _free(quick),
        _caution(results[third:]),
    ]


def _setting(results: Sequence[dict[str, Any]]) -> str:
    seeds = len({r["seed"] for r in results})
    return f"{DEPTH} blocks, d=64, {results[0]['steps']} steps of which {results[0]['warmup']} warm-up, {seeds} seed(s)"


def _perplexity(results: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> Evidence:
    (pre_rate, pre), (mix_rate, mix) = best_rate(results, "pre"), best_rate(results, "mix")
    gap, error = difference(mix, pre)
    by_rate = ", ".join(
        f"{_mean(results, 'pre', rate):.3f} / {_mean(results, 'mix', rate):.3f} at {rate:g}"
        for rate in sorted({r["rate"] for r in results})
    )
    beside = "".join(
        f", {name} {_mean(others, name, LOW):.3f}" for name in dict.fromkeys(r["placement"] for r in others)
    )
    return Evidence(
        KEY,
        "the perplexity is lower than Pre-LN's",
        "130M parameters: 26.07 against 26.73; 250M: 21.39 against 21.92",
        f"perplexity a byte at the best rate of each: {_perplexity_of(mix):.3f} at {mix_rate:g} (mix), {_perplexity_of(pre):.3f} at "
        f"{pre_rate:g} (pre); held-out nats a byte, pre / mix: {by_rate}" + (f"; beside them at {LOW:g}{beside}" if beside else ""),
        "Pre-LN, same rates, clipping, warm-up, start and bytes",
        compared(mix, pre),
        f"Mix-LN is {abs(gap):.3f} nats {'ahead' if gap > 0 else 'behind'}, standard error {error:.3f}; {_setting(results)}; "
        "the paper's gain is one of 130M parameters and 2 billion tokens",
        rows=[
            {"placement": r["placement"], "rate": r["rate"], "seed": r["seed"], "held out": r["held_out"], "largest": r["largest"]}
            for r in [*results, *others]
        ],
    )  # fmt: skip


def _mean(results: Sequence[dict[str, Any]], placement: str, rate: float) -> float:
    return statistics.fmean(r["held_out"] for r in of(results, placement=placement, rate=rate))


def _perplexity_of(losses: Sequence[float]) -> float:
    return math.exp(statistics.fmean(losses))


def _even(results: Sequence[dict[str, Any]]) -> Evidence:
    rows = [
        {"placement": r["placement"], "seed": r["seed"], "max / min": max(r["layer_gradients"]) / max(min(r["layer_gradients"]), 1e-30),
         "by layer": r["layer_gradients"]}
        for r in results
    ]  # fmt: skip
    spread = {p: [row["max / min"] for row in rows if row["placement"] == p] for p in ("pre", "post", "mix")}
    middle = {p: statistics.median(values) for p, values in spread.items()}
    seeds = len(spread["mix"])
    shorter = sum(m < p for m, p in zip(spread["mix"], spread["pre"], strict=True))
    return Evidence(
        KEY,
        "gradient norms are more even over the layers",
        "qualitative (figure)",
        "largest / smallest gradient norm of a layer after training: "
        + ", ".join(f"{p} {middle[p]:.3g} ({min(v):.3g} to {max(v):.3g})" for p, v in spread.items()),
        "Pre-LN and Post-LN",
        verdict([middle["mix"] < middle["pre"], middle["mix"] < middle["post"], shorter == seeds]),
        f"more even than Pre-LN in {shorter} of {seeds} seed(s), {middle['post'] / middle['mix']:.3g} times more even than Post-LN; rate "
        f"{LOW:g}, {_setting(results)}",
        rows=rows,
    )  # fmt: skip


def _deep(results: Sequence[dict[str, Any]]) -> list[Evidence]:
    found = []
    half = slice(DEPTH // 2, None)
    for field, claim, unit in (
        ("angles", "deep layers turn the representation further", "angular distance over the deep half"),
        ("drops", "deep layers are missed more when left out", "rise of the held-out loss over the deep half"),
    ):
        rows = []
        for pre, mix in zip(of(results, placement="pre"), of(results, placement="mix"), strict=True):
            a, b = (statistics.fmean(r[field][half]) for r in (pre, mix))
            rows.append(
                {
                    "seed": pre["seed"],
                    "pre": a,
                    "mix": b,
                    "mix / pre": b / a,
                    "pre by layer": pre[field],
                    "mix by layer": mix[field],
                }
            )
        pre, mix, ratio = (statistics.median(row[name] for row in rows) for name in ("pre", "mix", "mix / pre"))
        above = sum(row["mix"] > row["pre"] for row in rows)
        found.append(
            Evidence(
                KEY,
                claim,
                "larger in the deep half (figure)",
                f"{unit}, mean of a layer: {mix:.3g} (mix), {pre:.3g} (pre), ratio {ratio:.2f}",
                "Pre-LN, same start, same bytes",
                verdict([mix > pre, above == len(rows)]),
                f"more than Pre-LN in {above} of {len(rows)} seed(s); "
                f"blocks {DEPTH // 2} to {DEPTH - 1}, rate {LOW:g}, {_setting(results)}",
                rows=rows,
            )
        )  # fmt: skip
    return found


def _free(quick: bool) -> Evidence:
    rows = []
    for dim in (64, 192, 384):
        tokens = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(0))
        row: dict[str, Any] = {"width": dim}
        for name, norm in (("plain", nn.LayerNorm), ("fused", "layernorm")):
            pre, mix = (TransformerDecoder(256, dim, 4, dim // 32, p, norm, max_length=32) for p in ("pre", "mix"))
            pre, mix = natively(pre), natively(mix)
            times = paired(step(mix, tokens), step(pre, tokens), 0.4 if quick else 4.0)
            more = sum(p.numel() for p in mix.parameters()) - sum(p.numel() for p in pre.parameters())
            row |= {
                name: 1 / times.ratio,
                f"{name} low": 1 / times.high,
                f"{name} high": 1 / times.low,
                "more parameters": more,
            }
        rows.append(row)
    good = [row["more parameters"] == 0 for row in rows] + [abs(row["plain"] - 1) <= 0.02 for row in rows]
    return Evidence(
        KEY,
        "it is free: the same parameters, the same operations",
        "same parameters, same FLOPs",
        "step time mix / pre: "
        + ", ".join(f"{row['plain']:.3f} at width {row['width']}" for row in rows)
        + f"; {rows[0]['more parameters']} parameters more",
        "Pre-LN with nn.LayerNorm, forward and backward, float32, 4 blocks",
        verdict(good),
        f"within 2 % at {sum(good[3:])} of 3 widths; with headway's fused norms "
        + ", ".join(f"{row['fused']:.3f}" for row in rows)
        + ", where Pre-LN's addition and norm are one operator",
        rows=rows,
    )


def _caution(results: Sequence[dict[str, Any]]) -> Evidence:
    rows = [
        {
            "placement": r["placement"],
            "seed": r["seed"],
            "last losses": statistics.fmean(r["losses"][-20:]),
            "held out": r["held_out"],
        }
        for r in results
    ]
    loss = {p: statistics.fmean(row["last losses"] for row in rows if row["placement"] == p) for p in ("pre", "mix")}
    worse = [
        m["last losses"] > p["last losses"]
        for p, m in zip(*(of(rows, placement=p) for p in ("pre", "mix")), strict=True)
    ]
    return Evidence(
        KEY,
        "caution: it breaks where Pre-LN still learns",
        "a later study (arXiv 2502.05795) lists perplexity 1363 and 1415 at 350M and 1B against 19.6 and 17.0 for Pre-LN",
        f"training loss in the end at rate {HIGH:g}: {loss['mix']:.3f} (mix), {loss['pre']:.3f} (pre)",
        "Pre-LN at the same rate, same start, same bytes",
        verdict([all(worse), loss["mix"] > loss["pre"] + 0.3]),
        f"worse in {sum(worse)} of {len(worse)} seed(s), by {loss['mix'] - loss['pre']:.2f} nats (0.3 is called broken); guessing by "
        f"frequency alone gives about 3.2; {_setting(results)}",
        rows=rows,
    )
