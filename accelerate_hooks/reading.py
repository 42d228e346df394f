"""Which argument leaves follow an axis (batch rows, tokens)? Asked of the module, not guessed.

A rotary table as long as the batch is large reads the same as a per-row tensor, and slicing it is
silently wrong (an error of 2.6e-2 was measured). So the readings that shapes allow are tried on a
part, likeliest first, and the one that reproduces the full result is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from accelerate_hooks import tree
from accelerate_hooks.opaque import opaque_functions

Axis = tuple[tree.Path, int, int]  # a leaf's path, a dimension, and how items stand on it
Reading = frozenset[Axis]
Choice = list[Reading]  # ways to read some leaves that go together, likeliest first

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_MOST = 128  # readings tried


def first(
    choices: Sequence[Choice], attempt: Callable[[Reading], torch.Tensor], wanted: torch.Tensor
) -> Reading | None:
    """The likeliest reading under which ``attempt`` gives ``wanted`` up to the rounding of its
    dtype, None where there is none."""
    scale = wanted.abs().amax().clamp_min(1e-30) if wanted.numel() else wanted.new_tensor(1.0)
    bound = _TOLERANCE.get(wanted.dtype, 1e-4) * scale
    for reading in itertools.islice(_likeliest(choices), _MOST):
        try:
            got = attempt(reading)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError, TypeError, AssertionError):
            continue  # shapes that do not fit: not this reading
        if got.shape == wanted.shape and bool(((got - wanted).abs() <= bound).all()):
            return reading
    return None


def _likeliest(choices: Sequence[Choice]) -> Iterator[Reading]:
    """Every combination, in the order of how many choices are not the likeliest."""
    for number in range(len(choices) + 1):
        for places in itertools.combinations(range(len(choices)), number):
            for other in itertools.product(*(choices[place][1:] for place in places)):
                changed = dict(zip(places, other, strict=True))
                yield frozenset().union(*(changed.get(i, c[0]) for i, c in enumerate(choices)))


def grouped(axes: Sequence[Axis], key: Callable[[Axis], object]) -> list[list[Axis]]:
    """Axes of leaves that stand side by side (the two tables of a rotary embedding) and have the
    same ``key`` are read alike."""
    groups: dict[object, list[Axis]] = {}
    for axis in axes:
        path = axis[0]
        groups.setdefault((path[:-1] or path, key(axis)), []).append(axis)
    return list(groups.values())


opaque_functions(globals())
