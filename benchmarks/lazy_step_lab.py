"""The laboratory of `lazy_step.py`: runs a contestant, keeps what came out, checks it."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import plots
import torch
from peers import Contestant, Setting
from torch import Tensor
from tqdm import tqdm

from accelerate_hooks.demo.pipeline import (
    NUM_CLASSES,
    DigitsClassifier,
    DigitsPipeline,
    load_classifier,
    load_digits_pipeline,
    random_digits_pipeline,
    seeded_latents,
    unpack_latents,
)

ROOT = Path(__file__).resolve().parents[1]

MAX_SPREAD = 0.15
"""Times are not kept where the plain run's interquartile range is more of its median."""

Seeds = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How long, on which seeds, how often timed."""

    steps: int = 50
    converged_steps: int = 500
    select: Seeds = (0, 32)
    score: Seeds = (100, 164)
    batch: int = 32
    rounds: int = 6
    settings: int = 12

    def references(self) -> dict[str, int]:
        """Name and Euler steps of what quality is measured against."""
        return {"full": self.steps, "converged": self.converged_steps}


QUICK = Protocol(
    steps=12, converged_steps=24, select=(0, 4), score=(100, 104), rounds=1, settings=2
)


class Store:
    """Finished results as JSON lines, one file a contestant; the latest line of a key counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        paths = sorted(folder.glob("*.jsonl"))
        self.rows = {row["key"]: row for path in paths for row in self._lines(path)}

    @staticmethod
    def _lines(path: Path) -> Iterator[dict[str, Any]]:
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):  # a run was killed as it wrote
                yield json.loads(line)

    def put(self, contestant: Contestant, key: str, row: dict[str, Any]) -> dict[str, Any]:
        row = {"contestant": contestant.name, "key": key} | row
        with (self.folder / f"{contestant.name}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[key] = row
        return row

    def prune(self, contestant: Contestant, mark: str) -> None:
        """Keep of a contestant's file what is listed and bears the mark of its sources."""
        listed = [*contestant.settings, {}]
        rows = {
            row["key"]: row
            for row in self._lines(self.folder / f"{contestant.name}.jsonl")
            if mark in row["key"] and (row["kind"] == "check" or row.get("setting", {}) in listed)
        }
        text = "".join(json.dumps(row) + "\n" for row in rows.values())
        (self.folder / f"{contestant.name}.jsonl").write_text(text)


def images(latents: Tensor) -> Tensor:
    """Latents to images `[B, 1, 16, 16]` in [0, 1], as the pipeline does it."""
    return (unpack_latents(latents) / 2 + 0.5).clamp(0, 1)


def psnr(latents: Tensor, wanted: Tensor) -> list[float]:
    """Decibels an image, peak 1.0, at most 100."""
    error = (images(latents) - images(wanted)).square().mean((1, 2, 3))
    return _rounded(-10 * error.clamp_min(1e-10).log10(), 3)


def _rounded(values: Tensor, digits: int) -> list[float]:
    return [round(value, digits) for value in values.tolist()]


class Lab:
    """The model, the references, and everything that was measured so far."""

    def __init__(
        self, protocol: Protocol, weights: str, folder: Path, ours: Sequence[Contestant]
    ) -> None:
        self.protocol = protocol
        self.weights = weights
        self.store = Store(folder)
        pipe, self.classifier = self.load()
        self.versions = plots.versions("torch", "diffusers", "cache-dit", "accelerate-hooks")
        state = pipe.transformer.state_dict() | pipe.class_embedder.state_dict()
        self.model_hash = plots.digest(*(tensor.numpy().tobytes() for tensor in state.values()))
        lengths = (protocol.steps, protocol.converged_steps, protocol.batch)
        self.base = plots.digest(json.dumps([self.model_hash, *lengths, self.versions]).encode())
        sources = [ROOT / "policies" / "lazy_step.py", ROOT / "accelerate_hooks" / "history.py"]
        sources += [ROOT / "policies" / name for name in ("_pace.py", "_quantity.py")]
        self.ours = plots.digest(*(plots.code(path) for path in sources))
        self.references = ROOT / "build" / "benchmarks" / "lazy_step" / self.base
        self.full = Contestant("full", "full run", ({},), peers.fewer_steps)
        self.contestants = (*ours, *peers.contestants(protocol.steps, self.mag_ratios))

    # -- running -------------------------------------------------------------------------------

    def load(self) -> tuple[DigitsPipeline, DigitsClassifier]:
        """A new pipeline with the trained weights: no peer inherits what another left behind."""
        if self.weights == "shipped":
            pipe, classifier = load_digits_pipeline(), load_classifier()
        elif self.weights == "random":
            pipe, classifier = random_digits_pipeline(), DigitsClassifier().eval()
        else:
            sys.path.append(str(ROOT / "benchmarks" / "zoo"))
            from digits_flux import load_checkpoint

            pipe, classifier, _ = load_checkpoint(Path(self.weights))
        pipe.set_progress_bar_config(disable=True)
        return pipe, classifier

    def pipe(self, contestant: Contestant) -> DigitsPipeline:
        pipe, _ = self.load()
        peers.set_scheduler(pipe, contestant.scheduler)
        return pipe

    def sample(self, pipe: DigitsPipeline, seeds: Sequence[int], setting: Setting) -> Tensor:
        """Final latents `[len(seeds), 64, 4]` of one batch."""
        return pipe(
            [seed % NUM_CLASSES for seed in seeds],
            num_inference_steps=setting.get("steps", self.protocol.steps),
            guidance_scale=2.0,
            latents=seeded_latents(seeds),
            output_type="latent",
        ).images

    def batches(self, seeds: Seeds) -> list[range]:
        size = self.protocol.batch
        return [range(start, min(start + size, seeds[1])) for start in range(*seeds, size)]

    def settings(self, contestant: Contestant) -> tuple[Setting, ...]:
        """At most as many as the protocol allows, evenly spread over the list."""
        return contestant.settings[:: -(-len(contestant.settings) // self.protocol.settings)]

    def key(self, contestant: Contestant, kind: str, setting: Setting, seeds: Any) -> str:
        parts = [contestant.name, kind, setting, seeds, self.base]
        return json.dumps(parts + [self.ours] * contestant.ours)

    def reference(self, steps: int, seeds: Seeds) -> Tensor:
        """Latents of the plain model in `steps` Euler steps, kept under `build/`."""
        path = self.references / f"euler-{steps}-{seeds[0]}-{seeds[1]}.pt"
        if not path.exists():
            pipe, parts = self.pipe(self.full), []
            for batch in self.batches(seeds):
                tqdm.write(f"reference: {steps} steps on seeds {batch[0]} to {batch[-1]}")
                parts.append(self.sample(pipe, batch, {"steps": steps}))
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.cat(parts), path)
        return torch.load(path)

    def mag_ratios(self) -> list[float]:
        """MagCache's calibration, by its own mode, on the selection seeds."""
        contestant = next(c for c in self.contestants if c.name == "mag_cache")
        key = self.key(contestant, "calibration", {}, self.protocol.select)
        if key not in self.store.rows:
            pipe, seeds = self.pipe(contestant), self.batches(self.protocol.select)[0]
            steps = self.protocol.steps
            ratios = peers.calibrate_mag_cache(pipe, steps, lambda: self.sample(pipe, seeds, {}))
            self.store.put(contestant, key, {"kind": "calibration", "ratios": ratios})
        return self.store.rows[key]["ratios"]

    def measure(self, contestant: Contestant, setting: Setting, seeds: Seeds) -> dict[str, Any]:
        """FLOPs and quality of one setting; from the store where it is there."""
        key = self.key(contestant, "quality", setting, seeds)
        if key in self.store.rows:
            return self.store.rows[key]
        pipe, parts = self.pipe(contestant), []
        with contestant.enable(pipe, setting), peers.Flops() as flops:
            for batch in self.batches(seeds):
                parts.append(self.sample(pipe, batch, setting))
        latents = torch.cat(parts)
        row: dict[str, Any] = {"kind": "quality", "setting": setting, "seeds": seeds}
        row["flops"] = flops.get_total_flops()
        for name, steps in self.protocol.references().items():
            wanted = self.reference(steps, seeds)
            drift = (latents - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
            row[f"psnr_{name}"] = psnr(latents, wanted)
            row[f"drift_{name}"] = _rounded(drift, 6)
        with torch.no_grad():
            digits = self.classifier(images(latents)).argmax(1)
        row["correct"] = (digits == torch.arange(*seeds) % NUM_CLASSES).int().tolist()
        return self.store.put(contestant, key, row)

    def converged_check(self) -> float:
        """Decibels between the converged run and as many steps of the other solver."""
        solver = next(c for c in self.contestants if c.name == "solver")
        start, stop = self.protocol.score
        setting, seeds = {"steps": self.protocol.converged_steps}, (start, min(start + 8, stop))
        key = self.key(solver, "check", setting, seeds)
        if key not in self.store.rows:
            latents = self.sample(self.pipe(solver), range(*seeds), setting)
            wanted = self.reference(self.protocol.converged_steps, self.protocol.score)
            row = {"kind": "check", "setting": setting, "seeds": seeds}
            row["psnr"] = psnr(latents, wanted[: len(latents)])
            self.store.put(solver, key, row)
        values = self.store.rows[key]["psnr"]
        return sum(values) / len(values)

    def prove(self, contestant: Contestant, setting: Setting) -> dict[str, Any]:
        """Facts about one setting: what ran, whether a second run is the same, what stays."""
        key = self.key(contestant, "proof", setting, None)
        if key in self.store.rows:
            return self.store.rows[key]
        pipe, seeds = self.pipe(contestant), range(2)
        plain = self.sample(pipe, seeds, {})
        before = peers.attributes(pipe)
        with peers.linear_calls(pipe.transformer) as plain_calls:
            self.sample(pipe, seeds, {})
        with contestant.enable(pipe, setting):
            with peers.linear_calls(pipe.transformer) as calls:
                first = self.sample(pipe, seeds, setting)
            again = self.sample(pipe, seeds, setting)
        row = {
            "kind": "proof",
            "setting": setting,
            "linear_calls": calls["linear"],
            "linear_calls_plain": plain_calls["linear"],
            "second_run_equal": torch.equal(first, again),
            "plain_after_disable": torch.equal(plain, self.sample(pipe, seeds, {})),
            "left_behind": dict(peers.attributes(pipe) - before),
        }
        return self.store.put(contestant, key, row)

    def clock(self, contestant: Contestant, settings: Sequence[Setting]) -> None:
        """Rounds of one plain run and one run a setting, interleaved; not kept if too noisy."""
        keys = [self.key(contestant, "time", s, self.protocol.rounds) for s in settings]
        if all(key in self.store.rows for key in keys):
            return
        plain_pipe, pipe = self.pipe(self.full), self.pipe(contestant)
        plain: list[float] = []
        own: list[list[float]] = [[] for _ in settings]
        for _ in range(self.protocol.rounds):
            plain.append(self.seconds(plain_pipe, self.full.enable, {}))
            for times, setting in zip(own, settings, strict=True):
                times.append(self.seconds(pipe, contestant.enable, setting))
        spread = plots.relative_iqr(plain)
        if spread > MAX_SPREAD:
            tqdm.write(f"{contestant.name}: the plain run's times spread by {spread:.0%}; not kept")
            return
        for setting, times, key in zip(settings, own, keys, strict=True):
            row = {"kind": "time", "setting": setting, "plain": plain, "own": times}
            self.store.put(contestant, key, row | {"machine": plots.machine()})

    def seconds(self, pipe: DigitsPipeline, enable: peers.Enable, setting: Setting) -> float:
        """Wall time of one run of a batch, after two untimed steps of the same kind."""
        seeds = self.batches(self.protocol.score)[0]
        with enable(pipe, setting):
            self.sample(pipe, seeds, setting | {"steps": 2})
            begin = time.perf_counter()
            self.sample(pipe, seeds, setting)
            return time.perf_counter() - begin
