"""The demo: the same seeds in full and under each policy, as a table and a picture."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from accelerate_hooks.artifact import Artifact
from accelerate_hooks.demo.pipeline import (
    DigitsPipeline,
    load_classifier,
    load_digits_pipeline,
    seeded_latents,
)
from accelerate_hooks.enable import enable
from accelerate_hooks.errors import AccelerateHooksError
from accelerate_hooks.policies import LazyStep
from accelerate_hooks.report import Report

SEEDS = range(2000, 2032)
STEPS = 50
GATES = "lazy_gates.safetensors"
SHOWN = 16  # columns of the picture


@dataclass(frozen=True)
class Row:
    """One line of the table. ``milliseconds`` for the whole batch, median over rounds; ``psnr`` in
    dB (peak 1) and ``drift`` (relative L2) against the full run; ``accuracy`` in percent."""

    policy: str
    spec: str
    milliseconds: float
    speed_up: float
    skipped: float
    psnr: float
    drift: float
    accuracy: float


@dataclass
class Result:
    rows: list[Row]
    images: dict[str, Tensor]
    reports: dict[str, Report]
    labels: Tensor

    def __str__(self) -> str:
        head = ("policy", "ms", "speed-up", "skipped", "PSNR dB", "drift", "accuracy")
        lines = [head]
        for row in self.rows:
            lines.append(
                (
                    row.policy,
                    f"{row.milliseconds:.0f}",
                    f"{row.speed_up:.2f}x",
                    f"{row.skipped:.0%}",
                    "-" if row.psnr == float("inf") else f"{row.psnr:.1f}",
                    f"{row.drift:.4f}",
                    f"{row.accuracy:.1f}%",
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


def gates() -> LazyStep:
    """The learned gates that ship with the demo's model."""
    artifact = Artifact.load(str(files("accelerate_hooks.demo") / "weights" / GATES))
    return LazyStep(scope="site", criterion="gates", artifact=artifact)


def policies(steps: int = STEPS) -> dict[str, LazyStep]:
    """What the demo shows: three presets, and learned gates for the steps they were fitted to."""
    shown = {f"LazyStep {p}": LazyStep(preset=p) for p in ("safe", "balanced", "fast")}
    return {**shown, "LazyStep gates": gates()} if steps == STEPS else shown


def measure(batch: int = 32, rounds: int = 1, steps: int = STEPS, progress: bool = True) -> Result:
    """Run the demo: ``rounds`` interleaved passes over the full model and every policy."""
    pipe = load_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    seeds = list(SEEDS)[:batch]
    labels = torch.tensor([seed % 10 for seed in seeds])
    contestants: dict[str, LazyStep | None] = {"full": None, **policies(steps)}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    images: dict[str, Tensor] = {}
    reports: dict[str, Report] = {}
    generate(pipe, labels[:2], seeds[:2], 2)  # first-call costs
    bar = tqdm(total=rounds * len(contestants) + 1, disable=not progress, desc="demo", unit="run")
    for name in (*list(contestants) * rounds, "full"):
        bar.set_postfix_str(name)
        with _enabled(pipe, contestants[name]) as session:
            start = time.perf_counter()
            images[name] = generate(pipe, labels, seeds, steps)
            seconds[name].append(time.perf_counter() - start)
            if session is not None:
                reports[name] = session.report()
        bar.update()
    bar.close()
    classifier = load_classifier()
    rows = []
    full = statistics.median(seconds["full"])
    for name, policy in contestants.items():
        error = (images[name] - images["full"]).flatten(1)
        mse = error.square().mean(1)
        psnr = float((-10 * torch.log10(mse.clamp_min(1e-12))).mean())
        with torch.no_grad():
            right = classifier(images[name]).argmax(1) == labels
        taken = statistics.median(seconds[name])
        rows.append(
            Row(
                name,
                "" if policy is None else str(policy),
                taken * 1e3,
                full / taken,
                0.0 if policy is None else _share_skipped(reports[name]),
                float("inf") if policy is None else psnr,
                float(error.norm() / images["full"].norm()),
                float(right.float().mean()) * 100,
            )
        )
    return Result(rows, images, reports, labels)


def _share_skipped(report: Report) -> float:
    """Of all visits of the policy's sites, those left out, rows left out counted in part."""
    totals = report.to_dict()["totals"]
    return totals["share_skipped"] or 0.0


def generate(pipe: DigitsPipeline, labels: Tensor, seeds: list[int], steps: int) -> Tensor:
    with torch.no_grad():
        return pipe(labels, num_inference_steps=steps, latents=seeded_latents(seeds)).images


class _enabled:
    """A session for the time of a ``with``, or none."""

    def __init__(self, pipe: Any, policy: LazyStep | None) -> None:
        self.session = None if policy is None else enable(pipe, policy)

    def __enter__(self) -> Any:
        return self.session

    def __exit__(self, *_: Any) -> None:
        if self.session is not None:
            self.session.disable()


def draw(result: Result, path: Path) -> None:
    """A grid: one row a policy, the same seeds in every column."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise AccelerateHooksError(
            "the picture needs matplotlib; pip install 'accelerate-hooks[report]'"
        ) from error
    count = min(SHOWN, len(result.labels))
    figure, axes = pyplot.subplots(
        len(result.rows), 1, figsize=(count * 0.62 + 2.6, len(result.rows) * 0.92 + 0.5)
    )
    for axis, row in zip(axes, result.rows, strict=True):
        strip = torch.cat(list(result.images[row.policy][:count, 0]), dim=1)
        axis.imshow(strip, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks(
            [16 * i + 7.5 for i in range(count)], [int(n) for n in result.labels[:count]]
        )
        axis.set_yticks([])
        axis.tick_params(length=0, labelsize=8, labelbottom=row is result.rows[-1])
        detail = "" if row.psnr == float("inf") else f"\n{row.speed_up:.2f}x, {row.psnr:.1f} dB"
        label = f"{row.policy}{detail}"
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        for side in axis.spines.values():
            side.set_visible(False)
    figure.suptitle(
        "the same seeds, in full and with LazyStep (class asked for below)", fontsize=10
    )
    figure.tight_layout(h_pad=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write(result: Result, folder: Path) -> Iterator[Path]:
    """``demo.png``, ``report.json`` and ``report.html`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(result, folder / "demo.png")
    yield folder / "demo.png"
    rows = [asdict(row) for row in result.rows]
    for row in rows:
        row["psnr"] = None if row["psnr"] == float("inf") else row["psnr"]
    data = {
        "table": rows,
        "seeds": [SEEDS.start, SEEDS.start + len(result.labels) - 1],
        "reports": {name: report.to_dict() for name, report in result.reports.items()},
    }
    (folder / "report.json").write_text(json.dumps(data, indent=1))
    yield folder / "report.json"
    result.reports["LazyStep balanced"].save(str(folder / "report.html"))
    yield folder / "report.html"
