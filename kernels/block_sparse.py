"""Attention over chosen blocks of keys.

For a query ``i`` of block row ``r = i // block_q`` let ``A(i)`` be the keys ``j`` whose block
``j // block_k`` is chosen in row ``r`` (and ``j <= i`` where causal). Then

    lse[i] = log sum_{j in A(i)} exp(scale * q[i] . k[j])
    out[i] = sum_{j in A(i)} exp(scale * q[i] . k[j] - lse[i]) v[j]

and ``out[i] = 0``, ``lse[i] = -inf`` where ``A(i)`` is empty. With every block chosen this is
``torch.nn.functional.scaled_dot_product_attention``. Sums are in float32 (float64 for float64).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import ClassVar, Literal, overload

import torch
from torch import Tensor

from accelerate_hooks.kernels import _native as native
from accelerate_hooks.kernels._dispatch import (
    described,
    operator,
    require,
    require_no_gradient,
    require_scale,
    require_tensors,
    use_native,
    use_triton,
)

BlockMask = Tensor | tuple[Tensor, Tensor]
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_LOG2E = 1.4426950408889634
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BUFFER = 1 << 21  # bytes of gathered keys (as many of values): what stays in the caches


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, *,
    block_size: int | tuple[int, int] = ..., is_causal: bool = ...,
    scale: float | None = ..., enable_gqa: bool = ..., key_mask: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, *,
    block_size: int | tuple[int, int] = ..., is_causal: bool = ...,
    scale: float | None = ..., enable_gqa: bool = ..., key_mask: Tensor | None = ...,
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
    key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention in which every block of queries sees only its chosen blocks of
    keys.

    ``q`` is ``[B, Hq, N, D]``, ``k`` and ``v`` are ``[B, Hkv, M, D]``: float32, float16 or
    bfloat16, any strides. ``block_mask`` is a bool tensor ``[B or 1, Hq or 1, R, C]`` with
    ``R = ceil(N / block_q)`` and ``C = ceil(M / block_k)``, or (counts, indices) as `to_indices`
    makes them: the first ``counts`` of a row's indices are distinct, in any order, and the rest is
    not read (on a CPU that is checked). ``block_size`` is (queries, keys), or one number for both;
    the last blocks may be ragged. Causal means ``j <= i``, as in PyTorch. ``scale`` is
    ``1 / sqrt(D)`` by default. With ``enable_gqa`` head ``h`` of the queries uses head
    ``h // (Hq / Hkv)`` of keys and values. ``key_mask`` ``[B or 1, M]`` is False at keys that
    nobody sees (padding): like those of blocks that are not chosen, they and their values may be
    anything. (A value in the future, where causal, has weight 0; if it is infinite that is NaN, as
    in PyTorch.)
    Returns ``[B, Hq, N, D]``, and with ``return_lse`` the log of the sum of exponentials
    ``[B, Hq, N]`` in the dtype of sums. There is no backward: call it under ``torch.no_grad()``.
    """
    sizes = (block_size, block_size) if isinstance(block_size, int) else block_size
    require(
        isinstance(sizes, tuple) and len(sizes) == 2 and all(type(b) is int for b in sizes),
        lambda: f"block_size={block_size!r}; give an integer, or (queries, keys)",
    )
    bq, bk = sizes
    check(q, k, v, bq, bk, enable_gqa)
    require_no_gradient("block_sparse_attention", q, k, v)
    full = (*q.shape[:2], math.ceil(q.shape[2] / bq), math.ceil(k.shape[2] / bk))
    if isinstance(block_mask, tuple) and len(block_mask) == 2:
        counts, indices = block_mask
        _check_whole(counts, "counts")
        _check_mask(counts, full[:3], q.device, "counts")
        _check_whole(indices, "indices")
        _check_mask(indices, (*counts.shape, full[3]), q.device, "indices")
    else:
        require(
            isinstance(block_mask, Tensor) and block_mask.dtype == torch.bool,
            lambda: (
                f"block_mask is {described(block_mask)}; give bools (True: attend), or "
                "(counts, indices)"
            ),
        )
        _check_mask(block_mask, full, q.device, "block_mask")
        counts, indices = to_indices(block_mask)
    if key_mask is not None:
        check_key_mask(key_mask, k)
        key_mask = key_mask.expand(len(q), -1)
    require_scale(scale)
    require(isinstance(is_causal, bool), f"is_causal={is_causal!r}; give a bool")  # pyright: ignore[reportUnnecessaryIsInstance]
    scale = 1.0 / math.sqrt(max(q.shape[3], 1)) if scale is None else scale
    out, lse = torch.ops.accelerate_hooks.block_sparse_attention(
        q, k, v, counts, indices, key_mask, bq, bk, is_causal, scale, return_lse
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
    where = indices.long().masked_fill(~chosen, columns)
    mask = chosen.new_zeros((*chosen.shape[:-1], columns + 1))
    return mask.scatter_(-1, where, True)[..., :columns]


def reference(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor,
    key_mask: Tensor | None, block_q: int, block_k: int, is_causal: bool, scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula, with every score in memory; the sums are empty unless ``with_lse``."""
    n, m, groups = q.shape[2], k.shape[2], q.shape[1] // max(k.shape[1], 1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (t.to(wide).repeat_interleave(groups, 1) for t in (k, v))
    seen = to_mask(counts, indices)
    seen = seen.repeat_interleave(block_q, 2)[:, :, :n].repeat_interleave(block_k, 3)[..., :m]
    if is_causal:
        seen = seen & torch.ones(n, m, dtype=torch.bool, device=q.device).tril()
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    scores = (q.to(wide) @ k.transpose(-1, -2) * scale).masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1) if m else scores.new_full(scores.shape[:-1], -math.inf)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)).exp()
    out = torch.empty_like(q, dtype=wide, memory_format=torch.contiguous_format)
    for row in (slice(i, i + block_q) for i in range(0, n, block_q)):
        unseen = ~seen[:, :, row].any(2).unsqueeze(-1)  # 0 * inf is not 0
        out[:, :, row] = weights[:, :, row] @ v.masked_fill(unseen, 0.0)
    return out.to(q.dtype), lse if with_lse else lse[:, :, :0].clone()


@operator("block_sparse_attention")
def _op(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor,
    key_mask: Tensor | None, block_q: int, block_k: int, is_causal: bool, scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.shape[0] * q.shape[1] * q.shape[2] == 0:
        return _empty(q, with_lse)
    if q.device.type == "cpu":
        _check_indices(counts, indices)
    counts, indices = counts.int(), indices.int()
    given = (q, k, v, counts, indices, key_mask, block_q, block_k, is_causal, scale)
    if use_triton("block_sparse_attention", q.device, _unfit(q, block_q, block_k)):
        from accelerate_hooks.kernels._block_sparse_triton import launch

        out, lse = _empty(q, with_lse)
        launch(*given, out, lse)
        return out, lse
    # one block of a short sequence is padded to 16 tokens, not to all that a block may hold
    block_q, block_k = (
        min(block, max(16, math.ceil(t.shape[2] / 16) * 16))
        for block, t in ((block_q, q), (block_k, k))
    )
    given = (q, k, v, counts, indices, key_mask, block_q, block_k, is_causal, scale)
    if q.device.type != "cpu":
        return reference(*given, with_lse)
    if use_native("block_sparse_attention", "_block_sparse", _unfit_for_c(q, block_k)):
        return compiled(*given, with_lse)
    return (gathered if q.dtype in _DTYPES and q.shape[3] else reference)(*given, with_lse)


@torch.library.register_fake("accelerate_hooks::block_sparse_attention")
def _(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor,
    key_mask: Tensor | None, block_q: int, block_k: int, is_causal: bool, scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty(q, with_lse)


def _empty(q: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (*q.shape[:2], q.shape[2] if with_lse else 0)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=wide)


class _Problem(ctypes.Structure):
    """`Problem` of `_block_sparse.c`."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "counts", "indices", "kv_head")),
        *((name, ctypes.c_void_p) for name in ("bias", "out", "lse")),
        *((name, ctypes.c_int64) for name in ("heads", "rows", "columns", "block_q", "block_k")),
        *((name, ctypes.c_int64) for name in ("d", "m", "causal", "batch", "next", "failed")),
    ]


def compiled(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor,
    key_mask: Tensor | None, block_q: int, block_k: int, is_causal: bool, scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The CPU path where there is a C compiler: blocks are read where they lie, in float32."""
    (batch, heads, n, d), (kv_heads, m) = q.shape, k.shape[1:3]
    rows, columns = math.ceil(n / block_q), math.ceil(m / block_k)
    width = math.ceil(d / 16) * 16
    # float32 by name: the default dtype is the user's
    out = torch.empty(batch, heads, rows * block_q, width, dtype=torch.float32, device="cpu")
    lse = torch.empty(
        batch, heads, rows * block_q if with_lse else 0, dtype=torch.float32, device="cpu"
    )
    head = torch.arange(batch * heads, device="cpu")
    kv_head = head // heads * kv_heads + head % heads // (heads // kv_heads)
    given = {
        "q": _padded(q.float() * (scale * _LOG2E), block_q, rows, width),
        "k": _padded(k.float(), block_k, columns, width)
        .view(batch, kv_heads, columns, block_k, width)
        .mT.contiguous(),
        "v": _padded(_values(v, key_mask).float(), block_k, columns, width),
        "counts": counts.expand(batch, heads, rows).contiguous(),
        "indices": indices.expand(batch, heads, rows, columns).contiguous(),
        "kv_head": kv_head.int(),
    }
    if key_mask is not None:
        bias = torch.zeros(batch, columns * block_k, dtype=torch.float32, device="cpu")
        bias[:, :m].masked_fill_(~key_mask, -math.inf)
        given["bias"] = bias
    pointers = {name: t.data_ptr() for name, t in given.items()}
    problem = _Problem(
        **pointers, out=out.data_ptr(), lse=lse.data_ptr() if with_lse else None,
        heads=batch * heads, rows=rows, columns=columns, block_q=block_q, block_k=block_k,
        d=width, m=m, causal=is_causal, batch=batch,
    )  # fmt: skip
    run = native.library("_block_sparse").block_sparse_attention
    native.on_every_thread(run, problem)
    if problem.failed:
        raise MemoryError(f"no memory for a block of {block_q} x {block_k} scores")
    return out[:, :, :n, :d].to(q.dtype).contiguous(), lse[:, :, :n].contiguous()


def _padded(t: Tensor, size: int, count: int, d: int | None = None) -> Tensor:
    """``[B, H, tokens, D]``, filled with zeros to ``count`` blocks and a width of ``d``."""
    missing = (0, (d or t.shape[3]) - t.shape[3], 0, size * count - t.shape[2])
    return torch.nn.functional.pad(t, missing) if any(missing) else t.contiguous()


def _values(v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Nothing where nobody looks: a weight of 0 does not hide what is not finite."""
    return v if key_mask is None else v.where(key_mask[:, None, :, None], 0.0)


def _unfit_for_c(q: Tensor, block_k: int) -> str | None:
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype}"
    return f"blocks of {block_k} keys (multiples of 16)" if block_k % 16 else None


def gathered(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor,
    key_mask: Tensor | None, block_q: int, block_k: int, is_causal: bool, scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The CPU path without a compiler: block rows with equally many blocks go together; the keys
    and values of a few rows at a time are copied side by side, so that dense matrix products find
    them in the caches.

    Scores and sums are float32. Weights are rounded to bfloat16 before they meet bfloat16 values,
    as PyTorch's own CPU attention does; float16 is computed in float32, which is twice as fast.
    """
    (batch, heads, n, d), m = q.shape, k.shape[2]
    rows, columns = math.ceil(n / block_q), math.ceil(m / block_k)
    out = q.new_empty(batch, heads, rows * block_q, d)
    lse = q.new_empty(batch, heads, rows * block_q if with_lse else 0, dtype=torch.float32)
    counts = counts.expand(batch, heads, rows).reshape(-1)
    indices = indices.expand(batch, heads, rows, columns).reshape(len(counts), columns)
    weight_dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    q_blocks, k_blocks, v_blocks = (
        _padded(t, size, count).view(batch * t.shape[1] * count, size * d)
        for t, size, count in (
            (q.float(), block_q, rows), (k.float(), block_k, columns),
            (_values(v, key_mask).to(weight_dtype), block_k, columns),
        )
    )  # fmt: skip
    out_blocks = out.view(-1, block_q, d)
    kv_heads = k.shape[1]
    head = torch.arange(batch * heads, device="cpu").repeat_interleave(rows)
    base = (head // heads * kv_heads + head % heads // (heads // kv_heads)) * columns
    row = torch.arange(rows, device="cpu").repeat(batch * heads)
    seen = torch.arange(columns * block_k, device="cpu").expand(batch, -1) < m
    if key_mask is not None:
        seen = seen & torch.nn.functional.pad(key_mask, (0, columns * block_k - m))
    whole = bool(seen.all())
    room: dict[str, Tensor] = {}  # one for all parts: fresh pages cost more than copies
    for count, jobs in _groups(counts):
        if count == 0:
            out_blocks[jobs] = 0.0
            if with_lse:
                lse.view(-1, block_q)[jobs] = -math.inf
            continue
        for part in jobs.split(max(1, _BUFFER // (count * block_k * d * 4))):
            shape = (len(part), count * block_k)
            chosen = indices[part, :count]
            where = (base[part].unsqueeze(1) + chosen).reshape(-1)
            keys = torch.index_select(
                k_blocks, 0, where, out=_space(room, "keys", (len(where), block_k * d), k_blocks)
            )
            values = torch.index_select(
                v_blocks, 0, where, out=_space(room, "values", (len(where), block_k * d), v_blocks)
            )
            scores = _space(room, "scores", (shape[0], block_q, shape[1]), k_blocks)
            queries = q_blocks.index_select(0, part).view(-1, block_q, d)
            keys = keys.view(*shape, d).transpose(1, 2)
            torch.baddbmm(scores, queries, keys, beta=0, alpha=scale, out=scores)
            hidden = None
            if is_causal or not whole:
                j = (chosen.unsqueeze(-1) * block_k + torch.arange(block_k, device="cpu")).flatten(
                    1
                )
                hidden = ~seen[head[part] // heads].gather(1, j).unsqueeze(1)
                if is_causal:
                    i = row[part].view(-1, 1, 1) * block_q + torch.arange(
                        block_q, device="cpu"
                    ).view(1, -1, 1)
                    hidden = hidden | (j.unsqueeze(1) > i)
                scores.masked_fill_(hidden, -math.inf)
            if with_lse:
                lse.view(-1, block_q)[part] = scores.logsumexp(-1)
            torch.softmax(scores, -1, out=scores)
            if hidden is not None:
                scores.masked_fill_(hidden.all(-1, keepdim=True), 0.0)
            weights = scores
            if weight_dtype != torch.float32:
                weights = _space(room, "weights", tuple(scores.shape), v_blocks).copy_(scores)
            out_blocks[part] = torch.bmm(weights, values.view(*shape, d)).to(q.dtype)
    return out[:, :, :n].contiguous(), lse[:, :, :n].contiguous()


def _groups(counts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(count, the jobs that have it) in the order of the counts."""
    order = counts.argsort(stable=True)
    values, sizes = counts[order].unique_consecutive(return_counts=True)
    return zip(values.tolist(), order.split(sizes.tolist()), strict=True)


def _space(room: dict[str, Tensor], name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor of ``shape`` over memory kept in ``room``; it grows, and is not cleared."""
    size = math.prod(shape)
    if name not in room or room[name].numel() < size:
        room[name] = like.new_empty(size)
    return room[name][:size].view(shape)


def _unfit(q: Tensor, block_q: int, block_k: int) -> str | None:
    """Why Triton cannot take this, or None."""
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype}"
    if not 1 <= q.shape[3] <= 256:
        return f"head size {q.shape[3]} (1 to 256)"
    if any(b < 16 or b & (b - 1) for b in (block_q, block_k)):
        return f"block size {block_q} x {block_k} (powers of two from 16)"
    return None


def check(q: Tensor, k: Tensor, v: Tensor, bq: int, bk: int, gqa: bool) -> None:
    def fit(ok: bool, message: str) -> None:
        require(
            ok, lambda: f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: {message}"
        )

    require_tensors(q=q, k=k, v=v)
    fit(q.ndim == k.ndim == v.ndim == 4, "give [batch, heads, tokens, head size]")
    fit(k.shape == v.shape, "k and v differ in shape")
    fit(
        q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3],
        "batch and head size must be those of q",
    )
    require(
        q.dtype == k.dtype == v.dtype and q.is_floating_point(),
        lambda: f"q {q.dtype}, k {k.dtype}, v {v.dtype}: give one floating-point dtype",
    )
    require(
        q.device == k.device == v.device,
        lambda: f"q, k, v are on {q.device}, {k.device}, {v.device}",
    )
    require(bq > 0 and bk > 0, lambda: f"block_size=({bq}, {bk}): give positive numbers")
    hq, hkv = q.shape[1], k.shape[1]
    if gqa:
        fit(hkv > 0 and hq % hkv == 0, "Hq must be a multiple of Hkv")
    else:
        fit(hq == hkv, "other numbers of heads; say enable_gqa=True for groups")


def check_key_mask(key_mask: Tensor, k: Tensor) -> None:
    batch, tokens = len(k), k.shape[2]
    require(
        isinstance(key_mask, Tensor)
        and key_mask.dtype == torch.bool
        and key_mask.shape in ((batch, tokens), (1, tokens))
        and key_mask.device == k.device,
        lambda: (
            f"key_mask is {described(key_mask)}; give bools [{batch} or 1, {tokens}] on {k.device}"
        ),
    )


def _check_indices(counts: Tensor, indices: Tensor) -> None:
    """Memory is read by them. On an accelerator, where this would wait for it, they are trusted."""
    columns = indices.shape[-1]
    chosen = torch.arange(columns, device="cpu") < counts.unsqueeze(-1)
    wrong = chosen & ((indices < 0) | (indices >= columns))
    require(
        bool(((counts >= 0) & (counts <= columns)).all()) and not bool(wrong.any()),
        f"counts or indices point outside the {columns} blocks of keys",
    )
    falls = chosen[..., 1:] & (indices[..., 1:] <= indices[..., :-1])
    ok = not bool(falls.any()) or torch.equal(to_mask(counts, indices).sum(-1), counts.long())
    require(ok, "indices name a block twice; give each block of keys once a row")


def _check_whole(t: Tensor, name: str) -> None:
    whole = isinstance(t, Tensor) and t.dtype in _WHOLE
    require(whole, lambda: f"{name} are {described(t)}; give integers")


def _check_mask(t: Tensor, full: tuple[int, ...], device: torch.device, name: str) -> None:
    shape = tuple(t.shape)
    fits = len(shape) == len(full) and shape[2:] == full[2:]
    fits = fits and all(have in (1, want) for have, want in zip(shape[:2], full[:2], strict=True))
    require(fits, lambda: f"{name} is {shape}; give {full}, or 1 in the place of batch or heads")
    require(t.device == device, lambda: f"{name} is on {t.device}, and q on {device}")
