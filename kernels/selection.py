"""Which blocks of an attention map are worth computing.

From scores ``s[r, c]`` of one head, with density ``p`` or mass ``p``:

- ``quantile``: the ``ceil(p R C)`` greatest of the whole map. Rows compete: where ``s`` is
  normalised a row, sharp rows keep fewer blocks (DraftAttention, arXiv 2505.14708).
- ``row``: the ``ceil(p C)`` greatest of each row.
- ``mass``: of each row the fewest blocks that hold a share ``p`` of its sum.

Beside these, what is asked for by name, and the greatest of every row: no row is empty.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from accelerate_hooks.kernels._dispatch import require

Rule = Literal["quantile", "row", "mass"]


def select_blocks(
    scores: Tensor,
    share: float,
    *,
    rule: Rule = "row",
    diagonal: bool = False,
    sinks: int = 0,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """A bool mask ``[..., R, C]`` for ``scores`` ``[..., R, C]`` (not negative for ``mass``; the
    leading axes, batch and heads, are selected each for itself).

    ``share`` from 0 to 1 is the density (``quantile``, ``row``) or the share of each row's sum
    (``mass``); what it keeps only grows with it, ties go to the lower column. ``diagonal`` keeps
    the blocks where queries meet themselves (``c = floor(r C / R)``), ``sinks`` the first columns;
    ``rows`` ``[R]`` and ``columns`` ``[C]`` are bools of rows and columns to keep whole (text).
    """
    require(scores.ndim >= 2, f"scores are {tuple(scores.shape)}; give [..., rows, columns]")
    require(0.0 <= share <= 1.0, f"share={share!r} is out of range; give 0 to 1")
    require(rule in ("quantile", "row", "mass"), f"rule={rule!r}; give quantile, row or mass")
    count_rows, count_columns = scores.shape[-2:]
    _fits(rows, count_rows, "rows")
    _fits(columns, count_columns, "columns")
    if scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if rule == "quantile":
        mask = _greatest(scores.flatten(-2), share).view(scores.shape)
    elif rule == "row":
        mask = _greatest(scores, share)
    else:
        mask = _mass(scores, share)
    mask |= torch.zeros_like(mask).scatter_(-1, scores.argmax(-1, keepdim=True), True)
    if diagonal:
        at = torch.arange(count_rows, device=scores.device) * count_columns // count_rows
        mask |= at.unsqueeze(1) == torch.arange(count_columns, device=scores.device)
    if sinks:
        mask[..., :sinks] = True
    if rows is not None:
        mask |= rows.unsqueeze(-1)
    if columns is not None:
        mask |= columns
    return mask


def _greatest(scores: Tensor, share: float) -> Tensor:
    """The ``ceil(share * n)`` greatest of the last axis."""
    n = scores.shape[-1]
    # a density such as 0.1 times 10 must not become 2 by its last bit
    count = min(n, math.ceil(share * n - 1e-9))
    chosen = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def _mass(scores: Tensor, share: float) -> Tensor:
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranked = scores.gather(-1, order).double()
    before = ranked.cumsum(-1) - ranked
    wanted = share * ranked.sum(-1, keepdim=True)
    # the last bit of a sum must not ask for one block more; a share of 1 keeps all that hold any
    kept = (before < wanted * (1 - 1e-12)) & (ranked > 0) if share < 1 else ranked > 0
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def _fits(dense: Tensor | None, size: int, name: str) -> None:
    if dense is not None:
        require(
            dense.dtype == torch.bool and dense.shape == (size,),
            f"{name} is {dense.dtype} {tuple(dense.shape)}; give bools [{size}]",
        )
