"""Which policies there are: the built-in ones and those of installed packages.

A package offers a policy through an entry point whose name is the policy's:

    [project.entry-points."accelerate_hooks.policies"]
    my_policy = "my_package:MyPolicy"

A built-in policy wins over an entry point of the same name, so that installing a package never
changes what a spec means. Nothing is imported before it is asked for, and a package that cannot be
imported is an error only for who asks for its policy.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from accelerate_hooks.errors import SpecError

if TYPE_CHECKING:
    from torch import nn

    from accelerate_hooks.patch import Patch, Pipeline
    from accelerate_hooks.policy import Policy

__all__ = ["GROUP", "PolicyRegistry", "available_policies", "patch_for", "pipeline_of"]

GROUP = "accelerate_hooks.policies"


class PolicyRegistry(Mapping[str, "type[Policy]"]):
    """Every policy by name: iteration imports no entry point, `registry[name]` imports that one."""

    def __init__(self) -> None:
        package = importlib.import_module("accelerate_hooks.policies")
        exported = [getattr(package, name) for name in getattr(package, "__all__", ())]
        self._built_in: dict[str, type[Policy]] = {p.name: p for p in exported if _is_policy(p)}
        self._offered: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=GROUP):
            if point.name not in self._built_in:
                self._offered.setdefault(point.name, []).append(point)

    def __iter__(self) -> Iterator[str]:
        yield from self._built_in
        yield from self._offered

    def __len__(self) -> int:
        return len(self._built_in) + len(self._offered)

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self._offered

    def __getitem__(self, name: str) -> type[Policy]:
        """The policy class of that name; KeyError if nobody offers it.

        Raises SpecError, naming the distribution, if its entry point is broken or not the only one.
        """
        if name in self._built_in:
            return self._built_in[name]
        points = self._offered[name]
        if len({point.value for point in points}) > 1:
            owners = " and ".join(_distribution(point) for point in points)
            raise SpecError(f"policy {name!r} is offered by {owners}; uninstall all but one")
        return _load(points[0])


def available_policies() -> dict[str, type[Policy]]:
    """Every policy that can be used, by name: built-in ones first.

    A policy whose package cannot be imported is left out; naming it in a spec says why.
    """
    registry = PolicyRegistry()
    usable: dict[str, type[Policy]] = {}
    for name in registry:
        try:
            usable[name] = registry[name]
        except SpecError:
            continue
    return usable


def _load(point: EntryPoint) -> type[Policy]:
    where = f"the entry point '{point.name} = {point.value}' of {_distribution(point)}"
    try:
        policy = point.load()
    except Exception as error:  # an import runs foreign code, which may raise anything
        raise SpecError(
            f"policy {point.name!r} cannot be loaded: {where} raised "
            f"{type(error).__name__}: {error}; repair or uninstall that package"
        ) from error
    if not _is_policy(policy) or policy.name != point.name:
        raise SpecError(
            f"policy {point.name!r} cannot be used: {where} is not a policy of that name; "
            "it has to be a frozen dataclass derived from Policy whose `name` is the entry point's"
        )
    return policy


def _is_policy(thing: object) -> bool:
    return (
        isinstance(thing, type)
        and dataclasses.is_dataclass(thing)
        and isinstance(getattr(thing, "name", None), str)
    )


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed distribution"


def patch_for(model: nn.Module) -> Patch:
    """The adapter of a model: the first of `accelerate_hooks.patches.PATCHES` that matches."""
    package = importlib.import_module("accelerate_hooks.patches")
    return next(patch for patch in package.PATCHES if patch.matches(model))


def pipeline_of(target: Any) -> Pipeline | None:
    """The denoisers and the scheduler of a pipeline, None for anything else."""
    package = importlib.import_module("accelerate_hooks.patches")
    return package.pipeline_of(target)
