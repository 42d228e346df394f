"""What an expert gives on average, in place of what a token would have got from it.

With ``m_e`` the mean output of expert ``e`` over the tokens that asked it when the rule was fitted,
a token whose slots ``S`` are left out gets ``sum over s in S of w_s m_(e_s)`` on top of what the
kept ones give. The sum of the router's weights stays what it was, so nothing is renormalised.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accelerate_hooks.call import Call
from accelerate_hooks.errors import ArtifactError
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.policies._pruning import count_of, of_site

NAME = "mean"


def packed(means: dict[int, Tensor]) -> dict[str, Tensor]:
    """The tensors of an artifact for the mean outputs ``[E, H]`` of some layers."""
    return {f"{NAME}.{i}": mean.to(torch.bfloat16) for i, mean in means.items()}


def means_of(policy: Any, call: Call) -> Tensor | None:
    """The mean outputs ``[E, H]`` of this layer's experts, in the dtype of its input; None where
    the policy has none, or may not use them."""
    if policy.artifact is None or not policy.compensate or policy.prunes:
        return None

    def read() -> Tensor | None:
        found = of_site(policy.artifact, NAME, call.site, call.depth)
        if found is None:
            return None
        count = count_of(call.site.module)
        if tuple(found.shape) != (count, call.x.shape[-1]) or not found.isfinite().all():
            raise ArtifactError(
                f"expert_skip: the artifact's mean outputs for {call.site.name} are "
                f"{tuple(found.shape)}, for {count} experts and tokens of {call.x.shape[-1]}, or "
                "not all numbers; fit again"
            )
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several and torch.distributed.get_world_size() > 1:  # who add up their parts
            call.remark(
                "expert_skip: experts are shared between processes, so nothing stands in for "
                "those that are left out; the others are weighed up"
            )
            return None
        return found.to(call.x)

    return call.known(read, f"means {call.x.device} {call.x.dtype}")


def instead(means: Tensor, indices: Tensor, lost: Tensor) -> Tensor:
    """``[T, H]`` for slots of ``indices`` ``[T, k]`` that are left out at weights ``lost``."""
    there = (indices >= 0) & (indices < len(means))
    weights = torch.where(there, lost, 0.0).to(means.dtype)
    return F.embedding_bag(
        indices.long().clamp(0, len(means) - 1), means, per_sample_weights=weights, mode="sum"
    )


opaque_functions(globals())
