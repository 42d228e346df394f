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
