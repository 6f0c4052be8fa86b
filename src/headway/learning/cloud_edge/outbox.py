"""What a device has chosen and not yet sent: bounded, the oldest first, and the oldest dropped where it is full."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from headway.learning.cloud_edge.affine import Samples, count, rows


@dataclass
class Parcel:
    """Samples that travel in one message, with its number and bytes once it was sent for the first time."""

    samples: Samples
    sequence: int | None = None
    body: bytes | None = None

    def halves(self) -> list[Parcel]:
        """The same samples as two messages."""
        middle = count(self.samples) // 2
        return [Parcel(rows(self.samples, slice(None, middle))), Parcel(rows(self.samples, slice(middle, None)))]


class Outbox:
    """A queue of parcels that holds at most ``capacity`` samples. What was taken out to be sent no longer counts.

    Attributes:
        dropped: samples that had to make room.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"queue must hold at least one sample; it is {capacity}")
        self.capacity, self.dropped = capacity, 0
        self._parcels: deque[Parcel] = deque()
        self._waiting = 0
        self._news = threading.Condition()

    def __len__(self) -> int:
        return self._waiting

    def put(self, samples: Samples) -> None:
        """Adds a parcel; never waits."""
        with self._news:
            excess = count(samples) - self.capacity
            if excess > 0:
                samples = rows(samples, slice(excess, None))
                self.dropped += excess
            self._parcels.append(Parcel(samples))
            self._waiting += count(samples)
            while self._waiting > self.capacity:
                oldest = count(self._parcels.popleft().samples)
                self._waiting -= oldest
                self.dropped += oldest
            self._news.notify()

    def take(self) -> Parcel | None:
        """The oldest parcel, or None."""
        with self._news:
            if not self._parcels:
                return None
            parcel = self._parcels.popleft()
            self._waiting -= count(parcel.samples)
            return parcel

    def give_back(self, parcels: list[Parcel]) -> None:
        """Puts parcels before all others."""
        with self._news:
            self._parcels.extendleft(reversed(parcels))
            self._waiting += sum(count(parcel.samples) for parcel in parcels)

    def wait(self, seconds: float) -> None:
        """Returns once there is a parcel, or after a while, or when woken."""
        with self._news:
            if not self._parcels:
                self._news.wait(seconds)

    def wake(self) -> None:
        """Ends every wait."""
        with self._news:
            self._news.notify_all()
