"""The mean token of every region of a grid.

With tokens ``x[f, h, w]`` in raster order and regions of ``a * b * c`` cells,

    pooled[i, j, l] = mean of x[f, h, w] over the cells of the grid with
                      f // a = i, h // b = j, w // c = l

so that ragged regions at the edges are means of the cells they have.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from accelerate_hooks.kernels._dispatch import are_sizes, require, require_tensors


def pool_tokens(x: Tensor, grid: tuple[int, ...], region: tuple[int, ...]) -> Tensor:
    """``x`` is ``[..., tokens, D]`` with ``tokens = prod(grid)``; ``grid`` and ``region`` have one,
    two or three axes. Returns ``[..., prod(ceil(grid / region)), D]`` in raster order of the
    regions and the dtype of ``x``; sums are in float32 (float64 for float64)."""
    require_tensors(x=x)
    require(
        are_sizes(grid) and are_sizes(region),
        lambda: f"grid={grid!r}, region={region!r}: give tuples of integers",
    )
    require(
        1 <= len(grid) == len(region) <= 3,
        lambda: f"grid={grid}, region={region}: give as many axes for both, one to three",
    )
    require(
        all(g >= 0 for g in grid) and all(r > 0 for r in region),
        lambda: f"grid={grid}, region={region}: give positive sizes",
    )
    require(
        x.ndim >= 2 and x.is_floating_point() and x.shape[-2] == math.prod(grid),
        lambda: (
            f"x is {x.dtype} {tuple(x.shape)}: give floats [..., {math.prod(grid)} tokens, D], the "
            f"tokens of grid={grid}"
        ),
    )
    region = tuple(min(r, max(1, g)) for r, g in zip(region, grid, strict=True))
    lead, d = x.shape[:-2], x.shape[-1]
    counts = [math.ceil(g / r) for g, r in zip(grid, region, strict=True)]
    wide = x.float() if x.dtype.itemsize < 4 else x
    cells = wide.reshape(*lead, *grid, d)
    ones = wide.new_ones((*grid, 1))
    pad = [0, 0]
    for size, count, step in zip(grid[::-1], counts[::-1], region[::-1], strict=True):
        pad += [0, count * step - size]
    if any(pad):
        cells, ones = F.pad(cells, pad), F.pad(ones, pad)
    split = [n for pair in zip(counts, region, strict=True) for n in pair]
    inside = [-2 - 2 * i for i in range(len(grid))]
    total = cells.reshape(*lead, *split, d).sum(inside)
    weight = ones.reshape(*split, 1).sum(inside)
    return (total / weight).reshape(*lead, math.prod(counts), d).to(x.dtype)
