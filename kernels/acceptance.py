"""How often speculative decoding would accept what one model drafts for another.

    esap(p, q) = sum_v min(softmax(p)_v, softmax(q)_v) = 1 - total variation distance

of the distributions that two models give for the next token: the expected acceptance with the one
as the draft of the other (EvoESAP, arXiv 2603.06003). Between 0 and 1, symmetric, 1 for equal
models; one forward a candidate tells it, no generation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelerate_hooks.kernels._dispatch import described, require

_ROOM = 1 << 26  # bytes of float32 probabilities at a time


def esap(p: Tensor, q: Tensor) -> Tensor:
    """``p`` and ``q`` are logits ``[..., V]`` of one shape, floats; a float32 ``[...]`` (float64
    for float64). Rows go through in parts, so that half-precision logits of a large vocabulary are
    never all in memory as float32."""
    require(
        isinstance(p, Tensor) and isinstance(q, Tensor) and p.device == q.device,  # pyright: ignore[reportUnnecessaryIsInstance]
        lambda: f"p is {described(p)}, q {described(q)}; give tensors on one device",
    )
    require(
        p.shape == q.shape and p.ndim >= 1 and p.is_floating_point() and q.is_floating_point(),
        lambda: (
            f"p is {p.dtype} {tuple(p.shape)}, q {q.dtype} {tuple(q.shape)}; give floating-point "
            "logits [..., V] of one shape"
        ),
    )
    wide = torch.float64 if torch.float64 in (p.dtype, q.dtype) else torch.float32
    rows, vocabulary = p.shape[:-1], p.shape[-1]
    require(vocabulary > 0, lambda: f"p is {tuple(p.shape)}: there is no vocabulary")
    count = max(1, _ROOM // (vocabulary * 4))
    parts = [
        torch.minimum(a.to(wide).softmax(-1), b.to(wide).softmax(-1)).sum(-1)
        for a, b in zip(
            p.reshape(-1, vocabulary).split(count), q.reshape(-1, vocabulary).split(count),
            strict=True,
        )
    ]  # fmt: skip
    return torch.cat(parts).view(rows) if parts else p.new_zeros(rows, dtype=wide)
