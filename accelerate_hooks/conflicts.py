"""Which policies can share a site."""

from __future__ import annotations

import itertools

from accelerate_hooks.errors import PolicyConflictError
from accelerate_hooks.policy import Policy
from accelerate_hooks.site import Effect, Site

_RANK = {Effect.SKIP: 0, Effect.RESHAPE: 1, Effect.REPLACE: 2}
_ACTS = frozenset(_RANK)  # who only looks may stand anywhere


def check(plan: dict[Site, list[tuple[int, Policy]]]) -> None:
    """Raise PolicyConflictError unless on every site SKIP stands outside RESHAPE outside REPLACE,
    with at most one REPLACE."""
    for site, policies in plan.items():
        acts = [(policy, policy.acts(site)) for _, policy in policies]
        replacing = [policy for policy, effects in acts if Effect.REPLACE in effects]
        if len(replacing) > 1:
            names = " and ".join(str(policy) for policy in replacing)
            raise PolicyConflictError(
                f"{names} both replace {site.name}; keep one, or give each its own sites with '@'"
            )
        ranked = [
            (p, min(_RANK[e] for e in acted)) for p, e_all in acts if (acted := e_all & _ACTS)
        ]
        for (outer, a), (inner, b) in itertools.pairwise(ranked):
            if a > b:
                raise PolicyConflictError(
                    f"at {site.name} {inner} skips what {outer} reshapes or replaces; "
                    f"list {inner} before {outer}"
                )
