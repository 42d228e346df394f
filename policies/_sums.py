"""Whether a router gives all tokens weights of one sum, which those of kept experts then have too.

It is asked once of each mixture, on tokens of noise, so that no request decides how another one is
weighed. Their sizes spread over a factor of 64: a softmax that nobody normalises also sums to about
one where all logits are large, and to about the same where all are small.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_hooks.call import Call
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.policies import _lists, _weighing
from accelerate_hooks.policies._experts import noise
from accelerate_hooks.policies._routers import chosen
from accelerate_hooks.policies._twins import Bare, StandIn, router_of, twin
from accelerate_hooks.recognise import version_of
from accelerate_hooks.site import Site

_TOKENS = 256
_SAME = 1e-2  # sums of bfloat16 weights differ by as much


def same(totals: Tensor) -> Tensor:
    """Whether tokens ``[T]`` or ``[T, 1]`` have weights of one sum, of those that have any: a bool
    where they are. One token alone has if that is 1."""
    fine = totals.float().flatten()
    fine = torch.where(fine > 0, fine, torch.nan)
    least, most = fine.nan_to_num(torch.inf).amin(), fine.nan_to_num(0.0).amax()
    one = (most - 1.0).abs() < _SAME if len(fine) == 1 else torch.ones_like(most, dtype=torch.bool)
    return (most - least < _SAME * most) & one


def normalises(call: Call) -> Tensor | None:
    """Whether the router before these experts does, a bool on their device; None where it cannot be
    asked beside a visit."""
    around = next((m for m, _ in call.around() if router_of(m)), call.site.module)
    for ask in (_by_owner, _by_router) if call.routing is not None else (_by_list, _by_marks):
        for x in _noise(call):
            try:
                with call.beside(asked=False), torch.no_grad(), untouched(around):
                    totals = ask(call, x)
            except Exception:  # code of others, called with less than it wants
                continue
            if totals is not None and totals.device == call.x.device and len(totals) > 1:
                return same(totals)
    return None


def _noise(call: Call) -> Iterator[Tensor]:
    """In the shapes that a module may want; what a router sees may be wider than experts."""
    router = _router(call)
    matrices = [p for p in router.parameters() if p.ndim == 2] if router is not None else []
    for width in dict.fromkeys((call.x.shape[-1], *(p.shape[1] for p in matrices))):
        x = noise(_TOKENS, width).to(call.x)
        yield from (x.unsqueeze(0), x)


@contextmanager
def untouched(around: nn.Module) -> Generator[None]:
    """What routers count in buffers, they do not count of noise."""
    held = [
        (module, name, buffer, buffer.clone(), version_of(buffer))
        for module in around.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, before, version in held:
            if version_of(buffer) != version or buffer.is_inference():
                buffer.copy_(before)
            module._buffers[name] = buffer


def _router(call: Call) -> nn.Module | None:
    owner = next((m for m, _ in call.around() if router_of(m)), None)
    return None if owner is None else getattr(owner, router_of(owner))


class _Found(Exception):
    """It is known what the experts are given; nothing behind that has to run."""


class _Told(StandIn):
    """The experts of a twin, which tell what they are given and end the visit."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _Found(args, kwargs)


def given_by(
    around: Iterable[tuple[nn.Module, str]], site: Site, x: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that experts are given by the nearest module with a router, which is given
    ``x``. Raises whatever that module does."""
    owner, name = next((m, n) for m, n in around if router_of(m))
    children: dict[str, StandIn] = {
        n: Bare(child)
        for n, child in owner.named_children()
        if not isinstance(child, (nn.ModuleList, nn.ModuleDict))
    }
    children[name] = _Told(getattr(owner, name))
    try:
        twin(owner, **children).forward(x)
    except _Found as found:
        return found.args
    raise LookupError(f"{site.name} is not asked")


def _by_owner(call: Call, x: Tensor) -> Tensor | None:
    """What the module around the experts gives them."""
    port = call.site.port
    if port.routing is None:
        return None
    return port.named(*given_by(call.around(), call.site, x))[port.routing[1]].sum(-1)


def _by_router(call: Call, x: Tensor) -> Tensor | None:
    """What the router beside them gives."""
    router = _router(call)
    found = None if router is None else chosen(router.forward(x))
    return None if found is None else found[1].flatten(0, -2).sum(-1)


def _by_list(call: Call, x: Tensor) -> Tensor | None:
    found = _lists.asked(call, x)
    return None if found is None else found[1].flatten(0, -2).sum(-1)


def _by_marks(call: Call, x: Tensor) -> Tensor | None:
    found = _weighing.weights_of(call, x)
    return None if found is None else found.sum(-1)


opaque_functions(globals())
