"""Which experts a router may choose, whatever its formula is.

A softmax over the experts that are left is the softmax of logits that are ``-inf`` at the others.
So the logits are hidden where they leave the router's product, and once more where experts are
picked, since sigmoid routers add a bias to what they pick by. Inside of a router that is two
operations in the right place, and needs no knowledge of the family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from accelerate_hooks import tree
from accelerate_hooks.call import Call
from accelerate_hooks.errors import UnsupportedModelError
from accelerate_hooks.frame import FRAME
from accelerate_hooks.opaque import opaque_functions, uncompiled
from accelerate_hooks.seam import Override
from accelerate_hooks.site import Site

_PRODUCTS = frozenset(
    {
        F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.addmm,
        torch.einsum, torch.bmm,
    }
)  # fmt: skip
_PICKS = frozenset({torch.topk, Tensor.topk, torch.argmax, Tensor.argmax, torch.max, Tensor.max})


class _Hiding(TorchFunctionMode):
    """Inside, the experts of ``hidden`` ``[E]`` cannot be chosen."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PICKS and args and self._over_experts(args[0]):
            args = (self._hide(args[0]), *args[1:])
        out = func(*args, **kwargs or {})
        return self._hide(out) if func in _PRODUCTS and self._over_experts(out) else out

    def _over_experts(self, value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.ndim >= 1
            and value.shape[-1] == len(self.hidden)
        )

    def _hide(self, value: Tensor) -> Tensor:
        return value.masked_fill(self.hidden, float("-inf"))


@dataclass(frozen=True, eq=False)
class Plan:
    """What a router's choice is turned into.

    hidden: bools ``[E]``, experts that are not chosen. place: ``[E]``, the numbers of the experts
    among those that are left, where the others are gone. mix: ``[E', E]``, how the probabilities of
    the E' new experts are made of the old ones (EEP).
    """

    hidden: Tensor
    place: Tensor | None = None
    mix: Tensor | None = None

    def to(self, device: torch.device) -> Plan:
        place, mix = (None if t is None else t.to(device) for t in (self.place, self.mix))
        return Plan(self.hidden.to(device), place, mix)


@uncompiled
def route(call: Call, plan: Plan) -> Any:
    """A visit of a router under a plan.

    Raises UnsupportedModelError at the first visit if it does not obey.
    """
    told, device = plan, next(tree.leaves(call.given()))[1].device
    plan = call.known(lambda: told.to(device), f"plan on {device}")  # no copy a visit
    return _follow(
        call.site, plan, call.proceed,
        lambda wrong: call.known(lambda: not call.read(wrong())[0], "obeys"),
    )  # fmt: skip


class Renumbered:
    """The forward of a router before experts that are really gone: in every forward of the module,
    whether policies act in it or not."""

    def __init__(self, site: Site, plan: Plan) -> None:
        self.site, self.plan = site, plan
        self.plans: dict[torch.device, Plan] = {}
        self.obeys = False

    @uncompiled
    def __call__(self, override: Override, args: Any, kwargs: Any) -> Any:
        device = next(tree.leaves((args, kwargs)))[1].device
        if device not in self.plans:
            self.plans[device] = self.plan.to(device)
        return _follow(
            self.site, self.plans[device], lambda: override.original(*args, **kwargs), self._obeys
        )

    def _obeys(self, wrong: Callable[[], Tensor]) -> bool:
        if not self.obeys:
            frame = FRAME.get()
            if frame is not None:
                frame.count_read()
            self.obeys = not bool(wrong())
        return self.obeys


def _follow(
    site: Site, plan: Plan, work: Callable[[], Any], obeys: Callable[[Callable[[], Tensor]], bool]
) -> Any:
    with _Hiding(plan.hidden):
        out = work()
    if plan.mix is not None:
        return _mixed(site, out, plan.mix)
    at = _indices(out)
    if not obeys(lambda: _wrong(out, at, plan)):
        raise UnsupportedModelError(
            f"expert_skip: {site.name} ({type(site.module).__name__}) chooses experts in a way "
            "that pruning does not reach; use the rules that act at run time instead"
        )
    if plan.place is None or at is None:
        return out
    return _put(out, {at: plan.place[out[at]].to(out[at].dtype)})


def _indices(out: Any) -> int | None:
    """Where a router's output holds the numbers of the chosen experts."""
    parts = out if isinstance(out, tuple) else (out,)
    whole = [
        i
        for i, t in enumerate(parts)
        if isinstance(t, Tensor) and t.dtype in (torch.int64, torch.int32)
    ]
    return whole[0] if len(whole) == 1 and isinstance(out, tuple) else None


def chosen(out: Any) -> tuple[Tensor, Tensor] | None:
    """(indices, weights) ``[T, k]`` in what a router gave, where it gives both."""
    at = _indices(out)
    if at is None:
        return None
    weights = [
        t
        for t in out
        if isinstance(t, Tensor) and t.is_floating_point() and t.shape == out[at].shape
    ]
    return (out[at], weights[0]) if len(weights) == 1 else None


def _wrong(out: Any, at: int | None, plan: Plan) -> Tensor:
    """Whether a router has chosen what is hidden."""
    if at is None:  # logits alone are hidden already, but cannot be given other numbers
        hides = isinstance(out, Tensor) and out.shape[-1] == len(plan.hidden)
        return torch.tensor(float(not hides or plan.place is not None), device="cpu")
    return plan.hidden[out[at]].any().float()


def _mixed(site: Site, out: Any, mix: Tensor) -> Any:
    """EEP's router: ``p = softmax(logits) @ mix.T``, the greatest of which are chosen, weighed to
    the sum that the router's own weights had."""
    at = _indices(out)
    count = mix.shape[1]
    scores = [
        i for i, t in enumerate(out if isinstance(out, tuple) else ())
        if isinstance(t, Tensor) and t.is_floating_point()
    ]  # fmt: skip
    logits = [i for i in scores if out[i].shape[-1] == count]
    weights = [i for i in scores if at is not None and out[i].shape == out[at].shape]
    if at is None or len(logits) != 1 or len(weights) != 1:
        raise UnsupportedModelError(
            f"expert_skip: {site.name} ({type(site.module).__name__}) does not give "
            "logits, weights and indices; matrices that merge experts need a router that does"
        )
    before = out[weights[0]]
    share = out[logits[0]].float().softmax(-1) @ mix.float().mT
    top = share.topk(before.shape[-1], dim=-1)
    total = before.float().sum(-1, keepdim=True)
    new = top.values * (total / top.values.sum(-1, keepdim=True))
    return _put(out, {at: top.indices.to(out[at].dtype), weights[0]: new.to(before.dtype)})


def _put(out: tuple[Any, ...], new: dict[int, Tensor]) -> Any:
    return type(out)(new.get(i, value) for i, value in enumerate(out))


opaque_functions(globals())
