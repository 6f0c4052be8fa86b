"""What "Transformers Can Do Bayesian Inference" (2022, arXiv 2112.10510) claims, measured here on one thread.

The networks are trained here and now, on far fewer data sets than the paper's 500,000 to 4,000,000.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F

from headway.claims.evidence import Evidence, verdict
from headway.claims.pfn_hyper import hyper
from headway.claims.pfn_tables import tables
from headway.claims.pfn_training import FIXED, KEY, normal_nll, seeded, trained
from headway.measure import paired
from headway.tabular.pfn.bars import BarDistribution
from headway.tabular.pfn.heads import BernoulliHead
from headway.tabular.pfn.network import PFN, _with_own_column, attend_and_self


def measure(quick: bool) -> list[Evidence]:
    """Every claim; ``quick`` takes under half a minute, otherwise a few minutes."""
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore")
            return [*_mimics(quick), *hyper(quick), *tables(quick), *_queries(quick)]
    finally:
        torch.set_num_threads(threads)


def tail_cost(bars: int) -> float:
    """KL(N(0, 1), q) in nats of the best q with bars of equal mass and half-normal tails."""
    y = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    head = BarDistribution.from_samples(y, bars)
    return float((head.nll(torch.zeros(bars).double(), y) - normal_nll(y, torch.zeros(1), torch.ones(1))).mean())


@torch.no_grad()
def _mimics(quick: bool) -> list[Evidence]:
    steps, batch, queries = (250, 32, 24) if quick else (2000, 32, 32)
    borders = torch.linspace(-5, 5, 201) * math.sqrt(FIXED.amplitude + FIXED.noise)
    shape = (48, 2) if quick else (64, 4)
    model, seconds = trained(FIXED, 1, borders, shape, steps, batch, 25, queries, 3e-3)
    rows = []
    for n in (3, 10, 20):
        x, y = FIXED(4000, n + 1, 1, seeded(n))
        exact = normal_nll(y[:, n:], *FIXED.posterior(x[:, :n], y[:, :n], x[:, n:])).mean()
        nll = model.head.nll(model(x[:, :n], y[:, :n], x[:, n:]), y[:, n:]).mean()
        rows.append({"n": n, "nll": float(nll), "exact": float(exact), "gap": float(nll - exact)})
    setting = f"1-D RBF, noise variance 0.05, {steps * batch:,} data sets, {seconds:.0f} s of training, 200 bars of equal width"
    good = [row["gap"] < 0.03 for row in rows]
    mimics = Evidence(
        KEY, "a trained network mimics the exact posterior of a Gaussian process", "NLL curves next to each other up to n = 2000, 5-D",
        ", ".join(f"{r['gap']:.3f} nats above the exact NLL at n = {r['n']}" for r in rows), "the exact posterior, 4,000 data sets each",
        verdict(good), f"{sum(good)} of {len(good)} gaps below 0.03; {setting}",
        "bars of equal mass cannot come nearer to N(0, 1) than "
        f"{tail_cost(100):.3f} (100 bars) or {tail_cost(1000):.4f} nats (1000): the half-normal tails are too wide",
        rows,
    )  # fmt: skip
    x, y = FIXED(2000, 11, 1, seeded(99))
    u = model.head.cdf(model(x[:, :10], y[:, :10], x[:, 10:]), y[:, 10:]).flatten().sort().values
    distance = float((u - (torch.arange(2000) + 0.5) / 2000).abs().max() + 0.5 / 2000)
    bound = 1.628 / math.sqrt(2000)
    calibrated = Evidence(
        KEY, "the predictions are calibrated", "qualitative", f"Kolmogorov-Smirnov distance {distance:.3f}",
        f"the uniform distribution of the probability integral transform, 2,000 data sets, n = 10 (p = 0.01 at {bound:.3f})",
        verdict([distance < bound]), f"asked: below {bound:.3f}; {setting}", rows=[{"distance": distance, "bound": bound}],
    )  # fmt: skip
    return [mimics, calibrated]


@torch.no_grad()
def _queries(quick: bool) -> list[Evidence]:
    budget, n, heads, d = (0.5 if quick else 2.0), 1000, 4, 64
    q, k, v = (torch.randn(1, heads, size, d) for size in (4000, n, n))
    keys, values = _with_own_column(k, v)
    own_k, own_v = torch.randn_like(q), torch.randn_like(q)
    # contiguous, as the plain call gets them
    qs, ks, vs = (part[:, :, :1000].contiguous() for part in (q, own_k, own_v))
    plain = paired(
        lambda: attend_and_self(q, own_k, own_v, keys, values), lambda: F.scaled_dot_product_attention(q, k, v), budget
    )
    four = paired(
        lambda: attend_and_self(qs, ks, vs, keys, values),
        lambda: attend_and_self(q, own_k, own_v, keys, values),
        budget,
    )
    torch.manual_seed(0)
    model = PFN(5, BernoulliHead(), 256, 3).eval()
    x, y, one = torch.rand(1, n, 5), torch.zeros(1, n), torch.rand(1, 1, 5)
    context = model.encode_context(x, y)
    cached = paired(lambda: model.query(context, one), lambda: model(x, y, one), budget)
    overhead = 1 / plain.ratio - 1
    good = [overhead <= 0.1, 3.6 <= four.ratio <= 4.4, cached.ratio >= 3]
    return [Evidence(
        KEY, "queries cost O(n) each: no (N, N) mask, and a context is encoded once", "no number; the aims are 10 % and 3 times",
        f"{100 * overhead:+.0f} % over one plain attention call, {four.ratio:.2f} times the time for 4 times the queries, "
        f"{cached.ratio:.0f} times faster with a kept context for one query",
        f"F.scaled_dot_product_attention of 4,000 queries and {n} keys, {heads} heads of {d}; a network of width 256 and 3 layers",
        verdict(good), "asked: at most 10 % over, 3.6 to 4.4, and 3",
        rows=[{"overhead": overhead, "four_times_the_queries": four.ratio, "cached": cached.ratio}],
    )]  # fmt: skip
