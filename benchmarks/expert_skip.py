"""ExpertSkip: a full-size layer of experts, beside transformers' own implementations.

    expert_skip.py                # on the GPU if there is one; writes benchmarks/results/
    expert_skip.py --price        # what a call costs beside its experts, caches cold

One layer (hidden 2,048, width 768, 128 experts, 8 a token; random weights): `skip_experts` with 8,
6, 4 and 2 of the slots kept, transformers' `grouped_mm`, `batched_mm` and `eager` on all 8, in one
process, in a new order each round. Other memory is read before each, as by the other layers of a
model: nobody finds its experts in the caches. Decoding (1 to 64 tokens) is bound by the bytes of
the experts that are touched, prefill by the slots kept: `of_proportional` is
time(8) x share / time(kept), where share is that of the experts touched or of the slots; 1 where
skipped slots cost nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from accelerate_hooks.kernels import FALLBACKS, skip_experts

RESULTS = Path(__file__).parent / "results"
HIDDEN, WIDTH, EXPERTS, TOP = 2048, 768, 128, 8
KEPT = (8, 6, 4, 2)
DECODE, PREFILL = (1, 4, 64), (512, 2048)
MAX_SPREAD = 0.15
ELSEWHERE = 1 << 27
"""Bytes: more than caches hold."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layer(dtype: torch.dtype) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=EXPERTS,
        num_experts_per_tok=TOP,
    )  # fmt: skip
    with torch.device(DEVICE):
        module = Qwen3MoeExperts(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            for expert in p:  # one at a time: the whole in float32 would not fit beside
                expert.copy_(torch.randn(expert.shape, generator=generator) * 0.02)
    return module


def clock(run: Callable[[], Any], elsewhere: Tensor) -> float:
    elsewhere.sum()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def point(module: Qwen3MoeExperts, tokens: int, rounds: int) -> dict[str, Any]:
    dtype = next(module.parameters()).dtype
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(DEVICE, dtype)
    scores = torch.randn(tokens, EXPERTS, generator=generator).to(DEVICE)
    top = scores.softmax(-1).topk(TOP, -1)
    weights = (top.values / top.values.sum(-1, keepdim=True)).to(dtype)
    indices = top.indices
    runs: dict[str, Callable[[], Tensor]] = {}
    for kept in KEPT:
        some = weights * (torch.arange(TOP, device=DEVICE) < kept)

        def run(some: Tensor = some) -> Tensor:
            return skip_experts(x, indices, some, module.gate_up_proj, module.down_proj)

        runs[f"ours, {kept} of {TOP}"] = run
    implementations = ["grouped_mm", "eager"] + (["batched_mm"] if tokens <= 4 else [])
    for name in implementations:

        def theirs(name: str = name) -> Tensor:
            module.config._experts_implementation = name
            return module(x, indices, weights)

        runs[name] = theirs
    before = FALLBACKS.copy()
    outputs = {name: run() for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    elsewhere = torch.ones(ELSEWHERE // 4, device=DEVICE)
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            times[name].append(clock(runs[name], elsewhere))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    whole = medians[f"ours, {TOP} of {TOP}"]
    quartiles = statistics.quantiles(times["eager"], n=4)
    reference = outputs["eager"].float()
    touched = {kept: int(indices[:, :kept].unique().numel()) for kept in KEPT}
    per_expert = sum(p[0].numel() * p.element_size() for p in module.parameters())
    return {
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "ms": {name: round(m * 1e3, 3) for name, m in medians.items()},
        "experts_touched": touched,
        "gigabytes_per_s": {
            kept: round(touched[kept] * per_expert / medians[f"ours, {kept} of {TOP}"] / 1e9, 2)
            for kept in KEPT
        },
        "of_proportional": {
            kept: round(
                whole
                * (touched[kept] / touched[TOP] if tokens in DECODE else kept / TOP)
                / medians[f"ours, {kept} of {TOP}"],
                3,
            )
            for kept in KEPT
        },
        "of_best_other": round(min(medians[name] for name in implementations) / whole, 3),
        "error_to_eager": (
            (outputs[f"ours, {TOP} of {TOP}"].float() - reference).norm() / reference.norm()
        ).item(),
        "iqr": round((quartiles[2] - quartiles[0]) / medians["eager"], 3),
        "fallbacks": {" ".join(key): n for key, n in (FALLBACKS - before).items()},
    }


@torch.no_grad()
def price(rounds: int = 200) -> float:
    """Milliseconds of a call that asks no expert, behind other memory: what is paid beside them."""
    module = layer(torch.bfloat16)
    x = torch.zeros(1, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    indices, weights = x.new_zeros(1, TOP, dtype=torch.int64), x.new_zeros(1, TOP)
    elsewhere = torch.ones(ELSEWHERE // 4, device=DEVICE)

    def run() -> Tensor:
        return skip_experts(x, indices, weights, module.gate_up_proj, module.down_proj)

    return statistics.median([clock(run, elsewhere) for _ in range(rounds)][1:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--force", action="store_true", help="write even when the machine is noisy")
    parser.add_argument("--price", action="store_true", help="what a call costs by itself")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.price:
        print(f"a call that asks no expert: {price():.3f} ms")
        return
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        module = layer(dtype)
        for tokens in tqdm((*DECODE, *PREFILL), desc=str(dtype)):
            rounds = options.rounds if tokens in DECODE else max(3, options.rounds // 3)
            tries = []
            while len(tries) < 6:  # a neighbour's noise passes
                tries.append(point(module, tokens, rounds))
                if tries[-1]["iqr"] <= MAX_SPREAD:
                    break
            row = min(tries, key=lambda row: row["iqr"])
            rows.append(row)
            tqdm.write(json.dumps(row))
        del module
    result = {
        "rows": rows,
        "layer": {"hidden": HIDDEN, "width": WIDTH, "experts": EXPERTS, "top_k": TOP},
        "machine": {
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine(),
            "cores": os.cpu_count(), "threads": options.threads
        },
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }  # fmt: skip
    if any(row["iqr"] > MAX_SPREAD for row in rows) and not options.force:
        raise SystemExit("the plain layer's interquartile range is over 15 %: nothing written")
    path = RESULTS / f"expert_skip_{DEVICE}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
