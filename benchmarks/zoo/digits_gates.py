"""Fit LazyStep's gates for the demo's model and ship them.

    digits_gates.py                      # fits (resumes from build/digits_gates.pt) and exports
    digits_gates.py --calls 1 --probes 1 --out build/try.safetensors    # a try

Seeds 5000 and up: neither those of the demo nor those of any benchmark.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from accelerate_hooks.demo.pipeline import load_digits_pipeline, seeded_latents
from accelerate_hooks.policies import LazyStep

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "accelerate_hooks" / "demo" / "weights" / "lazy_gates.safetensors"
FIRST_SEED, CALLS, BATCH = 5000, 8, 20
STEPS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--probes", type=int, default=4)
    parser.add_argument("--target", type=float, default=0.4)
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--predictor", default="linear")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "digits_gates.pt")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.state.parent.mkdir(parents=True, exist_ok=True)
    pipe = load_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    data = []
    for call in range(options.calls):
        seeds = [FIRST_SEED + call * BATCH + i for i in range(BATCH)]
        data.append(
            {
                "class_labels": torch.tensor([seed % 10 for seed in seeds]),
                "latents": seeded_latents(seeds),
                "num_inference_steps": STEPS,
            }
        )
    mould = LazyStep(scope="site", criterion="gates", predictor=options.predictor)
    policy = mould.fit(
        pipe,
        data,
        target=options.target,
        probes=options.probes,
        resume=str(options.state),
    )
    policy.artifact.save(options.out)
    print(f"wrote {options.out} ({options.out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
