"""The experts of a mixture, at the price of those that are asked.

Token ``t`` asks experts ``e = indices[t, s]`` with weights ``w = weights[t, s]``:

    out[t] = sum over s with w != 0 of  w * (D_e g(U_e x[t] + a_e) + b_e)

``g`` is ``act(gate) * up`` where gated (the first half of the features is the gate), else ``act``;
``"clamped_swiglu"`` is GPT-OSS's: gate and up interleaved, ``gate' = min(gate, 7)``, ``up' = up``
within +-7, ``g = gate' * sigmoid(1.702 gate') * (up' + 1)``. A slot of weight 0, or of an expert
that does not exist, costs nothing. Weights are read where they lie, never copied.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from accelerate_hooks.kernels import _native as native
from accelerate_hooks.kernels._dispatch import (
    described,
    operator,
    require,
    require_no_gradient,
    use_native,
    use_triton,
)

Act = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW = 128
"""Up to so many tokens an expert our C reads its matrices once; beyond, BLAS is faster."""


def skip_experts(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    act: Act = "silu",
    gated: bool = True,
    transposed: bool = False,
) -> Tensor:
    """The weighted sum of the experts' outputs ``[T, H]``, in the dtype of ``hidden``.

    ``hidden`` is ``[T, H]``, ``indices`` and ``weights`` ``[T, k]``; ``up`` is ``[E, F, H]`` (``F``
    twice the width ``I`` where gated) and ``down`` ``[E, H, I]``, or with ``transposed``
    ``[E, H, F]`` and ``[E, I, H]``; ``up_bias`` is ``[E, F]``, ``down_bias`` ``[E, H]``. Any
    floating-point dtype, sums in float32 at least. There is no backward: call it under
    ``torch.no_grad()``.
    """
    _check(hidden, indices, weights, up, down, up_bias, down_bias, act, gated, transposed)
    return torch.ops.accelerate_hooks.skip_experts(
        hidden, indices.long(), weights, up, down, up_bias, down_bias, act, gated, transposed
    )


def activate(x: Tensor, act: str, gated: bool) -> Tensor:
    """``g`` of features ``[..., F]``."""
    if act == "clamped_swiglu":
        gate, linear = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
        return gate * (gate * 1.702).sigmoid() * (linear + 1.0)
    if gated:
        gate, linear = x.chunk(2, dim=-1)
        return activate(gate, act, False) * linear
    if act == "relu2":
        return F.relu(x).square()
    if act.startswith("gelu"):
        return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")
    return F.silu(x) if act == "silu" else F.relu(x)


def reference(
    hidden: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, act: str, gated: bool, transposed: bool,
) -> Tensor:  # fmt: skip
    """The formula, slot by slot."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    out = hidden.new_zeros(hidden.shape, dtype=wide)
    for t in range(len(hidden)):
        for s in range(indices.shape[1]):
            e, w = int(indices[t, s]), weights[t, s].to(wide)
            if w == 0 or not 0 <= e < len(up):
                continue
            first, second = (m[e].to(wide).mT if transposed else m[e].to(wide) for m in (up, down))
            x = first @ hidden[t].to(wide)
            x = x if up_bias is None else x + up_bias[e].to(wide)
            y = second @ activate(x, act, gated)
            y = y if down_bias is None else y + down_bias[e].to(wide)
            out[t] += w * y
    return out.to(hidden.dtype)


@operator("skip_experts")
def _op(
    hidden: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, act: str, gated: bool, transposed: bool,
) -> Tensor:  # fmt: skip
    if len(up) == 0 or indices.numel() == 0:
        return torch.zeros_like(hidden)
    given = (hidden, indices, weights, up, down, up_bias, down_bias, act, gated, transposed)
    unfit = None if hidden.dtype in _DTYPES else f"dtype {hidden.dtype}"
    if use_triton("skip_experts", hidden.device, unfit):
        from accelerate_hooks.kernels._experts_triton import launch

        return launch(*given)
    if hidden.device.type == "cpu" and use_native(
        "skip_experts", "_experts", _unfit(up, down, up_bias, down_bias)
    ):
        out = streamed(*given)
        if out is not None:
            return out
    return grouped(*given)


@torch.library.register_fake("accelerate_hooks::skip_experts")
def _(
    hidden: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, act: str, gated: bool, transposed: bool,
) -> Tensor:  # fmt: skip
    return hidden.new_empty(hidden.shape)


def grouped(
    hidden: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, act: str, gated: bool, transposed: bool,
) -> Tensor:  # fmt: skip
    """Slots sorted by expert, and a product for each expert."""
    experts = len(up)
    kept = (weights != 0) & (indices >= 0) & (indices < experts)
    token, slot = kept.nonzero().unbind(1)
    expert, order = indices[token, slot].sort(stable=True)
    token, slot = token[order], slot[order]
    touched, counts = expert.unique_consecutive(return_counts=True)
    x, sizes = hidden.index_select(0, token), counts.tolist()
    y = hidden.new_empty(len(token), hidden.shape[1])
    parts = zip(touched.tolist(), x.split(sizes), y.split(sizes), strict=True)
    for e, some, place in parts:
        first, second = (m[e] if transposed else m[e].mT for m in (up, down))
        features = some @ first
        if up_bias is not None:
            features += up_bias[e]
        torch.mm(activate(features, act, gated), second, out=place)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    y = y.to(wide)
    if down_bias is not None:
        y += down_bias[expert]
    y *= weights[token, slot].to(wide).unsqueeze(1)
    out = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    return out.index_add_(0, token, y).to(hidden.dtype)


class _Problem(ctypes.Structure):
    """`Problem` of `_experts.c`."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("hidden", "indices", "weights", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("up_bias", "down_bias", "out", "expert", "start")),
        *((name, ctypes.c_void_p) for name in ("token", "weight", "inputs", "sum", "inside")),
        *((name, ctypes.c_int64) for name in ("tokens", "k", "experts", "width", "inner")),
        *((name, ctypes.c_int64) for name in ("features", "act", "gated", "transposed")),
        *((name, ctypes.c_int64) for name in ("is_bf16", "touched", "next", "done")),
    ]


def streamed(
    hidden: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, act: str, gated: bool, transposed: bool,
) -> Tensor | None:  # fmt: skip
    """The matrices of each expert that is touched read once, in C on every thread; None where its
    tokens are so many that a product is faster."""
    lib = native.library("_experts")
    (tokens, width), k, experts = hidden.shape, indices.shape[1], len(up)
    inner = down.shape[1 if transposed else 2]
    hidden, indices = hidden.contiguous(), indices.long().contiguous()
    weights = weights.to(torch.float32).contiguous()
    scratch = torch.empty(2 * (experts + 1) + 2 * tokens * k, dtype=torch.int32, device="cpu")
    expert, start, token, weight = (scratch.data_ptr() + 4 * at for at in (
        0, experts, 2 * experts + 1, 2 * experts + 1 + tokens * k))  # fmt: skip
    problem = _Problem(
        hidden=hidden.data_ptr(), indices=indices.data_ptr(), weights=weights.data_ptr(),
        up=up.data_ptr(), down=down.data_ptr(),
        up_bias=None if up_bias is None else up_bias.data_ptr(),
        down_bias=None if down_bias is None else down_bias.data_ptr(),
        expert=expert, start=start, token=token, weight=weight,
        tokens=tokens, k=k, experts=experts, width=width, inner=inner,
        features=inner * (2 if gated or act == "clamped_swiglu" else 1),
        act=get_args(Act).index(act), gated=gated, transposed=transposed,
        is_bf16=up.dtype == torch.bfloat16,
    )  # fmt: skip
    slots = lib.plan(ctypes.byref(problem))
    if slots > FEW * problem.touched:
        return None
    out = torch.empty_like(hidden)
    total = out.float()  # out itself where that is float32
    inputs = hidden if ctypes.c_int.in_dll(lib, "reads_bf16").value else hidden.float()
    inside = inputs.new_empty(slots, inner)
    problem.out, problem.sum = out.data_ptr(), total.data_ptr()
    problem.inputs, problem.inside = inputs.data_ptr(), inside.data_ptr()
    native.on_every_thread(lib.experts, problem)
    return out


def _unfit(up: Tensor, down: Tensor, *biases: Tensor | None) -> str | None:
    """Why C cannot take these, or None."""
    if up.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {up.dtype}"
    if any(bias is not None and bias.dtype != up.dtype for bias in biases):
        return "biases of another dtype"
    if any(size % 16 for weight in (up, down) for size in weight.shape[1:]):
        return "matrices whose sizes are no multiples of 16"
    given = (up, down, *(bias for bias in biases if bias is not None))
    return None if all(t.is_contiguous() for t in given) else "matrices that are not contiguous"


def _check(
    hidden: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, act: str, gated: bool, transposed: bool,
) -> None:  # fmt: skip
    given = {
        "hidden": hidden, "indices": indices, "weights": weights, "up": up, "down": down,
        "up_bias": up_bias, "down_bias": down_bias,
    }  # fmt: skip
    for name, t in given.items():
        fine = isinstance(t, Tensor) and t.layout == torch.strided
        require(
            (fine and t.device == hidden.device) or (t is None and name.endswith("bias")),  # type: ignore[union-attr]
            lambda name=name, t=t: (
                f"{name} is {described(t)}, hidden {described(hidden)}; give dense tensors on one "
                "device"
            ),
        )
    for name, flag in (("gated", gated), ("transposed", transposed)):
        require(isinstance(flag, bool), lambda n=name, f=flag: f"{n}={f!r}; give a bool")  # pyright: ignore[reportUnnecessaryIsInstance]

    def shapes() -> str:
        return (
            f"hidden {tuple(hidden.shape)}, indices {tuple(indices.shape)}, weights "
            f"{tuple(weights.shape)}, up {tuple(up.shape)}, down {tuple(down.shape)}"
        )

    require(act in get_args(Act), lambda: f"act={act!r}; give one of {', '.join(get_args(Act))}")
    require(
        hidden.ndim == 2 and indices.ndim == 2 and indices.shape == weights.shape
        and len(indices) == len(hidden) and up.ndim == down.ndim == 3 and len(up) == len(down),
        lambda: f"{shapes()}: give [T, H], [T, k], [T, k], [E, F, H] and [E, H, I]",
    )  # fmt: skip
    features, width = up.shape[1:][::-1] if transposed else up.shape[1:]
    outputs, inner = down.shape[1:][::-1] if transposed else down.shape[1:]
    halves = 2 if gated or act == "clamped_swiglu" else 1
    require(
        width == outputs == hidden.shape[1] and features == halves * inner,
        lambda: (
            f"{shapes()}: H, F and I do not fit together (gated={gated}, transposed={transposed})"
        ),
    )
    require(
        hidden.dtype == up.dtype == down.dtype and hidden.is_floating_point(),
        lambda: (
            f"hidden {hidden.dtype}, up {up.dtype}, down {down.dtype}: give one floating-point "
            "dtype"
        ),
    )
    real = indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool
    require(not real, lambda: f"indices are {indices.dtype}; give integers")
    require(weights.is_floating_point(), lambda: f"weights are {weights.dtype}; give floats")
    for name, bias, size in (("up_bias", up_bias, features), ("down_bias", down_bias, outputs)):
        require(
            bias is None or tuple(bias.shape) == (len(up), size),
            lambda name=name, bias=bias, size=size: (
                f"{name} is {None if bias is None else tuple(bias.shape)}; give {(len(up), size)}"
            ),
        )
    require_no_gradient("skip_experts", hidden, weights, up, down, up_bias, down_bias)
