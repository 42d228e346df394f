"""The form of a site's output: what a skipped visit has to give back beside x."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from accelerate_hooks import flow, tree
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.run import Slot

if TYPE_CHECKING:
    from accelerate_hooks.call import Call

_MOST = 16
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class _Input:
    """An argument passed through."""

    def __init__(self, path: tree.Path) -> None:
        self.path = path


class _Kept:
    """A value that only the site can make; `weights` if they are attention weights."""

    def __init__(self, weights: bool) -> None:
        self.weights = weights


class _Rows:
    """x as a list of its rows."""


class _Known(NamedTuple):
    roles: Any  # the output with roles in the place of its leaves
    plain: bool  # it is x and nothing else
    x: tree.Path  # where x and context are in it, as far as could be told when it was made
    context: tree.Path | None
    sure: bool
    shapes: dict[tree.Path, Any]  # of its tensors
    given: dict[str, Any]  # shapes of the arguments, of x at least


class Form:
    """The last computed output, with roles in the place of its leaves.

    x and context have theirs by the site's port, whatever stands there. The others are constants,
    arguments passed through, or kept from the last computed visit of the same run, which holds
    them. Attention weights of a skipped visit do not exist: None. Nothing of a run is held here;
    visits with other flags (``return_dict``) have forms of their own.
    """

    def __init__(self) -> None:
        self._known: dict[Any, _Known] = {}

    def learn(self, call: Call, out: Any) -> None:
        """The site gave ``out``."""
        flow.confirm_inside(call, out)
        if isinstance(out, torch.Tensor):
            self._set(flags(call), _plain(out.shape, _shapes(call)))
            return
        inputs = {id(v): p for p, v in _objects(call.arguments())}
        first, sure = tree.first(out), True
        try:
            x, context = flow.places(call, out)
        except flow.Unsure:
            x, context, sure = first, None, False
        kept: dict[tree.Path, Any] = {}

        def role(path: tree.Path, value: Any) -> Any:
            if isinstance(value, _PLAIN):
                return value
            if path == first and isinstance(value, list):
                return _Rows()
            if id(value) in inputs:
                return _Input(inputs[id(value)])
            weights = _is_weights(call, value)
            # only tensors: a KV cache here would keep its own run alive
            if not weights and path not in (x, context) and isinstance(value, torch.Tensor):
                kept[path] = value
            return _Kept(weights)

        shapes = {path: leaf.shape for path, leaf in tree.leaves(out)}
        shapes[first] = _shape(tree.get(out, first))
        roles = _walk(out, role, whole=first)
        known = _Known(roles, False, x, context, sure, shapes, _shapes(call))
        self._set(flags(call), known)
        if kept:
            call.step.run.slots[_key(call)] = Slot(kept, False, -1)

    def learn_plain(self, given: Any, name: str, x: torch.Size, out: torch.Size) -> None:
        """The site gave a tensor of shape ``out`` for one of shape ``x`` under ``name``."""
        known = self._known.get(given)
        if known is None or not known.plain or known.shapes[()] != out:
            self._set(given, _plain(out, {name: x}))
        else:
            known.given[name] = x

    def _set(self, given: Any, known: _Known) -> None:
        if len(self._known) >= _MOST:
            self._known = {}
        self._known[given] = known

    def unknown(self, call: Call, given: bool) -> str | None:
        """Why no output can be made now (``given``: a value for x is there), or None."""
        known = self._known.get(flags(call))
        if known is None:
            return "never computed: the form of its output is not known yet"
        path, _ = _places(call, known)
        if not given and known.shapes.get(path) != known.given.get(call.site.port.x):
            return "its output is not shaped like its input, and no value was given"
        if known.plain:
            return None
        try:
            self.fill(call, None, None, given)
        except KeyError:
            return "its secondary outputs are not known in this run"
        return None

    def fill(self, call: Call, x: Any, context: Any, given: bool) -> Any:
        """An output of the known form with these values. What a block hands on beside them is held
        where a value was ``given``, else passed through."""
        port, arguments = call.site.port, call.arguments()
        known = self._known[flags(call)]
        if known.plain:
            return x
        out, context_out = _places(call, known)
        slot = call.step.run.slots.get(_key(call))
        held = {} if slot is None else slot.value
        passed = {path: arguments.get(name) for name, path in port.streams}

        def value(path: tree.Path, role: Any) -> Any:
            if path == out:
                return list(x) if isinstance(role, _Rows) and x is not None else x
            if not isinstance(role, (_Input, _Kept)):
                return role
            if path == context_out:
                return context
            if path in passed and not (given and path in held) and passed[path] is not None:
                return passed[path]
            if isinstance(role, _Input):
                return tree.get(arguments, role.path)
            if role.weights and path not in held:
                return None
            if call.site.kind == "block" and path not in passed:
                call.remark(
                    f"{type(call.site.module).__name__} gives more than the next block takes; "
                    "where it is left out, that is what it gave when it was last computed"
                )
            return held[path]

        return _walk(known.roles, value)


def _places(call: Call, known: _Known) -> tuple[tree.Path, tree.Path | None]:
    """Where x and context go: as confirmed, before that by their forms."""
    port = call.site.port
    if port.confirmed and port.out is not None:
        return port.out, port.context_out
    if not known.sure:
        raise flow.Unsure(call)
    return known.x, known.context


def flags(call: Call) -> Any:
    """The bools among the arguments: with others the output may have another form."""
    for values in (call._args, call._kwargs.values()):
        for value in values:
            if value is True or value is False:
                named = call.arguments().items()
                return tuple((k, v) for k, v in named if isinstance(v, bool))
    return ()


def _plain(out: torch.Size, given: dict[str, Any]) -> _Known:
    return _Known(None, True, (), None, True, {(): out}, given)


def _shapes(call: Call) -> dict[str, Any]:
    return {name: _shape(value) for name, value in call.arguments().items()}


def _key(call: Call) -> Any:
    return ("form", call.site.path, call.site.visit, call.step.branch)


def _shape(value: Any) -> Any:
    value = tree.stacked(value)
    return value.shape if isinstance(value, torch.Tensor) else None


def _is_weights(call: Call, value: Any) -> bool:
    """``[batch, heads, tokens, keys]`` that no block hands on."""
    x = call.x
    return (
        isinstance(value, torch.Tensor)
        and isinstance(x, torch.Tensor)
        and value.ndim == 4
        and x.ndim == 3
        and (value.shape[0], value.shape[2]) == tuple(x.shape[:2])
    )


def _objects(node: Any, path: tree.Path = ()) -> Any:
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _objects(child, (*path, key))
    elif isinstance(node, (tuple, list)):
        for i, child in enumerate(node):
            yield from _objects(child, (*path, i))
    elif not isinstance(node, _PLAIN):
        yield path, node


def _walk(node: Any, fn: Any, path: tree.Path = (), whole: tree.Path | None = None) -> Any:
    """Rebuild nested containers with ``fn(path, leaf)`` in the place of every leaf; what stands at
    the path ``whole`` is one."""
    if path == whole:
        return fn(path, node)
    if isinstance(node, (tuple, list)):
        return tree.rebuild(node, [_walk(c, fn, (*path, i), whole) for i, c in enumerate(node)])
    if isinstance(node, dict):
        return _Mapping(node, [_walk(c, fn, (*path, k), whole) for k, c in node.items()])
    if isinstance(node, _Mapping):
        children = zip(node.keys, node.children, strict=True)
        return node.make([_walk(c, fn, (*path, k), whole) for k, c in children])
    return fn(path, node)


class _Mapping:
    """A mapping output (a plain dict or an output class) with its values taken out."""

    def __init__(self, like: dict[str, Any], children: list[Any]) -> None:
        self.type, self.keys, self.children = type(like), list(like), children

    def make(self, children: list[Any]) -> Any:
        items = dict(zip(self.keys, children, strict=True))
        return items if self.type is dict else self.type(**items)


opaque_functions(globals())
