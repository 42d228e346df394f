"""Recipes: policies and their settings in a file to keep and to share.

    {"accelerate_hooks": 1,
     "policies": [{"policy": "lazy_step", "only": null, "settings": {"threshold": 0.1}}]}

`only` and `settings` may be left out. A recipe refers to an artifact by its path, relative to the
recipe's folder. YAML holds the same and needs pyyaml.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate_hooks._files import write_atomically
from accelerate_hooks._settings import changed, checked, did_you_mean, plain
from accelerate_hooks.artifact import Artifact
from accelerate_hooks.errors import ArtifactError, RecipeError, SpecError
from accelerate_hooks.registry import PolicyRegistry

if TYPE_CHECKING:
    from accelerate_hooks.policy import Policy

__all__ = ["Addressed", "is_recipe", "load_recipe", "save_recipe"]

VERSION = 1


@dataclass(frozen=True)
class Addressed:
    """A policy and the glob over site paths that it is limited to (None: every site)."""

    policy: Policy
    only: str | None = None

    def __str__(self) -> str:
        """A spec: ``parse(str(addressed)) == [addressed]``."""
        from accelerate_hooks.spec import render

        return render(self.policy, self.only)


def is_recipe(spec: str) -> bool:
    """Whether a string is the path of a recipe rather than a spec."""
    return spec.strip().lower().endswith((".json", ".yaml", ".yml"))


def load_recipe(
    path: str | os.PathLike[str], registry: Mapping[str, type[Policy]] | None = None
) -> list[Addressed]:
    """The policies of a recipe file.

    Raises RecipeError naming file and place; ArtifactError for an artifact that cannot be used.
    """
    path = Path(path)
    try:
        recipe = _object(_read(path), "the recipe", ["accelerate_hooks", "policies"])
        version, entries = recipe["accelerate_hooks"], recipe["policies"]
        if type(version) is not int or version != VERSION:
            raise SpecError(f"accelerate_hooks: version {version!r}, this release reads {VERSION}")
        if not isinstance(entries, list) or not entries:
            raise SpecError("policies: has to be a list of at least one policy")
        registry = PolicyRegistry() if registry is None else registry
        listed = enumerate(cast("list[Any]", entries))
        return [_addressed(entry, f"policies[{i}]", path, registry) for i, entry in listed]
    except SpecError as error:
        raise RecipeError(f"{path}: {error}") from error


def save_recipe(path: str | os.PathLike[str], addressed: Iterable[Addressed]) -> None:
    """Writes policies, globs and those settings that are no defaults.

    Raises RecipeError if the path does not end in .json, .yaml or .yml, the file or a setting
    cannot be written, or an artifact was never saved.
    """
    if not isinstance(path, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RecipeError(f"a recipe is saved to a path, not to a {type(path).__name__}")
    path = Path(path)
    if not is_recipe(str(path)):
        raise RecipeError(f"{path}: the name of a recipe ends in .json, .yaml or .yml")
    entries: list[dict[str, Any]] = []
    for entry in addressed:
        name = entry.policy.name
        settings = {k: _stored(v, f"{name}.{k}", path) for k, v in changed(entry.policy).items()}
        entries.append({"policy": name, "only": entry.only, "settings": settings})
    recipe = {"accelerate_hooks": VERSION, "policies": entries}
    try:
        if path.suffix.lower() == ".json":
            text = json.dumps(recipe, indent=2, ensure_ascii=False) + "\n"
        else:
            text = cast(str, _yaml(path).safe_dump(recipe, sort_keys=False))
        write_atomically(path, text.encode())
    except (OSError, TypeError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be written ({error})") from error


def _addressed(
    entry: object, place: str, path: Path, registry: Mapping[str, type[Policy]]
) -> Addressed:
    fields = _object(entry, place, ["policy"], ["only", "settings"])
    name, only = fields["policy"], fields.get("only")
    if not isinstance(name, str):
        raise SpecError(f"{place}.policy: has to be a policy's name, got {name!r}")
    if not isinstance(only, str | None):
        raise SpecError(f"{place}.only: has to be a glob or null, got {only!r}")
    try:
        cls = registry[name]
    except KeyError:
        near = did_you_mean(name, registry)
        raise SpecError(f"{place}.policy: there is no policy {name!r}{near}") from None
    given = _object(fields.get("settings", {}), f"{place}.settings")
    if isinstance(artifact := given.get("artifact"), str):
        given["artifact"] = str(path.parent / artifact)
    settings: dict[str, Any] = {}
    for key, value in given.items():
        try:
            settings[key] = checked(cls, key, value)
        except SpecError as error:
            raise SpecError(f"{place}.settings.{key}: {error}") from error
    try:
        return Addressed(cls(**settings), only)
    except ArtifactError:
        raise
    except (TypeError, ValueError) as error:
        raise SpecError(f"{place}: {error}") from error


def _stored(value: Any, place: str, path: Path) -> Any:
    if isinstance(value, Artifact):
        if value.path is None:
            raise RecipeError(f"{path}: {place} was never saved; call its save(path) first")
        return Path(os.path.relpath(value.path, path.parent)).as_posix()
    return plain(value)


def _read(path: Path) -> object:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(
            f"{path}: no such recipe (in a spec, a value ending in {path.suffix} needs quotes)"
        ) from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from error
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text, object_pairs_hook=_unique)
        except (RecursionError, ValueError) as error:
            raise RecipeError(f"{path}: not JSON ({error})") from error
    yaml = _yaml(path)
    try:
        return yaml.safe_load(text)
    except (RecursionError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not YAML ({error})") from error


def _yaml(path: Path) -> Any:
    try:
        return importlib.import_module("yaml")
    except ImportError as error:
        raise RecipeError(f"{path}: YAML needs pyyaml: pip install pyyaml, or use .json") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"{sorted(twice)[0]!r} is given twice")
    return dict(pairs)


def _object(
    value: object, place: str, required: list[str] | None = None, optional: list[str] | None = None
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SpecError(f"{place}: has to be an object with named values, got {value!r}")
    given = cast("dict[str, Any]", value)
    if required is None:
        return dict(given)
    known = required + (optional or [])
    for key in given:
        if key not in known:
            near = did_you_mean(str(key), known)
            raise SpecError(f"{place}: unknown key {key!r}{near} (known: {', '.join(known)})")
    if missing := [key for key in required if key not in given]:
        raise SpecError(f"{place}: lacks {', '.join(missing)}")
    return given
