"""Experts that choose their tokens: ``experts(rows [n, H], sizes [E])``, the rows sorted by expert.

The module around them weighs what comes out and adds it to the tokens' places, in ways of its own,
but linearly. So its forward runs twice on a twin: once with ``1`` in channel ``e`` as the output of
expert ``e``, and nothing else in the module; what arrives is the weight of each token and expert
``[T, E]``. Then in earnest, with the rows of the kept ones alone, and so scaled that the tokens'
weights are as they should.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accelerate_hooks.call import Call
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.policies._experts import slot_flops
from accelerate_hooks.policies._lists import Decide
from accelerate_hooks.policies._twins import StandIn, keys, router_of, twin


def run(call: Call, decide: Decide) -> Any:
    """The module's visit, with the pairs of token and expert that ``decide`` keeps."""
    module: Any = call.site.module
    args, kwargs = call.given()
    others = {
        name: _Nothing(child)
        for name, child in module.named_children()
        if name not in ("experts", router_of(module))
    }
    ones = _Ones(module.experts)
    x = call.x.flatten(0, -2)

    def work() -> Any:
        with call.beside():
            seen = twin(module, experts=ones, **others).forward(*args, **kwargs)
        if ones.count > x.shape[1] or not isinstance(seen, Tensor) or seen.shape != call.x.shape:
            call.inert(
                f"expert_skip: how {call.site.name} weighs its experts cannot be read off its "
                "output; they are left alone"
            )
            return plain()
        weights = seen.flatten(0, -2)[:, : ones.count]
        indices = torch.arange(ones.count, device=x.device).expand(weights.shape)
        decided = decide(indices, weights)
        if decided is None:
            return plain()
        some = _Some(call, module.experts, x, weights, *decided)
        return twin(module, experts=some).forward(*args, **kwargs)

    def plain() -> Any:
        return type(module).forward(module, *args, **kwargs)

    return call.compute(work)


class _Nothing(StandIn):
    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(x)


class _Ones(StandIn):
    count = 0

    def __call__(self, x: Tensor, sizes: Tensor) -> Tensor:
        self.count = len(sizes)
        out = torch.zeros_like(x)
        if self.count <= x.shape[1]:
            out.scatter_(1, _experts(x, sizes).unsqueeze(1), 1.0)
        return out


class _Some(StandIn):
    """The experts, for the rows whose token keeps them."""

    def __init__(
        self, call: Call, module: nn.Module, x: Tensor, old: Tensor, kept: Tensor, new: Tensor
    ) -> None:
        super().__init__(module)
        self._call, self._x, self._kept = call, x, kept
        self._scale = torch.where(old > 0, new / old, 1.0)

    def __call__(self, x: Tensor, sizes: Tensor) -> Tensor:
        expert = _experts(x, sizes)
        known, order = keys(self._x.to(x.dtype)).sort()
        place = torch.searchsorted(known, theirs := keys(x)).clamp(max=len(known) - 1)
        token = order[place]
        kept = self._kept[token, expert]
        right, count = self._call.read((known[place] == theirs).all(), kept.sum())
        if not right:
            self._call.inert(
                f"expert_skip: {self._call.site.name} gives its experts other rows than it gets; "
                "they are left alone"
            )
            return self._module(x, sizes)
        if count == len(x):
            return self._module(x, sizes)
        self._call.spare(slot_flops(self._module) * (len(x) - count))
        rows = kept.int().argsort(descending=True, stable=True)[: int(count)]
        fewer = torch.zeros_like(sizes).index_add_(0, expert[rows], torch.ones_like(rows))
        some = self._module(x[rows], fewer.to(sizes.dtype))
        scale = self._scale[token, expert][rows].unsqueeze(1)
        return torch.zeros_like(x).index_copy_(0, rows, (some * scale).to(x.dtype))


def _experts(x: Tensor, sizes: Tensor) -> Tensor:
    """The expert of each row."""
    numbers = torch.arange(len(sizes), device=x.device)
    return numbers.repeat_interleave(sizes.to(x.device), output_size=len(x))


opaque_functions(globals())
