"""Handlers of the methods that tell where a generation stands: of a scheduler, of a model."""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.run import Run
from accelerate_hooks.schedule import Schedule
from accelerate_hooks.seam import Override
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


def set_timesteps(session: Session) -> Any:
    """The handler of ``scheduler.set_timesteps``: a run starts in this context."""

    def handler(override: Any, args: Any, kwargs: Any) -> Any:
        result = override.original(*args, **kwargs)
        begin(session, override.owner)
        return result

    return handler


def begin(session: Session, scheduler: Any) -> None:
    """A run of ``scheduler``, whose timesteps are set, starts in this context."""
    before = session.schedules.current.get()
    if before is not None:
        before.run.ended = True
        before.run.clear()
    total, patch = len(scheduler.timesteps), session.roots[0].patch
    session.schedules.current.set(
        Schedule(
            Run(signal="scheduler", total=total),
            total,
            weakref.ref(scheduler),
            patch.noise(scheduler),
            patch.prediction(scheduler),
            patch.strides(scheduler),
        )
    )


def follow_scheduler(session: Session, scheduler: Any) -> bool:
    """Hear of ``scheduler`` from now on: the pipeline's, also one that it was given later. Whether
    its timesteps are set already."""
    session.scheduler = scheduler
    if not (hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step")):
        return False
    if not isinstance(vars(scheduler).get("step"), Override):
        ledger = session.ledger
        ledger.override(Override(scheduler, "set_timesteps", set_timesteps(session)))
        ledger.override(Override(scheduler, "step", scheduler_step(session)))
    return getattr(scheduler, "timesteps", None) is not None


def scheduler_step(session: Session) -> Any:
    """The handler of ``scheduler.step``: the run moves on."""

    def handler(override: Any, args: Any, kwargs: Any) -> Any:
        result = override.original(*args, **kwargs)
        schedule = session.schedules.current.get()
        if schedule is not None:
            schedule.step()
        return result

    return handler


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
