"""What a session remembers of its runs when their storage is gone."""

from __future__ import annotations

import weakref
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.run import Run

if TYPE_CHECKING:
    from accelerate_hooks.frame import Frame

_RECENT = 64


@dataclass(eq=False)
class Summary:
    """One run in numbers. ``plain_flops`` is what its forwards would have needed without policies,
    ``uncounted`` the forwards and skipped visits whose FLOPs are not known, ``looks`` the forwards
    that were made beside, to learn what blocks hand on: theirs are not saved."""

    number: int
    model: str
    signal: str
    phase: str
    total: int | None = None
    steps: int = 0
    forwards: int = 0
    ambiguous: str | None = None
    host_reads: int = 0
    skipped: int = 0
    plain_flops: int = 0
    saved_flops: int = 0
    uncounted: int = 0
    looks: int = 0
    look_flops: int = 0
    peak_bytes: int = 0


class Tally:
    """Summaries of the latest runs, and sums over all of them."""

    def __init__(self) -> None:
        self.recent: deque[Summary] = deque()
        self.older: Counter[str] = Counter()  # runs by signal that are no longer in `recent`
        self.older_ambiguous: Counter[str] = Counter()
        self.plain_flops = 0
        self.looks = 0
        self.look_flops = 0
        self.uncounted_forwards = 0
        self.peak_bytes = 0
        self._live: weakref.WeakKeyDictionary[Run, Summary] = weakref.WeakKeyDictionary()

    def forward(self, frame: Frame, model: str, plain: int | None) -> None:
        """A forward ended; ``plain`` are the FLOPs of a full one of this shape."""
        step = frame.step
        run = step.run
        summary = self._live.get(run)
        if summary is None:
            summary = Summary(run.number, model, run.signal, step.phase)
            self._live[run] = summary
            self.recent.append(summary)
            if len(self.recent) > _RECENT:
                self._forget(self.recent.popleft())
        summary.signal, summary.ambiguous, summary.total = run.signal, run.ambiguous, run.total
        summary.phase = step.phase
        summary.steps = max(summary.steps, step.index + 1)
        summary.forwards += 1
        summary.host_reads += frame.reads
        summary.skipped += frame.left_out
        beside = frame.looks * (plain or 0)
        for counts in (self, summary):
            counts.looks += frame.looks
            counts.look_flops += beside
        summary.saved_flops += frame.saved_flops - beside
        summary.uncounted += frame.uncounted + (plain is None)
        summary.peak_bytes = run.peak_bytes
        self.peak_bytes = max(self.peak_bytes, run.peak_bytes)
        if plain is None:
            self.uncounted_forwards += 1
        else:
            summary.plain_flops += plain
            self.plain_flops += plain

    def _forget(self, summary: Summary) -> None:
        self.older[summary.signal] += 1
        if summary.ambiguous is not None:
            self.older_ambiguous[summary.ambiguous] += 1

    @property
    def runs(self) -> int:
        return len(self.recent) + self.older.total()

    def signals(self) -> dict[str, int]:
        """How many runs were recognised by each signal."""
        return dict((self.older + Counter(s.signal for s in list(self.recent))).most_common())

    def ambiguous(self) -> dict[str, int]:
        reasons = Counter(s.ambiguous for s in list(self.recent) if s.ambiguous is not None)
        return dict((self.older_ambiguous + reasons).most_common())

    def bytes_now(self) -> int:
        """Bytes that policies hold in runs that are still alive."""
        return sum(run.measure() for run in list(self._live))


opaque_functions(globals())
