"""What a module of experts holds, in the terms of `kernels.skip_experts`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from accelerate_hooks.errors import UnsupportedModelError
from accelerate_hooks.kernels import skip_experts
from accelerate_hooks.kernels.experts import Act, activate
from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.policies._twins import has_own_forward

Run = Callable[[Tensor, Tensor], Tensor]

_CLOSE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True, eq=False)
class Experts:
    """A module that holds all its experts in matrices of the kernel's form."""

    module: nn.Module
    act: Act
    gated: bool
    transposed: bool

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `skip_experts`, beside hidden states, indices and weights: the parameters as they are
        now (loading and pruning put others in their places)."""
        own = self.module._parameters
        first = "gate_up_proj" if self.gated else "up_proj"
        return {
            "up": own[first], "down": own["down_proj"],
            "up_bias": own.get(f"{first}_bias"), "down_bias": own.get("down_proj_bias"),
            "act": self.act, "gated": self.gated, "transposed": self.transposed,
        }  # fmt: skip


def least_slots(run: Run, indices: Tensor, weights: Tensor) -> int:
    """The fewest slots a token that a module's own forward can do with: some fail with one (a
    squeeze too many). ``run``: its output for a routing ``[T, slots]``."""
    try:
        run(indices[:, :1].contiguous(), weights[:, :1].contiguous())
    except (IndexError, RuntimeError, ValueError):
        return 2
    return 1


def each_slot(run: Run, indices: Tensor, weights: Tensor, least: int) -> Tensor:
    """What the expert of each slot gives, at weight 1: ``[T, k, H]``."""
    alone = torch.zeros_like(weights[:, :1].expand(-1, least))
    alone[:, 0] = 1.0
    slots = range(indices.shape[1])
    ys = [run(indices[:, [s] * least], alone).detach() for s in slots]
    if any(y.layout != torch.strided or y.ndim != 2 or len(y) != len(indices) for y in ys):
        raise UnsupportedModelError(
            "expert_skip: experts that are given indices and weights [tokens, k] give back no "
            "dense [tokens, width], and cannot be fitted; give the numbers yourself"
        )
    return torch.stack(ys, 1)


def slot_flops(module: nn.Module, experts: int | None = None) -> float:
    """The operations of one slot, of ``experts`` of any form: two a weight of one expert."""
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    stacked = next((len(p) for p in matrices if p.ndim == 3), None)
    count = (
        experts or stacked or getattr(module, "num_experts", None) or len(list(module.children()))
    )
    return 2.0 * sum(p.numel() for p in matrices) / max(1, int(count))


def look_of(module: nn.Module) -> tuple[Any, ...]:
    """What `read_experts` makes of a module holds as long as this is the same."""
    own, names = vars(module), module._parameters
    return (
        type(module), own.get("forward"), own.get("act_fn"), *module._modules.values(),
        *names, *map(type, names.values()),
    )  # fmt: skip


def read_experts(module: nn.Module) -> Experts | None:
    """The experts of transformers' form: stacked matrices, gated or plain, either layout, biases.

    None where the form is another or the activation none that the kernel knows; where there is
    more than these parameters (scales of quantised weights, a norm), or they are no plain
    floating-point tensors (quantised, sharded, offloaded); and where the class's own ``forward``
    is not what runs (expert or tensor parallel, offloading).
    """
    gated = "gate_up_proj" in module._parameters
    first = "gate_up_proj" if gated else "up_proj"
    known = (first, "down_proj", f"{first}_bias", "down_proj_bias")
    own = dict(module.named_parameters())
    up, down, *biases = (own.pop(name, None) for name in known)
    transposed = bool(getattr(module, "is_transposed", False))
    if up is None or down is None or own or not has_own_forward(module):
        return None
    plain = all(p is None or _is_plain(p) for p in (up, down, *biases))
    if not plain or not _fit(up, down, gated, transposed):
        return None
    act = _activation(module, up.shape[2 if transposed else 1], gated)
    return None if act is None else Experts(module, act, gated, transposed)


def _is_plain(p: Tensor) -> bool:
    return type(p) in (Tensor, nn.Parameter) and p.dtype in _CLOSE and not p.is_meta


def _fit(up: Tensor, down: Tensor, gated: bool, transposed: bool) -> bool:
    """``[E, F, H]`` and ``[E, H, I]``, or with both transposed, F twice I where gated."""
    if up.ndim != 3 or down.ndim != 3:
        return False
    (e, f, h), (count, *rest) = up.shape, down.shape
    f, h = (h, f) if transposed else (f, h)
    width = f // 2 if gated else f
    return e == count and rest == ([width, h] if transposed else [h, width])


def _activation(module: nn.Module, features: int, gated: bool) -> Act | None:
    """The activation of the kernel that gives what the module's own gives, far out too: some are
    clamped there."""
    own = getattr(module, "_apply_gate", None) if gated else getattr(module, "act_fn", None)
    scale = torch.logspace(-1.0, 3.0, 32, device="cpu").unsqueeze(1)
    x = scale * torch.randn(32, features, generator=torch.Generator().manual_seed(0), device="cpu")
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
        if got.shape != wanted.shape:
            continue
        if ((got - wanted).abs() <= 1e-4 * wanted.abs() + 1e-5 * scale).all():
            return act
    return None


def noise(tokens: int, width: int) -> Tensor:
    """Hidden states ``[tokens, width]`` from small to large, the same each time."""
    scale = torch.logspace(-4, 2, tokens, base=2.0, device="cpu").unsqueeze(1)
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(tokens, width, generator=generator, device="cpu")


def sample(
    hidden: Tensor, indices: Tensor, weights: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, indices and weights like these, of noise: no request decides how the next one
    is treated."""
    tokens, k = 8, indices.shape[1]
    asked = torch.arange(tokens * k, device="cpu").remainder(experts).view(tokens, k)
    return (
        noise(tokens, hidden.shape[1]).to(hidden),
        asked.to(indices),
        weights.new_full((tokens, k), 1.0 / k),
    )


def error_of(
    experts: Experts, hidden: Tensor, indices: Tensor, weights: Tensor, true: Any
) -> Tensor:
    """How far the kernel is from what the module gave for the same routing, as a share of what
    rounding explains: at most 1 where the module was read rightly."""
    if not isinstance(true, Tensor) or true.shape != hidden.shape:
        return torch.full((), torch.inf, device="cpu")
    got = skip_experts(hidden, indices, weights, **experts.arguments)
    error = (got.float() - true.float()).norm() / true.float().norm().clamp(min=1e-30)
    return error / _CLOSE.get(hidden.dtype, 1e-6)


opaque_functions(globals())
