"""Train, score and export a video model told class and heading: a digit that moves and bounces.

    moving_digits.py                                 # train (resumes)
    moving_digits.py --evaluate --source checkpoint  # score the checkpoint
    moving_digits.py --export                        # write benchmarks/zoo/weights/
    moving_digits.py --evaluate --picture clips.png  # score and draw what ships

Data: scikit-learn's digits, upsampled to 16×16 pixels as `digits_flux.py` does and augmented like
there, move in a straight line over a picture of 32×32 pixels and bounce off its edges, 16 frames.
The model is diffusers' `WanTransformer3DModel` with patches of (1, 4, 4), so 16 × 8 × 8 = 1,024
tokens a clip; embeddings of the class and of the heading stand where text stands. It learns by flow
matching (Lipman et al., 2023, https://arxiv.org/abs/2210.02747): at `x_s = (1 - s) * clip + s *
noise` it predicts `noise - clip`, first on clips of 4 frames, then of 16, then at high noise, at
last with the heading told. Matrices of the blocks are trained by Muon (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon/), all else by AdamW. Every draw of a training step comes
from a generator seeded by the step, so that a resumed run goes on as if never stopped.

Generation is diffusers' own `WanPipeline` without a VAE: latents are the picture.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from safetensors.torch import save_file as save_safetensors
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent))  # a safe path (PYTHONSAFEPATH) lacks it

from digits_flux import DATA_LICENCE, augment, digits

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = Path(__file__).parent / "weights"
RESULTS = ROOT / "benchmarks" / "results" / "moving_digits.json"

SEED = 0
NUM_CLASSES = 10
FRAMES, SIZE, DIGIT = 16, 32, 16
MEAN, STD = 0.08, 0.22
"""Of the pixels of a clip in [0, 1]: the model sees `(pixel - MEAN) / STD`."""

SPEED = (0.8, 2.0)
"""Least and greatest speed, pixels a frame, of clips whose heading is not told."""

HEADINGS = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x)
"""Down and to the right, pixels a frame."""

TEXT_TOKENS, TEXT_DIM = 4, 128
TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": (1, 4, 4),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 6,
    "rope_max_seq_len": 32,
}
SCHEDULER_CONFIG: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 10.0}


@dataclass(frozen=True)
class Stage:
    """Training up to step ``until`` on clips of ``frames``, at noise levels whose log odds are
    normal with ``level`` as mean and deviation. ``anneal``: the rate falls to 0 at its end.
    ``headed``: clips move by a heading that is told, else in any direction and speed."""

    until: int
    frames: int
    level: tuple[float, float]
    anneal: bool = False
    headed: bool = False


STAGES = (
    Stage(1200, 4, (0.6, 1.2)),
    Stage(3300, FRAMES, (0.6, 1.2), anneal=True),
    Stage(4500, FRAMES, (2.0, 1.5)),
    Stage(6600, FRAMES, (2.0, 1.5), anneal=True, headed=True),
)
"""A digit of some 60 pixels of ink, 4 deviations bright, stands out of the noise of one frame by
``4 * 60 ** 0.5 * (1 - s) / s``: 1.6 at s = 0.95. So where it is in each frame is settled near
there, and the first stages draw such levels one time in forty. In the third, the path did not
become straighter: a line through noise is to be found among all starts and velocities. The fourth
tells the velocity."""

TOKENS_PER_STEP = 8192
MATRIX_RATE, OTHER_RATE, WARMUP_STEPS, DECAY_SHARE = 2e-3, 1e-3, 100, 0.3
EMA_DECAY = 0.998
LABEL_DROPOUT = 0.1
SAVE_EVERY = 100

SAMPLES = 100
FIRST_SEED = 1000
STEPS, GUIDANCE = 30, 4.0  # chosen, with the shift, on ten clips of other seeds (2000 on)
CLASSIFIER_STEPS = 1500


def move(
    images: Tensor, generator: torch.Generator, frames: int = FRAMES, headings: Tensor | None = None
) -> Tensor:
    """Clips `[B, frames, 32, 32]` in [0, 1] of `images` `[B, 1, 16, 16]` in [-1, 1] in motion.

    The place of the upper left corner at frame t is `reflect(start + t * velocity)` in each axis,
    where `reflect` folds the line into [0, 16]; the velocity is that of `HEADINGS` for `headings`
    `[B]`, else its direction is uniform, its speed uniform in `SPEED`.
    """
    batch, room = len(images), SIZE - DIGIT
    start = torch.rand(batch, 2, generator=generator) * room
    angle = torch.rand(batch, generator=generator) * 2 * math.pi
    low, high = SPEED
    speed = low + (high - low) * torch.rand(batch, generator=generator)
    velocity = torch.stack((angle.cos(), angle.sin()), dim=-1) * speed[:, None]
    if headings is not None:
        velocity = torch.tensor(HEADINGS, dtype=torch.float32)[headings]
    path = start[:, None] + velocity[:, None] * torch.arange(frames)[None, :, None]
    corner = reflect(path, room).flatten(0, 1)
    theta = torch.zeros(len(corner), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = SIZE / DIGIT
    theta[:, :, 2] = (room - 2 * corner) / DIGIT
    grid = F.affine_grid(theta, [len(corner), 1, SIZE, SIZE], align_corners=False)
    ink = (images / 2 + 0.5).clamp(0, 1).repeat_interleave(frames, dim=0)
    return F.grid_sample(ink, grid, align_corners=False).view(batch, frames, SIZE, SIZE)


def reflect(path: Tensor, room: float) -> Tensor:
    """Fold a straight path into [0, room], as a ball bounces between two walls."""
    return room - (path.remainder(2 * room) - room).abs()


class FrameClassifier(nn.Module):
    """A small CNN: frames `[B, 1, 32, 32]` in [0, 1] to logits `[B, 10]`, wherever the digit is."""

    def __init__(self, width: int = 24):
        super().__init__()

        def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride),
                nn.GroupNorm(8, outputs),
                nn.ReLU(),
            )

        self.layers = nn.Sequential(
            layer(1, width, 1),
            layer(width, 2 * width, 2),
            layer(2 * width, 4 * width, 2),
            layer(4 * width, 4 * width, 2),
            nn.Conv2d(4 * width, 4 * width, 4),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(4 * width, NUM_CLASSES),
        )

    def forward(self, frames: Tensor) -> Tensor:
        return self.layers(F.pad(frames, (8, 8, 8, 8)) * 2 - 1)


def train_classifier(path: Path) -> FrameClassifier:
    """Train the classifier on single frames, save it under `path`, and return it."""
    images, labels, _, _ = digits()
    torch.manual_seed(SEED)
    model = FrameClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=CLASSIFIER_STEPS)
    generator = torch.Generator().manual_seed(SEED)
    for _ in tqdm(range(CLASSIFIER_STEPS), desc="classifier", mininterval=5):
        rows = torch.randint(len(images), (64,), generator=generator)
        frames = move(augment(images[rows], generator), generator, 1)
        loss = F.cross_entropy(model(frames), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    tqdm.write(f"classifier: held-out accuracy {held_out_accuracy(model):.4f}")
    torch.save(model.state_dict(), path)
    return model


@torch.no_grad()
def held_out_accuracy(classifier: FrameClassifier) -> float:
    """Share of the held-out digits, each at one place, that the classifier reads right."""
    _, _, images, labels = digits()
    frames = move(images, torch.Generator().manual_seed(SEED), 1)
    return (classifier(frames).argmax(1) == labels).float().mean().item()


class MovingDigits(nn.Module):
    """The transformer, the class embedding `[11, 4, 128]` and that of headings `[9, 4, 128]`; class
    10 and heading 8 stand for none, as guidance needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = WanTransformer3DModel(**TRANSFORMER_CONFIG)
        self.classes = nn.Parameter(torch.randn(NUM_CLASSES + 1, TEXT_TOKENS, TEXT_DIM))
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)
        self.headings = nn.Parameter(torch.randn(len(HEADINGS) + 1, TEXT_TOKENS, TEXT_DIM))

    def told(self, labels: Tensor, headings: Tensor | None) -> Tensor:
        """What stands for text, `[B, 8, 128]`; `[B, 4, 128]` without headings."""
        classes = self.classes[labels]
        return classes if headings is None else torch.cat((classes, self.headings[headings]), 1)

    def pipeline(self) -> WanPipeline:
        """diffusers' pipeline around the transformer: no text encoder, no VAE."""
        scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG)
        absent: Any = None
        pipe = WanPipeline(
            tokenizer=absent,
            text_encoder=absent,
            vae=absent,
            scheduler=scheduler,
            transformer=self.transformer,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def request(
        self,
        labels: Tensor | Sequence[int],
        seeds: Sequence[int],
        *,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
    ) -> dict[str, Any]:
        """Arguments of one call of the pipeline; row i depends on `labels[i]`, `seeds[i]` alone.
        Its heading is that of the seed."""
        labels = torch.as_tensor(labels)
        headings = torch.tensor([s % len(HEADINGS) for s in seeds])
        shape = (1, FRAMES, SIZE, SIZE)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        none = torch.full_like(labels, NUM_CLASSES), torch.full_like(headings, len(HEADINGS))
        return {
            "prompt_embeds": self.told(labels, headings).detach(),
            "negative_prompt_embeds": self.told(*none).detach(),
            "height": SIZE * 8,  # WanPipeline counts the pixels before a VAE, here there is none
            "width": SIZE * 8,
            "num_frames": (FRAMES - 1) * 4 + 1,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "latents": torch.stack(noise),
            "output_type": "latent",
            "return_dict": False,
        }


def to_pixels(latents: Tensor) -> Tensor:
    """Latents `[B, 1, T, 32, 32]` to clips `[B, T, 32, 32]` in [0, 1]."""
    return (latents[:, 0].float() * STD + MEAN).clamp(0, 1)


def training_batch(
    images: Tensor, labels: Tensor, step: int, stage: Stage
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """One batch, a function of `step` and its stage alone.

    Returns:
        Noisy clips `[B, 1, frames, 32, 32]`, noise levels s `[B]` in (0, 1), labels and, in a
        stage with them, headings `[B]`, dropped together, and the target velocity.
    """
    frames, (mean, deviation) = stage.frames, stage.level
    batch = TOKENS_PER_STEP // (frames * (SIZE // 4) ** 2)
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    rows = torch.randint(len(images), (batch,), generator=generator)
    pictures = augment(images[rows], generator)
    headings = None
    if stage.headed:
        headings = torch.randint(len(HEADINGS), (batch,), generator=generator)
    pixels = move(pictures, generator, frames, headings)
    clean = ((pixels - MEAN) / STD).unsqueeze(1)
    noise = torch.randn(clean.shape, generator=generator)
    level = torch.sigmoid(mean + deviation * torch.randn(batch, generator=generator))
    dropped = torch.rand(batch, generator=generator) < LABEL_DROPOUT
    column = level.view(-1, 1, 1, 1, 1)
    noisy = (1 - column) * clean + column * noise
    classes = labels[rows].masked_fill(dropped, NUM_CLASSES)
    if headings is not None:
        headings = headings.masked_fill(dropped, len(HEADINGS))
    return noisy, level, classes, headings, noise - clean


def stage_of(step: int) -> Stage:
    return next(stage for stage in STAGES if step < stage.until)


def rate(step: int) -> float:
    """Share of the peak, a cycle to each stage that anneals: linear warm-up, constant, linear decay
    over the last `DECAY_SHARE` (warm restarts: Loshchilov and Hutter, 2017,
    https://arxiv.org/abs/1608.03983)."""
    ends = [0, *(stage.until for stage in STAGES if stage.anneal)]
    start, end = next((a, b) for a, b in itertools.pairwise(ends) if step < b)
    return min(1.0, (step - start + 1) / WARMUP_STEPS, (end - step) / (DECAY_SHARE * (end - start)))


def optimizers(model: MovingDigits) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if ".blocks." in name and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in named.values() if id(p) not in chosen]
    return (
        torch.optim.Muon(matrices, MATRIX_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, OTHER_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    )


def train(folder: Path) -> None:
    """Train through `STAGES`, from the checkpoint in `folder` where there is one."""
    steps = STAGES[-1].until
    images, labels, _, _ = digits()
    torch.manual_seed(SEED)
    model = MovingDigits().train()
    parameters = dict(model.named_parameters())
    ema = {name: p.detach().clone() for name, p in parameters.items()}
    muon, adamw = optimizers(model)
    start, path = 0, folder / "checkpoint.pt"
    if path.exists():
        checkpoint = torch.load(path)
        start, ema = checkpoint["step"], checkpoint["ema"]
        model.load_state_dict(checkpoint["parameters"])
        muon.load_state_dict(checkpoint["muon"])
        adamw.load_state_dict(checkpoint["adamw"])

    forward = torch.compile(model.transformer, dynamic=False)
    losses: list[float] = []
    began = time.perf_counter()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="clips", mininterval=20)
    for step in bar:
        batch = training_batch(images, labels, step, stage_of(step))
        noisy, level, classes, headings, target = batch
        with torch.autocast("cpu", torch.bfloat16):
            velocity = forward(
                hidden_states=noisy,
                timestep=level * 1000,
                encoder_hidden_states=model.told(classes, headings),
                return_dict=False,
            )[0]
        loss = F.mse_loss(velocity.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer, peak in ((muon, MATRIX_RATE), (adamw, OTHER_RATE)):
            optimizer.param_groups[0]["lr"] = peak * rate(step)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.values()), list(parameters.values()), 1 - decay)

        losses.append(loss.item())
        done = step + 1
        if done % 50 == 0:
            pace = (done - start) / (time.perf_counter() - began)
            tqdm.write(f"step {done} loss {np.mean(losses):.4f} steps/s {pace:.2f}")
            losses.clear()
        if done % SAVE_EVERY == 0 or done == steps:
            checkpoint = {
                "step": done,
                "ema": ema,
                "parameters": model.state_dict(),
                "muon": muon.state_dict(),
                "adamw": adamw.state_dict(),
            }
            torch.save(checkpoint, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(folder: Path) -> tuple[MovingDigits, FrameClassifier, int]:
    """The averaged weights and the classifier, rounded to fp16 as they ship, and the step."""
    checkpoint = torch.load(folder / "checkpoint.pt")
    model, classifier = MovingDigits().eval(), FrameClassifier().eval()
    model.load_state_dict({name: p.half() for name, p in checkpoint["ema"].items()}, strict=False)
    state = torch.load(folder / "classifier.pt")
    classifier.load_state_dict({name: p.half() for name, p in state.items()})
    return model, classifier, checkpoint["step"]


def load_moving_digits() -> MovingDigits:
    """The shipped model (fp16 on disk) in fp32 on the CPU."""
    model = MovingDigits().eval()
    model.load_state_dict(load_file(WEIGHTS / "moving_digits.safetensors"), strict=False)
    return model


def load_classifier() -> FrameClassifier:
    """The shipped classifier of frames, in fp32 on the CPU."""
    classifier = FrameClassifier().eval()
    classifier.load_state_dict(load_file(WEIGHTS / "moving_digits_classifier.safetensors"))
    return classifier


def export(model: MovingDigits, classifier: FrameClassifier, steps: int) -> None:
    """Write fp16 weights and their metadata."""
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    metadata = {
        "seed": str(SEED),
        "training_steps": str(steps),
        "script": "benchmarks/zoo/moving_digits.py",
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "data_licence": DATA_LICENCE,
    }
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    for name, tensors in (
        ("moving_digits", parameters),
        ("moving_digits_classifier", classifier.state_dict()),
    ):
        halves = {key: tensor.half().contiguous() for key, tensor in tensors.items()}
        save_safetensors(halves, WEIGHTS / f"{name}.safetensors", metadata=metadata)


def centres(clips: Tensor) -> Tensor:
    """Centre of the ink `[B, T, 2]` (row, column), pixels, of clips `[B, T, 32, 32]` in [0, 1]."""
    ink = (clips - 0.15).clamp(min=0)
    mass = ink.sum(dim=(2, 3)).clamp(min=1e-6)
    places = torch.arange(SIZE, dtype=ink.dtype)
    rows = (ink.sum(dim=3) * places).sum(dim=2) / mass
    columns = (ink.sum(dim=2) * places).sum(dim=2) / mass
    return torch.stack((rows, columns), dim=-1)


def deviation(clips: Tensor) -> tuple[Tensor, Tensor]:
    """Largest distances `[B]`, pixels, of the centre from a straight path over the frames.

    First, from one bouncing path: in each axis `offset + reflect(start + t * velocity)`, of any
    start and velocity, and of the offset that makes the largest error least. Second, between the
    bounces of that path: in each axis the line of least squares through the frames from one bounce
    to the next. Infinite where a frame has lost half of the clip's median ink.
    """
    track = centres(clips)
    starts = torch.linspace(0, 2 * (SIZE - DIGIT), 129)[:-1]
    velocities = torch.linspace(0, 2.4, 121)
    line = starts[:, None, None] + velocities[None, :, None] * torch.arange(clips.shape[1])
    line = line.flatten(0, 1)
    paths = reflect(line, SIZE - DIGIT)
    whole, pieces = [], []
    rows = torch.arange(len(clips))
    for axis in track.unbind(-1):
        error = axis[:, None] - paths
        offset = (error.amax(-1) + error.amin(-1)) / 2
        best = (error.amax(-1) - error.amin(-1)).argmin(-1)
        whole.append(error[rows, best] - offset[rows, best, None])
        bounces = (line[best] / (SIZE - DIGIT)).floor()
        pieces.append(torch.stack([_off_line(a, b) for a, b in zip(axis, bounces, strict=True)]))
    ink = clips.sum(dim=(2, 3))
    lost = (ink < 0.5 * ink.median(dim=1, keepdim=True).values).any(1)
    one, between = (
        torch.stack(errors, dim=-1).norm(dim=-1).amax(-1).masked_fill(lost, math.inf)
        for errors in (whole, pieces)
    )
    return one, between


def _off_line(places: Tensor, bounces: Tensor) -> Tensor:
    """Residuals `[T]` of the lines of least squares through each run of equal `bounces`."""
    out = torch.zeros_like(places)
    for number in bounces.unique():
        here = bounces == number
        t = torch.arange(len(places), dtype=places.dtype)[here]
        t, y = t - t.mean(), places[here] - places[here].mean()
        slope = (t * y).sum() / t.square().sum().clamp(min=1e-9)
        out[here] = y - slope * t
    return out


@torch.no_grad()
def sample(model: MovingDigits, count: int = SAMPLES, batch: int = 20) -> tuple[Tensor, Tensor]:
    """Clips `[count, 16, 32, 32]` in [0, 1] of fixed seeds, and the digits asked for."""
    pipe = model.pipeline()
    labels = torch.arange(count) % NUM_CLASSES
    clips = [
        to_pixels(pipe(**model.request(labels[rows], (FIRST_SEED + rows).tolist()))[0])
        for rows in tqdm(torch.arange(count).split(batch), desc="samples")
    ]
    return torch.cat(clips), labels


@torch.no_grad()
def evaluate(model: MovingDigits, classifier: FrameClassifier, steps: int) -> dict[str, Any]:
    """Score samples of fixed seeds, beside real clips of held-out digits."""
    clips, labels = sample(model)
    _, _, images, truth = digits()
    headings = torch.arange(len(images)) % len(HEADINGS)
    real = move(images, torch.Generator().manual_seed(SEED + 1), headings=headings)

    def read(clips: Tensor, labels: Tensor) -> dict[str, float]:
        middle = clips[:, FRAMES // 2].unsqueeze(1)
        one, between = deviation(clips)
        return {
            "middle_frame_agreement": (classifier(middle).argmax(1) == labels)
            .float()
            .mean()
            .item(),
            "straight_share": (between <= 1).float().mean().item(),
            "median_deviation_pixels": between.median().item(),
            "one_path_share": (one <= 1).float().mean().item(),
            "one_path_median_pixels": one.median().item(),
        }

    return {
        "classifier_held_out_accuracy": round(held_out_accuracy(classifier), 4),
        "generated": {name: round(value, 4) for name, value in read(clips, labels).items()},
        "real": {name: round(value, 4) for name, value in read(real, truth).items()},
        "samples": len(clips),
        "first_seed": FIRST_SEED,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "tokens": FRAMES * (SIZE // 4) ** 2,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_steps": steps,
        "tokens_per_step": TOKENS_PER_STEP,
        "training_seed": SEED,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def save_picture(model: MovingDigits, path: Path) -> None:
    """Draw every second frame (columns) of one clip a digit (rows) into one PNG, 3 × 3 a pixel."""
    from PIL import Image

    clips, _ = sample(model, NUM_CLASSES, NUM_CLASSES)
    grid = clips[:, ::2].permute(0, 2, 1, 3).reshape(NUM_CLASSES * SIZE, -1)
    picture = Image.fromarray((grid.numpy() * 255).round().astype(np.uint8))
    size = (grid.shape[1] * 3, grid.shape[0] * 3)
    picture.resize(size, Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "moving_digits")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evaluate", action="store_true", help="score samples, write JSON")
    parser.add_argument("--export", action="store_true", help="write the weights that ship")
    parser.add_argument("--picture", type=Path, help="draw samples into this PNG")
    parser.add_argument("--source", choices=("checkpoint", "shipped"), default="shipped")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    if options.export:
        export(*load_checkpoint(options.folder))
    if options.evaluate or options.picture:
        if options.source == "checkpoint":
            model, classifier, steps = load_checkpoint(options.folder)
        else:
            from safetensors import safe_open

            model, classifier = load_moving_digits(), load_classifier()
            with safe_open(WEIGHTS / "moving_digits.safetensors", "pt") as file:
                steps = int(file.metadata()["training_steps"])
        if options.picture:
            save_picture(model, options.picture)
        if options.evaluate:
            scores = evaluate(model, classifier, steps)
            print(json.dumps(scores, indent=2))
            if options.source == "shipped":
                RESULTS.write_text(json.dumps(scores, indent=2) + "\n")
    if not (options.export or options.evaluate or options.picture):
        options.folder.mkdir(parents=True, exist_ok=True)
        train(options.folder)
        if not (options.folder / "classifier.pt").exists():
            train_classifier(options.folder / "classifier.pt")


if __name__ == "__main__":
    main()
