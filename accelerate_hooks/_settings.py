"""The settings of a policy as plain values: checked against its fields, and back."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from accelerate_hooks.artifact import Artifact
from accelerate_hooks.errors import ArtifactError, SpecError

if TYPE_CHECKING:
    from accelerate_hooks.policy import Policy

UNSAVED = "unsaved:"
INFINITIES = {"inf": math.inf, "-inf": -math.inf}


def changed(policy: Policy) -> dict[str, Any]:
    """The fields of a policy that differ from their defaults, in their order."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(policy):
        value: Any = getattr(policy, field.name)
        if field.init and not _is_default(field, value):
            settings[field.name] = value
    return settings


def plain(value: Any) -> Any:
    """A setting as JSON holds it: tuples and sets as lists, an artifact as its path."""
    if isinstance(value, Artifact):
        if value.path is None:
            return f"{UNSAVED}{value.digest[:12]}"
        return str(value.path)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, frozenset):
        return sorted((plain(item) for item in cast("frozenset[Any]", value)), key=str)
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast("list[Any]", value)]
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    return value


def checked(cls: type[Policy], name: str, value: object) -> Any:
    """A value read from text or JSON as the field `name` of `cls` wants it.

    Integers become floats, lists tuples, and paths artifacts, where the field says so. Raises
    SpecError naming field, type and value; ArtifactError where an artifact cannot be loaded.
    """
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    if name not in fields:
        known = ", ".join(fields) or "none"
        raise SpecError(
            f"{cls.name} has no field {name!r}{did_you_mean(name, fields)} (its fields: {known})"
        )
    hint = _hints(cls)[name]
    try:
        return _fit(value, hint)
    except _Misfit:
        choices = [str(choice) for part in _options(hint) for choice in _literals(part)]
        hinted = did_you_mean(value, choices) if isinstance(value, str) else ""
        if str in _options(hint) and not isinstance(value, list | dict):
            hinted = f"; write '{value}'"
        raise SpecError(
            f"{cls.name}.{name} takes {_describe(hint)}, got {value!r}{hinted}"
        ) from None


def verify(policy: Policy) -> None:
    """Check that the settings of a policy are of the types of its fields; integers become floats
    where the field says so. Raises SpecError."""
    cls = type(policy)
    try:
        hints = _hints(cls)
    except NameError:  # of a class inside a function, perhaps
        return
    for field in dataclasses.fields(policy):
        value: Any = getattr(policy, field.name)
        if not field.init or (isinstance(value, float) and math.isnan(value)):
            continue  # what NaN means is the policy's to say
        fitted = checked(cls, field.name, value)
        if isinstance(value, str) and not isinstance(fitted, str):
            raise SpecError(
                f"{cls.name}.{field.name} takes {_describe(hints[field.name])}, got {value!r}"
            )
        object.__setattr__(policy, field.name, fitted)


@functools.cache
def _hints(cls: type[Policy]) -> dict[str, Any]:
    return get_type_hints(cls, localns={"Artifact": Artifact})


def literal(text: str) -> Any:
    """The JSON value that `text` is, `inf` and `-inf` included, else the text itself."""
    if text in INFINITIES:
        return INFINITIES[text]
    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError:
        return text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'a' or 'b'?`, or nothing where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


class _Misfit(Exception):
    pass


def _fit(value: Any, hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin is Literal:
        return _one_of([value, literal(value)] if isinstance(value, str) else [value], args)
    if len(options := _options(hint)) > 1:
        return _first_fit(value, options)
    container: Any = origin or hint
    if container in (tuple, frozenset):
        return _elements(value, container, args)
    if isinstance(value, str) and hint is Artifact:
        if value.startswith(UNSAVED):
            raise ArtifactError(f"artifact {value!r} was never saved; call its save(path) first")
        return Artifact.load(value)
    if isinstance(value, str) and container not in (str, object):
        value = literal(value)  # a quoted number, as in '1e+16'
    if hint is float and type(value) is int:
        value = _as_float(value)
    fits = type(value) is hint if hint in (bool, int, float, str) else isinstance(value, container)
    if not fits or (isinstance(value, float) and math.isnan(value)):
        raise _Misfit
    return value


def _first_fit(value: Any, options: tuple[Any, ...]) -> Any:
    for option in sorted(options, key=lambda option: option is not type(value)):
        try:
            return _fit(value, option)
        except _Misfit:
            continue
    raise _Misfit


def _one_of(candidates: list[Any], choices: tuple[Any, ...]) -> Any:
    for candidate in candidates:
        for choice in choices:
            if type(choice) is type(candidate) and choice == candidate:
                return choice
    raise _Misfit


def _elements(value: Any, container: type, args: tuple[Any, ...]) -> Any:
    value = literal(value) if isinstance(value, str) else value
    if not isinstance(value, list | tuple | frozenset):
        raise _Misfit
    items = list(cast("Iterable[Any]", value))
    hints = list(args) or [Any]
    if container is frozenset or not args or hints[-1] is Ellipsis:
        hints = [hints[0]] * len(items)
    if len(hints) != len(items):
        raise _Misfit
    return container(_fit(item, hint) for item, hint in zip(items, hints, strict=True))


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise _Misfit from None


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return type(default) is type(value) and default == value


def _options(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(types.NoneType if arg is None else arg for arg in get_args(hint))
    return (hint,)


def _literals(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(json.dumps(choice) for choice in get_args(hint))
    if len(options := _options(hint)) > 1:
        return " or ".join(_describe(option) for option in options)
    if hint is types.NoneType:
        return "null"
    if hint is Artifact:
        return "the path of an artifact"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def refuse(constant: str) -> Any:
    """For `parse_constant`: NaN and Infinity are no JSON."""
    raise ValueError(constant)
