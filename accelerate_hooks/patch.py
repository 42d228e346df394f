"""What the runtime asks of a library's adapter. The default answers are structural guesses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from accelerate_hooks.site import Site, TokenLayout

LayoutRule = Callable[[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]], TokenLayout | None]
"""From the arguments of a forward, and a function that gives a tensor on the host."""


class Patch:
    """One library's (or family's) knowledge of where models can be intercepted."""

    timesteps: tuple[str, ...] = ("timestep", "timesteps", "t")
    conditions: tuple[str, ...] = ("encoder_hidden_states", "class_labels", "y")

    def matches(self, model: nn.Module) -> bool:
        raise NotImplementedError

    def sites(self, model: nn.Module) -> list[Site]:
        """The model's sites in the order of its modules, the model itself first."""
        raise NotImplementedError

    def refuses(self, site: Site) -> str | None:
        """Why a block or attention must be neither skipped nor reshaped, or None."""
        return None

    def layout_of(self, model: nn.Module) -> LayoutRule | None:
        """How the layout of a forward's tokens follows from its arguments; None where nobody knows
        for this model."""
        return None

    def noise(self, scheduler: Any) -> list[tuple[float, float]]:
        """(alpha, sigma) of the sample that the model sees at each of the scheduler's timesteps,
        ``x = alpha * clean + sigma * noise``; empty where unknown."""
        return []

    def strides(self, scheduler: Any) -> list[float]:
        """By how much each step of a first-order solver moves the sample along the model's output;
        empty for another solver."""
        return []

    def prediction(self, scheduler: Any) -> str | None:
        """What the model predicts: ``"velocity"``, ``"epsilon"``, ``"v"`` or ``"sample"``."""
        return None

    def reach_attention(
        self, site: Site, session: Any
    ) -> Callable[[Any], AbstractContextManager[Any]] | None:
        """Called once a site whose attention a policy replaces: a factory of contexts in which
        the site's attention goes through the given function; None for the default, which
        intercepts ``F.scaled_dot_product_attention``."""
        return None


class Pipeline:
    """What a multi-model target offers: its denoisers and its scheduler. ``now`` gives the target
    itself (None where it is gone), since both may be replaced; ``notes`` say what is left out."""

    def __init__(
        self,
        models: dict[str, nn.Module],
        scheduler: Any,
        now: Callable[[], Any] = lambda: None,
        notes: Sequence[str] = (),
    ) -> None:
        self.models = models
        self.notes = notes
        self.scheduler = scheduler
        self.now = now


def named_blocks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            yield name, module
