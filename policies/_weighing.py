"""Modules that tell nobody how they weigh their experts: experts in a list whose router gives
logits alone, and experts that choose their tokens, ``experts(rows [n, H], rows_per_expert [E])``.

Whatever they do, the output is linear in what the experts give. So the module's forward runs twice
on a twin: once with ``1`` in channel ``e`` as the output of expert ``e``, and nothing else in the
module; what arrives is the weight of each token and expert ``[T, E]``. Then in earnest, where an
expert computes the rows of the tokens that keep it, so scaled that the weights are as they should.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accelerate_hooks.call import Call
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.policies._experts import slot_flops
from accelerate_hooks.policies._lists import Decide
from accelerate_hooks.policies._twins import Bare, Nothing, StandIn, keys, router_of, twin


def run(call: Call, decide: Decide) -> Any:
    """The module's visit, with the pairs of token and expert that ``decide`` keeps."""
    module: Any = call.site.module
    args, kwargs = call.given()

    def work() -> Any:
        weights = weights_of(call)
        if weights is None:
            call.inert(
                f"expert_skip: how {type(module).__name__} weighs its experts cannot be read off "
                "its output; they are left alone"
            )
            return type(module).forward(module, *args, **kwargs)
        indices = torch.arange(weights.shape[1], device=weights.device).expand(weights.shape)
        decided = decide(indices, weights)
        if decided is None:
            return type(module).forward(module, *args, **kwargs)
        rows = _Rows(call, weights, *decided)
        experts = module.experts
        if isinstance(experts, nn.ModuleList):
            some: Any = [_One(expert, rows, e) for e, expert in enumerate(experts)]
        else:
            some = _All(experts, rows)
        return twin(module, experts=some).forward(*args, **kwargs)

    return call.compute(work)


def weights_of(call: Call, x: Tensor | None = None) -> Tensor | None:
    """Of each token (of another ``x`` if there is one) and expert ``[T, E]``; None where they do
    not show."""
    module: Any = call.site.module
    experts, router = module.experts, router_of(module)
    listed = isinstance(experts, nn.ModuleList)
    probe: Any = [_Mark(e, i) for i, e in enumerate(experts)] if listed else _Marks(experts)
    silent: dict[str, StandIn] = {
        name: Nothing(child)
        for name, child in module.named_children()
        if name not in ("experts", router)
    }
    if router:
        silent[router] = Bare(getattr(module, router))
    args, kwargs = call.given(x)
    with call.beside():
        out = twin(module, experts=probe, **silent).forward(*args, **kwargs)
    seen = out[0] if isinstance(out, tuple) else out
    count = len(experts) if listed else probe.count
    shape = (call.x if x is None else x).shape
    if not isinstance(seen, Tensor) or seen.shape != shape or count > shape[-1]:
        return None
    weights = seen.flatten(0, -2)[:, :count]
    if x is not None:
        return weights
    shows = call.known(lambda: call.read(weights.abs().amax())[0] > 0.0, "weights")
    return weights if shows else None


class _Mark(StandIn):
    """An expert of a list that gives 1 in the channel of its number."""

    def __init__(self, module: nn.Module, number: int) -> None:
        super().__init__(module)
        self._number = number

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = torch.zeros_like(x)
        out[..., self._number : self._number + 1] = 1.0
        return out


class _Marks(StandIn):
    """All experts in one module, the same."""

    count = 0

    def __call__(self, x: Tensor, sizes: Tensor) -> Tensor:
        self.count = len(sizes)
        out = torch.zeros_like(x)
        if self.count <= x.shape[1]:
            out.scatter_(1, _experts(x, sizes).unsqueeze(1), 1.0)
        return out


class _Rows:
    """Which rows experts compute."""

    def __init__(self, call: Call, weights: Tensor, kept: Tensor, new: Tensor) -> None:
        self.call, self.kept = call, kept & (weights > 0)
        self.scale = torch.where(weights > 0, new / weights, 1.0)
        self.keys, self.order = keys(call.x.flatten(0, -2)).sort()

    def __call__(self, x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of rows ``x`` ``[n, H]`` for ``experts`` ``[n]``: which are to be computed and how their
        outputs are scaled; None for all as they are."""
        theirs = keys(x)
        place = torch.searchsorted(self.keys, theirs).clamp(max=len(self.keys) - 1)
        token = self.order[place]
        kept = self.kept[token, experts]
        right, count = self.call.read((self.keys[place] == theirs).all(), kept.sum())
        if not right:
            self.call.inert(
                f"expert_skip: {type(self.call.site.module).__name__} gives its experts other rows "
                "than it is given; they are left alone"
            )
            return None
        rows = kept.int().argsort(descending=True, stable=True)[: int(count)]
        return rows, self.scale[token, experts][rows].unsqueeze(1)


class _One(StandIn):
    """An expert of a list, for the rows whose token keeps it."""

    def __init__(self, module: nn.Module, rows: _Rows, number: int) -> None:
        super().__init__(module)
        self._rows, self._number = rows, number

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        flat = x.flatten(0, -2)
        numbers = torch.full(flat.shape[:1], self._number, device=x.device)
        found = self._rows(flat, numbers) if len(flat) else None
        if found is None:
            return self._module(x, *args, **kwargs)
        rows, scale = found
        self._rows.call.spare(slot_flops(self._module, 1) * (len(flat) - len(rows)))
        out = torch.zeros_like(flat)
        if len(rows):
            some = self._module(flat[rows], *args, **kwargs)
            out.index_copy_(0, rows, (some * scale).to(out.dtype))
        return out.view(x.shape)


class _All(StandIn):
    """All experts in one module, for the rows whose tokens keep them."""

    def __init__(self, module: nn.Module, rows: _Rows) -> None:
        super().__init__(module)
        self._rows = rows

    def __call__(self, x: Tensor, sizes: Tensor) -> Any:
        experts = _experts(x, sizes)
        found = self._rows(x, experts)
        if found is None or len(found[0]) == len(x):
            return self._module(x, sizes)
        rows, scale = found
        self._rows.call.spare(slot_flops(self._module) * (len(x) - len(rows)))
        ones = torch.ones(len(rows), dtype=sizes.dtype, device=sizes.device)
        fewer = torch.zeros_like(sizes).index_add_(0, experts[rows].to(sizes.device), ones)
        some = self._module(x[rows], fewer)
        return torch.zeros_like(x).index_copy_(0, rows, (some * scale).to(x.dtype))


def _experts(x: Tensor, sizes: Tensor) -> Tensor:
    """The expert of each row."""
    numbers = torch.arange(len(sizes), device=x.device)
    return numbers.repeat_interleave(sizes.to(x.device), output_size=len(x))


opaque_functions(globals())
