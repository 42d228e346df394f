"""LazyStep against fewer steps, a better solver, diffusers' caches and cache-dit.

    python benchmarks/lazy_step.py                    # all phases; goes on where it was killed
    python benchmarks/lazy_step.py --phase plot       # tables and figure from what is there
    python benchmarks/lazy_step.py --settings-sweep   # LazyStep's settings, selection seeds only

On the digits model that ships with the demo: 50 Euler steps, guidance 2 as two sequential calls,
fp32, batch 32, class = seed % 10, the same noise for every contestant. Settings are chosen on seeds
0 to 31 and scored on 100 to 163. Quality is measured against the full run and against a converged
one (500 Euler steps): PSNR in dB with peak 1.0 on images in [0, 1], per image (mean squared error
floored at 1e-10), then the mean; drift is ‖latents − ref‖ / ‖ref‖ an image, then the mean. Cost is
what torch's own FLOP counter sees of a run, never what a contestant says of itself.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from accelerate_hooks import LazyStep, enable
from accelerate_hooks.demo.pipeline import DigitsPipeline
from accelerate_hooks.errors import AccelerateHooksError

sys.path.append(str(Path(__file__).parent))  # a safe path (PYTHONSAFEPATH) lacks it

import lazy_step_report as report
import plots
from lazy_step_lab import QUICK, ROOT, Lab, Protocol
from peers import Contestant, Setting, spell

LAZY_STEP: tuple[Setting, ...] = (
    *({"preset": preset} for preset in ("safe", "balanced", "fast")),
    *(
        {"criterion": "cadence", "every": n, "max_age": n, "warmup": w}
        for n, w in ((2, 17), (2, 8), (2, 3), (3, 3), (4, 3), (6, 3))
    ),
    {"tolerance": 0.04, "max_age": 12},
)
"""What is compared; at most 12."""

LAZY_STEP_SOLVER = LAZY_STEP
"""The same on top of the second-order solver."""

SWEEP: tuple[Setting, ...] = (
    *(
        {"predictor": predictor, "time": axis, "quantity": quantity, **pace}
        for predictor in ("hold", "linear", "taylor2", "taylor3")
        for axis in ("sigma", "log_snr")
        for quantity in ("output", "clean", "noise")
        for pace in ({"criterion": "cadence", "every": 3, "max_age": 3}, {"tolerance": 0.03})
    ),
    *({"corrector": False, **pace} for pace in ({"criterion": "cadence", "every": 3}, {})),
    *({"tolerance": t, "max_age": n} for t in (0.01, 0.02, 0.03, 0.05, 0.08) for n in (1, 2, 8)),
)
"""What `--settings-sweep` tries."""


def lazy_step(name: str, label: str, scheduler: Any, settings: tuple[Setting, ...]) -> Contestant:
    """Ours, on one of the two schedulers."""

    def enabled(pipe: DigitsPipeline, setting: Setting) -> AbstractContextManager[Any]:
        return enable(pipe, LazyStep(**setting))

    return Contestant(name, label, settings, enabled, scheduler, ours=True)


# -- phases ------------------------------------------------------------------------------------


def choose(lab: Lab, contestant: Contestant) -> dict[str, list[Setting]]:
    """Each reference's Pareto settings next to the target costs, on the selection seeds."""
    full = lab.measure(lab.full, {}, lab.protocol.select)["flops"]
    rows = [
        row
        for setting in lab.settings(contestant)
        if (row := lab.store.rows.get(lab.key(contestant, "quality", setting, lab.protocol.select)))
        and row["flops"] < full
    ]
    savings = [full / row["flops"] for row in rows]
    chosen = {}
    for name in lab.protocol.references():
        values = [sum(row[f"psnr_{name}"]) for row in rows]
        places = plots.brackets(savings, values, (*report.TARGETS, report.REACH))
        chosen[name] = [rows[i]["setting"] for i in sorted(places)]
    return chosen


def united(chosen: dict[str, list[Setting]]) -> list[Setting]:
    settings = {json.dumps(setting): setting for some in chosen.values() for setting in some}
    return list(settings.values())


def run_select(lab: Lab, wanted: Sequence[Contestant]) -> None:
    lab.measure(lab.full, {}, lab.protocol.select)
    jobs = [(c, s) for c in wanted for s in lab.settings(c)]
    for contestant, setting in (bar := tqdm(jobs, desc="select")):
        bar.set_postfix_str(f"{contestant.name}: {spell(setting)}"[:60])
        try:
            lab.measure(contestant, setting, lab.protocol.select)
        except (AccelerateHooksError, NotImplementedError) as error:
            tqdm.write(f"{contestant.name}, {spell(setting)}: {error!r}")


def run_score(lab: Lab, wanted: Sequence[Contestant]) -> None:
    full = lab.measure(lab.full, {}, lab.protocol.score)["flops"]
    jobs = [(c, s) for c in wanted for s in united(choose(lab, c))]
    lab.converged_check()
    proven: set[str] = set()
    for contestant, setting in (bar := tqdm(jobs, desc="score")):
        bar.set_postfix_str(f"{contestant.name}: {spell(setting)}"[:60])
        if lab.measure(contestant, setting, lab.protocol.score)["flops"] >= full:
            raise RuntimeError(f"{contestant.name}, {spell(setting)}: skipped no work")
        if contestant.name not in proven:
            proof = lab.prove(contestant, setting)
            if proof["linear_calls"] >= proof["linear_calls_plain"]:
                raise RuntimeError(f"{contestant.name}, {spell(setting)}: every layer ran")
            proven.add(contestant.name)


def run_time(lab: Lab, wanted: Sequence[Contestant]) -> None:
    """Of each contestant the scored settings nearest the targets and the first beyond them, on the
    curve that it is for: a better solver aims at the converged run."""
    full = lab.measure(lab.full, {}, lab.protocol.score)["flops"]
    for contestant in (bar := tqdm(wanted, desc="time")):
        bar.set_postfix_str(contestant.name)
        settings = choose(lab, contestant)["converged" if contestant.scheduler == "dpm" else "full"]
        flops = [lab.measure(contestant, s, lab.protocol.score)["flops"] for s in settings]
        places = {
            min(range(len(settings)), key=lambda i: abs(math.log(full / flops[i] / target)))
            for target in report.TARGETS
            if settings
        }
        # beyond the last target in FLOPs, so that there is one beyond it in time as well
        beyond = [i for i in range(len(settings)) if full / flops[i] >= report.REACH]
        places |= {min(beyond, key=lambda i: full / flops[i])} if beyond else set()
        lab.clock(contestant, [settings[place] for place in sorted(places)])


def run_plot(lab: Lab, results: Path) -> None:
    full = lab.measure(lab.full, {}, lab.protocol.score)
    points: list[report.Point] = []
    proofs: list[dict[str, Any]] = []
    for contestant in lab.contestants:
        chosen = choose(lab, contestant)
        rows = lab.store.rows
        for setting in united(chosen):
            row = rows.get(lab.key(contestant, "quality", setting, lab.protocol.score))
            if row is None:
                continue
            times = rows.get(lab.key(contestant, "time", setting, lab.protocol.rounds))
            used = [name for name, settings in chosen.items() if setting in settings]
            points.append(report.point(contestant, row, full, times, used))
            proof = rows.get(lab.key(contestant, "proof", setting, None))
            if proof is not None:
                proofs.append({k: v for k, v in proof.items() if k != "key"})
    about = {
        "machine": plots.machine(),
        "versions": lab.versions,
        "model_sha256": lab.model_hash,
        "protocol": asdict(lab.protocol),
        "converged_check": lab.converged_check(),
        "proofs": proofs,
    }
    report.write(results, about, full, points)


def sweep_row(row: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    return {
        "setting": row["setting"],
        "saving": full["flops"] / row["flops"],
        "drift": float(np.mean(row["drift_full"])),
        **{name: float(np.mean(row[f"psnr_{name}"])) for name in report.REFERENCES},
    }


def sweep_table(rows: Sequence[dict[str, Any]], protocol: Protocol) -> str:
    """Every setting by saving, with a mark at those on a Pareto front."""
    fronts: set[int] = set()
    for name in report.REFERENCES:
        fronts.update(plots.pareto([r["saving"] for r in rows], [r[name] for r in rows]))
    lines = [
        (
            "●" if i in fronts else "",
            spell(rows[i]["setting"]),
            f"{rows[i]['saving']:.2f}x",
            *(f"{rows[i][name]:.2f}" for name in report.REFERENCES),
            f"{rows[i]['drift']:.4f}",
        )
        for i in sorted(range(len(rows)), key=lambda i: rows[i]["saving"])
    ]
    headers = ("front", "setting", "FLOPs", "dB, full", "dB, converged", "drift, full")
    first, last = protocol.select
    about = (
        f"LazyStep's settings on seeds {first} to {last - 1}; written by `--settings-sweep`.\n\n"
    )
    return about + plots.markdown_table(headers, lines) + "\n"


def run_sweep(lab: Lab, results: Path) -> None:
    """All of `SWEEP` on the selection seeds: a table by saving."""
    full = lab.measure(lab.full, {}, lab.protocol.select)
    rows = []
    contestant = lab.contestants[0]
    for setting in tqdm(SWEEP[:: 60 if lab.protocol is QUICK else 1], desc="sweep"):
        try:
            row = lab.measure(contestant, setting, lab.protocol.select)
        except (AccelerateHooksError, NotImplementedError) as error:
            tqdm.write(f"{contestant.name}, {spell(setting)}: {error!r}")
            continue
        rows.append(sweep_row(row, full))
    results.with_name("lazy_step_sweep.md").write_text(sweep_table(rows, lab.protocol))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 seeds, 12 steps: does it run?")
    parser.add_argument("--phase", choices=("select", "score", "time", "plot"), help="only this")
    parser.add_argument("--contestants", nargs="+", help="only these (all phases but plot)")
    parser.add_argument("--settings-sweep", action="store_true", help="LazyStep's settings only")
    parser.add_argument("--prune", action="store_true", help="drop what is stale, run nothing")
    parser.add_argument("--weights", default="shipped", help="shipped, random, or a zoo folder")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    results = ROOT / "benchmarks" / "results" / "lazy_step"
    if options.quick or options.weights != "shipped":
        results = ROOT / "build" / "benchmarks" / ("quick" if options.quick else "trial")
        results = results / "lazy_step"
    ours = (
        lazy_step("lazy_step", "LazyStep", "euler", LAZY_STEP),
        lazy_step("lazy_step_solver", "LazyStep on DPM-Solver++ 2M", "dpm", LAZY_STEP_SOLVER),
    )
    lab = Lab(QUICK if options.quick else Protocol(), options.weights, results, ours)
    names = [contestant.name for contestant in lab.contestants]
    unknown = set(options.contestants or ()) - set(names)
    if unknown:
        parser.error(f"no contestant {sorted(unknown)}; there are {names}")
    wanted = [c for c in lab.contestants if c.name in (options.contestants or names)]
    if options.settings_sweep:
        run_sweep(lab, results)
        return
    if options.prune:
        for contestant in (lab.full, *lab.contestants):
            lab.store.prune(contestant, lab.ours if contestant.ours else lab.base)
        return
    for phase, run in {"select": run_select, "score": run_score, "time": run_time}.items():
        if options.phase in (None, phase):
            run(lab, wanted)
    if options.phase in (None, "plot"):
        run_plot(lab, results)


if __name__ == "__main__":
    main()
