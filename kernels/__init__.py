"""The arithmetic made fast: one file an op."""

from __future__ import annotations

from accelerate_hooks.kernels._dispatch import FALLBACKS, KernelError, heard, in_given_dtype
from accelerate_hooks.kernels.acceptance import esap
from accelerate_hooks.kernels.block_sparse import block_sparse_attention
from accelerate_hooks.kernels.experts import skip_experts
from accelerate_hooks.kernels.pooling import pool_tokens
from accelerate_hooks.kernels.selection import Rule, Selection, attention_mass, select_blocks
from accelerate_hooks.kernels.windows import tile_order, window_attention

__all__ = [
    "FALLBACKS",
    "KernelError",
    "Rule",
    "Selection",
    "attention_mass",
    "block_sparse_attention",
    "esap",
    "heard",
    "in_given_dtype",
    "pool_tokens",
    "select_blocks",
    "skip_experts",
    "tile_order",
    "window_attention",
]
