"""Handlers of the methods that tell where a generation stands: of a scheduler, a pipeline, a
model."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate_hooks.clock import Clock
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.replaced import tell_replaced_models
from accelerate_hooks.run import Run
from accelerate_hooks.schedule import Schedule
from accelerate_hooks.site import Site

if TYPE_CHECKING:
    from accelerate_hooks.session import Session


def loop(session: Session, site: Site) -> Any:
    """The handler of a whole generation (``model.generate``), visited once a call."""

    def handler(override: Any, args: Any, kwargs: Any) -> Any:
        if session.is_paused() or site.module.training:
            return override.original(*args, **kwargs)
        return session.generate(override, site, args, kwargs)

    return handler


def begin(session: Session, scheduler: Any) -> None:
    """A run of ``scheduler``, whose timesteps are set, starts in this context."""
    before = session.schedules.current.get()
    if before is not None:
        before.stop()
    schedule = Schedule(Run(signal="scheduler"), scheduler.timesteps, weakref.ref(scheduler))
    session.schedules.current.set(schedule)
    patch = session.roots[0].patch
    try:
        schedule.learn_noise(patch.noise(scheduler))
        schedule.prediction = patch.prediction(scheduler)
        schedule.strides = patch.strides(scheduler)
        times = [float(t) for t in scheduler.timesteps.tolist()]
        schedule.turns = times not in (sorted(times), sorted(times, reverse=True))
    except Exception as error:  # a scheduler of the user's own has what it likes
        name = type(scheduler).__name__
        session.say(f"{name} does not tell its noise levels ({type(error).__name__}: {error})")
    tell_replaced_models(session)


def follow_scheduler(session: Session, scheduler: Any) -> bool:
    """Hear of ``scheduler`` from now on: the pipeline's, also one that it was given later. Whether
    its timesteps are set already."""
    session.scheduler = scheduler
    if not (hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step")):
        return False
    if not session.ledger.hears(scheduler):
        told = {"set_timesteps": set_timesteps(session), "step": scheduler_step(session)}
        try:
            session.ledger.overhear(scheduler, told)
        except TypeError as why:  # `__slots__`
            name = type(scheduler).__name__
            session.say(f"{name} cannot be heard ({why}): runs are told by their timesteps")
            return False
    return getattr(scheduler, "timesteps", None) is not None


def set_timesteps(session: Session) -> Any:
    """Told of ``scheduler.set_timesteps``: a run starts in this context."""

    def told(scheduler: Any, result: Any, args: Any, kwargs: Any) -> None:
        begin(session, scheduler)

    return told


def scheduler_step(session: Session) -> Any:
    """Told of ``scheduler.step``: the run moves on."""

    def told(scheduler: Any, result: Any, args: Any, kwargs: Any) -> None:
        schedule = session.schedules.current.get()
        if schedule is not None:
            given = inspect.signature(scheduler.step).bind(*args, **kwargs).arguments
            schedule.step(Clock.read(given.get("timestep")))

    return told


def progress_bar(session: Session) -> Any:
    """Told of ``pipeline.progress_bar``, with which its loop begins: a call of this
    pipeline, so that its ``num_timesteps`` are the steps of this run, also where it stops early.
    The loop is over when the bar is closed, whether it came to its end or not."""

    def told(pipeline: Any, bar: Any, args: Any, kwargs: Any) -> None:
        schedule = session.schedules.current.get()
        count = getattr(pipeline, "num_timesteps", None)
        if schedule is not None and schedule.scheduler() is pipeline.scheduler:
            schedule.count = count if type(count) is int and count > 0 else None
            _stop_with(bar, schedule)

    return told


def _stop_with(bar: Any, schedule: Schedule) -> None:
    """Stop the schedule when a bar is closed (on leaving its ``with``, too)."""
    close = getattr(bar, "close", None)

    def closed(*args: Any, **kwargs: Any) -> Any:
        schedule.stop()
        return close(*args, **kwargs)  # type: ignore[misc]

    if callable(close) and hasattr(bar, "__dict__"):
        bar.close = closed


def cache_context(session: Session) -> Any:
    """The handler of ``model.cache_context(name)``: the branch gets its name in this context."""

    def handler(override: Any, args: Any, kwargs: Any) -> Any:
        return _named(session, override, args, kwargs)

    return handler


@contextmanager
def _named(session: Session, override: Any, args: Any, kwargs: Any) -> Generator[None]:
    name = args[0] if args else kwargs.get("name")
    token = session.schedules.context_name.set(name)
    try:
        with override.original(*args, **kwargs):
            yield
    finally:
        session.schedules.context_name.reset(token)


opaque_functions(globals())
