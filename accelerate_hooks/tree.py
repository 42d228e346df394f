"""Nested arguments and outputs: walk them, read and replace leaves by path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from accelerate_hooks.opaque import opaque_functions

Path = tuple[int | str, ...]


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    """The tensors of nested tuples, lists and mappings, each with its path."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, (tuple, list)):
        for i, child in enumerate(tree):
            yield from leaves(child, (*path, i))
    elif isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from leaves(child, (*path, key))


def get(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def first(tree: Any) -> Path:
    """The path of the first tensor, or of the list that holds it (a list is a batch of tensors, a
    tuple holds different things)."""
    path, _ = next(leaves(tree), ((), None))
    return path[:-1] if path and isinstance(get(tree, path[:-1]), list) else path


def stacked(value: Any) -> Any:
    """A list of tensors of one shape as one tensor with a new first axis; others as they are."""
    if not isinstance(value, list) or not value:
        return value
    if any(not isinstance(v, torch.Tensor) or v.shape != value[0].shape for v in value):
        return value
    return torch.stack(value)


def rebuild(tree: Any, children: list[Any]) -> Any:
    """A container like ``tree`` with other children, in order (also named tuples and the
    ordered-mapping output classes of transformers and diffusers)."""
    if isinstance(tree, Mapping):
        items = dict(zip(tree, children, strict=True))
        if dataclasses.is_dataclass(tree):  # fields that are None are no items
            names = [field.name for field in dataclasses.fields(tree)]
            items = {name: items.get(name, getattr(tree, name)) for name in names}
        return items if type(tree) is dict else type(tree)(**items)
    if hasattr(tree, "_fields"):
        return type(tree)(*children)
    return type(tree)(children)


def transform(fn: Callable[[Path, torch.Tensor], Any], tree: Any, path: Path = ()) -> Any:
    """A copy of ``tree`` with every tensor replaced by ``fn(path, tensor)``; what does not change
    is not copied."""
    if isinstance(tree, torch.Tensor):
        return fn(path, tree)
    if isinstance(tree, (tuple, list)):
        new = [transform(fn, child, (*path, i)) for i, child in enumerate(tree)]
        same = all(a is b for a, b in zip(new, tree, strict=True))
        return tree if same else rebuild(tree, new)
    if isinstance(tree, Mapping):
        new = [transform(fn, child, (*path, key)) for key, child in tree.items()]
        same = all(a is b for a, b in zip(new, tree.values(), strict=True))
        return tree if same else rebuild(tree, new)
    return tree


def put(tree: Any, values: Mapping[Path, torch.Tensor]) -> Any:
    """A copy of ``tree`` with the leaves at some paths replaced."""
    return transform(lambda path, leaf: values.get(path, leaf), tree)


def nbytes(tree: Any, seen: set[int] | None = None) -> int:
    """Bytes of the tensors held by ``tree`` (objects with ``__dict__`` or ``__slots__`` included),
    each storage once."""
    seen = set() if seen is None else seen
    if isinstance(tree, torch.Tensor):
        key = tree.untyped_storage().data_ptr()
        if key in seen:
            return 0
        seen.add(key)
        return tree.untyped_storage().nbytes()
    if isinstance(tree, Mapping):
        return sum(nbytes(v, seen) for v in tree.values())
    if isinstance(tree, (tuple, list, set, frozenset)) or type(tree).__name__ == "deque":
        return sum(nbytes(v, seen) for v in tree)
    if hasattr(tree, "__dict__") and not isinstance(tree, type) and not callable(tree):
        return sum(nbytes(v, seen) for v in vars(tree).values())
    return 0


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same view of the same memory."""
    return a is b or (
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.stride() == b.stride()
        and a.numel() > 0
        and a.device.type != "meta"
        and a.data_ptr() == b.data_ptr()
    )


opaque_functions(globals())
