"""Block-sparse attention beside dense attention and FlexAttention, in one process.

    block_sparse_attention.py             # CPU: two threads, fp32 and bf16; writes results/
    block_sparse_attention.py --device cuda

Blocks of 128 x 128 are drawn at random, the diagonal always. `ideal` is time(dense) x density:
what remains of dense attention if skipped work costs nothing; figures are shares of that. Rounds
are interleaved, times are medians. On a GPU dense attention is the best of PyTorch's backends.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm

from accelerate_hooks.kernels import FALLBACKS, block_sparse, block_sparse_attention

RESULTS = Path(__file__).parent / "results"
BLOCK = 128
MAX_SPREAD = 0.15
"""Nothing is written where dense attention's interquartile range is more of its median."""


def blocks(heads: int, tokens: int, sparsity: float, device: str) -> Tensor:
    """A bool mask ``[1, heads, R, R]`` of the density asked for, the diagonal included."""
    rows = tokens // BLOCK
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(1, heads, rows, rows, generator=generator)
    order += torch.eye(rows)
    count = round((1 - sparsity) * rows * rows)
    least = order.flatten(2).topk(count).values[..., -1]
    return (order >= least[..., None, None]).to(device)


def clock(function: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def contestants(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, flex: Any
) -> dict[str, Callable[[], Tensor]]:
    counts, indices = block_sparse.to_indices(mask)
    # An explicit list of blocks: a mask_mod would be evaluated inside every block.
    listed = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=(BLOCK, BLOCK))
    dense: dict[str, Callable[[], Tensor]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v)
    }
    if q.device.type == "cuda":
        dense = {}
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):

            def run(backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v)

            dense[f"sdpa {backend.name.lower()}"] = run
    return {
        **dense,
        "ours": lambda: block_sparse_attention(q, k, v, (counts, indices)),
        "flex_attention, compiled": lambda: flex(q, k, v, block_mask=listed),
    }


@torch.no_grad()
def point(
    tokens: int, heads: int, d: int, dtype: torch.dtype, sparsity: float, rounds: int, device: str
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(1, heads, tokens, d, generator=generator).to(device, dtype) for _ in range(3)
    )
    mask = blocks(heads, tokens, sparsity, device)
    density = mask.float().mean().item()
    torch.compiler.reset()  # FlexAttention is specialised to one shape
    runs = contestants(q, k, v, mask, torch.compile(flex_attention, dynamic=False))
    before = FALLBACKS.copy()
    failed: dict[str, str] = {}
    outputs: dict[str, Tensor] = {}
    for name, run in list(runs.items()):
        try:
            outputs[name] = run()
        except Exception as error:  # a peer's failure is a result
            failed[name] = f"{type(error).__name__}: {error}"[:200]
            del runs[name]
    ours = outputs["ours"].float()
    norm = ours.norm()
    difference = {
        name: ((out.float() - ours).norm() / norm).item()
        for name, out in outputs.items()
        if name.startswith("flex")
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        names = list(runs) if turn % 2 else list(runs)[::-1]
        for name in names:
            taken = clock(runs[name], device)
            if turn:
                times[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    base = min((m, name) for name, m in medians.items() if name.startswith("sdpa"))
    quartiles = statistics.quantiles(times[base[1]], n=4)
    flops = 4 * heads * tokens**2 * d
    return {
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "sparsity": sparsity,
        "density": round(density, 4),
        "dense": base[1],
        "dense_iqr": round((quartiles[2] - quartiles[0]) / base[0], 3),
        "ms": {name: round(m * 1e3, 3) for name, m in medians.items()},
        "of_ideal": {
            name: round(base[0] * density / m, 3)
            for name, m in medians.items()
            if not name.startswith("sdpa")
        },
        "gflop_per_s": {
            name: round(flops * (1.0 if name.startswith("sdpa") else density) / m / 1e9, 1)
            for name, m in medians.items()
        },
        "difference_to_ours": difference,
        "fallbacks": {" ".join(key): n for key, n in (FALLBACKS - before).items()},
        "failed": failed,
    }


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """TFLOP/s of a large square product: what the machine gives."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    times = [clock(lambda: a @ a, device) for _ in range(12)][2:]
    return 2 * n**3 / statistics.median(times) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--force", action="store_true", help="write even when the machine is noisy")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        cases = [(n, 16, 128, torch.bfloat16) for n in options.tokens or (8192, 32768)]
        name = torch.cuda.get_device_name()
    else:
        cases = [
            (n, 8, 64, dtype)
            for n in options.tokens or (4096, 8192, 16384)
            for dtype in (torch.float32, torch.bfloat16)
        ]
        name = platform.machine()
    rows = []
    for tokens, heads, d, dtype in tqdm(cases):
        for sparsity in (0.5, 0.75, 0.9):
            for _ in range(4):  # a neighbour's noise passes
                row = point(tokens, heads, d, dtype, sparsity, options.rounds, options.device)
                if row["dense_iqr"] <= MAX_SPREAD:
                    break
            rows.append(row)
            tqdm.write(json.dumps({k: row[k] for k in ("tokens", "dtype", "sparsity", "ms")}))
            tqdm.write(f"  of ideal {row['of_ideal']}  iqr {row['dense_iqr']} {row['failed']}")
    result = {
        "rows": rows,
        "matmul_tflop_per_s": {
            str(dtype).removeprefix("torch."): round(matmul_rate(dtype, options.device), 3)
            for dtype in {case[3] for case in cases}
        },
        "heads_and_head_size": cases[0][1:3],
        "block_size": BLOCK,
        "rounds": options.rounds,
        "machine": {"device": name, "cores": os.cpu_count(), "threads": options.threads},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    if any(row["dense_iqr"] > MAX_SPREAD for row in rows) and not options.force:
        raise SystemExit("dense attention's interquartile range is over 15 %: nothing written")
    path = RESULTS / f"block_sparse_attention_{options.device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
