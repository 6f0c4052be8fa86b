"""How long a run lasts: a number of steps, or seconds of training."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_UNITS = {"s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "m": 60.0, "min": 60.0, "minute": 60.0, "minutes": 60.0}
_UNITS |= {"h": 3600.0, "hour": 3600.0, "hours": 3600.0}


@dataclass(frozen=True)
class Budget:
    """``amount`` of ``unit``. Seconds count training steps alone: neither evaluation, nor probing, nor saving."""

    amount: float
    unit: Literal["steps", "seconds"]

    @classmethod
    def of(cls, what: int | str | Budget) -> Budget:
        """From ``200``, ``"200"``, ``"200 steps"``, ``"60s"``, ``"2 min"``.

        Raises:
            ValueError: none of these, or nothing to do.
        """
        if isinstance(what, Budget):
            return what
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(what).lower())
        amount, unit = (float(match[1]), match[2]) if match else (0.0, "?")
        if unit in ("", "step", "steps") and amount >= 1 and amount == int(amount):
            return cls(int(amount), "steps")
        if unit in _UNITS and amount > 0:
            return cls(amount * _UNITS[unit], "seconds")
        raise ValueError(
            f'a budget is a number of steps or a time, such as 200, "200 steps", "60s" or "2 min", not {what!r}'
        )

    def progress(self, step: int, seconds: float) -> float:
        """The share that is used after ``step`` steps and ``seconds`` of training, 0 to 1."""
        return min(1.0, (step if self.unit == "steps" else seconds) / self.amount)

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"
