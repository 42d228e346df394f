"""DraftAttention on a really trained video model, and on a block as wide as Wan-1.3B's.

    draft_attention.py                # CPU, two threads; writes benchmarks/results/
    draft_attention.py --device cuda  # the wide block only

Three questions. How much attention mass do the blocks keep that the draft chooses, beside random
blocks and beside an oracle that knows the mass, under the same selection rule at the same density?
What does a generation gain and lose end to end? What do draft, selection and reordering cost? The
region and the rule are chosen on some seeds and scored on others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import accelerate_hooks as ah
from accelerate_hooks import DraftAttention, LazyStep, evaluate
from accelerate_hooks.kernels import attention_mass

sys.path.append(str(Path(__file__).parent / "zoo"))  # a safe path (PYTHONSAFEPATH) lacks it

from moving_digits import NUM_CLASSES, load_classifier, load_moving_digits, to_pixels

RESULTS = Path(__file__).parent / "results"
SELECT_SEEDS, SCORE_SEEDS = range(4), range(100, 104)
STEPS = 20
POOLS = ((1, 4, 4), (2, 4, 4), (4, 4, 4), (2, 8, 8))
MAX_SPREAD = 0.15


class Random(DraftAttention):
    """Blocks by lot, the same rule and density."""

    name: ClassVar[str] = "random_blocks"

    def draft(
        self, call: Any, plan: Any, q: Tensor, k: Tensor, scale: float, seen: Tensor | None
    ) -> Tensor:
        shape = (q.shape[0], q.shape[1], plan.rows, plan.rows)
        return torch.rand(shape, generator=call.generator).to(q.device)


class Oracle(DraftAttention):
    """Blocks by the mass that full attention gives them."""

    name: ClassVar[str] = "oracle_blocks"

    def draft(
        self, call: Any, plan: Any, q: Tensor, k: Tensor, scale: float, seen: Tensor | None
    ) -> Tensor:
        return attention_mass(q, k, plan.block, scale=scale)


RANKED = {"draft": DraftAttention, "random": Random, "oracle": Oracle}


@dataclass(frozen=True, kw_only=True)
class Watch(ah.Policy):
    """Full attention; notes the mass that each way of choosing would have kept."""

    name: ClassVar[str] = "watch"
    kinds = ("attention",)
    policies: dict[str, DraftAttention] = field(default_factory=dict)
    share: float = 0.25
    every: int = 4
    found: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def acts(self, site: ah.Site) -> frozenset[ah.Effect]:
        return frozenset({ah.Effect.REPLACE})

    def around(self, call: ah.Call) -> Any:
        if call.step.index % self.every:
            return call.proceed()
        return call.attention(lambda a: self.look(call, a))

    def look(self, call: ah.Call, a: Any) -> Tensor:
        first = next(iter(self.policies.values()))
        prepared = first.prepare(call, a)
        if prepared is not None:
            plan, q, k, _, _, scale = prepared
            mass = attention_mass(q, k, plan.block, scale=scale)
            row = self.found.setdefault(call.site.name, {})
            for name, policy in self.policies.items():
                mask = plan.selection.choose(
                    policy.draft(call, plan, q, k, scale, None), self.share
                )
                row.setdefault(name, []).append((mass * mask).sum(-1).mean().item())
        return a.default()


def mass_kept(
    model: Any, seeds: range, pool: tuple[int, ...], select: Any, density: float
) -> dict[str, dict[str, float]]:
    """Of each layer, the mass that blocks chosen in each way keep, over steps and branches."""
    settings: dict[str, Any] = {"pool": pool, "select": select, "dense_steps": 0, "dense_blocks": 0}
    watch = Watch(policies={name: kind(**settings) for name, kind in RANKED.items()}, share=density)
    pipe = model.pipeline()
    with torch.no_grad(), ah.enable(pipe, watch):
        pipe(**model.request([s % NUM_CLASSES for s in seeds], list(seeds), steps=STEPS))
    rows = {}
    for site, found in watch.found.items():
        row = {name: statistics.mean(values) for name, values in found.items()}
        gap = row["oracle"] - row["random"]
        row["recovered"] = (row["draft"] - row["random"]) / gap if gap else 1.0
        rows[site] = row
    return rows


def generations(
    model: Any, pool: tuple[int, ...], select: Any, repeats: int, force: bool
) -> list[dict[str, Any]]:
    """Speed, drift and PSNR of whole generations, beside what a user has for nothing."""
    pipe = model.pipeline()
    classifier = load_classifier()
    labels = [s % NUM_CLASSES for s in SCORE_SEEDS]

    def run(steps: int) -> Any:
        def once(item: dict[str, Any]) -> Tensor:
            request = model.request(item["labels"], item["seeds"], steps=steps)
            return to_pixels(pipe(**request)[0])

        return once

    settings: dict[str, Any] = {"pool": pool, "select": select}
    contestants: dict[str, Any] = {}
    for sparsity in (0.5, 0.75):
        for name, kind in RANKED.items():
            contestants[f"{name} {sparsity:g}"] = kind(sparsity=sparsity, **settings)
    contestants["draft 0.75, every step and layer"] = DraftAttention(
        sparsity=0.75, dense_steps=0, dense_blocks=0, **settings
    )
    contestants["lazy_step"] = LazyStep()
    # not by its error, which would count what is left out of attention
    second = LazyStep(criterion="cadence", every=2, warmup=5)
    contestants["every second step"] = second
    contestants["every second step + draft 0.75"] = [
        second, DraftAttention(sparsity=0.75, **settings)
    ]  # fmt: skip
    for steps in (18, 16):
        contestants[f"{steps} steps"] = run(steps)
    item = {"labels": labels, "seeds": list(SCORE_SEEDS)}
    table = evaluate(
        run(STEPS), contestants, [item], metric="drift", repeats=repeats, target=pipe, progress=True
    )
    if not force:
        table.check_quiet(MAX_SPREAD)
    left_out = {row.label: row.flops_skipped for row in table.rows}
    both = left_out["every second step + draft 0.75"]
    assert all(left_out[name] for name in contestants if "steps" not in name), left_out
    assert both > left_out["every second step"] and both > left_out["draft 0.75"], left_out
    plain = run(STEPS)(item)
    read = classifier(plain[:, plain.shape[1] // 2].unsqueeze(1)).argmax(1)
    print("plain clips read as asked:", (read == torch.tensor(labels)).float().mean().item())
    power = plain.double().pow(2).mean((1, 2, 3))  # drift^2 * power is the mean squared error

    def psnr(label: str) -> float:
        error = torch.tensor(table.values[label], dtype=torch.float64).pow(2) * power
        return (-10 * error.log10()).mean().item()

    return [
        {
            "contestant": row.label,
            "policy": row.policy,
            "speedup": row.speedup,
            "speedup_interval": [row.speedup_low, row.speedup_high],
            "flops_skipped": row.flops_skipped,
            "drift": row.value,
            "psnr_db": psnr(row.label),
            "seconds": row.seconds,
        }
        for row in table.rows
        if row.label != "plain"
    ]


GRIDS = ((16, 8, 32), (16, 16, 32))  # regions of 8 x 16 are to be reordered in both
WIDE: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "num_layers": 1,
}


def wide(frames: int, height: int, width: int, device: str, repeats: int) -> dict[str, Any]:
    """One block of Wan-1.3B's width (random weights): time and its parts."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**WIDE).eval()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = model.to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, frames, 2 * height, 2 * width, generator=generator).to(device, dtype)
    text = torch.randn(1, 64, 4096, generator=generator).to(device, dtype)
    when = torch.tensor([500], device=device)
    tokens = frames * height * width
    q, k, v = (
        torch.randn(1, 12, tokens, 128, generator=generator).to(device, dtype) for _ in range(3)
    )

    def clock(run: Any) -> float:
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        return time.perf_counter() - start

    def dense_attention() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward() -> Tensor:
        return model(x, when, text, return_dict=False)[0]

    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        full = forward()
        for sparsity in (0.5, 0.75, 0.9):
            settings: dict[str, Any] = {"sparsity": sparsity, "dense_steps": 0, "dense_blocks": 0}
            quality = {}
            for name, kind in RANKED.items():
                with ah.enable(model, kind(**settings)):
                    error = (forward() - full).double()
                drift = (error.norm() / full.double().norm()).item()
                peak = full.double().abs().max()
                psnr = (20 * (peak / error.pow(2).mean().sqrt()).log10()).item()
                quality[name] = {"drift": drift, "psnr_db": psnr}
            policy = DraftAttention(**settings)
            plain_times, times, dense = [], [], []
            with ah.enable(model, policy) as session:
                session.counting = False
                forward()
                before = len(session.report().steps)
                for _ in range(repeats):
                    with session.paused():
                        plain_times.append(clock(forward))
                    times.append(clock(forward))
                    dense.append(clock(dense_attention))
                numbers = [visit["numbers"] for visit in session.report().steps[before:]]
            parts = {
                name: statistics.median(noted[name] for noted in numbers if name in noted)
                for name in ("draft_ms", "select_ms", "reorder_ms", "kernel_ms")
                if device == "cpu"
            }
            attention = statistics.median(dense) * 1e3
            quartiles = statistics.quantiles(plain_times, n=4)
            extra = sum(ms for name, ms in parts.items() if name != "kernel_ms")
            whole = extra + parts.get("kernel_ms", 0.0)
            rows.append(
                {
                    "sparsity": sparsity,
                    "plain_ms": statistics.median(plain_times) * 1e3,
                    "plain_iqr": (quartiles[2] - quartiles[0]) / statistics.median(plain_times),
                    "speedup": statistics.median(
                        a / b for a, b in zip(plain_times, times, strict=True)
                    ),
                    "quality": quality,
                    "dense_attention_ms": attention,
                    "parts_ms": parts,
                    "draft_select_reorder_of_dense": extra / attention if parts else None,
                    "attention_speedup": attention / whole if parts else None,
                }
            )
    return {"tokens": tokens, "grid": [frames, height, width], "rows": rows}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--parts", nargs="+", choices=("wide", "mass", "generations"),
        default=["wide", "mass", "generations"], help="measure these, keep what was written before",
    )  # fmt: skip
    parser.add_argument(
        "--grids", nargs="+", default=GRIDS, type=lambda text: tuple(map(int, text.split("x"))),
        help="frames x height x width of the wide block, as 16x8x32",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="write even when the machine is noisy")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "machine": {"device": options.device, "cores": os.cpu_count(), "threads": options.threads},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }
    path = RESULTS / f"draft_attention_{options.device}.json"
    if path.exists():
        result = json.loads(path.read_text()) | result

    def keep(part: str, value: Any) -> None:
        print(json.dumps({part: value}, indent=1))
        result[part] = value
        path.write_text(json.dumps(result, indent=1) + "\n")

    if "wide" in options.parts:
        known = {tuple(size["grid"]): size for size in result.get("wide", ())}
        for grid in tqdm(options.grids):
            known[grid] = wide(*grid, options.device, options.repeats)
            if max(row["plain_iqr"] for row in known[grid]["rows"]) > MAX_SPREAD:
                print(json.dumps(known[grid], indent=1))
                if not options.force:
                    raise SystemExit(
                        f"{grid}: the plain model's times spread by over 15 %; not kept"
                    )
            keep("wide", [known[size] for size in GRIDS if size in known])
    model = load_moving_digits()
    if "mass" in options.parts and options.device == "cpu":
        choices = [
            {
                "pool": pool,
                "select": select,
                "layers": mass_kept(model, SELECT_SEEDS, pool, select, 0.25),
            }
            for pool in tqdm(POOLS, desc="pools")
            for select in ("quantile", "row")
        ]
        best = max(
            choices, key=lambda c: statistics.mean(row["draft"] for row in c["layers"].values())
        )
        pool, select = best["pool"], best["select"]
        keep("choices", choices)
        mass = {
            "pool": pool,
            "select": select,
            "density": 0.25,
            "seeds": [SCORE_SEEDS.start, SCORE_SEEDS.stop - 1],
            "layers": mass_kept(model, SCORE_SEEDS, pool, select, 0.25),
        }
        keep("mass", mass)
    if "generations" in options.parts and options.device == "cpu":
        pool, select = tuple(result["mass"]["pool"]), result["mass"]["select"]
        keep("generations", generations(model, pool, select, options.repeats, options.force))


if __name__ == "__main__":
    main()
