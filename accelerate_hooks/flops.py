"""Floating-point operations of a forward, counted from the shapes that torch functions see.

A function mode, not a dispatch mode: it looks at arguments and changes no kernel, so that a
counted forward is bit-equal to a plain one. One multiply-add counts as two operations; only matrix
products, convolutions and attention are counted.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from accelerate_hooks.opaque import opaque_functions


def _matmul(out: torch.Tensor, given: list[Any]) -> int:
    return 2 * out.numel() * given[0].shape[-1]


def _added(out: torch.Tensor, given: list[Any]) -> int:
    return 2 * out.numel() * given[1].shape[-1]


def _conv(out: torch.Tensor, given: list[Any]) -> int:
    return 2 * out.numel() * math.prod(given[1].shape[1:])


def _sdpa(out: torch.Tensor, given: list[Any]) -> int:
    query, key = given[:2]
    scores = math.prod(query.shape[:-1]) * key.shape[-2]
    return 2 * scores * (query.shape[-1] + out.shape[-1])


def _mha(out: torch.Tensor, given: list[Any]) -> int:
    """Of ``[length, batch, width]``: four projections, scores and their product with the values."""
    query, key, value = given[:3]
    width, batch = query.shape[-1], query.numel() // query.shape[0] // query.shape[-1]
    projected = 2 * (2 * query.numel() + key.numel() + value.numel()) * width
    return projected + 4 * batch * query.shape[0] * key.shape[0] * width


_FORMULAS: dict[Any, Callable[[torch.Tensor, list[Any]], int]] = {
    F.linear: _matmul,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    torch.bmm: _matmul,
    torch.Tensor.bmm: _matmul,
    torch.addmm: _added,
    torch.baddbmm: _added,
    torch.conv1d: _conv,
    torch.conv2d: _conv,
    torch.conv3d: _conv,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.scaled_dot_product_attention: _sdpa,
    F.multi_head_attention_forward: _mha,
}
for _owner, _name in ((F, "grouped_mm"), (torch, "_grouped_mm")):  # the first calls the second
    if hasattr(_owner, _name):
        _FORMULAS[getattr(_owner, _name)] = _matmul


_FAST = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


class FlopMode(TorchFunctionMode):
    """Counts into ``total`` while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = _FORMULAS.get(func)
        if formula is not None:
            first = out[0] if isinstance(out, tuple) else out
            self.total += formula(first, [*args, *kwargs.values()])
        return out


def can_count(model: nn.Module) -> bool:
    """Not under Dynamo: a mode entered in one forward only would make it compile twice. Not where
    PyTorch's own attention may take its fast path, since a mode turns that off."""
    if torch.backends.mha.get_fastpath_enabled() and any(
        isinstance(module, _FAST) for module in model.modules()
    ):
        return False
    if torch.compiler.is_compiling() or any(
        module._compiled_call_impl is not None for module in model.modules()
    ):
        return False
    if "torch._dynamo" not in sys.modules:
        return True
    callback = torch._C._dynamo.eval_frame.get_eval_frame_callback  # type: ignore[attr-defined]
    return callback() in (None, False)


opaque_functions(globals())
