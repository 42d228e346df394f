"""Tiny models of every family with mixture-of-experts layers: ``MOE`` maps a name to a `Tiny`,
``UNSERVED`` a name to a class and why ExpertSkip does not act on it.

Those of `tiny_models`, and beside them one row for each other modelling file of transformers 5.23
that has such layers. Six experts of which four are asked, wherever the family allows it.
"""

from __future__ import annotations

from typing import Any

import tiny_models
import torch
from tiny_models import BART, EXPERTS, GENERATE, LATENT, LM, PROMPT, SEQ2SEQ, TINY, WIDE, Tiny

_transformers = tiny_models._transformers

SMALL = dict(
    hidden_size=48, intermediate_size=40, num_hidden_layers=3, moe_intermediate_size=24,
    shared_expert_intermediate_size=24, shared_experts_intermediate_size=24,
    moe_shared_expert_intermediate_size=24, shared_intermediate_size=24, linear_head_dim=8,
    linear_num_heads=4,
)  # fmt: skip
BASE = {**LM, **LATENT, **EXPERTS, **WIDE, **SMALL, "num_key_value_heads": 4}
MLA = dict(head_dim=6, num_key_value_heads=8)
INDEXED = dict(MLA, index_n_heads=2, index_head_dim=8, index_topk=64)
LINEAR = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8
)
SHORT_TABLE = dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=61)
VISION = dict(
    hidden_size=32, intermediate_size=32, depth=1, num_hidden_layers=1, num_heads=2,
    num_attention_heads=2, patch_size=4, image_size=16, out_hidden_size=48,
)  # fmt: skip


def seeing(text: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The config of a model that also sees, of which the text half is wanted."""
    return dict(text_config={**BASE, **(text or {})}, vision_config=VISION, **more)


SPARSE = dict(mlp_layer_types=["dense", "sparse", "sparse"])

# name: class, config beside BASE
TEXT = _transformers("decoder", base=BASE, inputs=GENERATE, table={
    "afmoe": ("AfmoeForCausalLM", {}),
    "aria": ("AriaTextForCausalLM", {}),
    "axk1": ("AXK1ForCausalLM", MLA),
    "axk2": ("AXK2ForCausalLM", MLA),
    "bailing_hybrid": ("BailingHybridForCausalLM", {}),
    "beam": ("BeamForCausalLM", SPARSE),
    "cohere2_moe": ("Cohere2MoeForCausalLM", {}),
    "deepseek_v32": ("DeepseekV32ForCausalLM", INDEXED),
    "deepseek_v4": ("DeepseekV4ForCausalLM", dict(mlp_layer_types=["moe"] * 3)),
    "dots3_note": ("Dots3NoteForCausalLM",
        dict(INDEXED, layer_types=["full_attention"] * 3)),
    "exaone_moe": ("ExaoneMoeForCausalLM", {}),
    "flex_olmo": ("FlexOlmoForCausalLM", {}),
    "flint": ("FlintForCausalLM", {}),
    "gemma4": ("Gemma4ForCausalLM",
        dict(SHORT_TABLE, enable_moe_block=True, top_k_experts=4)),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", MLA),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", INDEXED),
    "granitemoe_swa": ("GraniteMoeSWAForCausalLM", {}),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM",
        dict(mamba_n_heads=8, mamba_d_head=12, mamba_d_state=8,
            layer_types=["mamba", "attention", "attention"])),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", {}),
    "hy_v3": ("HYV3ForCausalLM", {}),
    "hy_v4": ("HYV4ForCausalLM", {}),
    "inkling": ("InklingForCausalLM", {}),
    "inkling2": ("Inkling2ForCausalLM", {}),
    "kimi_linear": ("KimiLinearForCausalLM", {}),
    "kolibri1": ("Kolibri1ForCausalLM", {}),
    "laguna": ("LagunaForCausalLM", {}),
    "lfm2_moe": ("Lfm2MoeForCausalLM",
        dict(layer_types=["conv", "full_attention", "full_attention"], num_dense_layers=1)),
    "longcat_flash": ("LongcatFlashForCausalLM",
        dict(MLA, zero_expert_num=2, num_layers=2, ffn_hidden_size=40, expert_ffn_hidden_size=24)),
    "mellum": ("MellumForCausalLM", {}),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", {}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {}),
    "minimax_m3_vl": ("MiniMaxM3VLForCausalLM", {}),
    "mistral4": ("Mistral4ForCausalLM", MLA),
    "nemotron_h": ("NemotronHForCausalLM", dict(mamba_num_heads=8, mamba_head_dim=12)),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", LINEAR),
    "qwen4_exp": ("Qwen4ExpForCausalLM", LINEAR),
    "solar_open": ("SolarOpenForCausalLM", {}),
})  # fmt: skip
SEEING = _transformers("decoder", base={}, inputs=GENERATE, table={
    "ernie4_5_vl_moe": ("Ernie4_5_VLMoeForConditionalGeneration",
        seeing(dict(moe_intermediate_size=[24, 24], moe_num_experts=6, moe_k=4,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 2, 2])))),
    "glm4v_moe": ("Glm4vMoeForConditionalGeneration",
        seeing(dict(rope_parameters=dict(rope_type="default", rope_theta=1e4,
            mrope_section=[1, 1, 1])))),
    "glm5_next": ("Glm5NextForConditionalGeneration",
        seeing(dict(INDEXED, **SPARSE, head_dim=0, qk_rope_head_dim=0))),
    "mistral_large4": ("MistralLarge4ForConditionalGeneration", seeing(MLA)),
    "muse_spark": ("MuseSparkForConditionalGeneration",
        seeing(dict(moe_hidden_size=32, sliding_window=8), out_hidden_size=32,
            projector_hidden_size=32,
            audio_config=dict(out_hidden_size=48, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]))),
    "qwen3_omni_moe": ("Qwen3OmniMoeThinkerForConditionalGeneration",
        seeing(vision_start_token_id=50,
            audio_config=dict(d_model=32, encoder_layers=1, encoder_attention_heads=2,
                encoder_ffn_dim=32, output_dim=48, downsample_hidden_size=16))),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", seeing()),
    "step3p7": ("Step3p7ForConditionalGeneration",
        seeing(dict(SPARSE, sliding_window=8, swiglu_limits=[0.0, 0.0, 7.0]))),
    "deepseek_ocr2": ("DeepseekOcr2ForConditionalGeneration",
        dict(text_config=dict(BASE, **SPARSE),
            vision_config=dict(
                sam_config=dict(hidden_size=32, output_channels=16, num_hidden_layers=1,
                    num_attention_heads=2, downsample_channels=[16, 32], mlp_dim=32,
                    image_size=64, global_attn_indexes=[0]),
                encoder_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2)))),
    "unlimited_ocr": ("UnlimitedOcrForConditionalGeneration",
        dict(text_config=dict(BASE, **SPARSE),
            vision_config=dict(
                sam_config=dict(hidden_size=32, output_channels=16, num_hidden_layers=1,
                    num_attention_heads=2, downsample_channels=[16, 32], mlp_dim=32,
                    image_size=64, global_attn_indexes=[0]),
                encoder_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                    num_attention_heads=2)))),
})  # fmt: skip
OTHERS = [
    *_transformers("encoder-decoder", base={}, inputs=SEQ2SEQ, table={
        "diffusion_gemma": ("DiffusionGemmaForBlockDiffusion",
            seeing(dict(SHORT_TABLE, enable_moe_block=True, top_k_experts=4))),
    }),
    *_transformers("encoder", base=BASE, inputs=PROMPT, table={
        "openai_privacy_filter": ("OpenAIPrivacyFilterForTokenClassification", {}),
    }),
    *_transformers("encoder-decoder", base=BART, inputs=SEQ2SEQ, table={
        "nllb_moe": ("NllbMoeForConditionalGeneration",
            dict(num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2, expert_capacity=64)),
    }),
]  # fmt: skip
KNOWN = (
    "mixtral", "phimoe", "granitemoe", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2",
    "deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe", "hunyuan_moe", "jamba", "qwen3_next",
    "minimax", "hidream", "nucleus_moe_image",
)  # fmt: skip

MOE: dict[str, Tiny] = {
    **{name: TINY[name] for name in KNOWN},
    **{tiny.name: tiny for tiny in (*TEXT, *SEEING, *OTHERS)},
}

UNSERVED: dict[str, tuple[str, str]] = {
    "cosmos3": ("Cosmos3OmniTransformer",
        "two towers, one a modality, under names with moe in them: nothing is routed"),
    "dbrx": ("DbrxForCausalLM",
        "not built: broken in transformers 5.23, its attention config has no rope_theta"),
    "doge": ("DogeForCausalLM",
        "its experts are rows of two embeddings inside an MLP, less work than their router"),
    "jetmoe": ("JetMoeForCausalLM",
        "its experts are two modules of its MLP, and its attention has experts, too: no module is "
        "given hidden states, indices and weights"),
    "llama4": ("Llama4ForCausalLM",
        "runs every expert on every token; weights of zero are in the input, no work is saved"),
    "switch_transformers": ("SwitchTransformersForConditionalGeneration",
        "one expert a token: there is none to leave out"),
    "vitpose_backbone": ("VitPoseBackbone",
        "the caller says which expert, one an image; there is no router"),
    "zaya": ("ZayaForCausalLM", "one expert a token: there is none to leave out"),
}  # fmt: skip

# Those of them that a tiny configuration builds.
REFUSED: dict[str, Tiny] = {
    "jetmoe": TINY["jetmoe"],
    "llama4": TINY["llama4_text"],
    "switch_transformers": TINY["switch_transformers"],
    **{
        tiny.name: tiny
        for tiny in (
            *_transformers("decoder", base=BASE, inputs=GENERATE, table={
                "doge": ("DogeForCausalLM", dict(is_moe=True, num_experts=16)),
                "zaya": ("ZayaForCausalLM", dict(num_experts_per_tok=1)),
            }),
            *_transformers("encoder", base={}, table={
                "vitpose_backbone": ("VitPoseBackbone",
                    dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_experts=4,
                        part_features=8, image_size=(16, 16), patch_size=(4, 4))),
            }, inputs=dict(pixel_values=tiny_models.normal(3, 16, 16),
                dataset_index=lambda rows: torch.zeros(len(rows), dtype=torch.long))),
        )
    },
}  # fmt: skip
