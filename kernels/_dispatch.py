"""Which implementation of an op runs: Triton, or PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections import Counter

import torch

CHOICES = ("auto", "torch", "triton")
FALLBACKS: Counter[tuple[str, str]] = Counter()
"""How often Triton could not take what it was given, by (op, reason)."""


class KernelError(ValueError):
    """What an op was given does not fit together; the message says what, why and what would."""


def require(ok: bool, message: str) -> None:
    if not ok:
        raise KernelError(message)


def wanted() -> str:
    """``ACCELERATE_HOOKS_KERNELS``: ``auto`` (Triton on CUDA), ``torch`` or ``triton``."""
    value = os.environ.get("ACCELERATE_HOOKS_KERNELS", "auto").strip().lower() or "auto"
    require(
        value in CHOICES, f"ACCELERATE_HOOKS_KERNELS={value!r}; give one of {', '.join(CHOICES)}"
    )
    return value


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU (read by Triton when it decorates)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


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
        FALLBACKS[op, unfit] += 1
    return unfit is None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
