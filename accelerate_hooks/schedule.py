"""What a pipeline's scheduler told, and the run that the user declared."""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from accelerate_hooks.held import Held
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.own import Own
from accelerate_hooks.run import Run


@dataclass(eq=False)
class Schedule:
    """What a hooked scheduler told in this context: a run from ``set_timesteps`` to the last
    ``step``. ``begin`` is where an image-to-image pipeline enters the schedule."""

    run: Run
    total: int
    scheduler: weakref.ref[Any]
    noise: list[tuple[float, float]] = field(default_factory=list)
    prediction: str | None = None
    strides: list[float] = field(default_factory=list)
    index: int = 0

    @property
    def begin(self) -> int:
        return getattr(self.scheduler(), "begin_index", None) or 0

    def left(self) -> int:
        """Steps of this run."""
        return self.total - self.begin

    def restart(self) -> None:
        self.run = Run(signal="scheduler", total=self.left())

    def level(self) -> tuple[float, float] | None:
        place = self.begin + self.index
        return self.noise[place] if place < len(self.noise) else None

    def stride(self) -> float | None:
        place = self.begin + self.index
        return self.strides[place] if place < len(self.strides) else None

    def step(self) -> None:
        self.index += 1
        if self.index >= self.left():
            self.run.ended = True
            self.run.clear()


class Schedules:
    """The current `Schedule` of each context, and the runs that the user declared."""

    def __init__(self) -> None:
        self.current: Own[Schedule] = Own("accelerate_hooks_schedule")
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
