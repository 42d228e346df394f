"""Which run, step and CFG branch does a forward belong to? Host signals only, strongest first.

1. ``with session.run()``: said by the user.
2. A KV cache: the run is the cache's and dies with it.
3. A pipeline's scheduler: ``set_timesteps`` starts a run in this thread or task, ``step`` moves it.
4. A bare ``for t in timesteps`` loop: ``t`` as a view of ``scheduler.timesteps`` (its offset is the
   step, without a read), else its value, which must go on in one direction; the same shape, dtype,
   device and conditioning tensors.

The branch is the name given to ``cache_context``, else the identity of the conditioning tensors,
else the ordinal among the calls of one timestep, trusted while every step has as many calls.
In doubt a forward starts a clean run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from accelerate_hooks.clock import Clock
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.own import Own
from accelerate_hooks.run import Run
from accelerate_hooks.schedule import Schedule
from accelerate_hooks.stand_in import follow, unfollow


@dataclass(eq=False)
class Trail:
    """What one context (thread or task) has seen of its current run on one model."""

    run: Run
    shape: Any
    clock: Clock | None = None
    direction: int = 0
    course: float = 0.0  # the sign of time's last move, by value
    conditions: dict[tuple[int, ...], Condition] = field(default_factory=dict)
    calls: int = 0
    expected: dict[str, int] | None = None  # how often each name was seen in the step before
    restless: int = 0
    scheduler_index: int = -1
    seen_now: dict[str, int] = field(default_factory=dict)


@dataclass
class Condition:
    """A set of conditioning tensors, known by identity and version."""

    name: str
    tensors: list[weakref.ref[torch.Tensor]]
    versions: tuple[int, ...]
    steps: int = 1

    def alive(self, given: list[torch.Tensor]) -> bool:
        return len(given) == len(self.tensors) and all(
            ref() is tensor and version == version_of(tensor)
            for ref, tensor, version in zip(self.tensors, given, self.versions, strict=True)
        )


def version_of(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Recogniser:
    """The run of each forward of one model in one session."""

    def __init__(self) -> None:
        self._trail: Own[Trail] = Own()
        self._by_cache: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()
        self._trails: weakref.WeakSet[Trail] = weakref.WeakSet()

    def forget(self) -> None:
        for trail in self._trails:
            trail.run.clear()
            trail.run.ended = True
        for cache, run in list(self._by_cache.items()):
            run.clear()
            unfollow(cache, run)
        self._by_cache.clear()

    # -- language ----------------------------------------------------------------------------

    def of_cache(self, cache: Any, declared: Run | None = None) -> Run:
        """The run of a forward with a KV cache: the declared one for its first cache, else the
        cache's own, since in one run the rows of two caches cannot be told apart."""
        run = self._by_cache.get(cache)
        if declared is not None and not declared.cached:
            run = declared
            self.bind_cache(cache, run)
        elif run is None or run.ended or (run.broken and run is not declared):
            run = Run(signal="cache")
            self.bind_cache(cache, run)
        run.index += 1
        return run

    def bind_cache(self, cache: Any, run: Run) -> None:
        """From now on the run is the cache's, and dies with it. After another run the cache is no
        new one: it has its steps, and lacks what that left out."""
        before = self._by_cache.get(cache)
        if before is not None:
            run.index = max(run.index, before.index)
            run.cuts += before.cuts
            before.cuts.clear()
            unfollow(cache, before)
        run.cached = True
        self._by_cache[cache] = run
        follow(cache, run)

    def runs(self) -> Iterator[Run]:
        """The runs that still hold something."""
        yield from {id(t.run): t.run for t in self._trails if not t.run.ended}.values()
        yield from list(self._by_cache.values())

    # -- diffusion ---------------------------------------------------------------------------

    def of_loop(
        self,
        shape: Any,
        clock: Clock | None,
        given: list[torch.Tensor],
        context_name: str | None,
        scheduler: Schedule | None,
        explicit: Run | None,
    ) -> tuple[Run, int, str, str]:
        """(run, step index, branch, signal) of a forward in a denoising loop."""
        trail = self._trail.get()
        if explicit is not None:
            trail = explicit.trails.get(self)
            if trail is not None and self._begins(trail, clock):
                explicit.restart()
                trail = None
            if trail is None:
                self._stop()
                trail = explicit.trails[self] = Trail(explicit, shape, clock)
                self._trails.add(trail)
            moved = self._moved(trail, clock)
        elif scheduler is not None and not scheduler.run.ended:
            if trail is not None and trail.run is scheduler.run:
                back = scheduler.at(clock) < trail.scheduler_index
                turned = self._turned(trail, clock) and not scheduler.turns
                unheard = scheduler.index == 0 and self._course(trail, clock) != 0
                if back or turned or unheard:
                    # an aborted pipeline's, or a loop that steps without its scheduler: no part
                    scheduler.stop()
                    return self._bare(None, shape, clock, given, context_name)
                if trail.run.broken:
                    scheduler.restart()
            if trail is None or trail.run is not scheduler.run:
                trail = self._start(scheduler.run, shape, clock)
            now = scheduler.at(clock)
            moved = trail.scheduler_index != now
            trail.scheduler_index = now
        else:
            return self._bare(trail, shape, clock, given, context_name)
        if moved or trail.run.index < 0:
            if explicit is None:
                trail.restless += self._changes(trail, given, context_name)
            self._advance(trail, clock)
            if explicit is None and scheduler is not None:
                trail.run.index, trail.run.total = trail.scheduler_index, scheduler.left()
        branch, _ = self._branch(trail, given, context_name)
        signal = "scheduler" if explicit is None else "session.run()"
        return trail.run, trail.run.index, f"{branch}{_shape_tag(trail, shape)}", signal

    def _bare(
        self,
        trail: Trail | None,
        shape: Any,
        clock: Clock | None,
        given: list[torch.Tensor],
        name: str | None,
    ) -> tuple[Run, int, str, str]:
        if trail is None or trail.run.broken or trail.run.ended or trail.shape != shape:
            trail = None
        if clock is None or trail is None or trail.clock is None:
            trail = None  # no time at all: nothing tells one generation from the next
        else:
            direction = trail.clock.direction_to(clock)
            if direction is None or (direction and direction * trail.direction < 0):
                trail = None
            elif direction == 0:
                if self._repeats(trail, given, name):
                    trail = None
            else:
                known = self._find(trail, given) is not None or not given or name is not None
                settled = any(c.steps > 1 for c in trail.conditions.values())
                if not known and (settled or trail.restless < 2):
                    restless = trail.restless + 1
                    trail = self._start(Run(signal="timestep"), shape, None)
                    trail.restless = 0 if settled else restless
                trail.direction = direction
                self._advance(trail, clock)
        if trail is None:
            trail = self._start(Run(signal="timestep"), shape, clock)
            self._advance(trail, clock)
            if clock is None:
                trail.run.ambiguous = "the forward is given no timestep; use session.run()"
        branch, signal = self._branch(trail, given, name)
        return trail.run, trail.run.index, branch, signal

    def _start(self, run: Run, shape: Any, clock: Clock | None) -> Trail:
        self._stop(run)
        trail = Trail(run, shape, clock)
        self._trails.add(trail)
        self._trail.set(trail)
        return trail

    def _stop(self, other: Run | None = None) -> None:
        """The current run of this context ends where ``other``, or a declared run, begins."""
        old = self._trail.get()
        if old is not None and old.run is not other:
            old.run.ended = True
            old.run.clear()

    def _moved(self, trail: Trail, clock: Clock | None) -> bool:
        if clock is None or trail.clock is None:
            return True
        direction = trail.clock.direction_to(clock)
        return bool(self._course(trail, clock) if direction is None else direction)

    def _begins(self, trail: Trail, clock: Clock | None) -> bool:
        """Whether another generation begins in a declared run: with another schedule, on which time
        does not go on (some loops make a schedule anew at each step)."""
        if clock is None or trail.clock is None or not trail.clock.other_schedule(clock):
            return False
        known = trail.clock.value is not None and clock.value is not None
        return not known or self._turned(trail, clock)

    def _turned(self, trail: Trail, clock: Clock | None) -> bool:
        """Whether time runs against the direction that it had in this run."""
        return self._course(trail, clock) * trail.course < 0

    def _course(self, trail: Trail, clock: Clock | None) -> float:
        """How far time moved, by value; 0 where the host does not know."""
        if clock is None or trail.clock is None:
            return 0.0
        if trail.clock.value is None or clock.value is None:
            return 0.0
        return clock.value - trail.clock.value

    def _advance(self, trail: Trail, clock: Clock | None) -> None:
        run = trail.run
        trail.course = self._course(trail, clock) or trail.course
        if run.index >= 0:
            if trail.expected is not None:
                changed = sum(trail.seen_now.values()) != sum(trail.expected.values())
                if changed:
                    trail.restless = max(trail.restless, 2)
                names = trail.seen_now.keys() | trail.expected.keys()
                if changed and any(name.startswith("call ") for name in run.branches):
                    self._doubt(run)
                for name in names:
                    now, before = trail.seen_now.get(name, 0), trail.expected.get(name, 0)
                    if now != before and max(now, before) > 1:  # told apart by their order alone
                        self._doubt(run)
            trail.expected = trail.seen_now
        run.index += 1
        trail.calls = 0
        trail.seen_now = {}
        trail.clock = clock

    def _doubt(self, run: Run) -> None:
        run.ambiguous = (
            "the number of calls a timestep changes and nothing names the CFG branch; use "
            "model.cache_context(name) or keep the conditioning tensors"
        )
        run.clear()

    def _find(self, trail: Trail, given: list[torch.Tensor]) -> Condition | None:
        return next((c for c in trail.conditions.values() if c.alive(given)), None)

    def _changes(self, trail: Trail, given: list[torch.Tensor], name: str | None) -> bool:
        """Whether a step comes with conditioning tensors of its own, as all before it did."""
        settled = any(c.steps > 1 for c in trail.conditions.values())
        known = name is not None or not given or self._find(trail, given) is not None
        return bool(trail.conditions) and not known and not settled

    def _repeats(self, trail: Trail, given: list[torch.Tensor], name: str | None) -> bool:
        """At an unchanged timestep: has this branch been seen already? Then it is a new run (or a
        solver that evaluates twice, which only a scheduler's signal can tell)."""
        if name is not None:
            return name in trail.seen_now
        condition = self._find(trail, given)
        if condition is not None:
            return condition.name in trail.seen_now
        return not given

    def _branch(self, trail: Trail, given: list[torch.Tensor], name: str | None) -> tuple[str, str]:
        """(branch, the signal that names it)."""
        signal = trail.run.signal
        if name is None and given:
            condition = self._find(trail, given)
            if condition is None and trail.restless < 2:
                condition = Condition(
                    name=f"branch {len(trail.conditions)}",
                    tensors=[weakref.ref(t, _end_with(trail)) for t in given],
                    versions=tuple(version_of(t) for t in given),
                    steps=0,
                )
                trail.conditions[tuple(id(t) for t in given)] = condition
            if condition is not None:
                condition.steps += condition.name not in trail.seen_now
                name = condition.name
                signal += ", conditioning"
        elif name is not None:
            signal += ", cache_context"
        if name is None:
            name = f"call {trail.calls}" if given else "main"
            signal += ", ordinal" if given else ""
        trail.calls += 1
        visits = trail.seen_now[name] = trail.seen_now.get(name, 0) + 1
        if visits > 1:
            if trail.expected is not None and visits > max(1, trail.expected.get(name, 0)):
                self._doubt(trail.run)
            name = f"{name} ({visits})"
        trail.run.branches[name] = trail.run.branches.get(name, 0) + 1
        return name, signal


def _end_with(trail: Trail) -> Callable[[Any], None]:
    """A bare loop cannot go on without the prompt that it was seen to keep: when that dies, what
    the run has cached goes too."""
    known = weakref.ref(trail)

    def end(_: Any) -> None:
        trail = known()
        if trail is None or trail.run.signal != "timestep":
            return
        if any(condition.steps > 1 for condition in trail.conditions.values()):
            trail.run.ended = True
            trail.run.clear()

    return end


def _shape_tag(trail: Trail, shape: Any) -> str:
    """Within a run that somebody declared, other shapes are other branches."""
    return "" if shape == trail.shape else f" {shape[0]}"


opaque_functions(globals())
