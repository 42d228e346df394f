"""A module's own forward, with other children: for what only the module itself knows.

`twin` has the class, parameters and state of a module and is never registered anywhere, so the
module is as it was, for other threads too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.seam import Seam

_ROUTERS = ("gate", "router")


class StandIn:
    """A child of a twin. What is asked of it beside calls, the real one answers."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Bare(StandIn):
    """Runs it without its hooks: those who count or collect what it gives need not see a look."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module.forward(*args, **kwargs)


class Nothing(StandIn):
    """Gives zeros."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(x)


def router_of(module: nn.Module | None) -> str:
    """The name of a module's router; empty where it has none under a name that is known."""
    return next((n for n in _ROUTERS if isinstance(getattr(module, n, None), nn.Module)), "")


def has_own_forward(module: nn.Module) -> bool:
    """Whether the forward of the module's class is what runs, and can run on a twin."""
    forward: Any = module.forward
    while isinstance(forward, Seam):
        forward = forward.original
    return getattr(forward, "__func__", None) is type(module).forward


def twin(module: nn.Module, **children: Any) -> Any:
    copy: Any = object.__new__(type(module))
    vars(copy).update(vars(module))
    vars(copy).pop("forward", None)
    vars(copy)["_modules"] = dict(module._modules, **children)
    return copy


def keys(x: Tensor) -> Tensor:
    """A number for each row of ``x`` ``[n, H]`` that is equal for equal rows alone (a linear hash
    of its bits), so that rows are known again in whatever order."""
    bits = x.contiguous().view(torch.int16).long()
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, bits.shape[1:], generator=generator, device="cpu")
    return (bits * factors.to(x.device)).sum(-1)


opaque_functions(globals())
