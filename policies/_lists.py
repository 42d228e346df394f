"""Experts in a plain list, called one by one by the module around them, each for its rows:

    for e, expert in enumerate(self.experts):
        out[rows_e] += weights_e * expert(x[rows_e])

Which rows, only that module knows. Where its router gives indices and weights (elsewhere see
`_weighing`), its own forward runs on a twin of it in which the router gives the weights of the kept
slots (zero elsewhere), and an expert computes the rows of the tokens that keep it; the others get
zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_hooks.call import Call
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.policies._experts import slot_flops
from accelerate_hooks.policies._twins import Bare, Nothing, StandIn, keys, router_of, twin

Decide = Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None]
"""From indices and weights ``[T, k]``: which slots are kept, and all slots' new weights; None where
all are kept."""


def asked(call: Call, x: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """The indices and weights ``[..., k]`` that the router gives, for another ``x`` if there is
    one, in a visit in which no expert runs; None where it gives something else."""
    module: Any = call.site.module
    name = router_of(module)
    watched = _Watched(getattr(module, name))
    silent = [Nothing(expert) for expert in module.experts]
    args, kwargs = call.given(x)
    with call.beside(asked=False):
        twin(module, experts=silent, **{name: watched}).forward(*args, **kwargs)
    found = _places(watched.seen)
    return None if found is None else (watched.seen[found[0]], watched.seen[found[1]])


def run(call: Call, decide: Decide) -> Any:
    """The module's visit, with the experts that ``decide`` keeps."""
    module: Any = call.site.module
    name = router_of(module)
    plan = _Plan(call, decide)
    experts = [_Expert(plan, e, expert) for e, expert in enumerate(module.experts)]
    changed = twin(module, experts=experts, **{name: _Router(plan, getattr(module, name))})
    args, kwargs = call.given()

    def work() -> Any:
        out = changed.forward(*args, **kwargs)
        if plan.spared:
            call.spare(plan.spared)
        return out

    return call.compute(work)


class _Plan:
    """What the router said in this visit, and what is kept of it."""

    def __init__(self, call: Call, decide: Decide) -> None:
        self.call, self.decide = call, decide
        self.spared = 0.0
        self.x: Tensor | None = None
        self.indices: Tensor | None = None  # [T, k] on the host, -1 - e where e is dropped

    def route(self, x: Any, out: Any) -> Any:
        """The router's output with the weights of the kept slots."""
        found = _places(out)
        if found is None or not isinstance(x, Tensor):
            return out
        values = list(out)
        indices, weights = (values[place].flatten(0, -2) for place in found)
        decided = self.decide(indices, weights)
        if decided is None:
            return out
        kept, new = decided
        codes = torch.where(kept, indices, -1 - indices)
        self.indices = torch.tensor(self.call.read_rows(codes.flatten()), device="cpu").view(
            codes.shape
        )
        self.x = x.flatten(0, -2)
        values[found[1]] = new.to(weights.dtype).view(values[found[1]].shape)
        return type(out)(values)

    def rows(self, expert: int, x: Tensor) -> Tensor | None:
        """The numbers of the rows of ``x`` ``[n, H]``, what an expert was given, that are to be
        computed; None for all."""
        if self.indices is None or self.x is None:
            return None
        asked = (self.indices == expert) | (self.indices == -1 - expert)
        token = asked.nonzero()[:, 0]
        kept = self.indices[asked] >= 0
        if kept.all() or len(token) != len(x):
            return None
        if not kept.any():
            return kept.nonzero().squeeze(1)
        mine, theirs = (keys(t.to(x.dtype)).sort() for t in (self.x[token.to(x.device)], x))
        if not self.call.read((mine.values == theirs.values).all())[0]:
            self.call.remark(
                f"expert_skip: {self.call.site.name} gives its experts other rows than its router; "
                "those of experts that only some tokens drop are computed all the same"
            )
            return None
        wanted = torch.zeros_like(theirs.indices)
        wanted[theirs.indices] = kept.to(x.device, wanted.dtype)[mine.indices]
        return wanted.topk(int(kept.sum())).indices.sort().values


def _places(values: Any) -> tuple[int, int] | None:
    """Which outputs of a router are indices and weights: ``[..., k]`` both."""
    if not isinstance(values, (tuple, list)):
        return None
    tensors = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.ndim >= 2]
    for i in tensors:
        for w in tensors:
            whole = values[i].dtype in (torch.int64, torch.int32)
            if whole and values[w].is_floating_point() and values[i].shape == values[w].shape:
                return i, w
    return None


class _Watched(Bare):
    seen: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = super().__call__(*args, **kwargs)
        return self.seen


class _Router(StandIn):
    def __init__(self, plan: _Plan, module: nn.Module) -> None:
        super().__init__(module)
        self._plan = plan

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self._plan.route(x, self._module(x, *args, **kwargs))


class _Expert(StandIn):
    def __init__(self, plan: _Plan, number: int, module: nn.Module) -> None:
        super().__init__(module)
        self._plan, self._number = plan, number

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = self._plan.rows(self._number, x) if x.ndim == 2 and len(x) else None
        if rows is None:
            return self._module(x, *args, **kwargs)
        self._plan.spared += slot_flops(self._module, 1) * (len(x) - len(rows))
        if not len(rows):
            return torch.zeros_like(x)
        some = self._module(x.index_select(0, rows), *args, **kwargs)
        return some.new_zeros(len(x), *some.shape[1:]).index_copy_(0, rows, some)


opaque_functions(globals())
