"""Train, score and export the demo's model: a class-conditional Flux on scikit-learn's digits.

    digits_flux.py --compile --stop 1250                          # train (resumes); these two
    digits_flux.py --compile --threads 1 --steps 5000 --stop 3000 # commands made what ships
    digits_flux.py --evaluate --source checkpoint   # score the checkpoint
    digits_flux.py --export                         # write the package's weights
    digits_flux.py --evaluate --grid digits.png     # score and draw what ships

Data: 1,797 images of 8×8 pixels, bilinearly upsampled to 16×16. A stratified fifth is held out and
trains neither the diffusion model nor the classifier. The diffusion model learns by flow matching:
at `x_s = (1 - s) * image + s * noise` it predicts `noise - image` (Lipman et al., 2023,
https://arxiv.org/abs/2210.02747), with `s = sigmoid(1.5 * z)`, `z` normal. Every draw of a training
step comes from a generator seeded by the step, so that a resumed run goes on as if never stopped.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from accelerate_hooks.demo.pipeline import (
    CLASS_EMBEDDER_CONFIG,
    IMAGE_SIZE,
    NUM_CLASSES,
    SCHEDULER_CONFIG,
    TRANSFORMER_CONFIG,
    DigitsClassifier,
    DigitsPipeline,
    load_classifier,
    load_digits_pipeline,
    pack_latents,
    position_ids,
    random_digits_pipeline,
    seeded_latents,
)

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "accelerate_hooks" / "demo" / "weights"
RESULTS = ROOT / "benchmarks" / "results" / "digits_flux.json"
DATA_LICENCE = (
    "scikit-learn digits: UCI Optical Recognition of Handwritten Digits "
    "(Alpaydin and Kaynak, 1998, https://doi.org/10.24432/C50P49), CC BY 4.0"
)

TRAINING = "cosine over 8000 steps up to step 1250, over 5000 from there; fp32, torch.compile"
SEED = 0
BATCH_SIZE = 64
LEARNING_RATE = 1e-3
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.01
EMA_DECAY = 0.9995
LABEL_DROPOUT = 0.1
CLASSIFIER_EPOCHS = 60
SAMPLE_SEEDS = range(1000, 1500)
NEAR_COPY_RMS = 0.05
SAVE_EVERY = 250


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out images `[N, 1, 16, 16]` in [-1, 1], and labels `[N]`, a fifth held out.

    Returns:
        `train_images, train_labels, held_images, held_labels`.
    """
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target, dtype=torch.long)
    train, held = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels.numpy(), random_state=SEED
    )
    return images[train], labels[train], images[held], labels[held]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 10°, scale by 0.9 to 1.05, shear by 0.1, shift by a pixel, each at random."""
    batch = len(images)
    angle, log_scale, shear, dx, dy = torch.rand(5, batch, generator=generator) * 2 - 1
    angle = angle * math.radians(10)
    scale = 0.975 + 0.075 * log_scale
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    shift = 2 / IMAGE_SIZE
    theta = torch.stack(
        (cos, 0.1 * shear * cos - sin, dx * shift, sin, 0.1 * shear * sin + cos, dy * shift), dim=1
    ).view(batch, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train_classifier(path: Path) -> DigitsClassifier:
    """Train the classifier with augmentation, save it under `path`, and return it."""
    train_images, train_labels, held_images, held_labels = digits()
    torch.manual_seed(SEED)
    model = DigitsClassifier().train()
    steps_per_epoch = math.ceil(len(train_images) / BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=CLASSIFIER_EPOCHS * steps_per_epoch
    )
    generator = torch.Generator().manual_seed(SEED)
    for _ in tqdm(range(CLASSIFIER_EPOCHS), desc="classifier", mininterval=5):
        order = torch.randperm(len(train_images), generator=generator)
        for rows in order.split(BATCH_SIZE):
            images = augment(train_images[rows], generator)
            loss = F.cross_entropy(
                model(images / 2 + 0.5), train_labels[rows], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    tqdm.write(f"classifier: held-out accuracy {accuracy(model, held_images, held_labels):.4f}")
    torch.save(model.state_dict(), path)
    return model


@torch.no_grad()
def accuracy(classifier: DigitsClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of `images` `[N, 1, 16, 16]` in [-1, 1] that the classifier reads as `labels`."""
    return (classifier(images / 2 + 0.5).argmax(1) == labels).float().mean().item()


def trainable(pipe: DigitsPipeline) -> dict[str, Tensor]:
    """Parameters of the transformer and the class embedder, by name."""
    return {
        f"{module}.{name}": parameter
        for module in ("transformer", "class_embedder")
        for name, parameter in getattr(pipe, module).named_parameters()
    }


def zero_modulation(pipe: DigitsPipeline) -> None:
    """Make every block the identity and the output zero, as DiT starts (adaLN-Zero)."""
    for name, parameter in trainable(pipe).items():
        if (".linear." in name and "norm" in name) or name.startswith("transformer.proj_out."):
            torch.nn.init.zeros_(parameter)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    progress = max(0, step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * decay


def training_batch(
    images: Tensor, labels: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One batch, a function of `step` alone.

    Returns:
        Noisy tokens `[B, 64, 4]`, noise levels s `[B]` in (0, 1), labels `[B]` with dropout to the
        null class, and the target velocity `[B, 64, 4]`.
    """
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    rows = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
    clean = pack_latents(augment(images[rows], generator))
    noise = torch.randn(clean.shape, generator=generator)
    level = torch.sigmoid(1.5 * torch.randn(BATCH_SIZE, generator=generator))
    dropped = torch.rand(BATCH_SIZE, generator=generator) < LABEL_DROPOUT
    level_column = level[:, None, None]
    noisy = (1 - level_column) * clean + level_column * noise
    return noisy, level, labels[rows].masked_fill(dropped, NUM_CLASSES), noise - clean


def train(folder: Path, steps: int, stop: int, compile_model: bool) -> None:
    """Train the diffusion model, from the checkpoint in `folder` where there is one.

    Args:
        folder: holds `checkpoint.pt`, written every `SAVE_EVERY` steps.
        steps: length of the learning-rate schedule.
        stop: last step of this call; below `steps` the schedule is left unfinished.
        compile_model: `torch.compile` the transformer.
    """
    images, labels, _, _ = digits()
    pipe = random_digits_pipeline(SEED)
    zero_modulation(pipe)
    parameters = trainable(pipe)
    ema = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(
        parameters.values(), betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY, fused=True
    )
    start = 0
    path = folder / "checkpoint.pt"
    if path.exists():
        checkpoint = torch.load(path)
        start, ema = checkpoint["step"], checkpoint["ema"]
        optimizer.load_state_dict(checkpoint["optimizer"])
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(checkpoint["parameters"][name])

    transformer = pipe.transformer.train()
    forward = torch.compile(transformer) if compile_model else transformer
    img_ids, txt_ids = position_ids(pipe.class_embedder.config.num_tokens)
    losses: list[float] = []
    begin = time.perf_counter()
    for step in tqdm(
        range(start, stop), initial=start, total=stop, desc="digits_flux", mininterval=20
    ):
        noisy, level, batch_labels, target = training_batch(images, labels, step)
        tokens, pooled = pipe.class_embedder(batch_labels)
        velocity = forward(
            hidden_states=noisy,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=level,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.values()), list(parameters.values()), 1 - decay)

        losses.append(loss.item())
        done = step + 1
        if done % 100 == 0:
            rate = (done - start) / (time.perf_counter() - begin)
            tqdm.write(f"step {done} loss {np.mean(losses):.4f} steps/s {rate:.2f}")
            losses.clear()
        if done % SAVE_EVERY == 0 or done == stop:
            checkpoint = {
                "step": done,
                "ema": ema,
                "parameters": {name: p.detach() for name, p in parameters.items()},
                "optimizer": optimizer.state_dict(),
            }
            torch.save(checkpoint, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(folder: Path) -> tuple[DigitsPipeline, DigitsClassifier, int]:
    """The averaged weights and the classifier, rounded to fp16 as they ship, and the step."""
    checkpoint = torch.load(folder / "checkpoint.pt")
    pipe = random_digits_pipeline(SEED)
    classifier = DigitsClassifier().eval()
    classifier.load_state_dict(torch.load(folder / "classifier.pt"))
    with torch.no_grad():
        for name, parameter in trainable(pipe).items():
            parameter.copy_(checkpoint["ema"][name].half())
        for parameter in classifier.parameters():
            parameter.copy_(parameter.half())
    return pipe, classifier, checkpoint["step"]


def sample_batches(pipe: DigitsPipeline, batch_size: int = 100) -> Iterator[tuple[Tensor, Tensor]]:
    """Images `[B, 1, 16, 16]` in [0, 1] and the labels asked for, over `SAMPLE_SEEDS`."""
    pipe.set_progress_bar_config(disable=True)
    for seeds in tqdm(torch.tensor(list(SAMPLE_SEEDS)).split(batch_size), desc="samples"):
        labels = seeds % NUM_CLASSES
        yield pipe(labels, latents=seeded_latents(seeds.tolist())).images, labels


def nearest_rms(images: Tensor, train_images: Tensor) -> Tensor:
    """RMS pixel distance `[N]` of each image to its nearest training image, both in [0, 1]."""
    return torch.cdist(images.flatten(1), train_images.flatten(1)).amin(1) / IMAGE_SIZE


@torch.no_grad()
def evaluate(pipe: DigitsPipeline, classifier: DigitsClassifier, steps: int) -> dict[str, Any]:
    """Score 500 samples of fixed seeds (50 steps, guidance 2, two branches)."""
    train_images, _, held_images, held_labels = digits()
    train_images = train_images / 2 + 0.5
    images, labels = (torch.cat(parts) for parts in zip(*sample_batches(pipe), strict=True))
    agree = classifier(images).argmax(1) == labels
    distance = nearest_rms(images, train_images)
    held_distance = nearest_rms(held_images / 2 + 0.5, train_images)
    return {
        "classifier_held_out_accuracy": round(accuracy(classifier, held_images, held_labels), 4),
        "agreement": round(agree.float().mean().item(), 4),
        "agreement_by_class": [
            round(agree[labels == digit].float().mean().item(), 4) for digit in range(NUM_CLASSES)
        ],
        "near_copy_share": round((distance < NEAR_COPY_RMS).float().mean().item(), 4),
        "near_copy_share_of_held_out": round(
            (held_distance < NEAR_COPY_RMS).float().mean().item(), 4
        ),
        "nearest_rms_median": round(distance.median().item(), 4),
        "nearest_rms_median_of_held_out": round(held_distance.median().item(), 4),
        "near_copy_rms": NEAR_COPY_RMS,
        "samples": len(images),
        "sample_seeds": [SAMPLE_SEEDS.start, SAMPLE_SEEDS.stop - 1],
        "num_inference_steps": 50,
        "guidance_scale": 2.0,
        "parameters": sum(p.numel() for p in trainable(pipe).values()),
        "training_steps": steps,
        "training_batch_size": BATCH_SIZE,
        "training_seed": SEED,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def export(pipe: DigitsPipeline, classifier: DigitsClassifier, steps: int) -> None:
    """Write fp16 weights, their metadata and the configs into the package."""
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    metadata = {
        "seed": str(SEED),
        "training_steps": str(steps),
        "training_batch_size": str(BATCH_SIZE),
        "training": TRAINING,
        "script": "benchmarks/zoo/digits_flux.py",
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "data_licence": DATA_LICENCE,
    }
    weights = {
        "digits_flux.safetensors": trainable(pipe),
        "digits_classifier.safetensors": classifier.state_dict(),
    }
    for name, tensors in weights.items():
        halves = {key: tensor.detach().half().contiguous() for key, tensor in tensors.items()}
        (WEIGHTS / name).write_bytes(to_safetensors(halves, metadata=metadata))
    config = {
        "transformer": TRANSFORMER_CONFIG,
        "class_embedder": CLASS_EMBEDDER_CONFIG,
        "scheduler": SCHEDULER_CONFIG,
        "metadata": metadata,
    }
    (WEIGHTS / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_grid(pipe: DigitsPipeline, path: Path) -> None:
    """Draw ten samples (columns) of each digit (rows) into one PNG, six pixels a pixel."""
    from PIL import Image

    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(NUM_CLASSES).repeat_interleave(10)
    images = pipe(labels, latents=seeded_latents(range(len(labels)))).images
    rows = images.view(NUM_CLASSES, 10, IMAGE_SIZE, IMAGE_SIZE).permute(0, 2, 1, 3)
    grid = rows.reshape(NUM_CLASSES * IMAGE_SIZE, 10 * IMAGE_SIZE)
    picture = Image.fromarray((grid.numpy() * 255).round().astype(np.uint8))
    picture.resize((960, 960), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "digits_flux")
    parser.add_argument("--steps", type=int, default=8000, help="length of the schedule")
    parser.add_argument("--stop", type=int, help="stop early at this step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step")
    parser.add_argument("--evaluate", action="store_true", help="score 500 samples, write JSON")
    parser.add_argument("--export", action="store_true", help="write the package's weights")
    parser.add_argument("--grid", type=Path, help="draw a grid of samples into this PNG")
    parser.add_argument("--source", choices=("checkpoint", "shipped"), default="shipped")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    if options.export:
        export(*load_checkpoint(options.folder))
    if options.evaluate or options.grid:
        if options.source == "checkpoint":
            pipe, classifier, steps = load_checkpoint(options.folder)
        else:
            pipe, classifier = load_digits_pipeline(), load_classifier()
            steps = int(
                json.loads((WEIGHTS / "config.json").read_text())["metadata"]["training_steps"]
            )
        if options.grid:
            save_grid(pipe, options.grid)
        if options.evaluate:
            scores = evaluate(pipe, classifier, steps)
            print(json.dumps(scores, indent=2))
            if options.source == "shipped":
                RESULTS.write_text(json.dumps(scores, indent=2) + "\n")
    if not (options.export or options.evaluate or options.grid):
        options.folder.mkdir(parents=True, exist_ok=True)
        if not (options.folder / "classifier.pt").exists():
            train_classifier(options.folder / "classifier.pt")
        train(options.folder, options.steps, options.stop or options.steps, options.compile)


if __name__ == "__main__":
    main()
