"""A small class-conditional Flux on 16×16 handwritten digits, as a real `DiffusionPipeline`.

The transformer is diffusers' own `FluxTransformer2DModel`; a class embedding stands where text
stands, and guidance makes two calls a step, as `FluxPipeline` does with `true_cfg_scale`. The
weights that ship beside this file are made by `benchmarks/zoo/digits_flux.py`.
"""

import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FluxLoraLoaderMixin
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

IMAGE_SIZE = 16
"""Height and width of an image, in pixels."""

PATCH_SIZE = 2
"""Height and width of a patch, in pixels: 64 tokens of 4 channels an image."""

NUM_CLASSES = 10
"""Digits 0 to 9; the label `NUM_CLASSES` is the null class of guidance."""

TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": PATCH_SIZE**2,
    "num_layers": 3,
    "num_single_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}
CLASS_EMBEDDER_CONFIG: dict[str, Any] = {
    "num_classes": NUM_CLASSES,
    "num_tokens": 4,
    "joint_attention_dim": TRANSFORMER_CONFIG["joint_attention_dim"],
    "pooled_projection_dim": TRANSFORMER_CONFIG["pooled_projection_dim"],
}
SCHEDULER_CONFIG: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 1.0}


class ClassEmbedder(ModelMixin, ConfigMixin):
    """The text encoder's stand-in: a few tokens and one pooled vector a class."""

    @register_to_config
    def __init__(
        self,
        num_classes: int = NUM_CLASSES,
        num_tokens: int = 4,
        joint_attention_dim: int = 128,
        pooled_projection_dim: int = 128,
    ):
        super().__init__()
        self.tokens = nn.Embedding(num_classes + 1, num_tokens * joint_attention_dim)
        self.pooled = nn.Embedding(num_classes + 1, pooled_projection_dim)

    def forward(self, class_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Embed labels.

        Args:
            class_labels: `[B]`, int64; 0 to 9, or 10 for the null class.

        Returns:
            `encoder_hidden_states` `[B, num_tokens, joint_attention_dim]` and
            `pooled_projections` `[B, pooled_projection_dim]`.
        """
        tokens = self.tokens(class_labels).unflatten(1, (self.config.num_tokens, -1))
        return tokens, self.pooled(class_labels)


class DigitsClassifier(nn.Module):
    """A small CNN: images `[B, 1, 16, 16]` in [0, 1] to logits `[B, 10]`."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.GroupNorm(8, 2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, stride=2),
            nn.GroupNorm(8, 2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(2 * width * (IMAGE_SIZE // 4) ** 2, NUM_CLASSES),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images * 2 - 1)


def pack_latents(images: Tensor) -> Tensor:
    """Images `[B, 1, 16, 16]` to patch tokens `[B, 64, 4]`, row by row."""
    patches = images.unfold(2, PATCH_SIZE, PATCH_SIZE).unfold(3, PATCH_SIZE, PATCH_SIZE)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpack_latents(latents: Tensor) -> Tensor:
    """Patch tokens `[B, 64, 4]` to images `[B, 1, 16, 16]`: the inverse of `pack_latents`."""
    side = IMAGE_SIZE // PATCH_SIZE
    patches = latents.unflatten(2, (1, PATCH_SIZE, PATCH_SIZE)).unflatten(1, (side, side))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def position_ids(num_tokens: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Flux's position ids: `img_ids` `[64, 3]` as (0, row, column), `txt_ids` `[num_tokens, 3]`."""
    side = torch.arange(IMAGE_SIZE // PATCH_SIZE, dtype=torch.float32, device=device)
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    img_ids = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).flatten(0, 1)
    return img_ids, torch.zeros(num_tokens, 3, device=device)


def seeded_latents(seeds: Sequence[int]) -> Tensor:
    """Initial noise `[len(seeds), 64, 4]`, fp32 on the CPU; row i depends on `seeds[i]` alone."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = ((IMAGE_SIZE // PATCH_SIZE) ** 2, PATCH_SIZE**2)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


class DigitsPipeline(DiffusionPipeline, FluxLoraLoaderMixin):
    """Draws handwritten digits.

    Args:
        transformer: velocity model; predicts `noise - image` at `s * noise + (1 - s) * image`.
        class_embedder: gives the transformer its conditioning.
        scheduler: any flow-matching scheduler of diffusers, for example
            `FlowMatchEulerDiscreteScheduler`, or `DPMSolverMultistepScheduler` with
            `use_flow_sigmas=True, prediction_type="flow_prediction"`.
    """

    model_cpu_offload_seq = "class_embedder->transformer"
    text_encoder = None  # FluxLoraLoaderMixin asks for it, and leaves None alone
    _lora_loadable_modules: ClassVar[list[str]] = ["transformer"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        class_embedder: ClassEmbedder,
        scheduler: SchedulerMixin,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, class_embedder=class_embedder, scheduler=scheduler
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def check_class_labels(self, class_labels: Tensor | Sequence[int] | int) -> Tensor:
        """Labels as int64 `[B]` on the CPU; `ValueError` unless each is a digit from 0 to 9."""
        labels = torch.as_tensor(class_labels).reshape(-1).cpu()
        if labels.is_floating_point() or not ((labels >= 0) & (labels < NUM_CLASSES)).all():
            raise ValueError(
                f"class_labels must be integers from 0 to {NUM_CLASSES - 1}, got {class_labels}"
            )
        return labels.long()

    def prepare_latents(
        self,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        """Initial noise `[B, 64, 4]`; drawn in fp32, so that it is the same for every `dtype`."""
        shape = (batch_size, (IMAGE_SIZE // PATCH_SIZE) ** 2, self.transformer.config.in_channels)
        if latents is None and isinstance(generator, list):
            if len(generator) != batch_size:
                raise ValueError(
                    f"got {len(generator)} generators for a batch of {batch_size}; "
                    "pass one generator a sample, or a single one"
                )
            rows = [torch.randn(shape[1:], generator=g, device=g.device) for g in generator]
            latents = torch.stack([row.to(device) for row in rows])
        elif latents is None:
            where = generator.device if generator is not None else torch.device("cpu")
            latents = torch.randn(shape, generator=generator, device=where)
        elif latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        return latents.to(device=device, dtype=dtype)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Tensor | Sequence[int] | int,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one image a label.

        Args:
            class_labels: digits from 0 to 9, `[B]`.
            num_inference_steps: scheduler steps.
            guidance_scale: `uncond + guidance_scale * (cond - uncond)`, with one transformer call
                a branch; at 1 or below only the conditional branch is called.
            generator: one for the batch, or a list with one a sample.
            latents: initial noise `[B, 64, 4]`, for example from `seeded_latents`.
            output_type: `"pt"` `[B, 1, 16, 16]` in [0, 1], `"np"` `[B, 16, 16, 1]` in [0, 1],
                `"pil"` a list of images, or `"latent"` packed tokens `[B, 64, 4]` in about [-1, 1].
            return_dict: return `ImagePipelineOutput` instead of a tuple.
            joint_attention_kwargs: passed to the transformer; `{"scale": ...}` weighs LoRA.
            callback_on_step_end: called as `(pipe, step, timestep, {"latents": latents})` after
                each step; `latents` in what it returns replaces the latents.
            callback_on_step_end_tensor_inputs: names the callback receives; only `"latents"`.

        Raises:
            ValueError: a label, a shape, a name or the number of generators does not fit.
        """
        labels = self.check_class_labels(class_labels)
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may name {self._callback_tensor_inputs}, "
                f"got {sorted(unknown)} as well"
            )
        self._guidance_scale = guidance_scale
        self._interrupt = False
        do_guidance = guidance_scale > 1

        device = self._execution_device
        labels = labels.to(device)
        encoder_hidden_states, pooled_projections = self.class_embedder(labels)
        if do_guidance:
            null_labels = torch.full_like(labels, NUM_CLASSES)
            null_encoder_hidden_states, null_pooled_projections = self.class_embedder(null_labels)
        img_ids, txt_ids = position_ids(encoder_hidden_states.shape[1], device)

        latents = self.prepare_latents(
            len(labels), encoder_hidden_states.dtype, device, generator, latents
        )

        if self.scheduler.config.get("use_flow_sigmas", False):
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        self.scheduler.set_begin_index(0)

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                timestep = t.expand(latents.shape[0]).to(latents.dtype)

                with self.transformer.cache_context("cond"):
                    noise_pred = self.transformer(
                        hidden_states=latents,
                        timestep=timestep / 1000,
                        pooled_projections=pooled_projections,
                        encoder_hidden_states=encoder_hidden_states,
                        txt_ids=txt_ids,
                        img_ids=img_ids,
                        joint_attention_kwargs=joint_attention_kwargs,
                        return_dict=False,
                    )[0]

                if do_guidance:
                    with self.transformer.cache_context("uncond"):
                        null_noise_pred = self.transformer(
                            hidden_states=latents,
                            timestep=timestep / 1000,
                            pooled_projections=null_pooled_projections,
                            encoder_hidden_states=null_encoder_hidden_states,
                            txt_ids=txt_ids,
                            img_ids=img_ids,
                            joint_attention_kwargs=joint_attention_kwargs,
                            return_dict=False,
                        )[0]
                    noise_pred = null_noise_pred + guidance_scale * (noise_pred - null_noise_pred)

                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]

                if callback_on_step_end is not None:
                    kwargs = {name: latents for name in callback_on_step_end_tensor_inputs}
                    outputs = callback_on_step_end(self, i, t, kwargs)
                    latents = outputs.pop("latents", latents)
                progress_bar.update()

        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(unpack_latents(latents), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def random_digits_pipeline(seed: int = 0, dtype: torch.dtype = torch.float32) -> DigitsPipeline:
    """The shipped architecture with random weights; leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(**TRANSFORMER_CONFIG)
        class_embedder = ClassEmbedder(**CLASS_EMBEDDER_CONFIG)
    return _assemble(
        transformer, class_embedder, FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG), dtype
    )


def _assemble(
    transformer: FluxTransformer2DModel,
    class_embedder: ClassEmbedder,
    scheduler: SchedulerMixin,
    dtype: torch.dtype,
) -> DigitsPipeline:
    """A pipeline in `dtype`, ready for inference."""
    pipe = DigitsPipeline(transformer.eval(), class_embedder.eval(), scheduler)
    return pipe if pipe.dtype == dtype else pipe.to(dtype)


def _read_weights(name: str) -> bytes:
    """The bytes of a shipped file; `FileNotFoundError` names the file and the remedy."""
    path = files(__package__) / "weights" / name
    if not path.is_file():
        raise FileNotFoundError(
            f"the demo's weights are missing: {path}; install the package with its data files, "
            "or make them with `python benchmarks/zoo/digits_flux.py` (train, then `--export`)"
        )
    return path.read_bytes()


def load_digits_pipeline(dtype: torch.dtype = torch.float32) -> DigitsPipeline:
    """The trained pipeline that ships with the package (fp16 on disk), in `dtype` on the CPU.

    Raises:
        FileNotFoundError: the weights are not installed.
    """
    config = json.loads(_read_weights("config.json"))
    state = load_safetensors(_read_weights("digits_flux.safetensors"))
    modules = {
        "transformer": FluxTransformer2DModel.from_config(config["transformer"]),
        "class_embedder": ClassEmbedder.from_config(config["class_embedder"]),
    }
    for name, module in modules.items():
        prefix = f"{name}."
        module.load_state_dict(
            {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
        )
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config["scheduler"])
    return _assemble(modules["transformer"], modules["class_embedder"], scheduler, dtype)


def load_classifier() -> DigitsClassifier:
    """The shipped classifier in fp32 on the CPU: images `[B, 1, 16, 16]` in [0, 1] to logits.

    Raises:
        FileNotFoundError: the weights are not installed.
    """
    classifier = DigitsClassifier()
    classifier.load_state_dict(load_safetensors(_read_weights("digits_classifier.safetensors")))
    return classifier.eval()
