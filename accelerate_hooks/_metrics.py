"""How far outputs are from a reference, and how sure a mean or median is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from accelerate_hooks import tree
from accelerate_hooks.errors import UnsupportedModelError

_RESAMPLES = 2000
_FIELDS = ("logits", "sample", "images", "frames", "audios", "last_hidden_state")


def output(out: Any) -> torch.Tensor:
    """The tensor of a model's or pipeline's output that is compared: a field of a usual name, else
    the first tensor; images (PIL or arrays) as ``[batch, height, width, channels]`` in 0 to 1."""
    for name in _FIELDS:
        value = out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)
        if value is not None:
            out = value
            break
    if isinstance(out, tuple) and out:
        out = out[0]
    if isinstance(out, list) and out and not isinstance(out[0], torch.Tensor):
        out = torch.stack([_array(one) for one in out])
    elif not isinstance(out, torch.Tensor) and hasattr(out, "__array__"):
        out = _array(out)
    found = next(tree.leaves(out), ((), None))[1]
    if found is None:
        raise UnsupportedModelError(
            f"evaluate finds no tensor in {type(out).__name__}; give a callable run(item) that "
            "returns the tensor to compare"
        )
    return found.detach()


def detached(out: Any) -> Any:
    """A copy of the output's tensors: models may hand out memory that they use again."""
    return tree.transform(lambda _, leaf: leaf.detach().clone(), out)


def _array(value: Any) -> torch.Tensor:
    import numpy

    array = torch.from_numpy(numpy.array(value))
    return array / 255.0 if array.dtype == torch.uint8 else array


# -- metrics: (out, reference) of one sample in float64 to a number ------------------------------


def drift(out: torch.Tensor, ref: torch.Tensor, peak: float) -> float:
    norm = float(ref.norm())
    error = float((out - ref).norm())
    return error / norm if norm else (0.0 if error == 0.0 else math.inf)


def psnr(out: torch.Tensor, ref: torch.Tensor, peak: float) -> float:
    mse = float((out - ref).square().mean())
    return 10.0 * math.log10(peak**2 / mse) if mse else math.inf


def kl(out: torch.Tensor, ref: torch.Tensor, peak: float) -> float:
    log_p, log_q = ref.log_softmax(-1), out.log_softmax(-1)
    terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
    return max(float(terms.sum(-1).mean()), 0.0)


def agreement(out: torch.Tensor, ref: torch.Tensor, peak: float) -> float:
    return float((out.argmax(-1) == ref.argmax(-1)).double().mean())


METRICS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], float]] = {
    "drift": drift,
    "psnr": psnr,
    "kl": kl,
    "agreement": agreement,
}


def compare(
    metric: str, out: torch.Tensor, ref: torch.Tensor, peak: float, by_row: bool
) -> list[float]:
    """The metric of each sample."""
    if out.shape != ref.shape:
        raise UnsupportedModelError(
            f"a contestant's output is {tuple(out.shape)} where the reference is "
            f"{tuple(ref.shape)}; they cannot be compared"
        )
    out, ref = (t.to("cpu", torch.float64) for t in (out, ref))
    pairs = zip(out, ref, strict=True) if by_row and out.ndim > 1 else [(out, ref)]
    return [METRICS[metric](a, b, peak) for a, b in pairs]


# -- how sure ------------------------------------------------------------------------------------


def interval(values: Sequence[float], seed: int, *, middle: bool = False) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean (of the median for ``middle``). The same seed and
    count draw the same samples, so that intervals of several contestants are paired."""
    if not all(map(math.isfinite, values)):
        known = sorted(values)
        return known[0], known[-1]
    table = torch.tensor(values, dtype=torch.float64, device="cpu")[_draws(len(values), seed)]
    found = table.quantile(0.5, 1) if middle else table.mean(1)
    low, high = found.quantile(
        torch.tensor([0.025, 0.975], dtype=torch.float64, device="cpu")
    ).tolist()
    return low, high


def difference(a: Sequence[float], b: Sequence[float], seed: int) -> tuple[float, float, float]:
    """Mean of a - b over the same samples, with its 95 % interval."""
    apart = [x - y if x != y else 0.0 for x, y in zip(a, b, strict=True)]
    return (sum(apart) / len(apart), *interval(apart, seed))


def _draws(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (_RESAMPLES, count), generator=generator, device="cpu")


def spread(times: list[list[float]]) -> float:
    """Interquartile range over median of times by item and repeat, each item by its own median
    where it was repeated."""
    if min(map(len, times)) > 1:
        pooled = [t / statistics.median(row) for row in times for t in row]
    else:
        pooled = [t for row in times for t in row]
    if len(pooled) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(pooled, n=4, method="inclusive")
    return (high - low) / middle
