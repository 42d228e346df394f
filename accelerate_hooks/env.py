"""The environment variables."""

from __future__ import annotations

import os

from accelerate_hooks.errors import SpecError

KERNELS = ("auto", "torch", "triton")


def disabled() -> bool:
    """``ACCELERATE_HOOKS=0``: `enable` returns an inert session."""
    return os.environ.get("ACCELERATE_HOOKS", "").strip() == "0"


def kernels() -> str:
    """``ACCELERATE_HOOKS_KERNELS``: ``auto`` (the default), ``torch`` or ``triton``."""
    chosen = os.environ.get("ACCELERATE_HOOKS_KERNELS", "auto").strip().lower() or "auto"
    if chosen not in KERNELS:
        raise SpecError(f"ACCELERATE_HOOKS_KERNELS={chosen!r}; give one of {', '.join(KERNELS)}")
    return chosen
