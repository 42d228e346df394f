"""Which implementation of an op runs: Triton, our C, or PyTorch."""

from __future__ import annotations

import contextvars
import functools
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.compiler import is_dynamo_compiling

from accelerate_hooks.kernels import _native as native

P = ParamSpec("P")
T = TypeVar("T")

CHOICES = ("auto", "torch", "triton")
FALLBACKS: Counter[tuple[str, str]] = Counter()
"""How often Triton or C could not take what it was given, by (op, reason)."""
_HEARD: contextvars.ContextVar[set[tuple[str, str]] | None] = contextvars.ContextVar(
    "accelerate_hooks_heard", default=None
)

_LIBRARY = torch.library.Library("accelerate_hooks", "FRAGMENT")


def operator(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``torch.ops.accelerate_hooks.<name>`` runs the function, on any device; its annotations are
    the schema. (`torch.library.custom_op` does the same with a check of every argument at each
    call: 0.1 ms where caches are cold, as between two layers of a model.)"""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(f"{name}{schema}")
        # a compiler that is at work on the caller's code leaves ours alone
        body = torch._disable_dynamo(in_given_dtype(function))
        _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        return function

    return register


def in_given_dtype(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function of tensors without autocast: it says itself in which dtype it computes."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        device = next((t.device.type for t in tensors), "cpu")
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


# bound here: behind work that has emptied the caches each name that is looked up takes its time
_listeners = (
    torch.is_grad_enabled,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._get_tracing_state,
    torch._C._is_any_autocast_enabled,
)


def overheard() -> bool:
    """Whether PyTorch has to see the operators of this thread: a compiler, mode, transform, tracer,
    profiler, autocast or derivative is at work. Where none is, a function may stand for its op."""
    if is_dynamo_compiling() or forward_ad._current_level >= 0 or profiler._is_profiler_enabled:
        return True
    for is_there in _listeners:  # noqa: SIM110 (a generator costs as much as the rest)
        if is_there():
            return True
    return False


class KernelError(ValueError):
    """What an op was given does not fit together; the message says what, why and what would."""


def require(ok: bool, message: str | Callable[[], str]) -> None:
    """A message that tells sizes is a function: where `torch.compile` traces they may be symbols,
    which cannot be written."""
    if not ok:
        raise KernelError(message if isinstance(message, str) else message())


def require_tensors(**given: object) -> None:
    for name, t in given.items():
        fine = isinstance(t, Tensor) and t.layout == torch.strided
        require(fine, lambda name=name, t=t: f"{name} is {described(t)}; give a dense tensor")


def require_scale(scale: object) -> None:
    ok = scale is None or (isinstance(scale, (int, float, torch.SymFloat)) and scale is not True)
    require(ok, lambda: f"scale is {described(scale)}; give a number")


def described(given: object) -> str:
    """What an argument is, for a message."""
    if isinstance(given, Tensor):
        return f"{given.dtype} {tuple(given.shape)} on {given.device}"
    return f"a {type(given).__name__}"


def are_sizes(given: object) -> bool:
    """Whether this is a tuple (or list) of integers."""
    whole = (int, torch.SymInt)
    return isinstance(given, tuple | list) and all(isinstance(size, whole) for size in given)


def require_no_gradient(op: str, *tensors: Tensor | None) -> None:
    recorded = torch.is_grad_enabled()
    for t in tensors:
        if t is None:
            continue
        if recorded and t.requires_grad:
            raise KernelError(f"{op} has no backward; call it under torch.no_grad()")
        if forward_ad.unpack_dual(t).tangent is not None:
            raise KernelError(f"{op} has no derivative; call it without tangents (jvp, make_dual)")


def wanted() -> str:
    """``ACCELERATE_HOOKS_KERNELS``: ``auto`` (Triton on CUDA, C on a CPU), ``torch`` or
    ``triton``."""
    given = os.environ.get("ACCELERATE_HOOKS_KERNELS", "auto")
    value = given if given in CHOICES else given.strip().lower() or "auto"
    if value not in CHOICES:
        raise KernelError(f"ACCELERATE_HOOKS_KERNELS={value!r}; give one of {', '.join(CHOICES)}")
    return value


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU (read by Triton when it decorates)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@contextmanager
def heard() -> Generator[set[tuple[str, str]]]:
    """The ops that run without their fast kernel inside, in this thread and task, and why."""
    found: set[tuple[str, str]] = set()
    token = _HEARD.set(found)
    try:
        yield found
    finally:
        _HEARD.reset(token)


def _fall_back(op: str, why: str) -> None:
    FALLBACKS[op, why] += 1
    found = _HEARD.get()
    if found is not None:
        found.add((op, why))


def use_triton(op: str, device: torch.device, unfit: str | None) -> bool:
    """Whether ``op`` runs in Triton. ``unfit`` says why these arguments cannot; that is counted
    wherever Triton would have run otherwise."""
    choice = wanted()
    if choice == "torch" or (choice == "auto" and device.type != "cuda"):
        return False
    if unfit is None and device.type != "cuda" and not interpreted():
        unfit = f"no Triton on {device.type} (TRITON_INTERPRET=1 runs it, slowly, in Python)"
    if unfit is None and not _has_triton():
        unfit = "Triton is not installed"
    if unfit is not None:
        _fall_back(op, unfit)
    return unfit is None


def use_native(op: str, source: str, unfit: str | None) -> bool:
    """Whether ``op`` runs on the CPU in our C (``source``); counted where it would but cannot."""
    if wanted() == "torch":
        return False
    if unfit is None:
        try:
            native.library(source)
        except native.Unavailable as error:
            unfit = str(error)
    if unfit is not None:
        _fall_back(op, unfit)
    return unfit is None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
