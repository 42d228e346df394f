"""Context variables that child threads and tasks do not inherit."""

from __future__ import annotations

import contextvars
import sys
import threading
import weakref
from typing import Any, Generic, TypeVar

from accelerate_hooks.opaque import opaque_functions

T = TypeVar("T")


class Own(Generic[T]):
    """A context variable that only the thread and asyncio task which set it see: a child inherits
    its parent's context, but is no part of its parent's generation."""

    def __init__(self, name: str) -> None:
        self._held: contextvars.ContextVar[Any] = contextvars.ContextVar(name, default=None)

    def get(self) -> T | None:
        held = self._held.get()
        if held is None or held[0] != threading.get_ident():
            return None
        task = _task()
        return held[2] if (None if held[1] is None else held[1]()) is task else None

    def set(self, value: T) -> None:
        task = _task()
        kept = None if task is None else weakref.ref(task)
        self._held.set((threading.get_ident(), kept, value))


def _task() -> Any:
    asyncio = sys.modules.get("asyncio")
    if asyncio is None or asyncio._get_running_loop() is None:
        return None
    return asyncio.current_task()


opaque_functions(globals())
