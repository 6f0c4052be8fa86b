# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Writes ``golden_norms.json``: EvoNorm, EstBN, BCN, weight standardisation and AdaB2N as their papers print them, in 40 digits.

    python tests/golden_norms.py

Numpy arrays of arbitrary-precision numbers and nothing of torch or headway; every gradient is a symmetric difference quotient, so no
derivation is shared with what is tested. Statistics that a paper takes out of the gradient are taken at the point itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np

mpmath.mp.dps = 40
FILE = Path(__file__).with_suffix(".json")
EPS, STEP = mpmath.mpf("1e-5"), mpmath.mpf("1e-14")
Arrays = dict[str, Any]
sqrt, exp = np.frompyfunc(mpmath.sqrt, 1, 1), np.frompyfunc(mpmath.exp, 1, 1)


def numbers(seed: int, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Any:
    """Numbers of three digits, exact in the file."""
    drawn = np.random.default_rng(seed).normal(offset, scale, shape)
    return np.vectorize(lambda value: mpmath.mpf(f"{value:.3f}"), otypes=[object])(drawn)


def gradients(loss: Callable[[Arrays], Any], at: Arrays) -> Arrays:
    """The slope of a loss in every entry of every array."""
    found: Arrays = {}
    for name, array in at.items():
        slope = np.empty(array.shape, object)
        for place in np.ndindex(array.shape):
            sides = []
            for step in (STEP, -STEP):
                moved = array.copy()
                moved[place] += step
                sides.append(loss({**at, name: moved}))
            slope[place] = (sides[0] - sides[1]) / (2 * STEP)
        found[name] = slope
    return found


def of_channels(vector: Any) -> Any:
    return np.asarray(vector, object).reshape(1, -1, 1, 1)


def mean(x: Any, axes: tuple[int, ...]) -> Any:
    return x.sum(axes, keepdims=True) / int(np.prod([x.shape[axis] for axis in axes]))


def variance(x: Any, axes: tuple[int, ...]) -> Any:
    return mean((x - mean(x, axes)) ** 2, axes)


# EvoNorm, arXiv 2004.02967, table 2


def evo(kind: str, given: Arrays, groups: int = 2, running: Any = None) -> Any:
    x, gamma, beta, v = given["x"], *(of_channels(given[name]) for name in ("weight", "bias", "v"))
    if kind in ("B0", "B1", "B2"):
        left = sqrt(variance(x, (0, 2, 3)) + EPS) if running is None else sqrt(of_channels(running) + EPS)
        right = {
            "B0": v * x + sqrt(variance(x, (2, 3)) + EPS),
            "B1": (x + 1) * sqrt(mean(x * x, (2, 3)) + EPS),
            "B2": sqrt(mean(x * x, (2, 3)) + EPS) - x,
        }[kind]
        return gamma * x / np.maximum(left + 0 * x, right) + beta
    parts = x.reshape(len(x), groups, -1)
    square = mean(parts * parts, (2,)) if kind == "S2" else variance(parts, (2,))
    std = (sqrt(square + EPS) + 0 * parts).reshape(x.shape)
    slope = v if kind == "S0" else 1
    return gamma * x / (1 + exp(-slope * x)) / std + beta


def evo_cases() -> Arrays:
    given = {
        "x": numbers(0, 2, 4, 2, 3, scale=1.5, offset=0.3),
        "weight": numbers(1, 4, offset=1),
        "bias": numbers(2, 4),
        "v": numbers(3, 4),
    }
    gy, cases = numbers(4, 2, 4, 2, 3), {}
    for kind, groups in (("B0", 0), ("B1", 0), ("B2", 0), ("S0", 2), ("S1", 2), ("S2", 2), ("S0", 1)):
        slopes = gradients(lambda at, k=kind, g=groups: (gy * evo(k, at, g)).sum(), given)
        if kind not in ("B0", "S0"):
            del slopes["v"]
        case = {"kind": kind, "groups": groups, "y": evo(kind, given, groups), "grads": slopes}
        if not groups:
            unbiased = variance(given["x"], (0, 2, 3)).reshape(-1) * 12 / 11
            running = (9 + unbiased) / 10
            case |= {"running_var": running, "evaluation": evo(kind, given, groups, running)}
        cases[f"{kind} {groups}".rstrip(" 0")] = case
    return {"given": given, "gy": gy, "cases": cases}


# Batch-Channel Normalization, arXiv 1903.10520 and 1911.09738


def scaled(x: Any, centre: Any, square: Any, weight: Any, bias: Any) -> Any:
    return of_channels(weight) * (x - of_channels(centre)) / sqrt(of_channels(square) + EPS) + of_channels(bias)


def moved_estimates(x: Any, centre: Any, square: Any, speed: Any) -> tuple[Any, Any]:
    around = mean((x - of_channels(centre)) ** 2, (0, 2, 3)).reshape(-1)
    return centre + speed * (mean(x, (0, 2, 3)).reshape(-1) - centre), square + speed * (around - square)


def group_stage(z: Any, gain: Any, offset: Any) -> Any:
    parts = z.reshape(len(z), len(gain), -1)
    parts = (parts - mean(parts, (2,))) / sqrt(variance(parts, (2,)) + EPS)
    return (parts * gain.reshape(1, -1, 1) + offset.reshape(1, -1, 1)).reshape(z.shape)


def start(channels: int) -> tuple[Any, Any]:
    return tuple(np.array([mpmath.mpf(value)] * channels, object) for value in (0, 1))  # type: ignore[return-value]


def batch_channel(stages: int, estimate: bool, steps: int) -> Arrays:
    """``stages`` 1 is the estimated batch norm alone."""
    speed, (centre, square), rows = mpmath.mpf("0.3"), start(4), []
    own = {"weight": numbers(10, 4, offset=1), "bias": numbers(11, 4)}
    if stages == 2:
        own |= {"group_weight": numbers(12, 2, offset=1), "group_bias": numbers(13, 2)}
    for step in range(steps):
        x, gy = numbers(20 + step, 2, 4, 2, 1, scale=2, offset=1), numbers(40 + step, 2, 4, 2, 1)
        if estimate:
            centre, square = moved_estimates(x, centre, square, speed)
        else:
            centre = (9 * centre + mean(x, (0, 2, 3)).reshape(-1)) / 10
            square = (9 * square + variance(x, (0, 2, 3)).reshape(-1) * 4 / 3) / 10
        held = centre, square

        def output(at: Arrays, held: Any = held) -> Any:
            here = held if estimate else (mean(at["x"], (0, 2, 3)), variance(at["x"], (0, 2, 3)))
            z = scaled(at["x"], *here, at["weight"], at["bias"])
            return group_stage(z, at["group_weight"], at["group_bias"]) if stages == 2 else z

        at = {"x": x, **own}
        slopes = gradients(lambda at, gy=gy, f=output: (gy * f(at)).sum(), at)
        rows.append({"x": x, "gy": gy, "y": output(at), "grads": slopes, "running_mean": centre, "running_var": square})
    return {"given": own, "moving_speed": speed, "steps": rows}


def weights() -> Arrays:
    """The two released forms of weight standardisation, the TensorFlow text, and timm's (eps 1e-6)."""
    v, g, cases = numbers(60, 3, 2, 2, 2, scale=0.05, offset=0.02), numbers(61, 3, 2, 2, 2), {}
    forms = {
        "a": (True, "std", "1e-5"),
        "b": (True, "var", "1e-5"),
        "tf": (False, "std", "1e-5"),
        "timm": (False, "var", "1e-6"),
    }
    for name, (unbiased, mode, eps) in forms.items():

        def standardised(at: Arrays, unbiased: bool = unbiased, mode: str = mode, eps: str = eps) -> Any:
            rows = at["v"].reshape(3, -1)
            var = variance(rows, (1,)) * (mpmath.mpf(8) / 7 if unbiased else 1)
            deviation = sqrt(var + mpmath.mpf(eps)) if mode == "var" else sqrt(var) + mpmath.mpf(eps)
            return ((rows - mean(rows, (1,))) / deviation).reshape(at["v"].shape)

        slope = gradients(lambda at, f=standardised: (g * f(at)).sum(), {"v": v})["v"]
        settings = {"unbiased": unbiased, "eps_mode": mode, "eps": float(eps)}
        cases[name] = {"settings": settings, "w": standardised({"v": v}), "grad": slope}
    return {"v": v, "g": g, "cases": cases}


# AdaB2N, arXiv 2310.08855

# (current task, tasks of the samples): one task, two, three, and three of which the middle one is absent
STREAM = [(0, [0, 0, 0]), (1, [1, 0, 1]), (2, [2, 0, 1]), (2, [2, 0, 2])]


def task_statistics(x: Any, ids: list[int], cur: int, omega: Any) -> tuple[Any, Any]:
    if cur == 0:
        return mean(x, (0, 2, 3)).reshape(-1), variance(x, (0, 2, 3)).reshape(-1)
    posterior = [mpmath.exp(omega[j]) + ids.count(j) for j in range(cur + 1)]
    share = [posterior[k] / sum(posterior) / ids.count(k) for k in ids]
    centre = sum(w * mean(x[i], (1, 2)).reshape(-1) for i, w in enumerate(share))
    away = (x - of_channels(centre)) ** 2
    return centre, sum(w * mean(away[i], (1, 2)).reshape(-1) for i, w in enumerate(share))


def balanced(kappa: str) -> Arrays:
    own = {"weight": numbers(70, 2, offset=1), "bias": numbers(71, 2), "task_weight": numbers(72, 3, scale=0.7)}
    momentum, power, strength = mpmath.mpf("0.1"), mpmath.mpf(kappa), mpmath.mpf("0.3")
    running, eta, rows = start(2), None, []
    for step, (cur, ids) in enumerate(STREAM):
        x, gy = numbers(80 + step, 3, 2, 2, 1, scale=2, offset=1), numbers(90 + step, 3, 2, 2, 1)
        eta = momentum**power if eta is None else eta / (eta + (1 - momentum) ** power)
        now = task_statistics(x, ids, cur, own["task_weight"])
        running = tuple(old + eta * (new - old) for old, new in zip(running, now, strict=True))
        held = running

        def penalty(at: Arrays, held: Any = held, ids: list[int] = ids, cur: int = cur) -> Any:
            found = task_statistics(at["x"], ids, cur, at["task_weight"])
            return sum(((new - old) ** 2).sum() / 2 for new, old in zip(found, held, strict=True))

        def output(at: Arrays, ids: list[int] = ids, cur: int = cur) -> Any:
            return scaled(at["x"], *task_statistics(at["x"], ids, cur, at["task_weight"]), at["weight"], at["bias"])

        at = {"x": x, **own}
        slopes = gradients(lambda at, gy=gy, f=output, p=penalty: (gy * f(at)).sum() + strength * p(at), at)
        rows.append(
            {"cur": cur, "ids": ids, "x": x, "gy": gy, "y": output(at), "grads": slopes, "penalty": penalty(at), "eta": eta,
             "running_mean": running[0], "running_var": running[1]}
        )  # fmt: skip
    return {"kappa": float(kappa), "strength": strength, "given": own, "steps": rows}


CASES: dict[str, Callable[[], Arrays]] = {
    "evo": evo_cases,
    "estbn": lambda: batch_channel(1, True, 5),
    "bcn batch": lambda: batch_channel(2, False, 3),
    "bcn micro": lambda: batch_channel(2, True, 3),
    "ws": weights,
    "ada-b2n 1": lambda: balanced("1"),
    "ada-b2n 0.4": lambda: balanced("0.4"),
    "ada-b2n 0": lambda: balanced("0"),
}


def plain(value: Any) -> Any:
    """Plain data with 13 digits."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(part) for part in value]
    return float(mpmath.nstr(value, 13)) if isinstance(value, mpmath.mpf) else value


if __name__ == "__main__":
    lines = (f"{json.dumps(name)}:{json.dumps(plain(make()), separators=(',', ':'))}" for name, make in CASES.items())
    FILE.write_text("{" + ",\n".join(lines) + "}\n")
