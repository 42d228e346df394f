"""Reaching the scaled dot-product attention inside a site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.site import TokenLayout

if TYPE_CHECKING:
    from accelerate_hooks.call import Call

_PARAMETERS = (
    "query",
    "key",
    "value",
    "attn_mask",
    "dropout_p",
    "is_causal",
    "scale",
    "enable_gqa",
)


_CONTEXTS = ("encoder_hidden_states", "key_value_states")


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention inside a visit.

    ``q`` is ``[batch, heads, tokens, dim]``, ``k`` and ``v`` are
    ``[batch, heads / groups, keys, dim]``,
    ``mask`` broadcasts to ``[batch, heads, tokens, keys]`` (bool: True attends; float: added);
    ``is_cross`` where the keys are another sequence's (not of a joint one),
    ``ordinal`` counts the attentions of the visit; ``window``, ``sinks``, ``softcap`` stand in
    ``extra`` where a model has them. ``default()`` is what the model itself would compute.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    is_causal: bool
    scale: float | None
    groups: int
    ordinal: int
    is_cross: bool
    layout: TokenLayout | None
    default: Callable[..., torch.Tensor]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """What all scores and all values take, two a multiply-add (as `FlopMode` counts it)."""
        (*_, n, d), (*_, m, dv) = self.q.shape, self.v.shape
        return 2 * self.q.shape[0] * self.q.shape[1] * n * m * (d + dv)


class AttentionMode(TorchFunctionMode):
    """Hands every ``F.scaled_dot_product_attention`` of this thread to ``fn``."""

    def __init__(
        self, fn: Callable[[Attention], torch.Tensor], lengths: tuple[int, int] | None, layout: Any
    ) -> None:
        super().__init__()
        self.fn, self.lengths, self.layout, self.calls = fn, lengths, layout, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(_PARAMETERS, args, strict=False)) | kwargs
        q, k, v = given["query"], given["key"], given["value"]

        def default(**changes: Any) -> torch.Tensor:
            return func(**(given | changes))

        seen = Attention(
            q,
            k,
            v,
            given.get("attn_mask"),
            bool(given.get("is_causal", False)),
            given.get("scale"),
            q.shape[-3] // k.shape[-3] if given.get("enable_gqa") else 1,
            self.calls,
            self._is_cross(q.shape[-2], k.shape[-2]),
            self.layout,
            default,
        )
        self.calls += 1
        return self.fn(seen)

    def _is_cross(self, queries: int, keys: int) -> bool:
        """Joint attention has both sequences in its keys, the other one perhaps without its padding
        (Mochi): then they are in its queries, too."""
        if self.lengths is None or keys == sum(self.lengths):
            return False
        return not queries == keys > self.lengths[0]


def lengths(call: Call) -> tuple[int, int] | None:
    """How many tokens there are in a site's x and in the other sequence that it was given; None
    without one."""
    for name in _CONTEXTS:
        other = call.argument(name)
        if isinstance(other, torch.Tensor) and other.ndim > 1 and other is not call.x:
            return call.x.shape[1], other.shape[1]
    return None


opaque_functions(globals())
