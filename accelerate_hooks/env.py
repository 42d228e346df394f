"""The environment variables."""

from __future__ import annotations

import os

from accelerate_hooks.errors import SpecError


def disabled() -> bool:
    """``ACCELERATE_HOOKS=0``: `enable` returns an inert session. SpecError for a value that says
    neither that nor (``1``, or nothing) the opposite."""
    value = os.environ.get("ACCELERATE_HOOKS", "").strip()
    if value not in ("", "0", "1"):
        raise SpecError(f"ACCELERATE_HOOKS={value!r}; give 0 to switch policies off, else 1")
    return value == "0"


def check_kernels() -> None:
    """Refuse an ``ACCELERATE_HOOKS_KERNELS`` that would fail in the first forward."""
    choice = os.environ.get("ACCELERATE_HOOKS_KERNELS", "").strip().lower()
    if choice not in ("", "auto", "torch", "triton"):
        raise SpecError(
            f"ACCELERATE_HOOKS_KERNELS={choice!r}; give one of auto, torch, triton, or unset it"
        )
