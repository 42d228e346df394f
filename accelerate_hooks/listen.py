"""Handlers of the methods that tell where a generation stands: of a scheduler, of a model."""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.recognise import Schedule
from accelerate_hooks.run import Run
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
        total = len(override.owner.timesteps)
        run = Run(signal="scheduler", total=total)
        before = session.schedules.current.get()
        if before is not None:
            before.run.ended = True
            before.run.clear()
        patch = session.roots[0].patch
        scheduler = override.owner
        session.schedules.current.set(
            Schedule(
                run,
                total,
                weakref.ref(scheduler),
                patch.noise(scheduler),
                patch.prediction(scheduler),
                patch.strides(scheduler),
            )
        )
        return result

    return handler


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
