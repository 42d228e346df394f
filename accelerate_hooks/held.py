"""What ``with`` statements hold open, each for the forwards inside it alone."""

from __future__ import annotations

import contextlib
import dis
import inspect
import sys
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Generic, TypeVar

from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.own import Here, current_task

T = TypeVar("T")
Key = tuple[int, int]

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_SUSPENDABLE = _GENERATOR | inspect.CO_COROUTINE
_ENTER = ("__enter__", "__aenter__")
_CONTEXTLIB = contextlib.contextmanager.__code__.co_filename


@dataclass(eq=False)
class Opener:
    """The frames of an open ``with`` statement. They live as long as it is open, since another
    frame at the address of a dead one would pass for it. Only the statement holds them, so that one
    that was abandoned with all its variables is collected, and ends."""

    frame: FrameType
    home: FrameType | None

    def ended(self) -> bool:
        """Whether ``home`` has returned."""
        if self.home is None:
            return False
        last = self.home.f_code.co_code[self.home.f_lasti]
        return dis.opname[last] in ("RETURN_VALUE", "RETURN_CONST")


@dataclass(eq=False)
class Block(Generic[T]):
    """An open ``with`` statement. ``frame`` is the one that it stands in, ``home`` the generator or
    coroutine around that (or itself), without which nothing is inside the statement."""

    value: T
    frame: Key
    home: Key | None
    where: Here
    opener: weakref.ref[Opener]

    def may_hold(self, running: set[Key]) -> bool:
        """Whether its value may hold although its own frame is not running: a helper opened it and
        has returned, to this thread or task and to the generator that is running."""
        return self.where.now() and (self.home is None or self.home in running)

    def lost(self) -> bool:
        """Whether it is still open although all that it could hold in has ended."""
        if self.home is None:
            return self.where.gone()
        opener = self.opener()
        return opener is not None and opener.ended()


class Held(Generic[T]):
    """Values that ``with`` statements hold open.

    Context variables cannot tell a suspended generator from its caller, so the call stack does: a
    value holds where the frame of its statement is running, on whichever thread that is. One that
    a helper opened before it returned (``__init__``, a cell of a notebook) holds in its thread and
    asyncio task.
    """

    def __init__(self) -> None:
        self._blocks: list[Block[T]] = []

    @contextmanager
    def hold(self, value: T) -> Generator[None]:
        frame = _statement(sys._getframe())
        opener = Opener(frame, home := _home(frame))
        key = None if home is None else _key(home)
        block = Block(value, _key(frame), key, Here(), weakref.ref(opener))
        self._blocks.append(block)
        try:
            yield
        finally:
            self._blocks.remove(block)

    def get(self) -> list[T]:
        """What holds here: nothing, the value of the innermost statement, or several values where
        nobody can tell which of them is meant."""
        blocks = list(self._blocks)
        if not blocks:
            return []
        newest = {block.frame: n for n, block in enumerate(blocks)}
        running: set[Key] = set()
        inner = -1
        for frame in _of_task(sys._getframe()):
            running.add(key := _key(frame))
            if inner < 0 and key in newest:
                inner = newest[key]
                if inner == len(blocks) - 1:
                    break
        later = [b for b in blocks[inner + 1 :] if b.frame not in running and b.may_hold(running)]
        return [block.value for block in (blocks[inner : inner + 1] if inner >= 0 else []) + later]

    def lost(self) -> bool:
        """Whether one is open that can hold nowhere any more."""
        return any(block.lost() for block in list(self._blocks))

    def everywhere(self) -> list[T]:
        return [block.value for block in list(self._blocks)]


def _key(frame: FrameType) -> Key:
    """A frame, without keeping alive what its variables hold."""
    return id(frame), id(frame.f_code)


def _home(frame: FrameType) -> FrameType | None:
    """The generator or coroutine that a frame is part of. A module's statement is part of none:
    IPython runs each one of a cell in a coroutine of its own."""
    for one in _outward(frame):
        if one.f_code.co_name == "<module>":
            break
        if one.f_code.co_flags & _SUSPENDABLE:
            return one
    return None


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _of_task(frame: FrameType) -> Iterator[FrameType]:
    """The frames of this thread or asyncio task: below a task's own stands the event loop."""
    task = current_task()
    root = None if task is None else getattr(task.get_coro(), "cr_frame", None)
    for one in _outward(frame):
        yield one
        if one is root:
            return


def _statement(frame: FrameType) -> FrameType:
    """The frame of the ``with`` statement that is being entered: a context manager's own methods,
    and the generator of one that ``contextlib`` made, only stand for it."""
    while (back := frame.f_back) is not None:
        code = frame.f_code
        made = code.co_flags & _GENERATOR and back.f_code.co_name in _ENTER
        if not (made or code.co_name in _ENTER or code.co_filename == _CONTEXTLIB):
            break
        frame = back
    return frame


opaque_functions(globals())
