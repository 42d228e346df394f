"""One line makes a transformers or diffusers model do less work for (almost) the same answer.

session = accelerate_hooks.enable(pipe, "lazy_step")
pipe(...)
print(session.report())
session.disable()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate_hooks.call import Call
from accelerate_hooks.enable import active, disable, enable
from accelerate_hooks.errors import (
    AccelerateHooksError,
    AlreadyEnabledError,
    ArtifactError,
    PolicyConflictError,
    RecipeError,
    SpecError,
    UnsupportedModelError,
)
from accelerate_hooks.evaluate import evaluate
from accelerate_hooks.history import History
from accelerate_hooks.policy import Policy
from accelerate_hooks.registry import available_policies
from accelerate_hooks.session import InertWarning, Session
from accelerate_hooks.site import Effect, Port, Site, TokenLayout
from accelerate_hooks.spec import Addressed, parse

if TYPE_CHECKING:
    from accelerate_hooks.policies import DraftAttention, ExpertSkip, LazyStep

__version__ = "0.1.0"

__all__ = [
    "AccelerateHooksError",
    "Addressed",
    "AlreadyEnabledError",
    "ArtifactError",
    "Call",
    "DraftAttention",
    "Effect",
    "ExpertSkip",
    "History",
    "InertWarning",
    "LazyStep",
    "Policy",
    "PolicyConflictError",
    "Port",
    "RecipeError",
    "Session",
    "Site",
    "SpecError",
    "TokenLayout",
    "UnsupportedModelError",
    "active",
    "available_policies",
    "disable",
    "enable",
    "evaluate",
    "parse",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # a policy: these are imported when first asked for
        import importlib

        return getattr(importlib.import_module("accelerate_hooks.policies"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
