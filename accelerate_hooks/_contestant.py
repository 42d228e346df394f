"""Who takes part in an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from accelerate_hooks.errors import SpecError
from accelerate_hooks.policy import Policy
from accelerate_hooks.spec import Addressed

Run = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A way to compute an item. ``policy`` acts on the target, ``run`` replaces the plain call
    (fewer steps, say), ``setup`` is entered around it, outside of the time that is taken (a peer's
    own way to switch its cache on)."""

    policy: Any = None
    run: Run | None = None
    setup: Callable[[], AbstractContextManager[Any]] | None = None


def contestants(policies: Any) -> dict[str, Contestant]:
    if isinstance(policies, Mapping):
        named: dict[str, Any] = {str(label): p for label, p in policies.items()}
    elif policies is None or not isinstance(policies, (str, Policy, Addressed, Iterable)):
        raise SpecError(
            f"evaluate: policies is a {type(policies).__name__}; give policies, specs or callables "
            "in a list, or by label"
        )
    else:
        many = [policies] if isinstance(policies, (str, Policy, Addressed)) else list(policies)
        named = {}
        for policy in many:
            parts = policy if isinstance(policy, (list, tuple)) else [policy]
            label = " + ".join(getattr(p, "__name__", None) or str(p) for p in parts)
            named[label if label not in named else f"{label} ({len(named)})"] = policy
    if "plain" in named:
        raise SpecError("'plain' is the label of the plain model; give the contestant another one")
    return {label: _contestant(policy) for label, policy in named.items()}


def _contestant(given: Any) -> Contestant:
    if isinstance(given, Contestant):
        return given
    if callable(given) and not isinstance(given, (Policy, type)):
        return Contestant(run=given)
    return Contestant(policy=given)
