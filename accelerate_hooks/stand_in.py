"""Stand-ins for a KV cache at one block, so that skipped blocks and rows leave no holes in it.

A stand-in is a dynamic subclass of the cache's own class (models test with ``isinstance``) that
shares its state, answers the questions that a block may ask, and gives ``update`` another meaning.
Every other method is refused: a recurrent state that slipped through would be silently wrong.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from accelerate_hooks.errors import UnsupportedModelError
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.run import Run

NAMES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "state", "cache")
_ANSWERS = frozenset(
    [
        "get_seq_length",
        "get_mask_sizes",
        "get_max_cache_shape",
        "get_max_length",
        "has_previous_state",
        "get_query_offset",
        "get_usable_length",
        "is_croppable",
        "to_legacy_cache",
    ]
)
Update = Callable[..., Any]


class Stop(Exception):
    """Ends a forward that was started only for its keys and values."""


def find(arguments: Mapping[str, Any]) -> tuple[str | None, Any]:
    """The name and value of the KV cache among a block's arguments, or ``(None, None)``.

    Raises UnsupportedModelError for a state that is no KV cache.
    """
    for name, value in arguments.items():
        if value is None or isinstance(value, (torch.Tensor, bool, int, float, str)):
            continue
        if is_cache(value):
            return name, value
        if name in NAMES and not (isinstance(value, (tuple, list)) and not value):
            raise UnsupportedModelError(
                f"the argument {name!r} holds a {type(value).__name__}, which is no KV cache with "
                "`update` and `get_seq_length`; its state would be lost at a skipped block. Leave "
                "these blocks out with only=, or switch the cache off (use_cache=False)"
            )
    return None, None


def is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and (
        hasattr(value, "update") or hasattr(value, "self_attention_cache")
    )


@cache
def _class(base: type) -> type:
    def refuse(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            raise UnsupportedModelError(
                f"a block called {base.__name__}.{name}, which the runtime cannot keep right for "
                "skipped blocks or rows (a recurrent or convolution state, perhaps); leave these "
                "blocks out with only="
            )

        return method

    body: dict[str, Any] = {}
    for name in dir(base):
        if name.startswith("__") or name in _ANSWERS:
            continue
        member = getattr(base, name)
        if callable(member) and not isinstance(member, (property, type)):
            body[name] = refuse(name)
    body["update"] = lambda self, k, v, *a, **kw: self._standing_for(k, v, *a, **kw)
    return type(base.__name__, (base,), body)


def stand_in(cache: Any, update: Update, rows: torch.Tensor | None = None) -> Any:
    """An object that passes for ``cache`` and hands ``update(key, value, layer, ...)`` on."""
    twin = object.__new__(_class(type(cache)))
    vars(twin).update(vars(cache))
    vars(twin)["_standing_for"] = update
    if hasattr(cache, "self_attention_cache"):
        inner = stand_in(cache.self_attention_cache, update)
        vars(twin)["self_attention_cache"] = inner
        if rows is not None:
            vars(twin)["cross_attention_cache"] = _CrossRows(cache.cross_attention_cache, rows)
    return twin


class _CrossRows:
    """The (finished) cross-attention cache as a part of the rows sees it."""

    def __init__(self, cache: Any, rows: torch.Tensor) -> None:
        self._cache, self._rows = cache, rows
        self.get_seq_length = cache.get_seq_length

    @property
    def layers(self) -> _CrossRows:
        return self

    def __getitem__(self, index: int) -> Any:
        layer = copy.copy(self._cache.layers[index])
        layer.keys, layer.values = layer.keys[self._rows], layer.values[self._rows]
        return layer


def decoder_cache(cache: Any) -> Any:
    """The cache that a block's self-attention writes to."""
    return getattr(cache, "self_attention_cache", cache)


def has_cross(cache: Any) -> bool:
    """Whether all keys and values of the encoder's states are there (or none are needed): only
    then can a part of the rows be computed without leaving the others' out."""
    if not hasattr(cache, "is_updated"):
        return True
    return bool(cache.is_updated) and all(cache.is_updated.values())


def capture(call: Callable[[Any], Any], cache: Any, rows: torch.Tensor | None = None) -> Any:
    """What a block would write to the cache: run it until its first ``update``, no further."""
    written: list[Any] = []

    def update(key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        written.append((key, value, args, kwargs))
        raise Stop

    try:
        call(stand_in(cache, update, rows))
    except Stop:
        return written[0]
    return None


def peeking(cache: Any) -> Any:
    """A stand-in whose ``update`` leaves the cache as it is."""

    def update(key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return _copied(cache, args, kwargs).update(key, value, *args, **kwargs)

    return stand_in(cache, update)


def merged(
    cache: Any, rows: torch.Tensor, rest: torch.Tensor, kept: Any, peek: bool = False
) -> Any:
    """A stand-in whose ``update`` merges the keys and values of both parts of the batch into one
    real update and shows the caller its own rows. ``peek`` updates a copy of the layer instead."""

    def update(key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        total = rows.numel() + rest.numel()
        both = []
        for part, other in ((key, kept[0]), (value, kept[1])):
            full = part.new_empty(total, *part.shape[1:])
            full[rows], full[rest] = part, other
            both.append(full)
        target = _copied(cache, args, kwargs) if peek else decoder_cache(cache)
        keys, values = target.update(*both, *args, **kwargs)
        return keys[rows], values[rows]

    return stand_in(cache, update, rows)


def _copied(cache: Any, args: Any, kwargs: Any) -> Any:
    """The cache with a copy of the one layer that an ``update`` with these arguments changes."""
    twin = copy.copy(decoder_cache(cache))
    twin.layers = list(twin.layers)
    layer = kwargs.get("layer_idx", args[0] if args else None)
    if layer is not None and layer < len(twin.layers):
        twin.layers[layer] = copy.deepcopy(twin.layers[layer])
    return twin


# -- slots that follow the rows of a cache -----------------------------------------------------

_RUNS = "_accelerate_hooks_runs"


def follow(cache: Any, run: Run) -> None:
    """Let the run's slots follow what is done to the cache's rows, until `unfollow`.

    The cache gets a subclass of its own class, not methods in its ``__dict__``: those would tie it
    into a reference cycle, which keeps the keys and values of finished generations alive, and would
    go along into its copies.
    """
    if _RUNS not in vars(cache):
        vars(cache)[_RUNS] = []
        cache.__class__ = _following(type(cache))
    vars(cache)[_RUNS].append(weakref.ref(run))


def unfollow(cache: Any, run: Run) -> None:
    runs = vars(cache).get(_RUNS)
    if runs is None:
        return
    runs[:] = [ref for ref in runs if ref() not in (None, run)]
    if not runs:
        del vars(cache)[_RUNS]
        cache.__class__ = type(cache).__mro__[1]


@cache
def _following(base: Any) -> type:
    def told(name: str, change: Callable[..., None]) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            runs = [run for ref in vars(self)[_RUNS] if (run := ref()) is not None]
            if name == "crop":
                for run in runs:
                    _check_crop(run, self, *args, **kwargs)
            result = getattr(base, name)(self, *args, **kwargs)
            for run in runs:
                change(run, *args, **kwargs)
            return result

        method.__name__ = name
        return method

    def reduce(self: Any, protocol: Any) -> Any:
        """Copies are of the plain class and follow nothing."""
        _, args, state, *rest = base.__reduce_ex__(self, max(int(protocol), 2))
        state = {name: value for name, value in state.items() if name != _RUNS}
        # Not `copyreg.__newobj__`: pickle holds that one to the class that the cache has now.
        return object.__new__, (base, *args[1:]), state, *rest

    body: dict[str, Any] = {
        name: told(name, change) for name, change in _ROWS.items() if hasattr(base, name)
    }
    body |= {"__reduce_ex__": reduce, "__module__": base.__module__}
    return type(base.__name__, (base,), body)


def _check_crop(run: Run, cache: Any, tokens_to_remove: int = 0, *_: Any) -> None:
    """Layers behind a cut hold fewer keys: the same number of tokens can only be taken from all of
    them as long as none of these was there at the cut."""
    left = int(decoder_cache(cache).get_seq_length()) - abs(int(tokens_to_remove))
    if any(left < cut.before + cut.length for cut in run.cuts):
        raise UnsupportedModelError(
            "the cache is cropped to before the place where a policy shortened the sequence; start "
            "with a new cache"
        )


def _select(run: Run, index: Any) -> None:
    run.map_rows(lambda t: t[index.to(t.device)] if isinstance(index, torch.Tensor) else t[index])


def _repeat(run: Run, repeats: int) -> None:
    run.map_rows(lambda t: t.repeat_interleave(repeats, dim=0))


def _forget(run: Run, *_: Any) -> None:
    run.slots.clear()


def _restart(run: Run, *_: Any) -> None:
    run.clear()


_ROWS: dict[str, Callable[..., None]] = {
    "reorder_cache": _select,
    "batch_select_indices": _select,
    "batch_repeat_interleave": _repeat,
    "crop": _forget,
    "reset": _restart,
}


opaque_functions(globals())
