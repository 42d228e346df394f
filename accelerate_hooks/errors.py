"""The errors of accelerate_hooks: all that a user can cause, and nothing else.

    AccelerateHooksError
    ├── UnsupportedModelError
    ├── PolicyConflictError
    ├── AlreadyEnabledError
    ├── SpecError                 (also a ValueError)
    └── ArtifactError             (also a ValueError)
        └── RecipeError

Every message names the thing, the cause and the fix. An error raised by `enable` leaves the model
as it was.
"""

__all__ = [
    "AccelerateHooksError",
    "AlreadyEnabledError",
    "ArtifactError",
    "PolicyConflictError",
    "RecipeError",
    "SpecError",
    "UnsupportedModelError",
]


class AccelerateHooksError(Exception):
    """Base of every error that accelerate_hooks raises on purpose; catch it to catch them all."""


class UnsupportedModelError(AccelerateHooksError):
    """Raised by `enable` when the target is no model, has no site for a policy, or has a site that
    cannot be intercepted safely, and during a run when the model turns out to hold state that the
    runtime cannot keep right (an unknown KV cache, a recurrent state).
    """


class PolicyConflictError(AccelerateHooksError):
    """Raised by `enable`, before anything is touched, when two policies cannot share a site."""


class AlreadyEnabledError(AccelerateHooksError):
    """Raised by `enable` when a module of the target already carries another session's seam."""


class SpecError(AccelerateHooksError, ValueError):
    """Raised when a policy is named or configured wrongly: a spec that does not follow the
    grammar, an unknown policy or field, a value of the wrong type or out of range.
    """


class ArtifactError(AccelerateHooksError, ValueError):
    """Raised when an artifact cannot be written, read or trusted: the file is missing, truncated
    or of another format, or it was made for another policy, model, step count or scheduler.
    """


class RecipeError(ArtifactError):
    """Raised when a recipe file cannot be written or read, or does not follow its schema."""
