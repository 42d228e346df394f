"""What a pipeline's scheduler told, and the run that the user declared."""

from __future__ import annotations

import contextvars
import itertools
import math
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate_hooks.held import Held
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.own import Own
from accelerate_hooks.run import Run

if TYPE_CHECKING:
    from accelerate_hooks.clock import Clock


_ROUNDING = 1e-3  # of the mean distance between two levels


@dataclass(eq=False)
class Schedule:
    """What a hooked scheduler told in this context: a run from ``set_timesteps`` to the last
    ``step``. ``turns`` where its timesteps do not all go one way, ``entry`` is where a loop entered
    them that did not tell the scheduler so, ``count`` how many steps the pipeline says that it
    makes. ``one_way`` unless its noise levels go to and fro: then neither they nor its timesteps
    are a clock."""

    run: Run
    timesteps: Any
    scheduler: weakref.ref[Any]
    noise: list[tuple[float, float]] = field(default_factory=list)
    prediction: str | None = None
    strides: list[float] = field(default_factory=list)
    turns: bool = False
    one_way: bool = True
    index: int = 0
    entry: int | None = None
    count: int | None = None

    @property
    def begin(self) -> int:
        """Where the loop enters the schedule: as the scheduler was told, else as its first timestep
        shows, else at the start."""
        told = getattr(self.scheduler(), "begin_index", None)
        return (self.entry or 0) if told is None else told

    def left(self) -> int:
        """Steps of this run."""
        rest = len(self.timesteps) - self.begin
        return rest if self.count is None else min(self.count, rest)

    def learn_noise(self, levels: list[tuple[float, float]]) -> None:
        """(alpha, sigma) by step. Two in a row that differ by rounding alone are one level (the
        second evaluation of a step of KDPM2Ancestral stands where the next step does, almost):
        a predictor divides by their distance."""
        ratios = [_log_ratio(*level) for level in levels]
        gaps = [0.0 if a == b else b - a for a, b in itertools.pairwise(ratios)]
        finite = [abs(gap) for gap in gaps if math.isfinite(gap)]
        least = _ROUNDING * sum(finite) / max(1, len(finite))
        self.noise = levels[:1]
        for level, gap in zip(levels[1:], gaps, strict=True):
            self.noise.append(self.noise[-1] if abs(gap) < least else level)
        self.one_way = all(g <= least for g in gaps) or all(g >= -least for g in gaps)
        if not self.one_way:
            self.noise = []

    def restart(self) -> None:
        self.stop()
        self.run = Run(signal="scheduler", total=self.left())

    def at(self, clock: Clock | None) -> int:
        """The step of a forward that is given this timestep. One that the loop stays at, for the
        next window of a panorama, is the same step, though the scheduler has moved on."""
        place = None if clock is None else clock.place_in(self.timesteps)
        if place is None:
            return self.index
        if self.entry is None:
            self.entry = max(0, place - self.index)
        return place - self.begin if place >= self.begin else self.index

    def level(self, clock: Clock | None) -> tuple[float, float] | None:
        place = self.at(clock) + self.begin
        return self.noise[place] if place < len(self.noise) else None

    def stride(self, clock: Clock | None) -> float | None:
        place = self.at(clock) + self.begin
        return self.strides[place] if place < len(self.strides) else None

    def step(self, clock: Clock | None) -> None:
        """The scheduler made a step from this timestep."""
        place = None if clock is None else clock.place_in(self.timesteps, by_value=True)
        if place is not None and self.entry is None:  # the model's timestep did not show where
            before = self.begin
            self.entry = max(0, place - self.index)
            if self.begin != before:
                self.restart()
        if place is None:
            self.index += 1
        else:
            self.index = max(self.index, place + 1 - self.begin)
        if self.index >= self.left():
            self.stop()

    def stop(self) -> None:
        """The generation is over: its last step made, its loop left, or another one begun."""
        self.run.ended = True
        self.run.clear()


def _log_ratio(alpha: float, sigma: float) -> float:
    return math.log(sigma / alpha) if alpha > 0 < sigma else math.copysign(math.inf, sigma - alpha)


class Schedules:
    """The current `Schedule` of each context, and the runs that the user declared."""

    def __init__(self) -> None:
        self.current: Own[Schedule] = Own()
        self.explicit: Held[Run] = Held()
        self.context_name: contextvars.ContextVar[str | None] = contextvars.ContextVar(
            "accelerate_hooks_context_name", default=None
        )

    @contextmanager
    def declared(self, total: int | None) -> Generator[Run]:
        run = Run(signal="session.run()", total=total)
        try:
            with self.explicit.hold(run):
                yield run
        finally:
            run.end()


opaque_functions(globals())
