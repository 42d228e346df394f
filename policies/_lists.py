"""Experts in a plain list, called one by one by the module around them, each for its rows:

    for e, expert in enumerate(self.experts):
        out[rows_e] += weights_e * expert(x[rows_e])

Which rows, only that module knows. So its own forward runs, on a twin of it in which the router
gives the weights of the kept slots (zero elsewhere), and an expert computes the rows of the tokens
that keep it; the others get zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_hooks.call import Call
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.policies._experts import slot_flops
from accelerate_hooks.seam import seam_of

Decide = Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None]
"""From indices and weights ``[T, k]``: which slots are kept, and all slots' new weights; None where
all are kept."""
_ROUTERS = ("gate", "router")


def _router_of(module: nn.Module) -> str | None:
    return next((n for n in _ROUTERS if isinstance(getattr(module, n, None), nn.Module)), None)


def without(call: Call, decide: Decide) -> Any:
    """The module's visit, with the experts that ``decide`` keeps."""
    module, name = call.site.module, _router_of(call.site.module)
    args, kwargs = call.given()
    experts: Any = module.experts
    plan = _Plan(call, decide)
    forward: Any = type(module).forward
    seam = seam_of(module)
    if name is None or seam is None or getattr(seam.original, "__func__", None) is not forward:
        call.inert(
            f"expert_skip: {call.site.name} has no router, or its forward was replaced by somebody "
            "(offloading, another tool), and only the class's own can be given fewer rows"
        )
        return call.proceed()
    twin: Any = object.__new__(type(module))
    vars(twin).update(vars(module))
    vars(twin).pop("forward", None)
    vars(twin)["_modules"] = dict(
        module._modules,
        experts=[_Expert(plan, e, expert) for e, expert in enumerate(experts)],
        **{name: _Router(plan, getattr(module, name))},
    )

    def work() -> Any:
        out = forward(twin, *args, **kwargs)
        if plan.spared:
            call.spare(plan.spared)
        if not plan.asked:
            call.inert(
                f"expert_skip: {call.site.name}.{name} gives no indices and weights of one shape; "
                "its experts are left alone"
            )
        return out

    return call.compute(work)


class _Plan:
    """What the router said in this visit, and what is kept of it."""

    def __init__(self, call: Call, decide: Decide) -> None:
        self.call, self.decide = call, decide
        self.asked = False
        self.spared = 0.0
        self.x: Tensor | None = None
        self.indices: Tensor | None = None  # [T, k] on the host, -1 - e where e is dropped

    def route(self, x: Tensor, out: Any) -> Any:
        """The router's output with the weights of the kept slots."""
        values = list(out) if isinstance(out, (tuple, list)) else []
        whole = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.ndim >= 2]
        places = [
            (i, w)
            for i in whole
            for w in whole
            if values[i].dtype in (torch.int64, torch.int32)
            and values[w].is_floating_point()
            and values[i].shape == values[w].shape
        ]
        if not places or not isinstance(x, Tensor):
            return out
        self.asked = True
        indices, weights = (values[place].flatten(0, -2) for place in places[0])
        decided = self.decide(indices, weights)
        if decided is None:
            return out
        kept, new = decided
        codes = torch.where(kept, indices, -1 - indices)
        self.indices = torch.tensor(self.call.read_rows(codes.flatten())).view(codes.shape)
        self.x = x.flatten(0, -2)
        place = places[0][1]
        values[place] = new.to(weights.dtype).view(values[place].shape)
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
        mine, theirs = (_keys(t.to(x.dtype)).sort() for t in (self.x[token.to(x.device)], x))
        if not self.call.read((mine.values == theirs.values).all())[0]:
            self.call.remark(
                f"expert_skip: {self.call.site.name} gives its experts other rows than its router; "
                "those of experts that only some tokens drop are computed all the same"
            )
            return None
        wanted = torch.zeros_like(theirs.indices)
        wanted[theirs.indices] = kept.to(x.device, wanted.dtype)[mine.indices]
        return wanted.topk(int(kept.sum())).indices.sort().values


def _keys(x: Tensor) -> Tensor:
    """A number for each row that is equal for equal rows alone (a linear hash of its bits), so that
    rows are known again in whatever order."""
    bits = x.contiguous().view(torch.int16).long()
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, bits.shape[1:], generator=generator)
    return (bits * factors.to(x.device)).sum(-1)


class _StandIn:
    """A module of the twin; what is asked of it beside calls, the real one answers."""

    def __init__(self, plan: _Plan, module: nn.Module) -> None:
        self._plan, self._module = plan, module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Router(_StandIn):
    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self._plan.route(x, self._module(x, *args, **kwargs))


class _Expert(_StandIn):
    def __init__(self, plan: _Plan, number: int, module: nn.Module) -> None:
        super().__init__(plan, module)
        self._number = number

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = self._plan.rows(self._number, x) if x.ndim == 2 and len(x) else None
        if rows is None:
            return self._module(x, *args, **kwargs)
        self._plan.spared += slot_flops(self._module) * (len(x) - len(rows))
        if not len(rows):
            return torch.zeros_like(x)
        some = self._module(x.index_select(0, rows), *args, **kwargs)
        return some.new_zeros(len(x), *some.shape[1:]).index_copy_(0, rows, some)


opaque_functions(globals())
