"""What can be intercepted, as data: effects, ports, sites and token layouts."""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

Kind = Literal["loop", "model", "block", "attention", "mlp", "router", "experts"]
KINDS: tuple[Kind, ...] = ("loop", "model", "block", "attention", "mlp", "router", "experts")


class Effect(enum.Enum):
    """What a policy may do at a site. Conflicts between policies are computed from these."""

    SKIP = "skip"  # leave the site's work out
    RESHAPE = "reshape"  # change the shape inside the site (fewer tokens, fewer experts)
    REPLACE = "replace"  # compute the site by other means; at most one policy a site
    OBSERVE = "observe"  # look only


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of a sequence stand: ``frames * height * width`` in raster order,
    ``text`` the slice of text tokens in a joint sequence, ``special`` leading tokens such as CLS.
    """

    frames: int
    height: int
    width: int
    text: slice | None = None
    special: int = 0

    @property
    def visual(self) -> int:
        return self.frames * self.height * self.width

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    def at(self, tokens: int) -> TokenLayout | None:
        """This layout for a sequence of ``tokens``: with its text and special tokens or without
        (a stream by itself), with less text (that left its padding out), or of a picture halved
        again and again (a U-Net's inner stages); None where none fits."""
        text = 0 if self.text is None else self.text.stop - self.text.start
        if tokens == self.visual + text + self.special:
            return self
        if tokens == self.visual:
            return TokenLayout(*self.grid)
        fewer = tokens - self.visual - self.special
        if self.text is not None and 0 <= fewer < text:
            return replace(self, text=slice(self.text.start, self.text.start + fewer))
        if self.frames == self.height == 1 and not text and not self.special:
            return TokenLayout(1, 1, tokens)  # a line has any length
        height, width = self.height, self.width
        while not text and not self.special and (height > 1 or width > 1):
            height, width = (height + 1) // 2, (width + 1) // 2
            if tokens == self.frames * height * width:
                return TokenLayout(self.frames, height, width)
        return None


TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
"""What a forward of a language model reads, by the names that are tried in turn."""


@dataclass(frozen=True)
class Port:
    """Where a site keeps its tensors among the arguments and the outputs of ``forward``.

    ``parameters`` are the names that positional arguments bind to; ``x`` and ``context`` name
    arguments. ``out`` and ``context_out`` are paths into the output: ``()`` is the output itself,
    ``(1,)`` its second element, ``None`` "the first tensor" (``x``) or "not given back" (context).
    ``streams`` are what else a block hands on to the next one: (argument, path into the output).
    ``confirmed`` ports were seen at work, the others are read off names.
    """

    parameters: tuple[str, ...]
    x: str
    context: str | None = None
    out: tuple[int | str, ...] | None = None
    context_out: tuple[int | str, ...] | None = None
    residual: bool = False
    row: Literal["batch", "token"] = "batch"
    routing: tuple[str, str] | None = None
    streams: tuple[tuple[str, tuple[int | str, ...]], ...] = ()
    confirmed: bool = False

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name (positional ones beyond the named parameters excepted)."""
        return dict(zip(self.parameters, args, strict=False)) | kwargs

    def main(self, argument: Callable[[str], Any]) -> Any:
        """The argument ``x``, or what a language model was given in its place (embeddings)."""
        x = argument(self.x)
        return next((t for t in map(argument, TOKENS) if t is not None), None) if x is None else x


@dataclass(frozen=True, eq=False)
class Site:
    """One interceptable place. A module that is visited several times in a forward (ALBERT's
    shared layer) has one site a visit; ``index`` of ``count`` is the place in its ``stack``,
    the run of blocks whose output is the next one's input. ``parts`` are the kinds of sites that
    the enclosing block has inside. It is not ``alone`` where its module is a site of another kind
    too (HiDream's MLPs are mixtures of experts). A site is itself (no equality by value): ports and
    places in a stack are learned of it later.
    """

    kind: Kind
    path: str
    module: nn.Module
    port: Port
    index: int = 0
    count: int = 1
    stack: str = ""
    visit: int = 0
    parts: frozenset[Kind] = frozenset()
    alone: bool = True

    @property
    def name(self) -> str:
        name = f"{self.path}#{self.visit}" if self.visit else self.path or "(model)"
        return name if self.alone else f"{name} ({self.kind})"

    def around(self, root: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """The modules of ``root`` around this one, innermost first, each with the name of the child
        in which it is."""
        path = self.path
        while path:
            path, _, name = path.rpartition(".")
            yield root.get_submodule(path), name

    def learn(self, **known: Any) -> None:
        """Set fields that watching a forward has shown (the runtime's, see `flow`)."""
        for name, value in known.items():
            object.__setattr__(self, name, value)

    def let_go(self) -> None:
        """Do not keep the module alive any more."""
        if "module" in vars(self):
            self.learn(_module=weakref.ref(self.module))
            object.__delattr__(self, "module")

    def __getattr__(self, name: str) -> Any:
        if name == "module" and "_module" in vars(self):
            return vars(self)["_module"]()
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<{self.kind} site {self.name!r} {self.index + 1}/{self.count}>"
