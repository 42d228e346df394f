"""Which blocks of an attention map are worth computing.

From scores ``s[r, c]`` of one head, with density ``p`` or mass ``p``:

- ``quantile``: the ``ceil(p n)`` greatest of the whole map of ``n`` blocks. Rows compete: where
  ``s`` is normalised a row, sharp rows keep fewer blocks (DraftAttention, arXiv 2505.14708).
- ``row``: the ``ceil(p n)`` greatest of each row of ``n`` blocks.
- ``mass``: of each row the fewest blocks that hold a share ``p`` of its sum.

Blocks kept by name (the diagonal, sinks) are ranked before all others and count as chosen; rows and
columns kept whole (text) and blocks that cannot be seen stand outside: ``n`` does not count them.
The greatest of a row that would have none is kept as well: no row is empty. NaN is least.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from accelerate_hooks.kernels._dispatch import (
    described,
    in_given_dtype,
    require,
    require_tensors,
)
from accelerate_hooks.kernels.block_sparse import check, check_key_mask

Rule = Literal["quantile", "row", "mass"]


@dataclass(frozen=True, eq=False)
class Selection:
    """What is the same for every map ``[R, C]``; all bools ``[R, C]`` on the host.

    ``free`` blocks are ranked, those of ``first`` before the others; ``whole`` blocks are kept.
    """

    rule: Rule
    free: Tensor
    first: Tensor
    whole: Tensor
    copies: dict[tuple[str | float, torch.device], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        rows: int,
        columns: int,
        rule: Rule = "row",
        *,
        diagonal: bool = False,
        sinks: int = 0,
        dense_rows: Tensor | None = None,
        dense_columns: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Selection:
        require(rule in ("quantile", "row", "mass"), f"rule={rule!r}; give quantile, row or mass")
        fine = type(sinks) is int and sinks >= 0
        require(fine, lambda: f"sinks={sinks!r}; give an integer of at least 0")
        seen = _fits(visible, (rows, columns), True, "visible")
        down = _fits(dense_rows, (rows,), False, "dense_rows").unsqueeze(1)
        whole = seen & (down | _fits(dense_columns, (columns,), False, "dense_columns"))
        first = torch.arange(columns, device="cpu").expand(rows, columns) < sinks
        if diagonal:
            at = torch.arange(rows, device="cpu") * columns // max(rows, 1)
            first = first | (at.unsqueeze(1) == torch.arange(columns, device="cpu"))
        free = seen & ~whole
        return cls(rule, free, first & free, whole)

    def _known(self) -> tuple[Tensor, Tensor]:
        """Of each row, or of the map: how many blocks are free, and how many come first."""
        free, first = (t.double() for t in (self.free, self.first))
        if self.rule == "row":
            return free.sum(1), first.sum(1)
        return free.sum().unsqueeze(0), first.sum().unsqueeze(0)

    def density(self, share: float) -> float | None:
        """The share of visible blocks that are kept; None for ``mass``, which depends on scores.
        (For ``quantile`` without the diagonal, before empty rows get one.)"""
        if self.rule == "mass":
            return None
        kept = self._counts(share).sum() + self.whole.sum()
        return (kept / max(1, int((self.free | self.whole).sum()))).item()

    def _on(self, device: torch.device, what: str | float, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gives, copied to a device once."""
        if (what, device) not in self.copies:
            self.copies[what, device] = make().to(device)
        return self.copies[what, device]

    def unseen(self, device: torch.device) -> Tensor:
        """The blocks that cannot be seen."""
        return self._on(device, "unseen", lambda: ~(self.free | self.whole))

    def _counts_on(self, device: torch.device, share: float | Tensor) -> Tensor:
        if isinstance(share, Tensor):
            return self._counts(share).to(device)
        return self._on(device, share, lambda: self._counts(share))

    def _counts(self, share: float | Tensor) -> Tensor:
        """How many to keep ``[..., R]`` (``row``) or ``[..., 1]`` (``quantile``)."""
        free, first = self._known()
        if isinstance(share, Tensor):
            free, first, share = free.to(share.device), first.to(share.device), share.unsqueeze(-1)
        kept = free * share
        # a density such as 0.1 times 10 must not become 2 by its last bit
        return torch.maximum((kept - (kept * _rounding(share)).clamp(1e-9, 0.5)).ceil(), first)

    def choose(self, scores: Tensor, share: float | Tensor) -> Tensor:
        """The mask ``[..., R, C]`` of ``scores``; ``share`` may be a tensor over leading axes."""
        device = scores.device
        free = self._on(device, "free", lambda: self.free)
        first = self._on(device, "first", lambda: self.first)
        whole = self._on(device, "whole", lambda: self.whole)
        # finite first: nothing free stands with those of `first`, or with what is not free
        least = torch.finfo(scores.dtype).min
        ranked = scores.nan_to_num(least).masked_fill(first, math.inf).masked_fill(~free, -math.inf)
        if self.rule == "mass":
            mask = _mass(ranked, scores.masked_fill(~free, 0.0), share)
        elif self.rule == "row":
            mask = _greatest(ranked, self._counts_on(device, share))
        else:
            count = self._counts_on(device, share).squeeze(-1)
            mask = _greatest(ranked.flatten(-2), count).view(scores.shape)
        mask = mask & free | whole
        best = ranked == ranked.amax(-1, keepdim=True)
        best &= best.cumsum(-1) == 1
        return mask | (best & free & ~mask.any(-1, keepdim=True))


def select_blocks(
    scores: Tensor,
    share: float | Tensor,
    *,
    rule: Rule = "row",
    diagonal: bool = False,
    sinks: int = 0,
    dense_rows: Tensor | None = None,
    dense_columns: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """A bool mask ``[..., R, C]`` for ``scores`` ``[..., R, C]`` (not negative for ``mass``; the
    leading axes, batch and heads, are selected each for itself).

    ``share`` from 0 to 1 is the density (``quantile``, ``row``) or the share of each row's sum
    (``mass``), a number or a tensor that broadcasts to the leading axes; what it keeps only grows
    with it, ties go to the lower column. ``diagonal`` keeps the blocks where queries meet
    themselves (``c = floor(r C / R)``), ``sinks`` the first columns; ``dense_rows`` ``[R]`` and
    ``dense_columns`` ``[C]`` are bools on the host of rows and columns to keep whole (text),
    ``visible`` ``[R, C]`` of blocks that may be kept at all (causal).
    """
    require_tensors(scores=scores)
    require(
        scores.ndim >= 2 and scores.is_floating_point(),
        lambda: (
            f"scores are {scores.dtype} {tuple(scores.shape)}; give floats [..., rows, columns]"
        ),
    )
    _check_share(share, scores.shape[:-2])
    rows, columns = scores.shape[-2:]
    plan = Selection.of(
        rows, columns, rule, diagonal=diagonal, sinks=sinks, dense_rows=dense_rows,
        dense_columns=dense_columns, visible=visible,
    )  # fmt: skip
    if scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    return plan.choose(scores, share)


@in_given_dtype
def attention_mass(
    q: Tensor,
    k: Tensor,
    block: int,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """How much of full attention each block holds: ``[B, Hq, R, C]`` float32, rows sum to 1.

        mass[r, c] = mean over queries i of block r of sum over keys j of block c of softmax_j(i)

    ``q`` is ``[B, Hq, N, D]``, ``k`` ``[B, Hkv, M, D]`` (grouped heads are repeated), ``key_mask``
    ``[B or 1, M]`` False at keys that nobody sees. It costs what dense scores cost, a few
    rows at a time: for audits, oracles and fitting.
    """
    require(type(block) is int and block > 0, lambda: f"block={block!r}; give a positive integer")
    check(q, k, k, block, block, True)
    if key_mask is not None:
        check_key_mask(key_mask, k)
    (batch, heads, n, d), m = q.shape, k.shape[2]
    block = min(block, max(1, n, m))
    rows, columns = math.ceil(n / block), math.ceil(m / block)
    keys = k.float().repeat_interleave(heads // k.shape[1], 1).transpose(-1, -2)
    scale = 1.0 / math.sqrt(max(d, 1)) if scale is None else scale
    parts: list[Tensor] = []
    for row in range(rows):
        some = q[:, :, row * block : (row + 1) * block].float()
        scores = some @ keys * scale
        if is_causal:
            i = row * block + torch.arange(some.shape[2], device=q.device)
            hidden = torch.arange(m, device=q.device) > i.unsqueeze(1)
            scores = scores.masked_fill(hidden, -math.inf)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None], -math.inf)
        shares = scores.softmax(-1).nan_to_num(0.0).mean(2)  # nothing seen: no mass
        shares = torch.nn.functional.pad(shares, (0, columns * block - m))
        parts.append(shares.reshape(batch, heads, columns, block).sum(-1))
    return torch.stack(parts, 2) if parts else q.new_zeros((batch, heads, 0, columns)).float()


def _greatest(ranked: Tensor, count: Tensor) -> Tensor:
    """The ``count`` ``[...]`` greatest of the last axis."""
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    kept = torch.arange(ranked.shape[-1], device=ranked.device) < count.unsqueeze(-1)
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    return chosen.scatter_(-1, order, kept.expand_as(order))


def _mass(ranked: Tensor, scores: Tensor, share: float | Tensor) -> Tensor:
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    held = scores.gather(-1, order).double()
    most = torch.finfo(held.dtype).max / max(1, held.shape[-1])  # so that sums are finite
    held = held.nan_to_num(0.0).clamp(0.0, most)
    before = held.cumsum(-1) - held
    wanted = (share[..., None, None] if isinstance(share, Tensor) else share) * held.sum(
        -1, keepdim=True
    )
    # the last bit of a sum must not ask for one block more; a share of 1 keeps all that hold any
    kept = torch.where(
        wanted >= held.sum(-1, keepdim=True), held > 0, before < wanted * (1 - _rounding(share))
    )
    kept = kept & (held > 0) | (ranked.gather(-1, order) == math.inf)
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def _rounding(share: float | Tensor) -> float:
    """By how much of itself a share may be off what was meant."""
    floats = isinstance(share, Tensor) and share.is_floating_point()
    return max(1e-12, torch.finfo(share.dtype).eps) if floats else 1e-12


def _check_share(share: float | Tensor, lead: tuple[int, ...]) -> None:
    """Values of a tensor are read on a CPU only: elsewhere this would wait for them. Under vmap and
    in fake tensors there are none."""
    if not isinstance(share, Tensor):
        ok = isinstance(share, Real) and 0.0 <= share <= 1.0
        require(ok, lambda: f"share={share!r} is out of range; give 0 to 1")
        return
    fits = share.ndim <= len(lead)
    fits = fits and all(a in (1, b) for a, b in zip(share.shape[::-1], lead[::-1], strict=False))
    require(
        fits,
        lambda: f"share is {tuple(share.shape)}; give a number, or a tensor for {list(lead)}",
    )
    ok = not share.is_complex()
    if ok and share.device.type == "cpu" and not torch.compiler.is_compiling():
        with contextlib.suppress(RuntimeError):
            ok = bool(((share >= 0) & (share <= 1)).all())
    require(ok, f"share ({share.dtype}) is out of range; give real numbers from 0 to 1")


def _fits(given: Tensor | None, shape: tuple[int, ...], default: bool, name: str) -> Tensor:
    if given is None:
        return torch.full(shape, default, device="cpu")
    require(
        isinstance(given, Tensor)
        and given.dtype == torch.bool
        and given.shape == shape
        and given.device.type == "cpu",
        lambda: f"{name} is {described(given)}; give bools {list(shape)} on the host",
    )
    return given
