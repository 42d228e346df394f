"""What was computed at earlier steps, and what it predicts for this one.

The one routine below all policies that reuse across steps: values at uneven distances in time and
the polynomial through the latest of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from accelerate_hooks.opaque import opaque_functions

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

    def __len__(self) -> int:
        return len(self.times)

    @property
    def ready(self) -> bool:
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
            for column in (self.times, self.steps, self.values):
                del column[place]
        self.times.append(time)
        self.steps.append(step)
        self.values.append(tuple(v.detach() for v in values))
        extra = len(self.times) - self.order - 1
        if extra > 0:
            del self.times[:extra], self.steps[:extra], self.values[:extra]

    def clear(self) -> None:
        self.times.clear()
        self.steps.clear()
        self.values.clear()

    def age(self, step: int) -> int:
        """Steps since the last computed one."""
        return step - self.steps[-1] if self.steps else 0

    def weights(self, time: float) -> list[float]:
        return [
            math.prod((time - b) / (a - b) for j, b in enumerate(self.times) if j != i)
            for i, a in enumerate(self.times)
        ]

    def reach(self, time: float) -> float:
        return math.prod(abs(time - t) for t in self.times)

    def predict(self, time: float) -> Values:
        return tuple(
            combine(column, self.weights(time)) for column in zip(*self.values, strict=True)
        )


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
