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


class Own(Generic[T]):
    """A context variable that only the thread and asyncio task which set it see: a child inherits
    its parent's context, but is no part of its parent's generation."""

    def __init__(self, name: str) -> None:
        self._held: contextvars.ContextVar[tuple[Here, T] | None] = contextvars.ContextVar(
            name, default=None
        )

    def get(self) -> T | None:
        held = self._held.get()
        return held[1] if held is not None and held[0].now() else None

    def set(self, value: T) -> None:
        self._held.set((Here(), value))


def current_task() -> Any:
    asyncio = sys.modules.get("asyncio")
    if asyncio is None or asyncio._get_running_loop() is None:
        return None
    return asyncio.current_task()


opaque_functions(globals())
