"""Attention over chosen blocks of keys.

For a query ``i`` of block row ``r = i // block_q`` let ``A(i)`` be the keys ``j`` whose block
``j // block_k`` is chosen in row ``r`` (and ``j <= i`` where causal). Then

    lse[i] = log sum_{j in A(i)} exp(scale * q[i] . k[j])
    out[i] = sum_{j in A(i)} exp(scale * q[i] . k[j] - lse[i]) v[j]

and ``out[i] = 0``, ``lse[i] = -inf`` where ``A(i)`` is empty. With every block chosen this is
``torch.nn.functional.scaled_dot_product_attention``. Sums are in float32 (float64 for float64).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, overload

import torch
from torch import Tensor

from accelerate_hooks.kernels._dispatch import require, use_triton

BlockMask = Tensor | tuple[Tensor, Tensor]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BUFFER = 1 << 21  # bytes of gathered keys (as many of values): what stays in the caches


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, *,
    block_size: int | tuple[int, int] = ..., is_causal: bool = ...,
    scale: float | None = ..., enable_gqa: bool = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, *,
    block_size: int | tuple[int, int] = ..., is_causal: bool = ...,
    scale: float | None = ..., enable_gqa: bool = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    block_size: int | tuple[int, int] = 128,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention in which every block of queries sees only its chosen blocks of
    keys.

    ``q`` is ``[B, Hq, N, D]``, ``k`` and ``v`` are ``[B, Hkv, M, D]``: float32, float16 or
    bfloat16, any strides. ``block_mask`` is a bool tensor ``[B or 1, Hq or 1, R, C]`` with
    ``R = ceil(N / block_q)`` and ``C = ceil(M / block_k)``, or (counts, indices) as `to_indices`
    makes them. ``block_size`` is (queries, keys), or one number for both; the last blocks may be
    ragged. Causal means ``j <= i``, as in PyTorch. ``scale`` is ``1 / sqrt(D)`` by default. With
    ``enable_gqa`` head ``h`` of the queries uses head ``h // (Hq / Hkv)`` of keys and values.
    Returns ``[B, Hq, N, D]``, and with ``return_lse`` the log of the sum of exponentials
    ``[B, Hq, N]`` in float32. There is no backward: call it under ``torch.no_grad()``.
    """
    bq, bk = (block_size, block_size) if isinstance(block_size, int) else block_size
    _check(q, k, v, bq, bk, enable_gqa)
    rows, columns = math.ceil(q.shape[2] / bq), math.ceil(k.shape[2] / bk)
    if isinstance(block_mask, Tensor):
        require(
            block_mask.dtype == torch.bool,
            f"block_mask is {block_mask.dtype}; give bools (True: attend), or (counts, indices)",
        )
        _check_mask(tuple(block_mask.shape), (*q.shape[:2], rows, columns), "block_mask")
        counts, indices = to_indices(block_mask)
    else:
        counts, indices = block_mask
        _check_mask(tuple(counts.shape), (*q.shape[:2], rows), "counts")
        _check_mask(tuple(indices.shape), (*counts.shape, columns), "indices")
    scale = 1.0 / math.sqrt(max(q.shape[3], 1)) if scale is None else scale
    out, lse = torch.ops.accelerate_hooks.block_sparse_attention(
        q, k, v, counts, indices, bq, bk, is_causal, scale
    )
    return (out, lse) if return_lse else out


def to_indices(block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(counts ``[..., R]``, indices ``[..., R, C]``), int32, of a bool ``[..., R, C]``: how many
    blocks a row has, and which, ascending, before those it has not."""
    counts = block_mask.sum(-1, dtype=torch.int32)
    order = block_mask.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    indices = order.to(torch.int32)
    return counts, indices


def to_mask(counts: Tensor, indices: Tensor) -> Tensor:
    """The inverse of `to_indices`."""
    columns = indices.shape[-1]
    chosen = torch.arange(columns, device=counts.device) < counts.unsqueeze(-1)
    return torch.zeros_like(chosen).scatter_(-1, indices.long(), chosen)


def reference(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor,
    block_q: int, block_k: int, is_causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula, with every score in memory."""
    n, m, groups = q.shape[2], k.shape[2], q.shape[1] // max(k.shape[1], 1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (t.to(wide).repeat_interleave(groups, 1) for t in (k, v))
    seen = to_mask(counts, indices)
    seen = seen.repeat_interleave(block_q, 2)[:, :, :n].repeat_interleave(block_k, 3)[..., :m]
    if is_causal:
        seen = seen & torch.ones(n, m, dtype=torch.bool, device=q.device).tril()
    scores = (q.to(wide) @ k.transpose(-1, -2) * scale).masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1) if m else scores.new_full(scores.shape[:-1], -math.inf)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)).exp()
    return (weights @ v).to(q.dtype), lse


@torch.library.custom_op("accelerate_hooks::block_sparse_attention", mutates_args=())
def _op(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor,
    block_q: int, block_k: int, is_causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = (q, k, v, counts, indices, block_q, block_k, is_causal, scale)
    if use_triton("block_sparse_attention", q.device, _unfit(q, block_q, block_k)):
        from accelerate_hooks.kernels._block_sparse_triton import launch

        out = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        launch(*given, out, lse)
        return out, lse
    if q.device.type == "cpu" and q.dtype in _DTYPES:
        return gathered(*given)
    return reference(*given)


@_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor,
    block_q: int, block_k: int, is_causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)


def gathered(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor,
    block_q: int, block_k: int, is_causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The CPU path: block rows with equally many blocks go together; the keys and values of a few
    rows at a time are copied side by side, so that dense matrix products find them in the caches.
    """
    (batch, heads, n, d), m = q.shape, k.shape[2]
    rows, columns = math.ceil(n / block_q), math.ceil(m / block_k)
    out = q.new_empty(batch, heads, rows * block_q, d)
    lse = q.new_empty(batch, heads, rows * block_q, dtype=torch.float32)
    if out.numel() == 0:
        return out[:, :, :n], lse[:, :, :n]
    if is_causal:  # blocks with no key that any query of the row may see
        mask = to_mask(counts, indices)
        first = torch.arange(columns) * block_k
        last = torch.arange(rows).add(1).mul(block_q).clamp(max=n).sub(1)
        counts, indices = to_indices(mask & (first <= last.unsqueeze(1)))
    counts = counts.expand(batch, heads, rows).reshape(-1)
    indices = indices.expand(batch, heads, rows, columns).reshape(-1, columns)
    kv_heads = k.shape[1]
    q_blocks = _blocks(q, block_q, rows)
    k_blocks, v_blocks = (_blocks(t, block_k, columns) for t in (k, v))
    out_blocks, lse_blocks = out.view(-1, block_q, d), lse.view(-1, block_q)
    head = torch.arange(batch * heads).repeat_interleave(rows)
    base = (head // heads * kv_heads + head % heads // (heads // kv_heads)) * columns
    row = torch.arange(rows).repeat(batch * heads)
    ragged = m % block_k != 0
    room = (q.new_empty(0), q.new_empty(0))  # one for all parts: fresh pages cost more than copies
    for count, jobs in _groups(counts):
        if count == 0:
            out_blocks[jobs], lse_blocks[jobs] = 0.0, -math.inf
            continue
        block = block_k * d
        for part in jobs.split(max(2, _BUFFER // (count * block * q.element_size()))):
            chosen = indices[part, :count]
            where = (base[part].unsqueeze(1) + chosen).reshape(-1)
            if room[0].numel() < len(where) * block:
                room = (q.new_empty(len(where) * block), q.new_empty(len(where) * block))
            keys, values = (
                torch.index_select(t, 0, where, out=space[: len(where) * block].view(-1, block))
                for t, space in zip((k_blocks, v_blocks), room, strict=True)
            )
            keys, values = (t.view(len(part), -1, d) for t in (keys, values))
            bias = None
            if is_causal or ragged:
                bias = _bias(chosen, row[part], block_q, block_k, m, is_causal)
            out_blocks[part], lse_blocks[part] = _dense(
                q_blocks.index_select(0, part).view(-1, block_q, d), keys, values, bias, scale
            )
    return out[:, :, :n].contiguous(), lse[:, :, :n].contiguous()


def _groups(counts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(count, the jobs that have it) in the order of the counts."""
    order = counts.argsort(stable=True)
    values, sizes = counts[order].unique_consecutive(return_counts=True)
    return zip(values.tolist(), order.split(sizes.tolist()), strict=True)


def _blocks(t: Tensor, size: int, count: int) -> Tensor:
    """``[B, H, tokens, D]`` as ``[B * H * count, size * D]``, the last block filled with zeros."""
    missing = size * count - t.shape[2]
    t = torch.nn.functional.pad(t, (0, 0, 0, missing)) if missing else t.contiguous()
    return t.view(-1, size * t.shape[3])


def _bias(
    chosen: Tensor, row: Tensor, block_q: int, block_k: int, m: int, is_causal: bool
) -> Tensor | None:
    """0 where a query of the row sees a key of the chosen blocks, else -inf; None if all do."""
    j = (chosen.unsqueeze(-1) * block_k + torch.arange(block_k)).flatten(1).unsqueeze(1)
    seen = j < m
    if is_causal:
        i = row.view(-1, 1, 1) * block_q + torch.arange(block_q).view(1, -1, 1)
        seen = seen & (j <= i)
    if bool(seen.all()):
        return None
    return torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of ``[jobs, queries, D]`` to ``[jobs, keys, D]`` and its lse."""
    bias = None if bias is None else bias.to(q.dtype).unsqueeze(1).expand(-1, 1, q.shape[1], -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), attn_mask=bias, scale=scale
    )
    return out.squeeze(1), lse.view(q.shape[:2])


def _unfit(q: Tensor, block_q: int, block_k: int) -> str | None:
    """Why Triton cannot take this, or None."""
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype}"
    if not 1 <= q.shape[3] <= 256:
        return f"head size {q.shape[3]} (1 to 256)"
    if any(b < 16 or b & (b - 1) for b in (block_q, block_k)):
        return f"block size {block_q} x {block_k} (powers of two from 16)"
    return None


def _check(q: Tensor, k: Tensor, v: Tensor, bq: int, bk: int, gqa: bool) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    require(q.ndim == k.ndim == v.ndim == 4, f"{shapes}: give [batch, heads, tokens, head size]")
    require(k.shape == v.shape, f"{shapes}: k and v differ in shape")
    require(
        q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3],
        f"{shapes}: batch and head size must be those of q",
    )
    require(
        q.dtype == k.dtype == v.dtype and q.is_floating_point(),
        f"q {q.dtype}, k {k.dtype}, v {v.dtype}: give one floating-point dtype",
    )
    require(q.device == k.device == v.device, f"q, k, v are on {q.device}, {k.device}, {v.device}")
    require(bq > 0 and bk > 0, f"block_size=({bq}, {bk}): give positive numbers")
    hq, hkv = q.shape[1], k.shape[1]
    if gqa:
        require(hkv > 0 and hq % hkv == 0, f"{shapes}: Hq must be a multiple of Hkv")
    else:
        require(hq == hkv, f"{shapes}: other numbers of heads; say enable_gqa=True for groups")
    require(
        not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)),
        "block_sparse_attention has no backward; call it under torch.no_grad()",
    )


def _check_mask(shape: tuple[int, ...], full: tuple[int, ...], name: str) -> None:
    fits = len(shape) == len(full) and shape[2:] == full[2:]
    fits = fits and all(have in (1, want) for have, want in zip(shape[:2], full[:2], strict=True))
    require(fits, f"{name} is {shape}; give {full}, or 1 in the place of batch or heads")
