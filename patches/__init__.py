"""Adapters of libraries and model families; the first that matches a model is its patch."""

from __future__ import annotations

from accelerate_hooks.patch import Patch
from accelerate_hooks.patches.diffusers import DiffusersPatch, pipeline_of
from accelerate_hooks.patches.structural import StructuralPatch
from accelerate_hooks.patches.transformers import TransformersPatch
from accelerate_hooks.patches.unet import UNetPatch

PATCHES: tuple[Patch, ...] = (
    UNetPatch(),
    DiffusersPatch(),
    TransformersPatch(),
    StructuralPatch(),
)

__all__ = [
    "PATCHES",
    "DiffusersPatch",
    "StructuralPatch",
    "TransformersPatch",
    "UNetPatch",
    "pipeline_of",
]
