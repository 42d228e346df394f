"""Handlers of the methods that tell where a generation stands: of a scheduler, a pipeline, a
model."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.recognise import Clock
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
        before.run.ended = True
        before.run.clear()
    patch = session.roots[0].patch
    session.schedules.current.set(
        Schedule(
            Run(signal="scheduler"),
            scheduler.timesteps,
            weakref.ref(scheduler),
            patch.noise(scheduler),
            patch.prediction(scheduler),
            patch.strides(scheduler),
        )
    )
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

    def told(scheduler: Any, args: Any, kwargs: Any) -> None:
        begin(session, scheduler)

    return told


def scheduler_step(session: Session) -> Any:
    """Told of ``scheduler.step``: the run moves on."""

    def told(scheduler: Any, args: Any, kwargs: Any) -> None:
        schedule = session.schedules.current.get()
        if schedule is not None:
            given = inspect.signature(scheduler.step).bind(*args, **kwargs).arguments
            schedule.step(Clock.read(given.get("timestep")))

    return told


def progress_bar(session: Session) -> Any:
    """Told of ``pipeline.progress_bar``, with which its loop begins: a call of this pipeline, so
    that its ``num_timesteps`` are the steps of this run, also where it stops early."""

    def told(pipeline: Any, args: Any, kwargs: Any) -> None:
        schedule = session.schedules.current.get()
        count = getattr(pipeline, "num_timesteps", None)
        if schedule is not None and schedule.scheduler() is pipeline.scheduler:
            schedule.count = count if type(count) is int and count > 0 else None

    return told


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
