"""Computing a site on chosen tokens, or on all of them in another order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from accelerate_hooks import reading, stand_in, tree
from accelerate_hooks.errors import UnsupportedModelError
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.reading import Axis, Reading

if TYPE_CHECKING:
    from accelerate_hooks.call import Call


def take(leaf: torch.Tensor, dim: int, index: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """``leaf`` at positions ``index`` (``[n]``, or ``[batch, n]`` row by row) of an axis on which
    the tokens start at ``offset``; what stands before and behind them (the text of a joint
    sequence) is kept. ``offset`` is counted from the end where negative."""
    index = index.to(leaf.device)
    size = leaf.shape[dim]
    if offset:
        before, after = (offset, 0) if offset > 0 else (0, -offset)
        around = torch.arange(size, device=leaf.device).expand(*index.shape[:-1], size)
        parts = (around[..., :before], index + before, around[..., size - after :])
        index = torch.cat(parts, -1)
    if index.ndim == 1:
        return leaf.index_select(dim, index)
    if dim == 0:
        raise UnsupportedModelError(
            "an argument without a batch axis follows the tokens, so rows cannot keep different "
            "ones; give one index for all rows"
        )
    batch = index.shape[0]
    if leaf.shape[0] == 1 and batch > 1:
        leaf = leaf.expand(batch, *leaf.shape[1:])
    shape = [1] * leaf.ndim
    shape[0], shape[dim] = index.shape
    return torch.take_along_dim(leaf, index.reshape(shape), dim)


def spread(
    base: torch.Tensor, values: torch.Tensor, index: torch.Tensor, dim: int = 1
) -> torch.Tensor:
    """The inverse of `take`: a copy of ``base`` with ``values`` at positions ``index``."""
    index = index.to(base.device)
    if index.ndim == 1:
        return base.index_copy(dim, index, values)
    shape = [1] * base.ndim
    shape[0], shape[dim] = index.shape
    return base.scatter(dim, index.reshape(shape).expand_as(values), values)


def axes_of(
    arguments: Any, length: int, skip: tuple[str | None, ...] = (), joint: int = 0
) -> list[Axis]:
    """Every axis as long as the sequence, and those as long as it is together with ``joint``
    tokens of another stream, which stand before it or behind. A first axis counts only for a
    matrix or a vector, where it is no batch."""
    offsets: dict[int, tuple[int, ...]] = {length: (0,)}
    if joint:
        offsets[length + joint] = (joint, -joint)
    return [
        (path, dim, offset)
        for path, leaf in tree.leaves(arguments)
        if path[0] not in skip
        for dim in range(leaf.ndim)
        if dim > 0 or leaf.ndim <= 2
        for offset in offsets.get(leaf.shape[dim], ())
    ]


def apply(arguments: Any, axes: Reading, index: torch.Tensor) -> Any:
    """``arguments`` with every one of ``axes`` cut to ``index``."""
    by_path: dict[tree.Path, list[tuple[int, int]]] = {}
    for path, dim, offset in axes:
        by_path.setdefault(path, []).append((dim, offset))

    def select(path: tree.Path, leaf: torch.Tensor) -> torch.Tensor:
        for dim, offset in by_path.get(path, ()):
            leaf = take(leaf, dim, index, offset)
        return leaf

    return tree.transform(select, arguments)


def proceed(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], index: torch.Tensor) -> Any:
    """The site on the tokens ``index`` of x, its output back in the old order.

    The first visit is checked: tokens in another order must give the plain output in that order.
    """
    frame, port = call._frame, call.site.port
    named = dict(zip(port.parameters, args, strict=False))
    extra = args[len(named) :]
    x = (named | kwargs)[port.x]
    length = x.shape[1]
    if stand_in.find(named | kwargs)[1] is not None:
        raise UnsupportedModelError(
            f"{call.site.name}: tokens cannot be reordered beside a KV cache; use "
            "call.attention or call.shorten"
        )

    def given(axes: Reading, order: torch.Tensor) -> Any:
        chosen = [apply(a, axes, order) for a in (named, kwargs)]
        return (*chosen[0].values(), *extra), chosen[1]

    context = (named | kwargs).get(port.context) if port.context else None
    joint = context.shape[1] if isinstance(context, torch.Tensor) and context.ndim > 1 else 0
    axes = axes_of(named | kwargs, length, (port.x, port.context), joint)
    record = frame.session.record(call.site)
    key = ("tokens", length, joint, tuple(axes))
    known = record.readings.get(key)
    if known is None:
        order = torch.arange(length - 1, -1, -1, device=x.device)

        def attempt(trial: Reading) -> torch.Tensor:
            out = frame.plain(call._seam, *given(trial, order))
            return torch.cat([t.flatten() for t in _both(call, out, flip=True)])

        plain = frame.plain(call._seam, args, kwargs)
        wanted = torch.cat([t.flatten() for t in _both(call, plain)])
        known = reading.first(_choices(axes, port.x), attempt, wanted)
        frame.count_read()
        if known is None:
            raise UnsupportedModelError(
                f"{call.site.name}: its output does not follow an order of its tokens under any "
                "reading of its arguments; tokens cannot be reordered here"
            )
        record.remember(key, known)
        frame.note(call.site, "first reordered visit: checked against the plain one", {})
    chosen = given(known, index)
    fewer = call._of(*chosen)  # its output has the form of what it was given
    out = fewer._next(*chosen)
    part, context = fewer.outputs(out)
    base = x if port.residual else x.new_zeros(*x.shape[:-1], part.shape[-1])
    out = fewer.replaced(out, spread(base, part, index), context)
    return _handed_on(out, chosen, (args, kwargs))


def _handed_on(out: Any, chosen: Any, given: Any) -> Any:
    """Arguments that a block hands on beside x (T5's position bias), in the old order again."""
    before = [leaf for _, leaf in tree.leaves(given)]
    pairs = [(a, b) for (_, a), b in zip(tree.leaves(chosen), before, strict=True) if a is not b]

    def old(_: tree.Path, leaf: torch.Tensor) -> torch.Tensor:
        return next((b for a, b in pairs if leaf is a), leaf)

    return tree.transform(old, out)


def _both(call: Call, out: Any, flip: bool = False) -> list[torch.Tensor]:
    x, context = call.outputs(out)
    x = x.flip(1) if flip else x
    return [x] if context is None else [x, context]


def _choices(axes: list[Axis], x: str) -> list[list[Reading]]:
    """x follows; a leaf as long as x likely does, one of the joint length likely does behind the
    other stream; one that is named after that other stream likely does not."""
    choices: list[list[Reading]] = [[frozenset({((x,), 1, 0)})]]
    for group in reading.grouped(axes, lambda axis: (axis[1], axis[2] == 0)):
        by_offset: dict[int, set[Axis]] = {}
        for axis in group:
            by_offset.setdefault(axis[2], set()).add(axis)
        ways = [frozenset(found) for found in by_offset.values()]
        other = str(group[0][0][0]).startswith("encoder_")
        choices.append([frozenset(), *ways] if other else [*ways, frozenset()])
    return choices


opaque_functions(globals())
