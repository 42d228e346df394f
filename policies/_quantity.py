"""What LazyStep predicts: the model's output, or the clean sample or the noise made of it."""

from __future__ import annotations

import math

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


opaque_functions(globals())
