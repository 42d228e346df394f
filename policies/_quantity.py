"""What LazyStep predicts, and over what: the model's output, or the clean sample or the noise made
of it, over the scheduler's time."""

from __future__ import annotations

import math

import torch

from accelerate_hooks.call import Call
from accelerate_hooks.errors import UnsupportedModelError
from accelerate_hooks.history import Values
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.run import Step


def mixing(step: Step, quantity: str) -> tuple[float, float]:
    """(a, b) with ``quantity = a * x + b * output``, from ``x = alpha * clean + sigma * noise``."""
    if step.noise is None or step.prediction is None:
        return 0.0, 1.0
    alpha, sigma = step.noise
    clean = {
        "velocity": (1.0, -sigma),  # output = noise - clean, alpha = 1 - sigma
        "epsilon": (1.0 / max(alpha, 1e-2), -sigma / max(alpha, 1e-2)),
        "v": (alpha, -sigma),  # output = alpha * noise - sigma * clean
        "sample": (0.0, 1.0),
    }[step.prediction]
    if quantity == "clean":
        a, b = clean
    else:
        a, b = (1.0 - alpha * clean[0]) / max(sigma, 1e-2), -alpha * clean[1] / max(sigma, 1e-2)
    return a, b if abs(b) > 1e-3 else math.copysign(1e-3, b)


def present(values: tuple[torch.Tensor | None, ...]) -> Values:
    """Those that are there."""
    return tuple(v for v in values if v is not None)


def converted(call: Call, quantity: str, out: tuple[torch.Tensor, torch.Tensor | None]) -> Values:
    """What is predicted, from what the model or site gave."""
    if quantity == "output":
        return present(out)
    if out[0].shape != call.x.shape:
        raise UnsupportedModelError(
            f"lazy_step: quantity={quantity!r} follows from an output with the sample's shape, and "
            f"{type(call.site.module).__name__} gives {tuple(out[0].shape)} for "
            f"{tuple(call.x.shape)}; use quantity='output'"
        )
    a, b = mixing(call.step, quantity)
    return (torch.add(out[0] * b, call.x, alpha=a),)


def restored(call: Call, quantity: str, values: Values) -> Values:
    """What the model would have given, from what was predicted."""
    if quantity == "output":
        return values
    a, b = mixing(call.step, quantity)
    return (torch.sub(values[0], call.x, alpha=a) / b,)


def clock(step: Step, axis: str) -> float:
    """The host time of the step on an axis, scaled to the order of one."""
    if axis == "index" or (step.noise is None and step.time is None):
        return float(step.index) / (step.total or 50)
    if step.noise is None:
        return step.time / 1000.0  # type: ignore[operator]
    alpha, sigma = step.noise
    if axis == "sigma":
        return sigma
    return math.log(max(alpha, 1e-3) / max(sigma, 1e-3))


opaque_functions(globals())
