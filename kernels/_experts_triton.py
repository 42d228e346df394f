"""The Triton kernels of `skip_experts`: grouped products over the kept slots, sorted by expert.

No size is read by the host. Slots that cost nothing are sorted behind the last expert, and there
are as many programs as the slots could need; those without a tile return at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelerate_hooks.kernels._dispatch import interpreted


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _plain(x, ACT: tl.constexpr):
    if ACT == "silu":
        return x * _sigmoid(x)
    elif ACT == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif ACT == "relu2":
        kept = tl.where(x < 0.0, 0.0, x)
        return kept * kept
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:  # gelu_tanh: (1 + tanh(z)) / 2 = sigmoid(2 z)
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _product(
    acc, rows, rows_mask, r_stride, matrix, columns, columns_mask, c_stride, inner_stride, inner,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``acc + rows @ matrix.T``: both are read along ``inner``."""
    for start in range(0, inner, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            rows[:, None] + j[None, :] * r_stride,
            mask=rows_mask[:, None] & (j < inner)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            matrix + columns.to(tl.int64)[None, :] * c_stride + j[:, None] * inner_stride,
            mask=columns_mask[None, :] & (j < inner)[:, None], other=0.0,
        )  # fmt: skip
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _up(
    x, up, bias, features, order, tile_expert, tile_start, tile_end,
    x_t, x_h, u_e, u_f, u_h, b_e, b_f, f_s, hidden, width, k,
    ACT: tl.constexpr, GATED: tl.constexpr, CLAMPED: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    start, end = tl.load(tile_start + tl.program_id(1)), tl.load(tile_end + tl.program_id(1))
    if start >= end:
        return
    expert = tl.load(tile_expert + tl.program_id(1)).to(tl.int64)
    place = start + tl.arange(0, BLOCK_M)
    real = place < end
    slot = tl.load(order + place, mask=real, other=0)
    rows = x + (slot // k).to(tl.int64) * x_t
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    some = i < width
    matrix = up + expert * u_e
    # where the gate and the linear half of feature i lie: side by side, or in two halves
    first = i * 2 if CLAMPED else i
    second = first + 1 if CLAMPED else first + width
    gate = _product(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), rows, real, x_h, matrix, first, some, u_f, u_h,
        hidden, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    if BIASED:
        gate += tl.load(bias + expert * b_e + first * b_f, mask=some, other=0.0).to(tl.float32)
    if GATED or CLAMPED:
        linear = _product(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), rows, real, x_h, matrix, second, some, u_f,
            u_h, hidden, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
        if BIASED:
            linear += tl.load(bias + expert * b_e + second * b_f, mask=some, other=0.0).to(
                tl.float32
            )
        if CLAMPED:
            gate = tl.where(gate > 7.0, 7.0, gate)  # NaN stays
            linear = tl.where(linear > 7.0, 7.0, tl.where(linear < -7.0, -7.0, linear))
            result = gate * _sigmoid(1.702 * gate) * (linear + 1.0)
        else:
            result = _plain(gate, ACT) * linear
    else:
        result = _plain(gate, ACT)
    tl.store(
        features + place.to(tl.int64)[:, None] * f_s + i[None, :],
        result.to(features.dtype.element_ty), mask=real[:, None] & some[None, :],
    )  # fmt: skip


@triton.jit
def _down(
    features, down, bias, weights, out, order, tile_expert, tile_start, tile_end,
    f_s, d_e, d_h, d_i, b_e, b_h, hidden, width,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    start, end = tl.load(tile_start + tl.program_id(1)), tl.load(tile_end + tl.program_id(1))
    if start >= end:
        return
    expert = tl.load(tile_expert + tl.program_id(1)).to(tl.int64)
    place = start + tl.arange(0, BLOCK_M)
    real = place < end
    h = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    some = h < hidden
    y = _product(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), features + place.to(tl.int64) * f_s, real, 1,
        down + expert * d_e, h, some, d_h, d_i, width, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    if BIASED:
        y += tl.load(bias + expert * b_e + h * b_h, mask=some, other=0.0).to(tl.float32)
    slot = tl.load(order + place, mask=real, other=0)
    y *= tl.load(weights + slot, mask=real, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out + slot.to(tl.int64)[:, None] * hidden + h[None, :], y,
        mask=real[:, None] & some[None, :],
    )  # fmt: skip


def launch(
    hidden: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, act: str, gated: bool, transposed: bool,
) -> Tensor:  # fmt: skip
    (tokens, size), k, experts = hidden.shape, indices.shape[1], len(up)
    indices = indices.long()
    if transposed:
        up, down = up.mT, down.mT
    width, slots = down.shape[2], tokens * k
    per_slot = torch.zeros(slots, size, dtype=torch.float32, device=hidden.device)
    if slots == 0:
        return hidden.new_zeros(hidden.shape)
    # a tile of more rows than an expert has slots on average is mostly empty
    block_m = 16 if slots <= 32 * experts else 64
    order, *tiles = tiled(indices, weights, experts, block_m)
    features = hidden.new_empty(slots, width)
    block_n, block_k = 64, 64 if hidden.dtype.itemsize == 2 else 32
    how = {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
        "PRECISION": "ieee" if hidden.dtype.itemsize == 4 else "tf32",
        # the interpreter takes a product of bfloat16 for one of its bits as integers
        "UPCAST": interpreted() and hidden.dtype == torch.bfloat16,
        "num_warps": 4, "num_stages": 3,
    }  # fmt: skip
    weights = weights.contiguous()
    first = up if up_bias is None else up_bias
    _up[(triton.cdiv(width, block_n), len(tiles[0]))](
        hidden, up, first, features, order, *tiles,
        *hidden.stride(), *up.stride(), *first.stride()[:2], features.stride(0), size, width, k,
        ACT=act, GATED=gated, CLAMPED=act == "clamped_swiglu", BIASED=up_bias is not None, **how,
    )  # fmt: skip
    second = down if down_bias is None else down_bias
    _down[(triton.cdiv(size, block_n), len(tiles[0]))](
        features, down, second, weights, per_slot, order, *tiles,
        features.stride(0), *down.stride(), *second.stride()[:2], size, width,
        BIASED=down_bias is not None, **how,
    )  # fmt: skip
    return per_slot.view(tokens, k, size).sum(1).to(hidden.dtype)


def tiled(
    indices: Tensor, weights: Tensor, experts: int, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots ``[T * k]`` in the order of their experts, those that cost nothing last; and of each
    tile of at most ``rows`` slots the expert, the first place and the one behind the last. As many
    tiles as there can be: an empty one begins at its end."""
    kept = (weights != 0) & (indices >= 0) & (indices < experts)
    key = torch.where(kept, indices, experts).flatten()
    order = key.argsort(stable=True).int()
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=key.device)
    counts = counts.scatter_add_(0, key, torch.ones_like(key))[:experts]
    ends = counts.cumsum(0)
    tiles = (counts + rows - 1) // rows
    last = tiles.cumsum(0)
    most = min(len(key), triton.cdiv(len(key), rows) + experts)
    tile = torch.arange(most, device=key.device)
    expert = torch.searchsorted(last, tile, right=True).clamp(max=experts - 1)
    within = tile - (last - tiles)[expert]
    start = (ends - counts)[expert] + within * rows
    end = torch.minimum(start + rows, ends[expert])
    start = torch.where(tile < last[-1], start, end)
    return order, expert.int(), start.int(), end.int()
