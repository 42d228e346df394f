"""The experts of a mixture, at the price of those that are asked.

Token ``t`` asks experts ``e = indices[t, s]`` with weights ``w = weights[t, s]``:

    out[t] = sum over s with w != 0 of  w * (D_e g(U_e x[t] + a_e) + b_e)

``g`` is ``act(gate) * up`` where gated (the first half of the features is the gate), else ``act``;
``"clamped_swiglu"`` is GPT-OSS's: gate and up interleaved, ``gate' = min(gate, 7)``, ``up' = up``
within +-7, ``g = gate' * sigmoid(1.702 gate') * (up' + 1)``. A slot of weight 0, or of an expert
that does not exist, costs nothing. Weights are read where they lie, never copied.
"""

from __future__ import annotations

import struct
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from accelerate_hooks.kernels import _native as native
from accelerate_hooks.kernels._dispatch import (
    KernelError,
    described,
    operator,
    overheard,
    require,
    require_no_gradient,
    use_native,
    use_triton,
    wanted,
)

Act = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"]
_ACTS = get_args(Act)
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
    given = (hidden, indices, weights, up, down, up_bias, down_bias, act, gated, transposed)
    looks = None if overheard() else _looks(given)
    if looks is not None and looks in _STREAMED:  # a compiler would guard the set
        out = streamed(*given)
        return grouped(*given) if out is None else out
    _check(*given)
    out = torch.ops.accelerate_hooks.skip_experts(*given)
    if looks is not None and _streams(*given):
        if len(_STREAMED) >= 1024:
            _STREAMED.clear()
        _STREAMED.add(looks)
    return out


_STREAMED = set[tuple[object, ...]]()
"""What passed `_check` and goes to our C, as `_looks` tells it: it need not be asked again."""
_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def _looks(given: tuple[Any, ...]) -> tuple[object, ...] | None:
    """All of the arguments but their numbers and addresses; None where that cannot be told."""
    try:
        looks = (wanted(), *[
            (x.shape, x.dtype, x.is_cpu, x.layout, x.is_contiguous(), x.is_neg())
            if x.__class__ in _PLAIN
            else (x.__class__, x)  # 1.0 is equal to True
            for x in given
        ])  # fmt: skip
        hash(looks)
    except (RuntimeError, TypeError):
        return None
    return looks


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
    experts, indices = len(up), indices.long()
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


_GIVEN = struct.Struct("@8P11q")
"""The first part of `_experts.c`'s `Problem` (a `ctypes.Structure` takes longer)."""


def streamed(
    hidden: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, act: str, gated: bool, transposed: bool,
) -> Tensor | None:  # fmt: skip
    """The matrices of each expert that is touched read once, in C on every thread; None where its
    tokens are so many that a product is faster."""
    run = native.library("_experts").skip_experts
    (tokens, width), inner = hidden.shape, down.shape[1 if transposed else 2]
    hidden, indices = hidden.contiguous(), indices.long().contiguous()
    weights = weights.contiguous()
    if weights.dtype not in (torch.float32, torch.bfloat16):
        weights = weights.float()
    out = torch.empty_like(hidden)
    numbers = (hidden, indices, weights, up, down)
    pointers = [t.data_ptr() for t in numbers]
    if 0 in pointers and any(t.numel() and not t.data_ptr() for t in numbers):
        raise KernelError(
            "skip_experts: memory of a tensor was freed (as FSDP does); restore it first"
        )
    pointers += (
        0 if up_bias is None else up_bias.data_ptr(),
        0 if down_bias is None else down_bias.data_ptr(),
        out.data_ptr(),
    )  # fmt: skip
    sizes = (tokens, indices.shape[1], len(up), width, inner)
    features = inner * (2 if gated or act == "clamped_swiglu" else 1)
    bf16 = (up.dtype == torch.bfloat16, weights.dtype == torch.bfloat16)
    given = _GIVEN.pack(*pointers, *sizes, features, _ACTS.index(act), gated, transposed, *bf16)
    status = run(given, FEW, native.parallel(), torch.get_num_threads())
    if status == _NO_MEMORY:
        raise MemoryError(f"no memory for {tokens} tokens of {inner} features")
    return None if status == _TOO_MANY else out


_TOO_MANY, _NO_MEMORY = 1, 2


def _streams(*given: Any) -> bool:
    """Whether arguments that fit together go to our C, and nothing has to be counted."""
    plain = all(x.__class__ in _PLAIN and not x.is_neg() for x in given if isinstance(x, Tensor))
    here = plain and given[0].is_cpu and wanted() == "auto" and native.is_built("_experts")
    return here and _unfit(*given[3:7]) is None


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

    require(act in _ACTS, lambda: f"act={act!r}; give one of {', '.join(_ACTS)}")
    require(
        hidden.ndim == 2 and indices.ndim == 2 and indices.shape == weights.shape
        and indices.shape[0] == hidden.shape[0] and up.ndim == down.ndim == 3
        and up.shape[0] == down.shape[0],
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
            bias is None or tuple(bias.shape) == (up.shape[0], size),
            lambda name=name, bias=bias, size=size: (
                f"{name} is {None if bias is None else tuple(bias.shape)}; give "
                f"{(up.shape[0], size)}"
            ),
        )
    require_no_gradient("skip_experts", hidden, weights, up, down, up_bias, down_bias)
