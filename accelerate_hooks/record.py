"""What a session knows of one site: counters, costs, and the form of its output."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

from accelerate_hooks.form import Form
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.reading import Reading
from accelerate_hooks.site import Site

if TYPE_CHECKING:
    import torch

    from accelerate_hooks.call import Call

_READINGS = 32
_COUNTERS = (
    "computed", "skipped", "partly", "rows_left_out", "saved_flops", "uncounted", "seconds",
    "timed", "_rough",
)  # fmt: skip


class Record:
    """Counters and costs of a site over a session, and the form of its output. Nothing of a run is
    held here."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.computed = 0
        self.skipped = 0
        self.partly = 0  # computed visits of which some rows, or a part of the work, were left out
        self.rows_left_out = 0.0
        self.saved_flops = 0
        self.uncounted = 0  # skipped visits whose FLOPs are not known
        self.seconds = 0.0
        self.timed = 0
        self._rough = False
        self.events: deque[tuple[Any, Any]] = deque(maxlen=32)
        self.flops: dict[tuple[int, ...], int] = {}
        self.reasons: dict[str, int] = {}
        self.form = Form()
        self.readings: dict[Any, Reading] = {}
        self.facts: dict[Any, Any] = {}  # what policies found out about the site

    def counters(self) -> dict[str, Any]:
        """What counts visits, to be restored where a forward is begun again."""
        return {name: getattr(self, name) for name in _COUNTERS} | {"reasons": dict(self.reasons)}

    def restore(self, counters: dict[str, Any] | None) -> None:
        for name, value in (counters or Record(self.site).counters()).items():
            setattr(self, name, dict(value) if name == "reasons" else value)

    def unskippable(self, call: Call, given: bool = True) -> str | None:
        """Why the site cannot be left out now (``given``: a value for x is there), or None."""
        return self.form.unknown(call, given)

    def fill(
        self, call: Call, x: torch.Tensor, context: torch.Tensor | None, given: bool = True
    ) -> Any:
        """An output of the known form with these values."""
        return self.form.fill(call, x, context, given)

    def remember(self, key: Any, reading: Reading) -> None:
        """How the arguments are read under ``key`` (shapes); the oldest are forgotten."""
        if len(self.readings) >= _READINGS:
            del self.readings[next(iter(self.readings))]
        self.readings[key] = reading

    # -- costs -------------------------------------------------------------------------------

    def count(self, took: Any, rough: bool = False, partial: bool = False) -> None:
        """A visit was computed; ``took`` are seconds, or a pair of events on an accelerator. Rough
        times (while FLOPs were counted) only stand in until there are others, partial ones are
        not those of a visit."""
        self.computed += 1
        if isinstance(took, tuple):
            self.events.append(took)
            return
        if partial or (rough and not self._rough and self.timed):
            return
        if self._rough and not rough:
            self.seconds, self.timed = 0.0, 0
        self._rough = rough
        self.seconds += took
        self.timed += 1

    def mean_seconds(self) -> float:
        """Mean time of a computed visit: host clock on a CPU, events on an accelerator."""
        if self.events:
            self.events[-1][1].synchronize()
            return sum(a.elapsed_time(b) for a, b in self.events) / len(self.events) / 1e3
        return self.seconds / self.timed if self.timed else 0.0

    def flops_of(self, shape: tuple[int, ...]) -> float | None:
        """The operations of a whole visit; where none of this shape was counted those of the
        nearest one, in proportion to the numbers that go in."""
        if shape in self.flops or not self.flops:
            return self.flops.get(shape)
        size = math.prod(shape)
        near = min(self.flops, key=lambda other: abs(math.prod(other) - size))
        return self.flops[near] * size / max(1, math.prod(near))

    def count_skip(self, shape: tuple[int, ...], share: float = 1.0) -> int | None:
        """Count a visit (or a share of its rows) as left out; the FLOPs saved, None where a
        computed visit of this shape was never counted."""
        if share == 1.0:
            self.skipped += 1
        else:
            self.partly += 1
            self.rows_left_out += share
        flops = self.flops.get(shape)
        if flops is None:
            self.uncounted += 1
            return None
        saved = round(flops * share)
        self.saved_flops += saved
        return saved


opaque_functions(globals())
