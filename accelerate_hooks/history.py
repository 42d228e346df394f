"""What was computed at earlier steps, and what it predicts for this one.

The one routine below all policies that reuse across steps: values at uneven distances in time and
the polynomial through the latest of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.recognise import version_of

Values = tuple[torch.Tensor, ...]


class History:
    """The latest ``order + 1`` values, each with its time.

    Prediction at time ``t`` is the Lagrange polynomial through them,

        y(t) = sum_i y_i * prod_{j != i} (t - t_j) / (t_i - t_j),

    order 0 the last value. Its error is ``y^(order+1) / (order+1)! * prod_i |t - t_i|``: `reach` is
    that product, so that an error seen at one distance foretells the error at another.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.times: list[float] = []
        self.steps: list[int] = []
        self.values: list[Values] = []
        self.versions: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return len(self.times)

    @property
    def ready(self) -> bool:
        """Whether there are enough values; none are left where somebody wrote to one of them."""
        if [_versions(values) for values in self.values] != self.versions:
            self.clear()
        return len(self.times) > self.order

    def add(self, step: int, time: float, values: Values) -> None:
        """Values of a computed step; those of a time already there, or of other shapes, go."""
        if self.values and any(
            a.shape != b.shape or a.dtype != b.dtype or a.device != b.device
            for a, b in zip(self.values[-1], values, strict=True)
        ):
            self.clear()
        if time in self.times:
            place = self.times.index(time)
            for column in (self.times, self.steps, self.values, self.versions):
                del column[place]
        self.times.append(time)
        self.steps.append(step)
        self.values.append(tuple(v.detach() for v in values))
        self.versions.append(_versions(values))
        extra = len(self.times) - self.order - 1
        for column in (self.times, self.steps, self.values, self.versions):
            del column[: max(extra, 0)]

    def clear(self) -> None:
        for column in (self.times, self.steps, self.values, self.versions):
            column.clear()

    def age(self, step: int) -> int:
        """Steps since the last computed one."""
        return step - self.steps[-1] if self.steps else 0

    def reach(self, time: float) -> float:
        return math.prod(abs(time - t) for t in self.times)

    def predict(self, time: float) -> Values:
        return tuple(
            combine(column, weights(self.times, time)) for column in zip(*self.values, strict=True)
        )


class RowHistory:
    """A `History` in which each batch row has computed values, and times, of its own."""

    def __init__(self, order: int) -> None:
        self.order = order
        self._clear()

    def _clear(self) -> None:
        self._latest: list[int] = []  # the step of each row's last value
        self._times: list[list[float]] = []  # by row
        self._values: list[Values] = []
        self._versions: list[tuple[int, ...]] = []

    @property
    def ready(self) -> bool:
        """Whether there are enough values; none are left where somebody wrote to one of them."""
        if [_versions(values) for values in self._values] != self._versions:
            self._clear()
        return len(self._values) > self.order

    def ages(self, step: int) -> list[int]:
        """Steps since each row's last computed one."""
        return [step - latest for latest in self._latest]

    def add(
        self, step: int, time: float, values: Values, rows: Sequence[bool] | None = None
    ) -> None:
        """Values of a step at which ``rows`` (all of them) were computed, in place of those of the
        same time."""
        batch, values = len(values[0]), tuple(v.detach() for v in values)
        if self._values and any(
            a.shape != b.shape or a.dtype != b.dtype or a.device != b.device
            for a, b in zip(self._values[-1], values, strict=True)
        ):
            self._clear()
        ready = self.ready
        self._times = self._times or [[] for _ in range(batch)]
        self._latest = self._latest or [step] * batch
        rows = [True] * batch if rows is None or not ready else list(rows)
        again = [bool(times) and times[-1] == time for times in self._times]
        if all(rows) and all(again) == any(again):
            keep = self._values[:-1] if all(again) else self._values
            self._values = [*keep, values][-self.order - 1 :]
        else:
            on = [row and not same for row, same in zip(rows, again, strict=True)]
            later = [
                tuple(_choose(on, a, b) for a, b in zip(new, old, strict=True))
                for new, old in zip(self._values[1:], self._values[:-1], strict=True)
            ]
            last = tuple(_choose(rows, a, b) for a, b in zip(values, self._values[-1], strict=True))
            self._values = [*later, last]
        self._versions = [_versions(kept) for kept in self._values]
        for row in (i for i, computed in enumerate(rows) if computed):
            self._latest[row] = step
            kept = self._times[row][:-1] if again[row] else self._times[row]
            self._times[row] = [*kept, time][-self.order - 1 :]

    def predict(self, time: float) -> Values:
        by_row = [weights(times, time) for times in self._times]
        columns = zip(*self._values, strict=True)
        if all(w == by_row[0] for w in by_row):
            return tuple(combine(column, by_row[0]) for column in columns)
        each = torch.tensor(by_row).unbind(1)
        return tuple(
            torch.stack([v * _column(w, v) for v, w in zip(c, each, strict=True)]).sum(0)
            for c in columns
        )


def _versions(values: Values) -> tuple[int, ...]:
    return tuple(version_of(v) for v in values)


def _choose(rows: Sequence[bool], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(_column(torch.tensor(rows), a), a, b)


def _column(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A vector over rows, to choose among or multiply the rows of a tensor."""
    dtype = vector.dtype if vector.dtype == torch.bool else like.dtype
    return vector.to(like.device, dtype).reshape(-1, *[1] * (like.ndim - 1))


def weights(times: Sequence[float], time: float) -> list[float]:
    """Those of the values at ``times`` in the polynomial through them, at ``time``."""
    return [
        math.prod((time - b) / (a - b) for j, b in enumerate(times) if j != i)
        for i, a in enumerate(times)
    ]


def combine(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """``sum_i weights[i] * values[i]`` in the values' dtype."""
    out = values[0] if weights[0] == 1.0 else values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        out = torch.add(out, value, alpha=weight)
    return out


def relative_error(predicted: Values, true: Values) -> torch.Tensor:
    """``||predicted - true|| / ||true||`` over all tensors, a scalar on their device."""
    difference = sum((p - t).float().square().sum() for p, t in zip(predicted, true, strict=True))
    norm = sum(t.float().square().sum() for t in true)
    return torch.as_tensor(difference / torch.as_tensor(norm).clamp_min(1e-30)).sqrt()


opaque_functions(globals())
