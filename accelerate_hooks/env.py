"""The environment variables."""

from __future__ import annotations

import os


def disabled() -> bool:
    """``ACCELERATE_HOOKS=0``: `enable` returns an inert session."""
    return os.environ.get("ACCELERATE_HOOKS", "").strip() == "0"
