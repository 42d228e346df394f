"""One generation: where we are in it, and the storage that lives exactly as long."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from accelerate_hooks import tree
from accelerate_hooks.opaque import opaque_functions

Phase = Literal["prefill", "decode", "denoise", "encode"]
_numbers = itertools.count(1)


@dataclass(eq=False)
class Run:
    """One generation. ``slots`` holds everything that policies keep; it goes with the run.

    ``signal`` names how the run was recognised, ``ambiguous`` says in words why it could not be
    trusted (every policy then computes in full). A run that the user declared has ``trails``, one a
    model, and is ``cached`` once a KV cache is bound to it.
    """

    signal: str
    total: int | None = None
    number: int = field(default_factory=lambda: next(_numbers))
    index: int = -1
    slots: dict[Hashable, Slot] = field(default_factory=dict)
    branches: dict[str, int] = field(default_factory=dict)
    order: int = 0
    ambiguous: str | None = None
    broken: bool = False
    ended: bool = False
    bytes: int = 0
    peak_bytes: int = 0
    generators: dict[int, torch.Generator] = field(default_factory=dict)
    cuts: list[Any] = field(default_factory=list)
    trails: dict[Any, Any] = field(default_factory=dict)
    cached: bool = False
    readings: deque[Any] = field(default_factory=lambda: deque(maxlen=4))

    def measure(self) -> int:
        seen: set[int] = set()
        self.bytes = sum(tree.nbytes(slot.value, seen) for slot in list(self.slots.values()))
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return self.bytes

    def clear(self) -> None:
        self.slots.clear()
        self.generators.clear()
        self.cuts.clear()
        self.readings.clear()
        self.bytes = 0

    def restart(self) -> None:
        """Begin anew, while it goes on to be the user's declared run."""
        self.clear()
        self.trails.clear()
        self.index, self.cached = -1, False

    def end(self) -> None:
        """Give back what policies keep. What they left out of a KV cache stays known: the cache
        may be used on."""
        cuts = list(self.cuts)
        self.clear()
        self.trails.clear()
        self.cuts, self.ended = cuts, True

    def map_rows(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a reordering of the batch to every slot that was declared to have a batch axis;
        the others are dropped, since nobody can say whose rows they hold."""
        for cut in self.cuts:
            cut.keep = fn(cut.keep) if cut.keep.ndim == 2 else cut.keep
        for key, slot in list(self.slots.items()):
            if slot.rows:
                slot.value = _map_state(slot.value, fn)
            else:
                del self.slots[key]


@dataclass
class Slot:
    value: Any
    rows: bool
    policy: int


def _map_state(value: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return fn(value) if value.ndim else value
    if isinstance(value, dict):
        for key, child in value.items():
            value[key] = _map_state(child, fn)
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_map_state(child, fn) for child in value)
    if hasattr(value, "__dict__") and not callable(value):
        for key, child in vars(value).items():
            vars(value)[key] = _map_state(child, fn)
    return value


@dataclass(frozen=True, slots=True)
class Step:
    """Where a forward stands: ``index`` counts the steps of a run (one a timestep or token, however
    many CFG branches), ``branch`` names the CFG branch, ``timestep`` is what the model was given,
    ``time`` its host value where that costs nothing and goes one way, ``signal`` how all this is
    known. ``noise`` is (alpha, sigma) of the sample, ``prediction`` what the model predicts,
    ``stride`` by how much a first-order solver moves along that (in the sample over alpha for
    epsilon).
    """

    run: Run
    index: int
    total: int | None
    phase: Phase
    branch: str
    signal: str
    timestep: Any = None
    time: float | None = None
    positions: Any = None
    noise: tuple[float, float] | None = None
    prediction: str | None = None
    stride: float | None = None


opaque_functions(globals())
