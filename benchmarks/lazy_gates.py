"""LazyStep's learned gates against its training-free rules, site by site, at equal skips.

    python benchmarks/lazy_gates.py

On the demo's model and with its shipped gates: 50 Euler steps, guidance 2, fp32, batch 32. Settings
of the training-free rules are chosen on seeds 0 to 31 (those on the Pareto front next to the gates'
share of visits skipped) and all is scored on seeds 100 to 163, against the full run: PSNR in dB an
image, then the mean; differences with paired bootstrap 95 % intervals. Shares are the report's.
Writes results/lazy_gates.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from accelerate_hooks import LazyStep, enable
from accelerate_hooks.demo.pipeline import DigitsPipeline, load_digits_pipeline, seeded_latents
from accelerate_hooks.demo.show import gates

sys.path.append(str(Path(__file__).parent))  # a safe path (PYTHONSAFEPATH) lacks it

import plots
from lazy_step_lab import ROOT, psnr
from peers import Setting, spell

STEPS, BATCH = 50, 32
SELECT, SCORE = range(32), range(100, 164)
RULES: tuple[Setting, ...] = (
    *(
        {"criterion": "cadence", "every": 2, "max_age": 1, "warmup": w, "cooldown": c}
        for w, c in ((3, 2), (3, 6), (3, 8), (4, 5), (5, 5), (5, 9))
    ),
    *({"criterion": "change", "threshold": t, "max_age": 8} for t in (0.045, 0.05, 0.055)),
    *({"criterion": "change", "threshold": t, "max_age": 1} for t in (0.05, 0.06)),
    {"criterion": "error", "tolerance": 0.05, "max_age": 1},
)


def latents(pipe: DigitsPipeline, seeds: range) -> torch.Tensor:
    made = [
        pipe(
            class_labels=torch.tensor([seed % 10 for seed in some]),
            latents=seeded_latents(some),
            num_inference_steps=STEPS,
            output_type="latent",
        ).images
        for some in (seeds[i : i + BATCH] for i in range(0, len(seeds), BATCH))
    ]
    return torch.cat(made)


def score(pipe: DigitsPipeline, policy: LazyStep, seeds: range, full: torch.Tensor) -> Any:
    """(share of visits skipped, PSNR an image)."""
    with enable(pipe, policy) as session:
        values = psnr(latents(pipe, seeds), full)
        return session.report().to_dict()["totals"]["share_skipped"], values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    pipe = load_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    full = {seeds: latents(pipe, seeds) for seeds in (SELECT, SCORE)}
    share, learned = score(pipe, gates(), SCORE, full[SCORE])

    found = []
    for setting in tqdm(RULES, desc="select"):
        skipped, values = score(pipe, LazyStep(scope="site", **setting), SELECT, full[SELECT])
        found.append((skipped, sum(values) / len(values), setting))
    chosen = plots.brackets([s for s, _, _ in found], [v for _, v, _ in found], [share])
    rows = []
    for place in tqdm(sorted(chosen), desc="score"):
        setting = found[place][2]
        skipped, values = score(pipe, LazyStep(scope="site", **setting), SCORE, full[SCORE])
        rows.append({"setting": setting, "skipped": skipped, "psnr": values})
    rows.sort(key=lambda row: row["skipped"])
    equal = plots.interpolate(
        np.array([row["skipped"] for row in rows]), np.array([row["psnr"] for row in rows]), share
    )
    assert equal is not None, "no training-free rule skips as much and as little"
    middle, low, high = plots.interval(np.array(learned) - equal)
    fitted = {key: gates().artifact.meta[key] for key in ("reused", "samples", "settings")}
    result = {
        "gates": {"skipped": share, "psnr": learned, "fitted": fitted},
        "rules": rows,
        "difference": {"mean": middle, "low": low, "high": high},
        "machine": plots.machine(),
        "versions": plots.versions("torch", "diffusers", "accelerate-hooks"),
    }
    folder = ROOT / "benchmarks" / "results"
    (folder / "lazy_gates.json").write_text(json.dumps(result, indent=1) + "\n")
    shown = [("learned gates", share, learned)]
    shown += [(spell(row["setting"]), row["skipped"], row["psnr"]) for row in rows]
    lines = [[name, f"{skipped:.1%}", f"{np.mean(values):.1f}"] for name, skipped, values in shown]
    page = plots.markdown_table(["rule", "visits skipped", "PSNR, dB"], lines)
    page += f"\n\nAt equal skips, gates minus rule: {middle:+.1f} dB ({low:+.1f} to {high:+.1f}).\n"
    (folder / "lazy_gates.md").write_text(f"# {__doc__.splitlines()[0]}\n\n{page}")
    print(page)


if __name__ == "__main__":
    main()
