"""One table of tiny models: real classes, random weights, for the contract suites.

``TINY`` maps a name to a :class:`Tiny`; ``names(kind=..., library=...)`` selects for
``pytest.mark.parametrize``. Nothing of transformers or diffusers is imported before ``build()``.

Sizes are clean: batch (1 to 3 in tests) is the length of no other axis that a block sees.
Images are 24 tokens, texts 7, heads 5, latent channels 4, frames 6 (diffusion); prompts 7 tokens,
heads 8 over 4 key-value heads of 12 (language).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Rows = list[torch.Generator]
Maker = Callable[[Rows], object]
Table = Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]]


@dataclass(frozen=True, eq=False)
class Tiny:
    """A model as data. ``inputs(batch)`` is seeded: the first rows of any larger batch."""

    name: str
    library: str  # "diffusers" | "transformers"
    kind: str  # "diffusion" | "decoder" | "encoder" | "encoder-decoder" | "recurrent"
    cls: str
    config: Mapping[str, Any]
    inputs: Callable[[int], dict[str, Any]]

    def build(self) -> nn.Module:
        """The model in eval mode and float32, with the same random weights every time."""
        cls = getattr(importlib.import_module(self.library), self.cls)
        config = copy.deepcopy(dict(self.config))
        with torch.random.fork_rng(devices=[]), _poisoned_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            if self.library == "diffusers":
                model, gain = cls(**config), 3**0.5
            else:
                model, gain = cls(cls.config_class(**config)), 1.0
            model = model.float().eval()
            _redraw(model, gain=gain)
        return model


def names(*, kind: str | None = None, library: str | None = None) -> list[str]:
    """Names in table order, all of them without arguments."""
    return [
        tiny.name
        for tiny in TINY.values()
        if kind in (None, tiny.kind) and library in (None, tiny.library)
    ]


@contextlib.contextmanager
def _poisoned_memory() -> Generator[None]:
    """``torch.empty`` gives NaN: two diffusers classes leave parameters uninitialised."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _redraw(model: nn.Module, *, gain: float) -> None:
    """Make every block matter to the output.

    Zero-initialised gates, biases and output projections would hide whole blocks, and the default
    of ``nn.Linear`` shrinks a signal by the square root of 3: `gain` gives that back.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.isnan().any() or not parameter.any():
                parameter.normal_(std=0.1)
            elif parameter.ndim > 1:
                parameter.mul_(gain)


# Inputs: a maker turns one generator a row into a value; `draw` joins makers to `inputs`.


def draw(**makers: object) -> Callable[[int], dict[str, Any]]:
    """``inputs`` from makers; a value that is no maker is passed as it is."""

    def inputs(batch: int) -> dict[str, Any]:
        rows = [torch.Generator().manual_seed(1 + row) for row in range(batch)]
        return {key: make(rows) if callable(make) else make for key, make in makers.items()}

    return inputs


def normal(*shape: int, axis: int = 0) -> Maker:
    """Standard normal rows of `shape`, stacked along `axis`."""
    return lambda rows: torch.stack([torch.randn(shape, generator=row) for row in rows], axis)


def ragged(*shape: int) -> Maker:
    """The same as a list of rows."""
    return lambda rows: [torch.randn(shape, generator=row) for row in rows]


def tokens(*shape: int) -> Maker:
    return lambda rows: torch.stack([torch.randint(3, 60, shape, generator=row) for row in rows])


def same(value: float | list[Any]) -> Maker:
    """The same value in every row."""
    return lambda rows: torch.tensor([value] * len(rows))


def ones(*shape: int, dtype: torch.dtype = torch.long) -> Maker:
    return lambda rows: torch.ones(len(rows), *shape, dtype=dtype)


def once(make: Callable[[], object]) -> Maker:
    """A value without a batch axis, made anew for each call."""
    return lambda rows: make()


def positions(*span: int) -> Maker:
    return once(lambda: torch.arange(*span))


def grid(*sizes: int, axes: int = 3) -> Maker:
    """Position ids of a grid, (tokens, axes), leading axes zero."""

    def make() -> torch.Tensor:
        steps = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
        ids = torch.stack(steps, -1).float().flatten(0, -2)
        return torch.cat([torch.zeros(len(ids), axes - len(sizes)), ids], 1)

    return once(make)


def rotary(*shape: int, complex: bool = False) -> Maker:
    """A table (*positions, width) shared by all rows: (cos, sin), or one complex tensor."""

    def make() -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        place = torch.arange(math.prod(shape[:-1])).view(*shape[:-1], 1)
        angles = place * 10.0 ** -torch.linspace(0, 2, shape[-1])
        table = torch.polar(torch.ones(shape), angles)
        return table if complex else (table.real, table.imag)

    return once(make)


# Diffusion

IMAGE = normal(4, 8, 12)
VIDEO = normal(4, 6, 8, 12)
FRAMES = normal(6, 4, 8, 12)
PACKED = normal(24, 4)
TEXT = normal(7, 20)
POOLED = normal(18)
MASK = ones(7, dtype=torch.bool)
T = same(0.5)

TEXTED = dict(encoder_hidden_states=TEXT, timestep=T)
TEXTED_IMAGE = dict(TEXTED, hidden_states=IMAGE)
TEXTED_VIDEO = dict(TEXTED, hidden_states=VIDEO)
TEXTED_PACKED = dict(TEXTED, hidden_states=PACKED)
MASKED = dict(TEXTED, encoder_attention_mask=MASK)
MASKED_IMAGE = dict(MASKED, hidden_states=IMAGE)
MASKED_VIDEO = dict(MASKED, hidden_states=VIDEO)
MASKED_PACKED = dict(MASKED, hidden_states=PACKED)
FLUXED = dict(TEXTED_PACKED, img_ids=grid(4, 6), txt_ids=once(lambda: torch.zeros(7, 3)))
FLUX2_IDS = dict(img_ids=grid(4, 6, axes=4), txt_ids=once(lambda: torch.zeros(7, 4)))
FROM_IMAGE = dict(
    TEXTED_VIDEO, encoder_hidden_states=normal(512, 20), encoder_hidden_states_image=normal(9, 18)
)
SIZES = {name: same([64.0, 96.0]) for name in ("original_size", "target_size", "crop_coords")}

ROPE = (4, 4, 8)
HEADS = dict(num_attention_heads=5, attention_head_dim=16)
IN_OUT = dict(in_channels=4, out_channels=4)
DEEP = dict(num_layers=4)
TWO_STACKS = dict(num_layers=4, num_single_layers=4)
BLOCKS = dict(HEADS, **DEEP)
PLAIN = dict(BLOCKS, **IN_OUT)
FLUX = dict(
    HEADS, **TWO_STACKS, patch_size=1, in_channels=4, joint_attention_dim=20, axes_dims_rope=ROPE
)
WAN = dict(
    PLAIN, patch_size=(1, 2, 2), text_dim=20, freq_dim=32, ffn_dim=72, cross_attn_norm=True,
    rope_max_seq_len=32,
)  # fmt: skip
WAN_I2V = dict(WAN, image_dim=18, added_kv_proj_dim=80)
COGVIDEO = dict(
    PLAIN, time_embed_dim=12, text_embed_dim=20, sample_width=12, sample_height=8,
    sample_frames=21, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=7,
)  # fmt: skip
COGVIEW = dict(
    PLAIN, patch_size=2, text_embed_dim=20, time_embed_dim=12, condition_dim=6, sample_size=8
)
PIXART = dict(
    PLAIN, norm_num_groups=4, cross_attention_dim=80, sample_size=8, patch_size=2,
    num_embeds_ada_norm=10, caption_channels=20,
)  # fmt: skip
SANA = dict(
    PLAIN, num_cross_attention_heads=5, cross_attention_head_dim=16, cross_attention_dim=80,
    caption_channels=20, sample_size=8,
)  # fmt: skip
HUNYUAN = dict(
    HEADS, **IN_OUT, **TWO_STACKS, num_refiner_layers=3, text_embed_dim=20, rope_axes_dim=ROPE
)
KANDINSKY = dict(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=20, in_text_dim2=18, time_dim=24, model_dim=80,
    ff_dim=72, num_text_blocks=3, num_visual_blocks=4, axes_dims=ROPE,
)  # fmt: skip

NO_RETURN_DICT = {"T5FilmDecoder", "UVit2DModel", "MiniMaxMusic3RVQDepthDecoder"}


def _diffusion(table: Table) -> list[Tiny]:
    return [
        Tiny(
            name, "diffusers", "diffusion", cls, config,
            draw(**inputs, **({} if cls in NO_RETURN_DICT else {"return_dict": False})),
        )
        for name, (cls, config, inputs) in table.items()
    ]  # fmt: skip


# name: class, config, inputs. Mochi warns in every float32 forward on the CPU (autocast).
DIFFUSION = _diffusion({
    "dit": ("DiTTransformer2DModel",
        dict(BLOCKS, in_channels=4, sample_size=8, norm_num_groups=4, num_embeds_ada_norm=10),
        dict(hidden_states=normal(4, 8, 8), timestep=T,
            class_labels=lambda rows: torch.arange(len(rows)))),
    "pixart": ("PixArtTransformer2DModel", PIXART,
        dict(MASKED_IMAGE,
            added_cond_kwargs=once(lambda: {"resolution": None, "aspect_ratio": None}))),
    "flux": ("FluxTransformer2DModel", dict(FLUX, pooled_projection_dim=18),
        dict(FLUXED, pooled_projections=POOLED)),
    "flux2": ("Flux2Transformer2DModel",
        dict(FLUX, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16),
        dict(TEXTED_PACKED, guidance=same(4.0), **FLUX2_IDS)),
    "sd3": ("SD3Transformer2DModel",
        dict(PLAIN, sample_size=12, patch_size=2, joint_attention_dim=20, caption_projection_dim=80,
            pooled_projection_dim=18, pos_embed_max_size=12, dual_attention_layers=(0, 1),
            qk_norm="rms_norm"),
        dict(TEXTED_IMAGE, pooled_projections=POOLED)),
    "wan": ("WanTransformer3DModel", WAN, TEXTED_VIDEO),
    "wan_i2v": ("WanTransformer3DModel", WAN_I2V, FROM_IMAGE),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", dict(HUNYUAN, pooled_projection_dim=18),
        dict(MASKED_VIDEO, pooled_projections=POOLED, guidance=same(4.0))),
    "cogvideox": ("CogVideoXTransformer3DModel", COGVIDEO, dict(TEXTED, hidden_states=FRAMES)),
    "ltx": ("LTXVideoTransformer3DModel", dict(PLAIN, cross_attention_dim=80, caption_channels=20),
        dict(MASKED, hidden_states=normal(144, 4), num_frames=6, height=4, width=6)),
    "mochi": ("MochiTransformer3DModel",
        dict(BLOCKS, patch_size=2, in_channels=4, pooled_projection_dim=18, text_embed_dim=24,
            time_embed_dim=12, max_sequence_length=7),
        dict(hidden_states=VIDEO, encoder_hidden_states=normal(7, 24), timestep=T,
            encoder_attention_mask=MASK)),
    "auraflow": ("AuraFlowTransformer2DModel",
        dict(HEADS, **IN_OUT, num_mmdit_layers=4, num_single_dit_layers=4, sample_size=12,
            joint_attention_dim=20, caption_projection_dim=80, pos_embed_max_size=36),
        TEXTED_IMAGE),
    "lumina2": ("Lumina2Transformer2DModel",
        dict(DEEP, in_channels=4, hidden_size=128, num_refiner_layers=3, num_attention_heads=8,
            num_kv_heads=4, multiple_of=4, axes_dim_rope=(8, 4, 4), axes_lens=(32, 32, 32),
            cap_feat_dim=20),
        MASKED_IMAGE),
    "sana": ("SanaTransformer2DModel", SANA, MASKED_IMAGE),
    "zimage": ("ZImageTransformer2DModel",
        dict(in_channels=4, dim=80, n_layers=4, n_refiner_layers=3, n_heads=5, n_kv_heads=5,
            cap_feat_dim=20, axes_dims=ROPE, axes_lens=(64, 64, 64)),
        dict(x=ragged(4, 1, 8, 12), t=T, cap_feats=ragged(7, 20))),
    "qwenimage": ("QwenImageTransformer2DModel",
        dict(BLOCKS, patch_size=2, in_channels=16, out_channels=4, joint_attention_dim=20,
            axes_dims_rope=ROPE),
        dict(TEXTED, hidden_states=normal(24, 16), encoder_hidden_states_mask=MASK,
            img_shapes=lambda rows: [[(1, 4, 6)]] * len(rows))),
    "allegro": ("AllegroTransformer3DModel",
        dict(num_attention_heads=5, attention_head_dim=24, **IN_OUT, **DEEP,
            cross_attention_dim=120, sample_width=12, sample_height=8, sample_frames=6,
            caption_channels=20),
        dict(TEXTED_VIDEO, attention_mask=ones(6, 8, 12, dtype=torch.float32),
            encoder_attention_mask=ones(7))),
    "latte": ("LatteTransformer3DModel",
        dict(PLAIN, cross_attention_dim=80, attention_bias=True, sample_size=8, patch_size=2,
            activation_fn="gelu-approximate", norm_type="ada_norm_single",
            norm_elementwise_affine=False, caption_channels=20, video_length=6),
        dict(TEXTED, hidden_states=normal(4, 6, 8, 8))),
    "cogview3plus": ("CogView3PlusTransformer2DModel", dict(COGVIEW, pos_embed_max_size=12),
        dict(TEXTED_IMAGE, **SIZES)),
    "cogview4": ("CogView4Transformer2DModel", dict(COGVIEW, rope_axes_dim=(8, 8)),
        dict(TEXTED_IMAGE, **SIZES)),
    "chroma": ("ChromaTransformer2DModel",
        dict(FLUX, approximator_num_channels=16, approximator_hidden_dim=24, approximator_layers=3),
        FLUXED),
    "bria": ("BriaTransformer2DModel", FLUX, FLUXED),
    "ovis_image": ("OvisImageTransformer2DModel", dict(FLUX, out_channels=4), FLUXED),
    "longcat_image": ("LongCatImageTransformer2DModel", FLUX, FLUXED),
    "skyreels_v2": ("SkyReelsV2Transformer3DModel", WAN, TEXTED_VIDEO),
    "wan_vace": ("WanVACETransformer3DModel", dict(WAN, vace_layers=[0, 1, 2], vace_in_channels=12),
        dict(TEXTED_VIDEO, control_hidden_states=normal(12, 6, 8, 12))),
    "hunyuan_dit": ("HunyuanDiT2DModel",
        dict(HEADS, num_layers=6, in_channels=4, patch_size=2, sample_size=8, hidden_size=80,
            mlp_ratio=1.0, learn_sigma=False, cross_attention_dim=20, cross_attention_dim_t5=24,
            pooled_projection_dim=18, text_len=7, text_len_t5=9,
            use_style_cond_and_image_meta_size=False),
        dict(TEXTED_IMAGE, text_embedding_mask=MASK, encoder_hidden_states_t5=normal(9, 24),
            text_embedding_mask_t5=ones(9, dtype=torch.bool), image_rotary_emb=rotary(24, 16))),
    "omnigen": ("OmniGenTransformer2DModel",
        dict(DEEP, in_channels=4, patch_size=2, hidden_size=80, num_attention_heads=5,
            num_key_value_heads=5, intermediate_size=72, pad_token_id=0, vocab_size=61,
            pos_embed_max_size=8, time_step_dim=16,
            rope_scaling=dict(short_factor=[1.0] * 8, long_factor=[1.0] * 8)),
        dict(hidden_states=IMAGE, timestep=T, input_ids=tokens(7), input_img_latents=[],
            input_image_sizes={}, attention_mask=ones(32, 32),
            position_ids=same(list(range(32))))),
    "hidream": ("HiDreamImageTransformer2DModel",
        dict(HEADS, **IN_OUT, **TWO_STACKS, patch_size=2, caption_channels=[20, 22],
            text_emb_dim=18, num_routed_experts=6, num_activated_experts=4, axes_dims_rope=ROPE,
            max_resolution=(8, 12), llama_layers=list(range(8))),
        dict(hidden_states=IMAGE, timesteps=T, encoder_hidden_states_t5=normal(9, 20),
            encoder_hidden_states_llama3=normal(8, 7, 22, axis=1), pooled_embeds=POOLED)),
    "bria_fibo": ("BriaFiboTransformer2DModel", dict(FLUX, text_encoder_dim=22),
        dict(FLUXED, text_encoder_layers=lambda rows: [normal(7, 22)(rows) for _ in range(8)])),
    "hunyuan_image": ("HunyuanImageTransformer2DModel",
        dict(HUNYUAN, patch_size=(2, 2), rope_axes_dim=(8, 8)),
        MASKED_IMAGE),
    "hunyuan_video15": ("HunyuanVideo15Transformer3DModel",
        dict(PLAIN, num_refiner_layers=3, patch_size=2, text_embed_dim=20, text_embed_2_dim=22,
            image_embed_dim=18, rope_axes_dim=ROPE),
        dict(MASKED_VIDEO, encoder_hidden_states_2=normal(9, 22),
            encoder_attention_mask_2=ones(9, dtype=torch.bool), image_embeds=normal(11, 18))),
    "hunyuan_video_framepack": ("HunyuanVideoFramepackTransformer3DModel",
        dict(HUNYUAN, pooled_projection_dim=18, has_image_proj=True, image_proj_dim=18,
            has_clean_x_embedder=True),
        dict(MASKED_VIDEO, pooled_projections=POOLED, guidance=same(4.0),
            image_embeds=normal(11, 18), indices_latents=positions(6),
            latents_clean=normal(4, 1, 8, 12),
            indices_latents_clean=positions(6, 7),
            latents_history_2x=normal(4, 4, 8, 12),
            indices_latents_history_2x=positions(7, 11),
            latents_history_4x=normal(4, 4, 8, 12),
            indices_latents_history_4x=positions(11, 15))),
    "chronoedit": ("ChronoEditTransformer3DModel", WAN_I2V, FROM_IMAGE),
    "sana_video": ("SanaVideoTransformer3DModel", dict(SANA, patch_size=(1, 2, 2)), MASKED_VIDEO),
    "cosmos": ("CosmosTransformer3DModel",
        dict(PLAIN, mlp_ratio=1.0, text_embed_dim=20, adaln_lora_dim=12, max_size=(6, 8, 12),
            concat_padding_mask=False),
        TEXTED_VIDEO),
    "kandinsky5": ("Kandinsky5Transformer3DModel", KANDINSKY,
        dict(TEXTED, hidden_states=normal(6, 8, 12, 4), pooled_projections=POOLED,
            text_rope_pos=positions(7),
            visual_rope_pos=once(lambda: (*map(torch.arange, (6, 4, 6)),)))),
    "kandinsky6": ("Kandinsky6Transformer3DModel",
        dict(KANDINSKY, visual_cond=False, in_audio_dim=9, out_audio_dim=9),
        dict(TEXTED, hidden_states=normal(6, 8, 12, 4), pooled_projections=POOLED,
            audio_hidden_states=normal(11, 9))),
    "prior": ("PriorTransformer",
        dict(BLOCKS, embedding_dim=18, num_embeddings=7, additional_embeddings=4),
        dict(hidden_states=POOLED, timestep=T, proj_embedding=POOLED,
            encoder_hidden_states=normal(7, 18), attention_mask=MASK)),
    "transformer_2d": ("Transformer2DModel",
        dict(BLOCKS, in_channels=8, norm_num_groups=4, cross_attention_dim=20),
        dict(hidden_states=normal(8, 4, 6), encoder_hidden_states=TEXT)),
    "dreamlite": ("DreamLiteTransformer2DModel",
        dict(BLOCKS, in_channels=8, norm_num_groups=4, cross_attention_dim=20),
        dict(hidden_states=normal(8, 4, 6), encoder_hidden_states=TEXT)),
    "easyanimate": ("EasyAnimateTransformer3DModel",
        dict(PLAIN, patch_size=2, sample_width=12, sample_height=8, mmdit_layers=3,
            time_embed_dim=12, text_embed_dim=20),
        TEXTED_VIDEO),
    "consisid": ("ConsisIDTransformer3DModel", COGVIDEO, dict(TEXTED, hidden_states=FRAMES)),
    "stable_audio": ("StableAudioDiTModel",
        dict(IN_OUT, **DEEP, sample_size=24, attention_head_dim=16, num_attention_heads=8,
            num_key_value_attention_heads=4, cross_attention_dim=64, time_proj_dim=16,
            global_states_input_dim=18, cross_attention_input_dim=20),
        dict(TEXTED, hidden_states=normal(4, 24), global_hidden_states=normal(1, 18),
            rotary_embedding=rotary(25, 8))),
    "lumina_next": ("LuminaNextDiT2DModel",
        dict(DEEP, in_channels=4, hidden_size=80, sample_size=8, num_attention_heads=5,
            num_kv_heads=5, multiple_of=4, cross_attention_dim=20, learn_sigma=False),
        dict(TEXTED_IMAGE, encoder_mask=ones(7),
            image_rotary_emb=rotary(9, 9, 8, complex=True),
            cross_attention_kwargs=once(dict))),
    "flux3": ("Flux3Transformer2DModel",
        dict(HEADS, **TWO_STACKS, in_channels=4, cond_in_channels=6, joint_attention_dim=20,
            timestep_channels=16, axes_dims_rope=(4, 4, 4, 4)),
        dict(TEXTED_PACKED, **FLUX2_IDS,
            image_cond_hidden_states=normal(9, 6), image_cond_ids=grid(9, axes=4))),
    "prx": ("PRXTransformer2DModel",
        dict(in_channels=4, context_in_dim=20, hidden_size=80, num_heads=5, depth=4,
            axes_dim=[8, 8]),
        dict(TEXTED_IMAGE, attention_mask=MASK)),
    "glm_image": ("GlmImageTransformer2DModel",
        dict(PLAIN, text_embed_dim=20, time_embed_dim=8, condition_dim=6,
            prior_vq_quantizer_codebook_size=61),
        dict(TEXTED_IMAGE, prior_token_id=tokens(24), prior_token_drop=same([False] * 24),
            target_size=SIZES["target_size"], crop_coords=SIZES["crop_coords"])),
    "ernie_image": ("ErnieImageTransformer2DModel",
        dict(IN_OUT, **DEEP, hidden_size=80, num_attention_heads=5, ffn_hidden_size=72,
            patch_size=2, text_in_dim=20, rope_axes_dim=ROPE),
        dict(hidden_states=IMAGE, timestep=T, text_bth=TEXT, text_lens=same(7))),
    "ideogram4": ("Ideogram4Transformer2DModel",
        dict(BLOCKS, in_channels=4, intermediate_size=72, adaln_dim=24, llm_features_dim=20,
            mrope_section=(4, 2, 2)),
        dict(hidden_states=normal(31, 4), timestep=T, encoder_hidden_states=normal(31, 20),
            position_ids=same([[n, n, n] for n in range(31)]), segment_ids=same([1] * 31),
            indicator=same([3] * 7 + [2] * 24))),
    "joyimage": ("JoyImageEditTransformer3DModel",
        dict(DEEP, in_channels=4, hidden_size=80, num_attention_heads=5, text_dim=20,
            mlp_width_ratio=1.0, rope_dim_list=[4, 4, 8]),
        TEXTED_VIDEO),
    "helios": ("HeliosTransformer3DModel",
        dict(PLAIN, text_dim=20, freq_dim=32, ffn_dim=72, rope_dim=ROPE,
            has_multi_term_memory_patch=False),
        TEXTED_VIDEO),
    "anyflow": ("AnyFlowTransformer3DModel",
        WAN,
        dict(hidden_states=FRAMES, timestep=same([5.0] * 6), r_timestep=same([4.0] * 6),
            encoder_hidden_states=TEXT)),
    "nucleus_moe_image": ("NucleusMoEImageTransformer2DModel",
        dict(BLOCKS, in_channels=16, out_channels=4, joint_attention_dim=20, axes_dims_rope=ROPE,
            num_experts=6, moe_intermediate_dim=40, capacity_factors=4.0,
            dense_moe_strategy="leave_first_block_dense"),
        dict(TEXTED, hidden_states=normal(24, 16), img_shapes=lambda rows: [(1, 4, 6)] * len(rows),
            encoder_hidden_states_mask=MASK)),
    "minimax_music3": ("MiniMaxMusic3Transformer1DModel",
        dict(BLOCKS, in_channels=4, condition_dim=20, ff_inner_dim=72, rotary_dim=8,
            fourier_embedding_dim=16),
        dict(hidden_states=normal(4, 24), timestep=T, encoder_hidden_states=normal(24, 20))),
    "stable_audio3": ("StableAudio3DiTModel",
        dict(io_channels=4, embed_dim=80, depth=4, num_heads=5, cond_token_dim=20,
            global_cond_dim=18, local_add_cond_dim=6, timestep_features_dim=16, ff_mult=1.0,
            num_memory_tokens=9),
        dict(TEXTED, hidden_states=normal(4, 24), global_hidden_states=POOLED,
            local_add_cond=normal(6, 24))),
    "longcat_audio": ("LongCatAudioDiTTransformer",
        dict(dit_dim=80, dit_depth=4, dit_heads=5, dit_text_dim=20, latent_dim=4, ff_mult=1.0),
        dict(MASKED_PACKED, attention_mask=ones(24, dtype=torch.bool), latent_cond=PACKED)),
    "ace_step": ("AceStepTransformer1DModel",
        dict(hidden_size=128, intermediate_size=72, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, head_dim=16, in_channels=12, audio_acoustic_hidden_dim=4,
            encoder_hidden_size=20),
        dict(TEXTED_PACKED, timestep_r=T, context_latents=normal(24, 8))),
    "krea2": ("Krea2Transformer2DModel",
        dict(DEEP, in_channels=4, attention_head_dim=16, num_attention_heads=8,
            num_key_value_heads=4, intermediate_size=72, timestep_embed_dim=16, text_hidden_dim=80,
            num_text_layers=6, text_num_attention_heads=5, text_num_key_value_heads=5,
            text_intermediate_size=72, num_layerwise_text_blocks=3, num_refiner_text_blocks=3,
            axes_dims_rope=ROPE),
        dict(hidden_states=PACKED, encoder_hidden_states=normal(7, 6, 80), timestep=T,
            position_ids=grid(31), encoder_attention_mask=MASK)),
    "motif_video": ("MotifVideoTransformer3DModel",
        dict(HEADS, **IN_OUT, **TWO_STACKS, mlp_ratio=1.0, text_embed_dim=20, rope_axes_dim=ROPE,
            num_decoder_layers=3),
        MASKED_VIDEO),
    "qwenimage21": ("QwenImage21Transformer2DModel",
        dict(PLAIN, context_in_dim=20, mlp_ratio=1, axes_dims_rope=ROPE),
        dict(TEXTED_PACKED, img_shapes=lambda rows: [[(1, 4, 6)]] * len(rows),
            img_mask=same([False] * 7 + [True] * 6), encoder_hidden_states_mask=MASK)),
    "ltx2": ("LTX2VideoTransformer3DModel",
        dict(PLAIN, cross_attention_dim=80, caption_channels=20, audio_in_channels=6,
            audio_out_channels=6, audio_num_attention_heads=4, audio_attention_head_dim=12,
            audio_cross_attention_dim=48, vae_scale_factors=(8, 8, 8)),
        dict(TEXTED, hidden_states=normal(144, 4), audio_hidden_states=normal(11, 6),
            audio_encoder_hidden_states=TEXT, sigma=T, num_frames=6, height=4, width=6,
            audio_num_frames=11)),
    "t5_film": ("T5FilmDecoder",
        dict(DEEP, input_dims=9, targets_length=24, d_model=80, num_heads=5, d_kv=16, d_ff=72),
        dict(encodings_and_masks=lambda rows: [(normal(7, 80)(rows), MASK(rows))],
            decoder_input_tokens=normal(24, 9), decoder_noise_time=T)),
    "uvit_2d": ("UVit2DModel",
        dict(hidden_size=80, cond_embed_dim=18, micro_cond_encode_dim=8, micro_cond_embed_dim=40,
            encoder_hidden_size=20, vocab_size=61, codebook_size=60, in_channels=20,
            block_out_channels=20, num_res_blocks=3, block_num_heads=5, num_hidden_layers=4,
            num_attention_heads=5, intermediate_size=72, sample_size=8),
        dict(input_ids=tokens(4, 6),
            encoder_hidden_states=TEXT, pooled_text_emb=POOLED, micro_conds=normal(5))),
    "unet": ("UNet2DConditionModel",
        dict(IN_OUT, sample_size=16, layers_per_block=3, block_out_channels=(20, 40, 60),
            down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2, norm_num_groups=5,
            attention_head_dim=5, cross_attention_dim=20),
        dict(TEXTED, sample=normal(4, 16, 24))),
    "joyimage_plus": ("JoyImageEditPlusTransformer3DModel",
        dict(DEEP, in_channels=4, hidden_size=80, num_attention_heads=5, text_dim=20,
            mlp_width_ratio=1.0, rope_dim_list=[4, 4, 8]),
        dict(TEXTED, hidden_states=normal(24, 4, 1, 2, 2), encoder_hidden_states_mask=ones(7),
            shape_list=lambda rows: [[(1, 4, 6)]] * len(rows))),
    "bria_fibo2": ("BriaFibo2Transformer2DModel",
        dict(in_channels=4, dim=80, n_layers=4, n_refiner_layers=3, n_heads=5, cap_feat_dim=20,
            injection_layer_ids=(0, 1, 2, 3), perceiver_num_layers=3, min_num_gist_tokens=6,
            max_num_gist_tokens=10, gist_step=4, gist_min_text_len=4, gist_max_text_len=9,
            axes_dims=ROPE, axes_lens=(32, 32, 32)),
        dict(TEXTED_IMAGE, encoder_hidden_states=normal(5, 7, 20), encoder_attention_mask=MASK)),
    "wan_animate": ("WanAnimateTransformer3DModel",
        dict(WAN_I2V, in_channels=12, latent_channels=4, added_kv_proj_dim=None,
            motion_encoder_channel_sizes={"4": 12, "8": 12, "16": 12}, motion_encoder_size=16,
            motion_style_dim=9, motion_dim=6, motion_encoder_dim=12, face_encoder_hidden_dim=12,
            face_encoder_num_heads=4, inject_face_latents_blocks=1),
        dict(FROM_IMAGE, hidden_states=normal(12, 6, 8, 12), pose_hidden_states=normal(4, 5, 8, 12),
            face_pixel_values=normal(3, 17, 16, 16))),
    "sana_wm": ("SanaWMTransformer3DModel",
        dict(in_channels=4, num_layers=4, hidden_size=80, num_attention_heads=5,
            linear_head_dim=16, caption_channels=20, mlp_ratio=1.0, image_size=64),
        dict(hidden_states=normal(4, 6, 4, 6), timestep=same([[0.5] * 6]),
            encoder_hidden_states=normal(1, 7, 20), encoder_attention_mask=MASK,
            camera_conditions=normal(6, 20), chunk_plucker=normal(48, 6, 4, 6))),
    "music_rvq": ("MiniMaxMusic3RVQDepthDecoder",
        dict(DEEP, hidden_size=80, num_attention_heads=5, intermediate_size=72, audio_vocab_size=61,
            num_codebooks=7, max_position_embeddings=16),
        dict(inputs_embeds=normal(7, 80))),
})  # fmt: skip


# transformers

TOKENS = dict(
    vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.1
)
LM = dict(
    TOKENS, hidden_size=96, intermediate_size=72, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=64,
)  # fmt: skip
PROMPT = dict(input_ids=tokens(7), attention_mask=ones(7))
GENERATE = dict(PROMPT, use_cache=False)


def _transformers(
    kind: str,
    table: Mapping[str, tuple[str, Mapping[str, Any]]],
    *,
    base: Mapping[str, Any] = LM,
    inputs: Mapping[str, object] = PROMPT,
) -> list[Tiny]:
    return [
        Tiny(name, "transformers", kind, cls, {**base, **config}, draw(**inputs))
        for name, (cls, config) in table.items()
    ]


WIDE = dict(head_dim=12)
EXPERTS = dict(num_experts=6, num_local_experts=6, num_experts_per_tok=4, moe_intermediate_size=40)
ROUTED = dict(
    n_routed_experts=6, num_experts_per_tok=4, n_group=1, topk_group=1, n_shared_experts=1,
    first_k_dense_replace=1, moe_intermediate_size=40,
)  # fmt: skip
LATENT = dict(
    ROUTED, q_lora_rank=40, kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=6,
    v_head_dim=12, head_dim=6, num_key_value_heads=8,
)  # fmt: skip
SLIDING = dict(layer_types=["sliding_attention", "full_attention"] * 2)

# name: class, config beside LM
DECODERS = _transformers("decoder", inputs=GENERATE, table={
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", WIDE),
    "gemma": ("GemmaForCausalLM", WIDE),
    "gemma2": ("Gemma2ForCausalLM", WIDE),
    "gemma3_text": ("Gemma3ForCausalLM", dict(WIDE, **SLIDING)),
    "gemma3n_text": ("Gemma3nForCausalLM",
        dict(WIDE, **SLIDING, hidden_size_per_layer_input=20, vocab_size_per_layer_input=61,
            altup_num_inputs=4, laurel_rank=10, num_kv_shared_layers=2,
            intermediate_size=[72] * 4, activation_sparsity_pattern=[0.0] * 4)),
    "phi": ("PhiForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt_neo": ("GPTNeoForCausalLM",
        dict(num_layers=4, attention_types=[[["global", "local"], 2]])),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "gptj": ("GPTJForCausalLM", dict(rotary_dim=6)),
    "codegen": ("CodeGenForCausalLM", dict(rotary_dim=6)),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {}),
    "ctrl": ("CTRLLMHeadModel", dict(dff=72)),
    "opt": ("OPTForCausalLM", dict(ffn_dim=72, word_embed_proj_dim=96)),
    "xglm": ("XGLMForCausalLM", dict(ffn_dim=72)),
    "biogpt": ("BioGptForCausalLM", {}),
    "bloom": ("BloomForCausalLM", {}),
    "falcon": ("FalconForCausalLM", dict(new_decoder_architecture=True, num_kv_heads=4)),
    "falcon_mqa": ("FalconForCausalLM", {}),
    "mpt": ("MptForCausalLM", {}),
    "stablelm": ("StableLmForCausalLM", dict(partial_rotary_factor=0.5)),
    "persimmon": ("PersimmonForCausalLM", {}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "cohere": ("CohereForCausalLM", dict(logit_scale=1.0)),
    "cohere2": ("Cohere2ForCausalLM", dict(WIDE, **SLIDING, logit_scale=1.0)),
    "olmo": ("OlmoForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", SLIDING),
    "granite": ("GraniteForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "exaone4": ("Exaone4ForCausalLM", WIDE),
    "nemotron": ("NemotronForCausalLM", WIDE),
    "diffllama": ("DiffLlamaForCausalLM", {}),
    "apertus": ("ApertusForCausalLM", {}),
    "hunyuan_dense": ("HunYuanDenseV1ForCausalLM", WIDE),
    "mixtral": ("MixtralForCausalLM", EXPERTS),
    "phimoe": ("PhimoeForCausalLM", dict(EXPERTS, num_experts_per_tok=2)),
    "granitemoe": ("GraniteMoeForCausalLM", EXPERTS),
    "qwen2_moe": ("Qwen2MoeForCausalLM", dict(EXPERTS, shared_expert_intermediate_size=40)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", dict(EXPERTS, **WIDE)),
    "olmoe": ("OlmoeForCausalLM", EXPERTS),
    "gpt_oss": ("GptOssForCausalLM", dict(EXPERTS, **WIDE, **SLIDING)),
    "deepseek_v2": ("DeepseekV2ForCausalLM", LATENT),
    "deepseek_v3": ("DeepseekV3ForCausalLM", LATENT),
    "glm4_moe": ("Glm4MoeForCausalLM", dict(ROUTED, **WIDE)),
    "dots1": ("Dots1ForCausalLM", dict(ROUTED, **WIDE)),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM",
        dict(moe_num_experts=6, moe_k=4, moe_intermediate_size=40, moe_layer_start_index=1)),
    "hunyuan_moe": ("HunYuanMoEV1ForCausalLM", dict(WIDE, num_experts=6, moe_topk=4)),
    "jetmoe": ("JetMoeForCausalLM", dict(EXPERTS, kv_channels=12)),
    "llama4_text": ("Llama4ForCausalLM",
        dict(EXPERTS, **WIDE, interleave_moe_layer_step=1, intermediate_size_mlp=40)),
})  # fmt: skip

HYBRID = dict(layer_types=["linear_attention", "full_attention"] * 2)
MAMBA2 = dict(mamba_d_head=12, mamba_d_state=10, mamba_n_groups=4)

RECURRENT = _transformers("recurrent", inputs=GENERATE, table={
    "mamba": ("MambaForCausalLM", dict(state_size=10)),
    "mamba2": ("Mamba2ForCausalLM",
        dict(state_size=10, num_heads=16, head_dim=12, n_groups=4, chunk_size=8)),
    "falcon_mamba": ("FalconMambaForCausalLM", dict(state_size=10)),
    "rwkv": ("RwkvForCausalLM", dict(attention_hidden_size=96, context_length=64)),
    "jamba": ("JambaForCausalLM",
        dict(num_experts=6, num_experts_per_tok=4, attn_layer_period=2, attn_layer_offset=1,
            expert_layer_period=2, expert_layer_offset=1, mamba_d_state=10, mamba_dt_rank=9)),
    "bamba": ("BambaForCausalLM",
        dict(MAMBA2, mamba_n_heads=16, attn_layer_indices=[1, 3], mamba_chunk_size=8)),
    "falcon_h1": ("FalconH1ForCausalLM",
        dict(MAMBA2, mamba_d_ssm=96, mamba_n_heads=8, mamba_chunk_size=8)),
    "qwen3_next": ("Qwen3NextForCausalLM",
        dict(EXPERTS, **WIDE, **HYBRID, shared_expert_intermediate_size=40,
            linear_num_value_heads=8, linear_num_key_heads=4, linear_key_head_dim=12,
            linear_value_head_dim=12)),
    "lfm2": ("Lfm2ForCausalLM", dict(layer_types=["conv", "full_attention"] * 2)),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM",
        dict(WIDE, lru_width=96, block_types=["recurrent", "attention"],
            attention_window_size=16)),
    "minimax": ("MiniMaxForCausalLM", dict(EXPERTS, **WIDE, **HYBRID, block_size=4)),
})  # fmt: skip

# Images are 5 channels of 20 by 20 (25 patches), sounds 500 samples or 50 frames of 20 bands.
VIT = dict(LM, image_size=20, patch_size=4, num_channels=5)
PIXELS = dict(pixel_values=normal(5, 20, 20))
SPEECH = dict(
    LM, conv_dim=(20, 24), conv_kernel=(6, 5), conv_stride=(5, 4), num_feat_extract_layers=2,
    num_conv_pos_embeddings=5, num_conv_pos_embedding_groups=4, mask_time_prob=0.0,
)  # fmt: skip
T5 = dict(TOKENS, d_model=96, d_kv=12, d_ff=72, num_layers=4, num_heads=8, decoder_start_token_id=1)
BART = dict(
    TOKENS, d_model=96, encoder_layers=4, decoder_layers=4, encoder_ffn_dim=72, decoder_ffn_dim=72,
    encoder_attention_heads=8, decoder_attention_heads=8, init_std=0.1, decoder_start_token_id=1,
    forced_eos_token_id=None, max_position_embeddings=64,
)  # fmt: skip

ENCODERS = [
    *_transformers("encoder", {
        "bert": ("BertModel", {}),
        "roberta": ("RobertaModel", {}),
        "distilbert": ("DistilBertModel", dict(hidden_dim=72)),
        "albert": ("AlbertModel", dict(embedding_size=20)),
        "electra": ("ElectraModel", dict(embedding_size=20)),
        "modernbert": ("ModernBertModel", dict(cls_token_id=1, sep_token_id=2)),
        "deberta_v2": ("DebertaV2Model",
            dict(relative_attention=True, position_biased_input=False,
                pos_att_type=["p2c", "c2p"])),
        "mpnet": ("MPNetModel", {}),
        "esm": ("EsmModel", dict(position_embedding_type="rotary", mask_token_id=2)),
        "roformer": ("RoFormerModel", {}),
        "squeezebert": ("SqueezeBertModel", dict(embedding_size=96)),
        "clip_text": ("CLIPTextModel", dict(eos_token_id=2)),
        "siglip_text": ("SiglipTextModel", dict(projection_size=96)),
    }),
    *_transformers("encoder", {"t5_encoder": ("T5EncoderModel", {})}, base=T5),
    *_transformers("encoder", base=TOKENS, table={
        "xlnet": ("XLNetModel", dict(d_model=96, n_layer=4, n_head=8, d_inner=72)),
    }),
    *_transformers("encoder", {"fnet": ("FNetModel", {})}, inputs=dict(input_ids=tokens(7))),
    *_transformers("encoder", base=VIT, inputs=PIXELS, table={
        "vit": ("ViTModel", {}),
        "beit": ("BeitModel", {}),
        "dinov2": ("Dinov2Model", {}),
        "dinov3_vit": ("DINOv3ViTModel", {}),
        "ijepa": ("IJepaModel", {}),
        "clip_vision": ("CLIPVisionModel", {}),
        "siglip_vision": ("SiglipVisionModel", {}),
    }),
    *_transformers("encoder", base={}, inputs=PIXELS, table={
        "swin": ("SwinModel",
            dict(image_size=20, patch_size=2, num_channels=5, embed_dim=48, depths=[3, 3],
                num_heads=[4, 8], window_size=5, initializer_range=0.1)),
    }),
    *_transformers("encoder", {"videomae": ("VideoMAEModel", dict(num_frames=6))}, base=VIT,
        inputs=dict(pixel_values=normal(6, 5, 20, 20))),
    *_transformers("encoder", base=SPEECH, inputs=dict(input_values=normal(500)), table={
        "wav2vec2": ("Wav2Vec2Model", {}),
        "hubert": ("HubertModel", {}),
        "wavlm": ("WavLMModel", {}),
    }),
    *_transformers("encoder", inputs=dict(input_values=normal(50, 20)), table={
        "audio_spectrogram": ("ASTModel",
            dict(max_length=50, num_mel_bins=20, patch_size=5, frequency_stride=5,
                time_stride=5)),
    }),
]  # fmt: skip

SEQ2SEQ = dict(PROMPT, decoder_input_ids=tokens(9), use_cache=False)
SPOKEN = dict(input_features=normal(20, 50), decoder_input_ids=tokens(9), use_cache=False)

ENCODER_DECODERS = [
    *_transformers("encoder-decoder", base=T5, inputs=SEQ2SEQ, table={
        "t5": ("T5ForConditionalGeneration", {}),
        "umt5": ("UMT5ForConditionalGeneration", {}),
        "switch_transformers": ("SwitchTransformersForConditionalGeneration",
            dict(num_decoder_layers=4, num_experts=6)),
    }),
    *_transformers("encoder-decoder", base=BART, inputs=SEQ2SEQ, table={
        "bart": ("BartForConditionalGeneration", {}),
        "mbart": ("MBartForConditionalGeneration", {}),
        "marian": ("MarianMTModel", {}),
        "pegasus": ("PegasusForConditionalGeneration", {}),
        "blenderbot": ("BlenderbotForConditionalGeneration", {}),
        "m2m_100": ("M2M100ForConditionalGeneration", {}),
    }),
    *_transformers("encoder-decoder", base=TOKENS, inputs=SEQ2SEQ, table={
        "prophetnet": ("ProphetNetForConditionalGeneration",
            dict(hidden_size=96, num_encoder_layers=4, num_decoder_layers=4, encoder_ffn_dim=72,
                decoder_ffn_dim=72, num_encoder_attention_heads=8,
                num_decoder_attention_heads=8, decoder_start_token_id=1)),
    }),
    *_transformers("encoder-decoder", base=BART, inputs=SPOKEN, table={
        "whisper": ("WhisperForConditionalGeneration",
            dict(num_mel_bins=20, max_source_positions=25, max_target_positions=64)),
    }),
]  # fmt: skip

TINY: dict[str, Tiny] = {
    tiny.name: tiny for tiny in (*DIFFUSION, *DECODERS, *ENCODERS, *ENCODER_DECODERS, *RECURRENT)
}

# Classes left out, and why.
UNBUILT: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": "flex_attention block masks",
    "Cosmos3OmniTransformer": "one packed sequence without a batch axis",
    "DbrxForCausalLM": "broken in transformers 5.23: its attention config has no rope_theta",
    "GlmForCausalLM": "sets eos_token_id itself where it is None",
    "Kandinsky6SRTransformer3DModel": "uncompiled flex_attention takes over a second",
    "MiniMaxH3Transformer3DModel": "six index tensors of a packed sequence without a batch axis",
    "RFD4ProteinaTransformer": "protein features; not tried",
    "SanaWMLTX2RefinerTransformer3DModel": "the video half of LTX2; not tried",
    "TransformerTemporalModel": "batch and frames share the first axis",
    "WanAnimate2Transformer3DModel": "needs a KV cache object and flex_attention block masks",
}
