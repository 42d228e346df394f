"""When LazyStep computes: the decision of a step, and what it rests on."""

from __future__ import annotations

import math
import weakref

import torch

from accelerate_hooks.call import Call
from accelerate_hooks.history import History, Values
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.recognise import version_of

_MOST_CORRECTION = 4.0


class Pace:
    """The decisions of one model, stack or site, step after step.

    ``age`` counts the steps since the last computed one when this step was decided, ``measured``
    are scalars that the host has not read yet, ``values`` those it has.
    """

    def __init__(self) -> None:
        self.step = -1
        self.skip = False
        self.age = 0
        self.computed_at = -1
        self.computed = 0
        self.expected = 0.0
        self.measured: list[torch.Tensor] = []
        self.measured_age = 1
        self.values: list[float] = []
        self.span = 1
        self.error = 0.0
        self.accumulated = 0.0
        self.recent = 0.0
        self.last: Values | None = None

    def enter(self, step: int) -> None:
        self.step = step
        self.age = step - self.computed_at

    def restart(self) -> None:
        """This step is computed."""
        self.computed += 1
        self.computed_at = self.step
        self.measured_age = self.age
        self.measured.clear()
        self.values.clear()
        self.accumulated = 0.0

    def read(self, call: Call) -> None:
        if self.measured:
            self.values = call.read(*self.measured)
            self.measured.clear()

    def choose_span(self, tolerance: float, order: int) -> int:
        """The number of steps to the next computed one, as an ODE solver chooses its step size:
        ``span * (tolerance / error) ** (1 / (order + 1))`` of the last measured error, in whole
        steps: at least one more where the error was under the tolerance, at most twice as many."""
        if self.values:
            self.error = self.expected = max(self.values)
            self.values.clear()
            age = self.measured_age
            factor = (tolerance / max(self.error, 1e-12)) ** (1.0 / (order + 1))
            if self.error <= tolerance:
                self.span = max(age + 1, math.floor(age * min(factor, 2.0)))
            elif self.error > tolerance:
                self.span = max(1, math.floor(age * factor))
            else:
                self.span = 1  # NaN
        return self.span

    def watch(self, seen: Values, metric: str) -> None:
        """Measure the change of the decision tensor since the step before."""
        if self.last is not None and self.last[0].shape == seen[0].shape:
            self.measured = [change(self.last, seen, metric)]
        self.last = tuple(t.detach() for t in seen)

    def change_since(self, lagged: bool) -> float:
        """The change accumulated since the last computed step; ``lagged``: all but the latest is
        known, which is taken to be like the one before it."""
        for value in self.values:
            self.recent = value
            if self.skip or not lagged:
                self.accumulated += value
        self.values.clear()
        self.expected = self.accumulated + (self.recent if lagged else 0.0)
        return self.expected


class Board:
    """The paces of all sites of a forward: what they measured is read at once, one step later."""

    def __init__(self) -> None:
        self.step = -1
        self.paces: weakref.WeakSet[Pace] = weakref.WeakSet()

    def settle(self, call: Call, pace: Pace) -> None:
        """Called at every site; the first one of a step reads for all."""
        if self.step != call.step.index:
            self.step = call.step.index
            waiting = [p for p in self.paces if p.measured]
            tensors = [t for p in waiting for t in p.measured]
            values = iter(call.read(*tensors) if tensors else [])
            for p in waiting:
                p.values = [next(values) for _ in p.measured]
                p.measured.clear()
        self.paces.add(pace)


class State:
    """What one site, model or segment of a stack (up to its block ``last``) keeps in a run and
    branch."""

    def __init__(self, order: int, last: int = 0) -> None:
        self.history = History(order)
        self.pace = Pace()
        self.last = last
        self.owed: list[tuple[float, float]] = []  # (time, stride) of skipped steps
        self.entered = -1
        self._entry: list[torch.Tensor | None] = []
        self._before: list[tuple[torch.Tensor, int] | None] = []

    def settle_debt(self, time: float, stride: float | None) -> float:
        """The share of ``y - prediction`` to add to a computed output ``y``, which takes back what
        the skipped steps before it were off by.

        The true value ``y`` raises the polynomial through the old ones by one order: at a skipped
        time ``t_k`` it differs from the prediction made there by
        ``(y - prediction) * rho_k``, ``rho_k = prod_i (t_k - t_i) / (t - t_i)``. A first-order
        solver has added ``stride_k`` times that to the sample, so that the share is
        ``sum_k stride_k rho_k / stride``.
        """
        owed, self.owed = self.owed, []
        if not (owed and stride and self.history.ready):
            return 0.0
        times = self.history.times
        reach = math.prod(time - t for t in times)
        factor = sum(s * math.prod(k - t for t in times) for k, s in owed) / reach / stride
        return max(-_MOST_CORRECTION, min(_MOST_CORRECTION, factor))

    def enter(self, step: int, values: tuple[torch.Tensor | None, ...]) -> None:
        """A computed block of a stack begins with these values. What the model adds between two
        blocks (a ControlNet's residuals) is no part of what the blocks add: the entry follows."""
        if self.entered != step:
            self.entered, self._entry, self._before = step, list(values), []
            return
        for i, (old, now) in enumerate(zip(self._before, values, strict=True)):
            entry = self._entry[i]
            if old is None or now is None or entry is None:
                continue
            made, version = old
            if made.shape != now.shape or version != version_of(made):
                self._entry[i] = None
            elif made is not now and made.data_ptr() != now.data_ptr():
                self._entry[i] = entry + (now - made)

    def leave(self, values: tuple[torch.Tensor | None, ...]) -> None:
        """A computed block of the stack gave these."""
        self._before = [None if v is None else (v, version_of(v)) for v in values]

    def added(self, values: tuple[torch.Tensor | None, ...]) -> Values | None:
        """What the blocks since the entry have added in all, where that can be told."""
        entry, self._entry, self._before = self._entry, [], []
        if not entry or entry[0] is None:
            return None
        if entry[1] is None and values[1] is not None:
            return None
        return minus(values, tuple(entry))


def minus(
    a: tuple[torch.Tensor | None, ...], b: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor, ...]:
    return tuple(u - v for u, v in zip(a, b, strict=True) if u is not None and v is not None)


def plus(a: tuple[torch.Tensor | None, ...], b: Values) -> Values:
    return tuple(u + v for u, v in zip((v for v in a if v is not None), b, strict=False))


def change(before: Values, now: Values, metric: str) -> torch.Tensor:
    """``sum |now - before| / sum |before|``, or one minus the cosine."""
    a, b = before[0].float().flatten(), now[0].float().flatten()
    if metric == "cosine":
        return 1.0 - torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(1e-30)
    return (b - a).abs().sum() / a.abs().sum().clamp_min(1e-30)


opaque_functions(globals())
