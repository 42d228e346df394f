"""What work may be skipped, reused, merged or approximated: one file a policy."""

from accelerate_hooks.policies.draft_attention import DraftAttention
from accelerate_hooks.policies.expert_skip import ExpertSkip
from accelerate_hooks.policies.lazy_step import LazyStep

__all__ = ["DraftAttention", "ExpertSkip", "LazyStep"]
