"""``UNet2DConditionModel``: its down, mid and up blocks hand tuples of residuals to one another and
are stages, not blocks. The transformer blocks inside their attentions are the blocks, in the order
in which they are visited.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from accelerate_hooks.patches.diffusers import DiffusersPatch

_STAGES = ("down_blocks", "mid_block", "up_blocks")


class UNetPatch(DiffusersPatch):
    def matches(self, model: nn.Module) -> bool:
        return any(base.__name__ == "UNet2DConditionModel" for base in type(model).__mro__)

    def stacks(self, model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
        for stage in _STAGES:
            for name, module in model.named_modules():
                inside = name.startswith(stage) and name.endswith(".transformer_blocks")
                if inside and isinstance(module, nn.ModuleList):
                    yield name, module
