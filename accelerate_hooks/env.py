"""The environment variables."""

from __future__ import annotations

import os

from accelerate_hooks.errors import SpecError


def disabled() -> bool:
    """``ACCELERATE_HOOKS=0``: `enable` returns an inert session."""
    return os.environ.get("ACCELERATE_HOOKS", "").strip() == "0"


def check_kernels() -> None:
    """Refuse an ``ACCELERATE_HOOKS_KERNELS`` that would fail in the first forward."""
    choice = os.environ.get("ACCELERATE_HOOKS_KERNELS", "").strip().lower()
    if choice not in ("", "auto", "torch", "triton"):
        raise SpecError(
            f"ACCELERATE_HOOKS_KERNELS={choice!r}; give one of auto, torch, triton, or unset it"
        )
