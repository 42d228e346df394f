"""Attention to what is near, on a line, in a plane or in a clip.

Tokens of a ``grid`` are cut into tiles; a tile of queries sees a tile of keys if they come within
``window`` tokens of each other along every axis. So every query sees all keys within ``window`` of
it, and what else their tiles hold: a band of blocks in one axis, sliding tiles (arXiv 2502.04507)
in two and three.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from accelerate_hooks.kernels._dispatch import are_sizes, require
from accelerate_hooks.kernels.block_sparse import (
    block_sparse_attention,
    check,
    check_key_mask,
)

TILES = {1: (128,), 2: (8, 16), 3: (2, 8, 8)}


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | tuple[int, ...],
    *,
    grid: tuple[int, ...] | None = None,
    tile: tuple[int, ...] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Self-attention in which queries see near keys only.

    ``q`` is ``[B, Hq, N, D]``, ``k`` and ``v`` ``[B, Hkv, N, D]`` with ``N = prod(grid)`` tokens
    in raster order (``grid`` is ``(N,)`` by default). ``window`` is how many tokens to each side, a
    number or one an axis; ``tile`` the shape of a block, 128 tokens by default. The rest is as in
    `block_sparse_attention`; causal needs a grid of one axis.
    """
    check(q, k, v, 1, 1, enable_gqa)
    grid = (q.shape[2],) if grid is None else grid
    require(
        are_sizes(grid) and 1 <= len(grid) <= 3 and all(size >= 0 for size in grid),
        lambda: f"grid={grid}: give the sizes of one to three axes",
    )
    tile = TILES[len(grid)] if tile is None else tile
    window = (window,) * len(grid) if isinstance(window, int) else window
    require(
        are_sizes(tile)
        and are_sizes(window)
        and len(tile) == len(window) == len(grid)
        and all(t > 0 for t in tile),
        lambda: (
            f"grid={grid}, tile={tile}, window={window}: give as many axes for all, tiles of 1 or "
            "more"
        ),
    )
    require(all(w >= 0 for w in window), lambda: f"window={window}: give 0 or more tokens")
    require(
        q.shape[2] == k.shape[2] == math.prod(grid),
        lambda: (
            f"q {tuple(q.shape)}, k {tuple(k.shape)}: give the {math.prod(grid)} tokens of "
            f"grid={grid}"
        ),
    )
    require(not is_causal or len(grid) == 1, lambda: f"is_causal needs one axis, and grid={grid}")
    if key_mask is not None:
        check_key_mask(key_mask, k)
    order = tile_order(grid, tile)
    near = window_blocks(grid, tile, window).to(q.device)
    if order is not None:
        index = order.to(q.device)
        q, k, v = (t.index_select(2, index) for t in (q, k, v))
        key_mask = None if key_mask is None else key_mask.index_select(1, index)
    out, lse = block_sparse_attention(
        q, k, v, near[None, None], block_size=block_of(grid, tile), is_causal=is_causal,
        scale=scale, enable_gqa=enable_gqa, key_mask=key_mask, return_lse=True,
    )  # fmt: skip
    if order is not None:
        back = order.argsort().to(q.device)
        out, lse = out.index_select(2, back), lse.index_select(2, back)
    return (out, lse) if return_lse else out


def block_of(grid: tuple[int, ...], tile: tuple[int, ...]) -> int:
    """How many tokens a block has: those of a tile, and no more than there are."""
    return min(math.prod(tile), max(1, math.prod(grid)))


def tile_order(grid: tuple[int, ...], tile: tuple[int, ...]) -> Tensor | None:
    """An order of the tokens of a grid (raster numbers ``[N]``) whose blocks of ``prod(tile)`` are
    tiles, or as compact where a grid is no multiple of its tiles; None where that is raster order.

    The grid is cut into bands as thick as a tile or a little less, all the same to one token, and
    walked column by column along them, to and fro: a block that spans the end of a band goes on
    beside it. In a block, tokens stand in raster order.
    """
    last = max([0, *(i for i in range(len(grid)) if tile[i] < grid[i])])
    lines = all(1 in pair for pair in zip(tile[:last], grid[:last], strict=True))
    if lines and (math.prod(grid[:last]) == 1 or math.prod(grid[last:]) % math.prod(tile) == 0):
        return None
    walks = [torch.arange(math.prod(grid), device="cpu").view(grid)]
    for axis, thick in enumerate(tile[:-1]):
        bands = max(1, math.ceil(grid[axis] / thick))
        walks = [
            band
            for i, walk in enumerate(walks)
            for band in walk.tensor_split(bands, axis)[:: -1 if i % 2 else 1]
        ]
    columns = [walk.movedim(-1, 0) for walk in walks]
    order = torch.cat(
        [c.flip(0).flatten() if i % 2 else c.flatten() for i, c in enumerate(columns)]
    )
    return torch.cat([block.sort().values for block in order.split(block_of(grid, tile))])


def window_blocks(grid: tuple[int, ...], tile: tuple[int, ...], window: tuple[int, ...]) -> Tensor:
    """Which blocks of ``prod(tile)`` tokens in `tile_order` see which ``[R, R]``: those whose
    bounding boxes come within ``window`` along every axis."""
    order, block = tile_order(grid, tile), block_of(grid, tile)
    places = torch.arange(math.prod(grid), device="cpu") if order is None else order
    rows = math.ceil(len(places) / block)
    places = torch.cat((places, places[-1:].expand(rows * block - len(places)))).view(rows, block)
    near = torch.ones(rows, rows, dtype=torch.bool, device="cpu")
    for at, reach in zip(torch.unravel_index(places, grid), window, strict=True):
        low, high = at.aminmax(dim=1)
        gap = low.unsqueeze(1) - high
        near &= torch.maximum(gap, gap.T) <= reach
    return near
