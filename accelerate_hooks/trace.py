"""The decisions of runs as data."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

CAPACITY = 65536


class Entry(NamedTuple):
    """One decision: ``action`` is ``run``, ``skip``, ``rows``, ``note`` or ``audit`` (what a
    skipped visit was really off by; the number comes when a report is made)."""

    run: int
    step: int
    branch: str
    site: str
    action: str
    reason: str | None = None
    numbers: dict[str, float] | None = None


class Trace:
    """A ring of the latest entries (kept as plain tuples: a visit makes one)."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self._entries: deque[tuple[Any, ...]] = deque(maxlen=capacity)
        self.add = self._entries.append

    def __iter__(self) -> Iterator[Entry]:
        return map(Entry._make, list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def cut(self, length: int) -> None:
        """Forget what came after the first ``length`` entries (a full ring is left as it is)."""
        while length < len(self._entries) < self.capacity:
            self._entries.pop()

    def of(self, run: int) -> list[Entry]:
        return [entry for entry in self if entry.run == run]

    def runs(self) -> list[int]:
        return sorted({entry.run for entry in self})

    def to_list(self) -> list[dict[str, Any]]:
        return [entry._asdict() for entry in self]

    def __repr__(self) -> str:
        return f"<trace of {len(self)} decisions in {len(self.runs())} runs>"
