"""Where the tokens of diffusers' transformers stand: one line a family.

A rule reads the grid (frames, height, width) off the arguments of the model's ``forward``, and
where text stands in a joint sequence: before the picture, behind it, or nowhere (cross-attention).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from accelerate_hooks.opaque import opaque_functions
from accelerate_hooks.patch import LayoutRule
from accelerate_hooks.site import TokenLayout

Text = Literal["first", "last"] | None
Config = Mapping[str, Any]
Given = dict[str, Any]
Values = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Latents:
    """x is the picture: ``axes`` names its dimensions (``f``, ``h``, ``w``), ``patch`` the entries
    of the config that hold the sizes of a patch in (frames, height, width): one entry with all
    three, or one each (None: 1)."""

    axes: str
    patch: tuple[str | None, ...] = (None, "patch_size", "patch_size")
    text: Text = None
    x: str = "hidden_states"

    def grid(self, config: Config, given: Given, values: Values) -> tuple[int, ...] | None:
        x = given.get(self.x)
        if not isinstance(x, torch.Tensor) or x.ndim != len(self.axes) + 1:
            return None
        sizes = dict(zip(self.axes, x.shape[1:], strict=True))
        patches: list[int] = []
        for name in self.patch:
            value = 1 if name is None else config.get(name) or 1
            patches += list(value) if isinstance(value, (list, tuple)) else [value]
        return tuple(sizes.get(a, 1) // p for a, p in zip("fhw", patches, strict=True))


@dataclass(frozen=True)
class Named:
    """The grid is among the arguments."""

    names: tuple[str, str, str]
    text: Text = None

    def grid(self, config: Config, given: Given, values: Values) -> tuple[int, ...] | None:
        found = [given.get(name) for name in self.names]
        return None if None in found else tuple(int(size) for size in found if size is not None)


@dataclass(frozen=True)
class Positions:
    """``ids`` holds (index, row, column) of each token of one picture in raster order."""

    ids: str
    text: Text = None

    def grid(self, config: Config, given: Given, values: Values) -> tuple[int, ...] | None:
        ids = given.get(self.ids)
        if not isinstance(ids, torch.Tensor):
            return None
        rows = values(ids)[0] if ids.ndim == 3 else values(ids)
        height, width = (int(size) + 1 for size in rows[:, 1:].amax(0))
        return (1, height, width) if height * width == len(rows) else None


@dataclass(frozen=True)
class Shapes:
    """``name`` lists (frames, height, width) of the pictures of each row of the batch."""

    name: str
    text: Text = None

    def grid(self, config: Config, given: Given, values: Values) -> tuple[int, ...] | None:
        shapes = given.get(self.name)
        while isinstance(shapes, list):
            if len({str(shape) for shape in shapes}) != 1:
                return None
            shapes = shapes[0]
        return None if shapes is None else tuple(int(size) for size in shapes)


Rule = Latents | Named | Positions | Shapes

_CUBES = ("patch_size_t", "patch_size", "patch_size")
LAYOUTS: dict[str, Rule] = {
    "WanTransformer3DModel": Latents("cfhw", ("patch_size",)),
    "WanVACETransformer3DModel": Latents("cfhw", ("patch_size",)),
    "HunyuanVideoTransformer3DModel": Latents("cfhw", _CUBES, "last"),
    "CogVideoXTransformer3DModel": Latents("fchw", _CUBES, "first"),
    "MochiTransformer3DModel": Latents("cfhw", text="last"),
    "LTXVideoTransformer3DModel": Named(("num_frames", "height", "width")),
    "FluxTransformer2DModel": Positions("img_ids", "first"),
    "SD3Transformer2DModel": Latents("chw", text="last"),
    "PixArtTransformer2DModel": Latents("chw"),
    "DiTTransformer2DModel": Latents("chw"),
    "QwenImageTransformer2DModel": Shapes("img_shapes", "first"),
    "UNet2DConditionModel": Latents("chw", (None, None, None), x="sample"),
}


def layout_of(model: nn.Module) -> LayoutRule | None:
    rule = next((LAYOUTS[c.__name__] for c in type(model).__mro__ if c.__name__ in LAYOUTS), None)
    if rule is None:
        return None
    return functools.partial(_layout, rule, dict(getattr(model, "config", {})))


def _layout(rule: Rule, config: Config, given: Given, values: Values) -> TokenLayout | None:
    grid = rule.grid(config, given, values)
    if grid is None:
        return None
    frames, height, width = grid
    where, text = None, given.get("encoder_hidden_states")
    if rule.text is not None and isinstance(text, torch.Tensor):
        start = 0 if rule.text == "first" else frames * height * width
        where = slice(start, start + text.shape[1])
    return TokenLayout(frames, height, width, where)


opaque_functions(globals())
