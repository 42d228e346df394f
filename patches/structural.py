"""Where a model can be intercepted, read off its structure: no family is named here.

Blocks are the entries of the innermost module lists whose entries hold an attention beside
something else; attention and MLP are found inside them by class and name, experts by their
signature, or as a list beside a router. Ports are guessed from names and confirmed (blocks) by
watching a forward.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from accelerate_hooks.patch import Patch
from accelerate_hooks.site import Kind, Port, Site

_ATTENTION = re.compile(r"attention|attn|(^|_)att($|_)|attention$", re.IGNORECASE)
_MIXER = re.compile(_ATTENTION.pattern + r"|mixer|fourier|mamba|recurrent|shortconv", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|feed_?forward|(^|_)ffn?($|_)|ff_context|swiglu|dense(relu|gated|act)", re.IGNORECASE
)
_INPUTS = ("hidden_states", "sample", "input_ids", "pixel_values", "input_features", "input_values")
_CONTEXTS = ("encoder_hidden_states",)
_ROUTERS = ("gate", "router")
_WRAPPED = re.compile(r"(\.base_layer)+$")  # what an adapter puts around a module


class StructuralPatch(Patch):
    """The default of every library."""

    def matches(self, model: nn.Module) -> bool:
        return True

    def sites(self, model: nn.Module) -> list[Site]:
        sites = [Site("model", "", model, port(model, "model"))]
        for name, stack in self.stacks(model):
            for index, block in enumerate(stack):
                path = f"{name}.{index}"
                found = list(inside(block))
                place: dict[str, Any] = {
                    "index": index,
                    "count": len(stack),
                    "stack": name,
                    "parts": frozenset(kind for kind, _, _ in found),
                }
                sites.append(Site("block", path, block, port(block, "block"), **place))
                for kind, inner, module in found:
                    where = port(module, kind)
                    sites.append(Site(kind, f"{path}.{inner}", module, where, **place))
        return sites

    def stacks(self, model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
        """The lists of blocks, in the order of the modules. A list whose entries hold such lists
        themselves is one of stages."""
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and is_stack(module):
                yield name, module


def is_stack(modules: nn.ModuleList) -> bool:
    """All are composed of parts and mix tokens, none is a stage."""
    return (
        len(modules) > 0
        and all(is_composed(module) and mixes_tokens(module) for module in modules)
        and not any(
            isinstance(inner, nn.ModuleList) and is_stack(inner)
            for module in modules
            for inner in module.modules()
        )
    )


def is_composed(module: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.Sequential)) or not any(
        True for _ in module.parameters()
    ):
        return False
    children = list(module.children())
    while len(children) == 1:
        children = list(children[0].children())
    return len(children) >= 2


def mixes_tokens(module: nn.Module) -> bool:
    """There is an attention somewhere inside, or what stands for one."""
    return any(
        _MIXER.search(type(m).__name__) or _MIXER.search(n.rpartition(".")[2])
        for n, m in module.named_modules()
        if n
    )


def inside(block: nn.Module) -> Iterator[tuple[Kind, str, nn.Module]]:
    """The attention, MLP, router and expert modules of a block."""
    done: list[str] = []
    for name, module in block.named_modules():
        if not name or any(name.startswith(f"{d}.") for d in done):
            continue
        around, _, last = _WRAPPED.sub("", name).rpartition(".")
        kind = kind_of(last, module)
        if last in _ROUTERS and hasattr(block.get_submodule(around), "experts"):
            kind = "router"
        if around.rpartition(".")[2] == "experts":  # one of a list: it gets the rows of some tokens
            kind = None
            done.append(name)
        elif kind == "experts" and _has_other_ways(block.get_submodule(around), module):
            kind = None
        elif _routes_inside(module):
            yield "experts", name, module
        if kind is None:
            continue
        if kind != "mlp" or not _holds_experts(module):
            done.append(name)
        yield kind, name, module


def kind_of(name: str, module: nn.Module) -> Kind | None:
    cls = type(module).__name__
    if name == "experts" and len(parameters(module)) >= 3:
        return "experts"
    if "router" in cls.lower():
        return "router"
    if (_ATTENTION.search(cls) or _ATTENTION.search(name)) and _projections(module) >= 2:
        return "attention"
    named = _MLP.search(cls) or _MLP.search(name)
    if named and not isinstance(module, (nn.Linear, nn.ModuleList)) and _has_weights(module):
        return "mlp"
    return None


def _holds_experts(module: nn.Module) -> bool:
    return any(name.rpartition(".")[2] == "experts" for name, _ in module.named_modules())


def _has_other_ways(parent: nn.Module, experts: nn.Module) -> bool:
    """The module around asks its experts by another method than ``forward`` (transformers' MXFP4
    ones), which nobody would see."""
    code = getattr(inspect.unwrap(type(parent).forward), "__code__", None)
    own = {
        name
        for cls in type(experts).__mro__
        if cls.__module__.partition(".")[0] != "torch"
        for name, value in vars(cls).items()
        if inspect.isfunction(value) and name != "forward" and not name.startswith("__")
    }
    return code is not None and not own.isdisjoint(code.co_names)


def _routes_inside(module: nn.Module) -> bool:
    """It has a router and calls the experts of a plain list one by one, or sorts tokens by expert
    itself: ``experts(rows, rows_per_expert)``."""
    experts = getattr(module, "experts", None)
    if not any(isinstance(getattr(module, name, None), nn.Module) for name in _ROUTERS):
        return False
    if type(experts) is nn.ModuleList:
        return len(experts) > 1
    names = parameters(experts) if isinstance(experts, nn.Module) else ()
    return len(names) == 2 and "per_expert" in names[1]


def _projections(module: nn.Module) -> int:
    """Of its own or of a child; XLNet keeps plain matrices."""
    own = sum(p.ndim >= 2 for p in module.parameters(recurse=False))
    return own + sum(
        any(True for _ in child.parameters(recurse=False))
        and "norm" not in type(child).__name__.lower()
        for child in module.children()
    )


def _has_weights(module: nn.Module) -> bool:
    return sum(p.ndim >= 2 for p in module.parameters()) >= 2


def signature(module: nn.Module) -> inspect.Signature:
    """Of ``forward``; of the class's where somebody wrapped it without passing the names on."""
    found = inspect.signature(module.forward)
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in found.parameters.values()):
        own = inspect.signature(type(module).forward)
        return own.replace(parameters=list(own.parameters.values())[1:])
    return found


def parameters(module: nn.Module) -> tuple[str, ...]:
    """The names that positional arguments of ``forward`` bind to."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(n for n, p in signature(module).parameters.items() if p.kind in kinds)


def port(module: nn.Module, kind: Kind) -> Port:
    names = parameters(module)
    keywords = set(signature(module).parameters)
    x = next((n for n in _INPUTS if n in keywords), names[0] if names else "hidden_states")
    context = next((n for n in _CONTEXTS if n in keywords and n != x), None)
    routing: Any = None
    if kind == "experts" and not _routes_inside(module):
        index = next((n for n in names if "ind" in n), None)
        weight = next((n for n in names if "weight" in n or "score" in n), None)
        routing = (index, weight) if index and weight else names[1:3]
    return Port(
        names,
        x,
        context,
        residual=kind == "block",
        row="token" if kind == "router" or routing is not None else "batch",
        routing=routing,
    )
