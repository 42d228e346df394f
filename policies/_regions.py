"""Regions of a token grid as blocks of a sequence: their order, and what is kept of them anyway."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from accelerate_hooks.errors import SpecError
from accelerate_hooks.kernels import Rule, Selection, in_given_dtype, pool_tokens, tile_order
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.site import TokenLayout

_BLOCK = 128


@dataclass(frozen=True, eq=False)
class Plan:
    """What does not depend on q, k and v: the order of the tokens and what is kept anyway."""

    tokens: int
    block: int
    index: Tensor | None
    back: Tensor | None
    sizes: Tensor
    selection: Selection

    @property
    def rows(self) -> int:
        return len(self.sizes)

    @cached_property
    def visible(self) -> float:
        """The share of the blocks that can be seen."""
        return (self.selection.free | self.selection.whole).double().mean().item()

    @classmethod
    def of(
        cls, layout: TokenLayout, tokens: int, device: torch.device, *,
        pool: tuple[int, ...] | None, rule: Rule, sinks: int, causal: bool,
    ) -> Plan:  # fmt: skip
        region = region_of(pool, layout)
        block = math.prod(region)
        order = order_of(layout, region, tokens)
        rows = math.ceil(tokens / block)
        dense = torch.arange(rows, device="cpu") >= layout.visual // block
        dense &= torch.tensor(tokens > layout.visual, device="cpu")
        before = torch.ones(rows, rows, dtype=torch.bool, device="cpu").tril() if causal else None
        selection = Selection.of(
            rows, rows, rule, diagonal=True, sinks=sinks, dense_rows=dense, dense_columns=dense,
            visible=before,
        )  # fmt: skip
        sizes = torch.full((rows,), block, device="cpu")
        sizes[-1] = tokens - block * (rows - 1)
        return cls(
            tokens,
            block,
            None if order is None else order.to(device),
            None if order is None else order.argsort().to(device),
            sizes.to(device),
            selection,
        )

    def reorder(self, t: Tensor, axis: int = 2) -> Tensor:
        return t if self.index is None else t.index_select(axis, self.index)

    def restore(self, t: Tensor) -> Tensor:
        return t if self.back is None else t.index_select(2, self.back)

    @in_given_dtype
    def draft(self, q: Tensor, k: Tensor, scale: float, seen: Tensor | None = None) -> Tensor:
        """The attention map of blocks ``[B, Hq, R, R]``, float32; keys that nobody sees (``seen``
        False) are in no mean."""
        counts = self._counts(seen)
        if seen is not None:
            k = k * seen[:, None, :, None]
        queries, keys = (self._pooled(t).float() for t in (q, k))
        if seen is not None:
            keys = keys * (self.sizes / counts.clamp(min=1e-6)).unsqueeze(-1)
        keys = keys.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = queries @ keys.transpose(-1, -2) * scale + counts.unsqueeze(-2).log()
        scores = scores.masked_fill(self.selection.unseen(q.device), -math.inf)
        return scores.softmax(-1).nan_to_num(0.0)

    def kept(self, mass: Tensor, mask: Tensor, seen: Tensor | None = None) -> Tensor:
        """The share of ``attention_mass`` in the blocks of ``mask``, the mean over queries (those
        ``seen``): ``[B, Hq]``."""
        counts = self._counts(seen)
        return ((mass * mask).sum(-1) * counts / counts.sum(-1, keepdim=True)).sum(-1)

    def _counts(self, seen: Tensor | None) -> Tensor:
        """How many tokens a block has, of those ``seen``: ``[B or 1, 1, R]``."""
        sizes = self.sizes.float().view(1, 1, -1)
        return (
            sizes if seen is None else sizes * self._pooled(seen[:, None, :, None].float())[..., 0]
        )

    def _pooled(self, t: Tensor) -> Tensor:
        return pool_tokens(t, (self.tokens,), (self.block,))


def region_of(pool: tuple[int, ...] | None, layout: TokenLayout) -> tuple[int, int, int]:
    """(frames, height, width) of a region; of 128 tokens where nothing is said."""
    if pool is not None and len(pool) == 1 and layout.frames == layout.height == 1:
        return 1, 1, pool[0]
    if pool is not None and layout.frames == layout.height == 1:
        return 1, 1, math.prod(pool)
    if pool is not None:
        if len(pool) == 1:
            raise SpecError(
                f"draft_attention: pool={pool!r} names one axis, and tokens stand in a grid of "
                f"{layout.grid}; give (height, width) or (frames, height, width)"
            )
        return (1, pool[0], pool[1]) if len(pool) == 2 else (pool[0], pool[1], pool[2])
    width = min(16, _power(layout.width))
    if layout.frames == layout.height == 1:
        return 1, 1, _BLOCK
    height = min(_BLOCK // width, _power(layout.height))
    return _BLOCK // width // height, height, width


def _power(size: int) -> int:
    """The greatest power of two that is no more than ``size``."""
    return 1 << (size.bit_length() - 1)


def order_of(layout: TokenLayout, region: tuple[int, int, int], tokens: int) -> Tensor | None:
    """The tokens region by region, each in raster order; text and special tokens at the end. None
    where that is the order in which they stand."""
    start = layout.special
    if layout.text is not None and layout.text.start <= layout.special:
        start += layout.text.stop - layout.text.start
    inside = tile_order(layout.grid, region)
    if inside is None and start == 0:
        return None
    inside = torch.arange(layout.visual, device="cpu") if inside is None else inside
    behind = torch.arange(start + layout.visual, tokens, device="cpu")
    return torch.cat((inside + start, torch.arange(start, device="cpu"), behind))


opaque_functions(globals())
