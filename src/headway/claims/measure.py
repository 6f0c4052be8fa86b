"""Runs the claims of systems on this machine: ``hw.claim("peri-ln")`` and ``headway claims``."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from headway.claims.evidence import Evidence


@dataclass(frozen=True)
class System:
    """The claims of one system, measured.

    Attributes:
        key: as in the catalogue.
        evidence: one entry a claim.
        seconds: how long all of them took.
        error: why they could not be measured, empty if they were.
    """

    key: str
    evidence: list[Evidence] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "key": self.key,
            "seconds": round(self.seconds, 2),
            "error": self.error,
            "claims": [e.to_dict() for e in self.evidence],
        }


def measured_keys(keys: Iterable[str]) -> list[str]:
    """Those of the catalogue's keys whose claims can be measured."""
    return [key for key in keys if importlib.util.find_spec(f"headway.claims.{key.replace('-', '_')}") is not None]


def claim(key: str, quick: bool = False) -> list[Evidence]:
    """Measures every claim of one system here and now.

    Args:
        key: as in the catalogue ("beyond-batchnorm").
        quick: at most about half a minute, with smaller sizes and fewer seeds; otherwise at most about five minutes.

    Raises:
        ValueError: there is no such system, or its claims cannot be measured yet.
    """
    if not measured_keys([key]):
        raise ValueError(
            f"no claims are measured for {key!r}; `headway claims --list` names the systems that have some"
        )
    return importlib.import_module(f"headway.claims.{key.replace('-', '_')}").measure(quick)


def measure_all(keys: Iterable[str], quick: bool = False) -> Iterator[System]:
    """Measures the claims of several systems one after the other; one that fails does not take the others with it."""
    for key in keys:
        start = time.perf_counter()
        try:
            evidence, error = claim(key, quick), ""
        except Exception as failure:
            evidence, error = [], f"{type(failure).__name__}: {failure}"
        yield System(key, evidence, time.perf_counter() - start, error)
