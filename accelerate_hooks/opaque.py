"""Keep Dynamo out of the runtime's own frames.

A function between a seam and the original ``forward`` must be *skipped* one by one: it is not
compiled, but what it calls still is. ``torch.compiler.disable(recursive=False)`` says the same, yet
imports Dynamo (over a second) and wraps; a mark on the code object needs neither.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any, TypeVar

import torch

F = TypeVar("F")
_WHY = (
    "a policy of accelerate_hooks acts inside what is compiled: compile with fullgraph=False, or "
    "let policies act on whole models or whole compiled blocks"
)


def _strategy() -> tuple[Any, Any] | None:
    try:
        from torch._C._dynamo import eval_frame as c
    except ImportError:
        return None
    names = ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction")
    if not all(hasattr(c, name) for name in names):
        return None
    skip = c._FrameExecStrategy(c._FrameAction.SKIP, c._FrameAction.DEFAULT)
    return c.set_code_exec_strategy, skip


_STRATEGY = _strategy()


def _mark(code: types.CodeType) -> None:
    """Skip a code object and those of the functions that are defined inside it."""
    if _STRATEGY is not None:
        _STRATEGY[0](code, _STRATEGY[1])
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _mark(constant)


def opaque(fn: F) -> F:
    """Mark a function so that Dynamo breaks the graph at a call of it, does not compile its frame,
    and goes on compiling what it calls."""
    code = getattr(fn, "__code__", None)
    if code is None:
        return fn
    if _STRATEGY is not None:
        _mark(code)
        fn._torchdynamo_disable = True  # type: ignore[attr-defined]
        fn._torchdynamo_disable_msg = _WHY  # type: ignore[attr-defined]
    else:
        import torch._dynamo

        torch._dynamo.skip(fn)  # type: ignore[arg-type]
    return fn


def uncompiled(fn: F) -> F:
    """Run a function, and all that it calls, outside Dynamo: for arithmetic that is no part of the
    model's own frames (a kernel, a decision). Without Dynamo at work it is the function itself."""
    inner = None

    @functools.wraps(fn)  # type: ignore[arg-type]
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal inner
        if "torch._dynamo" not in sys.modules:
            return fn(*args, **kwargs)  # type: ignore[operator]
        if inner is None:
            inner = torch.compiler.disable(fn)
        return inner(*args, **kwargs)  # type: ignore[misc]

    return opaque(run)  # type: ignore[return-value]


def opaque_members(owner: type) -> None:
    """Mark every function that a class defines."""
    for value in list(vars(owner).values()):
        if isinstance(value, (staticmethod, classmethod)):
            opaque(value.__func__)
        elif isinstance(value, property):
            for part in (value.fget, value.fset):
                opaque(part)
        elif isinstance(value, types.FunctionType):
            opaque(value)


def opaque_functions(namespace: dict[str, Any]) -> None:
    """Mark every function and method that a module defines; call with ``globals()`` at its end."""
    for value in list(namespace.values()):
        if getattr(value, "__module__", None) != namespace["__name__"]:
            continue
        if isinstance(value, type):
            opaque_members(value)
        else:
            opaque(value)
