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
from accelerate_hooks.kernels._dispatch import require, use_native, use_triton

Act = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW = 8
"""Up to so many tokens an expert its matrices are streamed; beyond, products have enough to do."""


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
    ``[E, H, F]`` and ``[E, I, H]``; ``up_bias`` is ``[E, F]``, ``down_bias`` ``[E, H]``. float32,
    float16 or bfloat16. There is no backward: call it under ``torch.no_grad()``.
    """
    _check(hidden, indices, weights, up, down, up_bias, down_bias, act, gated, transposed)
    return torch.ops.accelerate_hooks.skip_experts(
        hidden, indices, weights, up, down, up_bias, down_bias, act, gated, transposed
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


@torch.library.custom_op("accelerate_hooks::skip_experts", mutates_args=())
def _op(
    hidden: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, act: str, gated: bool, transposed: bool,
) -> Tensor:  # fmt: skip
    given = (hidden, indices, weights, up, down, up_bias, down_bias, act, gated, transposed)
    unfit = None if hidden.dtype in _DTYPES else f"dtype {hidden.dtype}"
    if use_triton("skip_experts", hidden.device, unfit):
        from accelerate_hooks.kernels._experts_triton import launch

        return launch(*given)
    return grouped(*given)


@_op.register_fake
def _(
    hidden: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, act: str, gated: bool, transposed: bool,
) -> Tensor:  # fmt: skip
    return hidden.new_empty(hidden.shape)


def grouped(
    hidden: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, act: str, gated: bool, transposed: bool,
) -> Tensor:  # fmt: skip
    """Slots sorted by expert: a stream through the matrices of each for few tokens (on a CPU, in
    C), a product for many."""
    experts = len(up)
    kept = (weights != 0) & (indices >= 0) & (indices < experts)
    token, slot = kept.nonzero().unbind(1)
    expert, order = indices[token, slot].sort(stable=True)
    token, slot = token[order], slot[order]
    x = hidden.index_select(0, token)
    touched, counts = expert.unique_consecutive(return_counts=True)
    if _streams(hidden, up, down, len(token), len(touched)):
        features = _stream(x.float(), up, touched, counts, transposed)
        if up_bias is not None:
            features += up_bias[expert]
        y = _stream(activate(features, act, gated), down, touched, counts, transposed)
    else:
        y = hidden.new_empty(len(token), hidden.shape[1])
        sizes = counts.tolist()
        parts = zip(touched.tolist(), x.split(sizes), y.split(sizes), strict=True)
        for e, some, place in parts:
            first, second = (m[e] if transposed else m[e].mT for m in (up, down))
            features = some @ first
            if up_bias is not None:
                features += up_bias[e]
            torch.mm(activate(features, act, gated), second, out=place)
        y = y.float()
    if down_bias is not None:
        y += down_bias[expert]
    y *= weights[token, slot].float().unsqueeze(1)
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    return out.index_add_(0, token, y).to(hidden.dtype)


def _streams(hidden: Tensor, up: Tensor, down: Tensor, slots: int, touched: int) -> bool:
    if hidden.device.type != "cpu" or slots == 0 or slots > FEW * touched:
        return False
    return use_native("skip_experts", "_experts", _unfit(up) or _unfit(down))


def _unfit(weight: Tensor) -> str | None:
    """Why C cannot take this, or None."""
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {weight.dtype}"
    if any(size % 16 for size in weight.shape[1:]):
        return f"matrices of {weight.shape[1]} x {weight.shape[2]} (multiples of 16)"
    return None if weight.is_contiguous() else "matrices that are not contiguous"


class _Problem(ctypes.Structure):
    """`Problem` of `_experts.c`."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "expert", "start", "y")),
        *((name, ctypes.c_int64) for name in ("touched", "inputs", "outputs")),
        *((name, ctypes.c_int64) for name in ("transposed", "is_bf16", "next")),
    ]


def _stream(x: Tensor, weight: Tensor, touched: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    """``y[slot] = W_e x[slot]`` for the slots of each touched expert, float32."""
    outputs, inputs = weight.shape[2 if transposed else 1], weight.shape[1 if transposed else 2]
    y = torch.empty(len(x), outputs, dtype=torch.float32)
    x = x.contiguous()
    start = F.pad(counts.cumsum(0), (1, 0)).int()
    expert = touched.int()
    problem = _Problem(
        x=x.data_ptr(), weight=weight.data_ptr(), expert=expert.data_ptr(), start=start.data_ptr(),
        y=y.data_ptr(), touched=len(touched), inputs=inputs, outputs=outputs,
        transposed=transposed, is_bf16=weight.dtype == torch.bfloat16,
    )  # fmt: skip
    native.on_every_thread(native.library("_experts").experts, problem)
    return y


def _check(
    hidden: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, act: str, gated: bool, transposed: bool,
) -> None:  # fmt: skip
    shapes = (
        f"hidden {tuple(hidden.shape)}, indices {tuple(indices.shape)}, weights "
        f"{tuple(weights.shape)}, up {tuple(up.shape)}, down {tuple(down.shape)}"
    )
    require(act in get_args(Act), f"act={act!r}; give one of {', '.join(get_args(Act))}")
    require(
        hidden.ndim == 2 and indices.ndim == 2 and indices.shape == weights.shape
        and len(indices) == len(hidden) and up.ndim == down.ndim == 3 and len(up) == len(down),
        f"{shapes}: give [T, H], [T, k], [T, k], [E, F, H] and [E, H, I]",
    )  # fmt: skip
    features, width = up.shape[1:][::-1] if transposed else up.shape[1:]
    outputs, inner = down.shape[1:][::-1] if transposed else down.shape[1:]
    halves = 2 if gated or act == "clamped_swiglu" else 1
    require(
        width == outputs == hidden.shape[1] and features == halves * inner,
        f"{shapes}: H, F and I do not fit together (gated={gated}, transposed={transposed})",
    )
    require(
        hidden.dtype == up.dtype == down.dtype and hidden.is_floating_point(),
        f"hidden {hidden.dtype}, up {up.dtype}, down {down.dtype}: give one floating-point dtype",
    )
    require(not indices.is_floating_point(), f"indices are {indices.dtype}; give integers")
    for name, bias, size in (("up_bias", up_bias, features), ("down_bias", down_bias, outputs)):
        require(
            bias is None or tuple(bias.shape) == (len(up), size),
            f"{name} is {None if bias is None else tuple(bias.shape)}; give {(len(up), size)}",
        )
    tensors = (hidden, weights, up, down, up_bias, down_bias)
    require(
        not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)),
        "skip_experts has no backward; call it under torch.no_grad()",
    )
