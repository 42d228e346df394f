"""What a module of experts holds, in the terms of `kernels.skip_experts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from accelerate_hooks.kernels import skip_experts
from accelerate_hooks.kernels.experts import Act, activate
from accelerate_hooks.opaque import opaque_functions

_CLOSE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True, eq=False)
class Experts:
    """Arguments of `skip_experts` beside hidden states, indices and weights, and the operations of
    one slot."""

    arguments: dict[str, Any]
    flops: float


def read_experts(module: nn.Module) -> Experts | None:
    """The experts of transformers' form: stacked matrices, gated or plain, either layout, biases.
    None where it is another, or where the activation is none that the kernel knows."""
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    gated = up is not None
    up = getattr(module, "up_proj", None) if up is None else up
    if not isinstance(up, Tensor) or not isinstance(down, Tensor) or {up.ndim, down.ndim} != {3}:
        return None
    if getattr(module, "has_post_expert_norm", False):
        return None
    name = "gate_up_proj_bias" if gated else "up_proj_bias"
    biases = getattr(module, name, None), getattr(module, "down_proj_bias", None)
    transposed = bool(getattr(module, "is_transposed", False))
    features = up.shape[2 if transposed else 1]
    act = _activation(module, features, gated)
    if act is None:
        return None
    return Experts(
        {
            "up": up, "down": down, "up_bias": biases[0], "down_bias": biases[1],
            "act": act, "gated": gated, "transposed": transposed,
        },
        2.0 * (up[0].numel() + down[0].numel()),
    )  # fmt: skip


def _activation(module: nn.Module, features: int, gated: bool) -> Act | None:
    """The activation of the kernel that gives what the module's own gives."""
    own = getattr(module, "_apply_gate", None) if gated else getattr(module, "act_fn", None)
    x = torch.linspace(-9.0, 9.0, features).roll(features // 3).unsqueeze(0)
    try:
        if own is None:
            gate, linear = x.chunk(2, dim=-1)
            wanted = module.act_fn(gate) * linear  # type: ignore[operator]
        else:
            wanted = own(x)
    except (AttributeError, RuntimeError, TypeError):
        return None
    for act in get_args(Act):
        if act == "clamped_swiglu" and not gated:
            continue
        got = activate(x, act, gated)
        if got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-4, atol=1e-5):
            return act
    return None


def error_of(
    experts: Experts, hidden: Tensor, indices: Tensor, weights: Tensor, true: Any
) -> Tensor:
    """How far the kernel is from what the module gave for the same routing, as a share of what
    rounding explains: at most 1 where the module was read rightly."""
    if not isinstance(true, Tensor) or true.shape != hidden.shape:
        return torch.full((), torch.inf)
    got = skip_experts(hidden, indices, weights, **experts.arguments)
    error = (got.float() - true.float()).norm() / true.float().norm().clamp(min=1e-30)
    return error / _CLOSE.get(hidden.dtype, 1e-6)


opaque_functions(globals())
