"""Where code runs: which thread and asyncio task, and variables that only these see."""

from __future__ import annotations

import contextvars
import sys
import threading
import weakref
from typing import Any, Generic, TypeVar

from accelerate_hooks.opaque import opaque_functions

T = TypeVar("T")


class Here:
    """The thread and asyncio task that this was made in, if any; a task may be gone meanwhile."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        task = current_task()
        self._task = None if task is None else weakref.ref(task)

    def now(self) -> bool:
        """Whether this is called there."""
        if self._thread != threading.get_ident():
            return False
        task = current_task()
        if self._task is None or task is None:
            return self._task is task
        return self._task() is task

    def gone(self) -> bool:
        """Whether the task has ended."""
        task = None if self._task is None else self._task()
        return task.done() if task is not None else self._task is not None


_SET: contextvars.ContextVar[dict[weakref.ref[Any], Here]] = contextvars.ContextVar(
    "accelerate_hooks_set"
)


class Own(Generic[T]):
    """A context variable that only the thread and asyncio task which set it see: a child inherits
    its parent's context, but is no part of its parent's generation.

    A context holds for ever what was set in it, so it has no more than where that was, and the
    values are here: they go with the context and with this, whichever is first.
    """

    def __init__(self) -> None:
        self._values: weakref.WeakKeyDictionary[Here, T] = weakref.WeakKeyDictionary()

    def get(self) -> T | None:
        here = _SET.get({}).get(weakref.ref(self))
        return self._values.get(here) if here is not None and here.now() else None

    def set(self, value: T) -> None:
        here = Here()
        self._values[here] = value
        others = {own: there for own, there in _SET.get({}).items() if own() is not None}
        _SET.set(others | {weakref.ref(self): here})


def current_task() -> Any:
    asyncio = sys.modules.get("asyncio")
    if asyncio is None or asyncio._get_running_loop() is None:
        return None
    return asyncio.current_task()


opaque_functions(globals())
