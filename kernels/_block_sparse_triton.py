"""The Triton kernel of `block_sparse_attention`: one program a tile of queries and head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelerate_hooks.kernels._dispatch import interpreted

_LOG2E = 1.4426950408889634


@triton.jit
def _kernel(
    q, k, v, counts, indices, key_mask, out, lse,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    o_b, o_h, o_n, o_d, c_b, c_h, c_r, i_b, i_h, i_r, i_c, m_b, m_m,
    heads, groups, n, m, d, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    WIDTH: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, LSE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    row = tile * TILE_Q // BLOCK_Q
    at = tile * TILE_Q + tl.arange(0, TILE_Q)
    lane = tl.arange(0, WIDTH)
    inside = (at < n)[:, None] & (lane < d)[None, :]
    mine = tl.load(
        q + b * q_b + h * q_h + at.to(tl.int64)[:, None] * q_n + lane[None, :] * q_d,
        mask=inside, other=0.0,
    )  # fmt: skip
    if UPCAST:
        mine = mine.to(tl.float32)
    k += b * k_b + (h // groups) * k_h
    v += b * v_b + (h // groups) * v_h
    count = tl.load(counts + b * c_b + h * c_h + row * c_r)
    list_of_blocks = indices + b * i_b + h * i_h + row * i_r
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    acc = tl.zeros([TILE_Q, WIDTH], tl.float32)
    for step in range(0, count * (BLOCK_K // TILE_K)):
        block = tl.load(list_of_blocks + step // (BLOCK_K // TILE_K) * i_c)
        j = block * BLOCK_K + step % (BLOCK_K // TILE_K) * TILE_K + tl.arange(0, TILE_K)
        keys = tl.load(
            k + j.to(tl.int64)[None, :] * k_n + lane[:, None] * k_d,
            mask=(j < m)[None, :] & (lane < d)[:, None], other=0.0,
        )  # fmt: skip
        if UPCAST:
            keys = keys.to(tl.float32)
        scores = tl.dot(mine, keys, input_precision=PRECISION) * scale
        exists = j < m
        if MASKED:
            kept = tl.load(key_mask + b * m_b + j.to(tl.int64) * m_m, mask=exists, other=0)
            exists = exists & (kept != 0)
        seen = exists[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= at[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        # a row that has seen nothing yet has no maximum to take off
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        values = tl.load(
            v + j.to(tl.int64)[:, None] * v_n + lane[None, :] * v_d,
            mask=exists[:, None] & (lane < d)[None, :], other=0.0,
        )  # fmt: skip
        if UPCAST:
            values = values.to(tl.float32)
        acc = acc * shrink[:, None] + tl.dot(
            weights.to(values.dtype), values, input_precision=PRECISION
        )
        total = total * shrink + tl.sum(weights, 1)
        top = new
    nothing = total == 0.0
    result = acc / tl.where(nothing, 1.0, total)[:, None]
    tl.store(
        out + b * o_b + h * o_h + at.to(tl.int64)[:, None] * o_n + lane[None, :] * o_d,
        result.to(out.dtype.element_ty), mask=inside,
    )  # fmt: skip
    if LSE:
        log_sum = (top + tl.log2(tl.where(nothing, 1.0, total))) / 1.4426950408889634
        log_sum = tl.where(nothing, float("-inf"), log_sum)
        tl.store(lse + (b * heads + h) * n + at, log_sum, mask=at < n)


def launch(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, key_mask: Tensor | None,
    block_q: int, block_k: int, is_causal: bool, scale: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    (batch, heads, n, d), m = q.shape, k.shape[2]
    if out.numel() == 0:
        return
    counts = counts.expand(batch, heads, -1)
    indices = indices.expand(batch, heads, -1, -1)
    masked = key_mask is not None
    kept = counts if key_mask is None else key_mask.view(torch.uint8)
    block_q = min(block_q, max(16, triton.next_power_of_2(n)))
    block_k = min(block_k, max(16, triton.next_power_of_2(m)))
    tile_q, tile_k = min(block_q, 128), min(block_k, 64)
    width = max(16, triton.next_power_of_2(d))
    _kernel[(triton.cdiv(n, tile_q), batch * heads)](
        q, k, v, counts, indices, kept, out, lse,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(), *counts.stride(), *indices.stride(),
        *(kept.stride() if masked else (0, 0)),
        heads, heads // k.shape[1], n, m, d, scale * _LOG2E,
        BLOCK_Q=block_q, BLOCK_K=block_k, TILE_Q=tile_q, TILE_K=tile_k, WIDTH=width,
        CAUSAL=is_causal, MASKED=masked, LSE=lse.numel() > 0,
        PRECISION="ieee" if q.dtype.itemsize == 4 else "tf32",
        # the interpreter takes a product of bfloat16 for one of its bits as integers
        UPCAST=interpreted() and q.dtype == torch.bfloat16,
        num_warps=8 if tile_q * width >= 128 * 128 else 4, num_stages=2 if width > 128 else 3,
    )  # fmt: skip
