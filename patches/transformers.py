"""transformers: recurrent states that must be refused, attention through a key of our own."""

from __future__ import annotations

import contextvars
import copy
import functools
import inspect
import itertools
import operator
import re
import sys
import types
from typing import Any

import torch
from torch import nn

from accelerate_hooks.attention import Attention
from accelerate_hooks.opaque import opaque
from accelerate_hooks.patch import LayoutRule
from accelerate_hooks.patches.structural import StructuralPatch
from accelerate_hooks.site import Port, Site, TokenLayout

_numbers = itertools.count(1)
_current: contextvars.ContextVar[Any] = contextvars.ContextVar("attention", default=None)


_STATE = re.compile(
    r"(^|_)(conv|conv1d|recurrent|rnn|ssm|linear|shared_kv|indexer)_(states?|cache|keys)$"
    r"|^update_indexer$"
)


@functools.cache
def _states(cls: type) -> str | None:
    """What the methods of a module's class call the states that they keep, if any."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for member in vars(base).values():
            code = getattr(inspect.unwrap(member) if callable(member) else None, "__code__", None)
            if code is None:
                continue
            given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            for name in (*code.co_names, *given):
                if _STATE.search(name) or (name == "state" and name in given):
                    return name
    return None


class TransformersPatch(StructuralPatch):
    timesteps = ()

    def matches(self, model: nn.Module) -> bool:
        return any(base.__module__.startswith("transformers.") for base in type(model).__mro__)

    def sites(self, model: nn.Module) -> list[Site]:
        sites = super().sites(model)
        if callable(getattr(model, "generate", None)) and model.can_generate():
            parameters = tuple(inspect.signature(model.generate).parameters)
            loop = Port(parameters, parameters[0], confirmed=True)
            sites.append(Site("loop", "generate", model, loop))
        return sites

    def refuses(self, site: Site) -> str | None:
        """States that a skipped visit would not move on: whoever keeps one calls a method, reads an
        attribute or takes an argument that says so."""
        if site.kind not in ("block", "attention"):
            return None
        for module in site.module.modules():
            found = _states(type(module))
            if found:
                return f"{type(module).__name__} keeps a state beside keys and values ({found})"
        return None

    def layout_of(self, model: nn.Module) -> LayoutRule | None:
        """Text and sound stand in a line; a picture's patches are left to who knows them."""
        if getattr(model, "main_input_name", None) == "pixel_values":
            return None
        return _line

    def reach_attention(self, site: Site, session: Any) -> Any:
        """Register a private attention function and name it in a config copy that only this
        attention module holds; other modules never see it."""
        module = site.module
        config = getattr(module, "config", None)
        implementation = getattr(config, "_attn_implementation", None)
        own = inspect.unwrap(type(module).forward)
        if implementation is None or "ALL_ATTENTION_FUNCTIONS" not in own.__globals__:
            return None  # those that ask for the name of an implementation themselves (Falcon)
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry

        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if implementation == "eager":
            original = eager
        else:
            original = registry.get_interface(implementation, eager)
        if original is None:
            return None
        key = session.private_key
        if key is None:
            key = session.private_key = f"accelerate_hooks_{next(_numbers)}"
            registry[key] = _dispatch
            session.ledger.note(lambda: _unregister(registry, key))
        changed = _private(config, key, original)
        module.config = changed

        def undo() -> str | None:
            if module.config is not changed:
                return f"{site.path}.config"
            module.config = config
            return None

        session.ledger.note(undo)
        return KeyContext


@opaque
def _line(given: dict[str, Any], values: Any) -> TokenLayout | None:
    names = (
        "inputs_embeds", "input_ids", "input_features", "input_values",
        "decoder_input_ids", "decoder_inputs_embeds",
    )  # fmt: skip
    x = next((given[n] for n in names if isinstance(given.get(n), torch.Tensor)), None)
    return None if x is None or x.ndim < 2 else TokenLayout(1, 1, x.shape[1])


class _Key(str):
    """The name of our function, that is found under it, and equal to the name that it stands for:
    some models ask which implementation they have."""

    stands_for: str

    def __new__(cls, key: str, stands_for: str) -> _Key:
        new = super().__new__(cls, key)
        new.stands_for = stands_for
        return new

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == self.stands_for

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _private(config: Any, key: str, original: Any) -> Any:
    """A copy of a config that names our key, whose own copies are those of the plain config: a
    deep copy or an unpickled model never asks for a key that only a living session answers."""
    changed = copy.copy(config)
    changed._attn_implementation_internal = _Key(key, config._attn_implementation)
    vars(changed)["_accelerate_hooks"] = (config, original)
    changed.__class__ = _returning(type(config))
    return changed


@functools.cache
def _returning(base: type) -> type:
    def plain(self: Any, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(vars(self)["_accelerate_hooks"][0], memo)

    def reduce(self: Any, protocol: Any) -> Any:
        return operator.getitem, ((vars(self)["_accelerate_hooks"][0],), 0)

    def shallow(self: Any) -> Any:
        return copy.copy(vars(self)["_accelerate_hooks"][0])

    body = {
        "__copy__": shallow,
        "__deepcopy__": plain,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
    }
    return types.new_class(base.__name__, (base,), exec_body=lambda names: names.update(body))


def _unregister(registry: Any, key: str) -> None:
    del registry[key]


_KNOWN = ("position_ids", "cache_position", "dropout")
"""Tensors among an attention's keywords that change nothing of its arithmetic; others (T5's
position bias) do."""


class KeyContext:
    """While entered, attention of this thread that goes through our key goes to ``fn``."""

    def __init__(self, fn: Any, joint: int | None, layout: Any) -> None:
        self.fn, self.joint, self.layout, self.calls = fn, joint, layout, 0

    def __enter__(self) -> KeyContext:
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: Any) -> None:
        _current.reset(self._token)


def _dispatch(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> Any:
    _, original = vars(module.config)["_accelerate_hooks"]
    context = _current.get()
    if context is None:
        return original(module, query, key, value, attention_mask, **kwargs)
    weights = None

    def default(**changes: Any) -> torch.Tensor:
        nonlocal weights
        q, k, v = (changes.get(n, t) for n, t in (("query", query), ("key", key), ("value", value)))
        out, weights = original(module, q, k, v, changes.get("attn_mask", attention_mask), **kwargs)
        return out.transpose(1, 2)

    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    extra = {
        name: kwargs[given]
        for name, given in (
            ("window", "sliding_window"),
            ("sinks", "s_aux"),
            ("softcap", "softcap"),
        )
        if kwargs.get(given) is not None
    }
    extra |= {
        name: value
        for name, value in kwargs.items()
        if isinstance(value, torch.Tensor) and name not in (*_KNOWN, "s_aux")
    }
    context.calls += 1
    out = context.fn(
        Attention(
            query,
            key,
            value,
            attention_mask,
            bool(causal) and attention_mask is None and query.shape[2] > 1,
            kwargs.get("scaling"),
            query.shape[1] // key.shape[1],
            context.calls - 1,
            context.joint not in (None, key.shape[2]),
            context.layout,
            default,
            extra,
        )
    )
    return out.transpose(1, 2).contiguous(), weights
