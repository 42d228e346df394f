"""What a fit has measured so far, in a file: a fit that was killed goes on from there."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from accelerate_hooks._files import write_atomically
from accelerate_hooks._identity import canonical, identity
from accelerate_hooks.errors import ArtifactError

_SAMPLES = 64  # values of each weight that tell one checkpoint from another


class Resume:
    """A file for plain data and tensors, tied to what they were measured for.

    path: None keeps nothing.
    model: the model that is fitted: class, config and a sample of its weights count.
    data: the items that are measured; those that the kept state saw have to be the same ones.
    made_for: what else the measurements depend on, such as the policy's settings; told by ``str``.

    Raises ArtifactError, before anything is measured, where the file cannot be written, and from
    `load` where it cannot be read or was begun with something else.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        model: nn.Module,
        data: Sequence[Any],
        **made_for: Any,
    ) -> None:
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise ArtifactError(f"{self.path}: there is no folder to keep it in; make that first")
        self.made_for = {name: str(value) for name, value in made_for.items()}
        self.made_for |= {**identity(model), "weights": _digest(_sample(model))}
        self.data = [_digest(item) for item in data]

    def load(self) -> Any:
        """What was kept last; None at the beginning."""
        if self.path is None or not self.path.exists():
            return None
        try:
            kept = torch.load(self.path, weights_only=True)
            made_for, data, state = kept["made_for"], kept["data"], kept["state"]
        except Exception as error:  # torch.load raises what it likes
            raise ArtifactError(
                f"{self.path}: not a readable file of a fit, perhaps truncated ({error}); delete "
                "it to begin again"
            ) from error
        for name, value in self.made_for.items():
            if made_for.get(name) != value:
                raise ArtifactError(
                    f"{self.path} was begun with {name}={made_for.get(name)}, not {value}; give "
                    "another file, or that"
                )
        if data != self.data[: len(data)]:
            raise ArtifactError(
                f"{self.path} was begun with other data; give another file, or that"
            )
        return state

    def save(self, state: Any, seen: int | None = None) -> None:
        """Keep ``state``, for which ``seen`` items of the data were looked at (None: all)."""
        if self.path is None:
            return
        content = io.BytesIO()
        kept = {"made_for": self.made_for, "data": self.data[:seen], "state": state}
        torch.save(kept, content)
        try:
            write_atomically(self.path, content.getvalue())
        except OSError as error:
            raise ArtifactError(f"{self.path}: cannot be written ({error})") from error


def _sample(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        flat = p.detach().reshape(-1)
        at = torch.linspace(0, max(len(flat) - 1, 0), min(_SAMPLES, len(flat)), device="cpu").long()
        values = flat[at.to(flat.device)] if flat.device.type != "meta" else flat.new_zeros(0)
        found[name] = [str(p.dtype), tuple(p.shape), values.cpu().double()]
    return found


def _digest(value: Any) -> str:
    """SHA-256 of what ``value`` is, leaf by leaf; of objects that nobody knows, the class."""
    return hashlib.sha256(canonical(_plain(value)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        items = cast("Mapping[object, Any]", value).items()
        return {str(key): _plain(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("list[Any]", value)]
    if isinstance(value, torch.Tensor):
        bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(bits).hexdigest()]
    if isinstance(value, torch.Generator):
        return ["seed", value.initial_seed()]  # its state moves on as it is used
    if hasattr(value, "tobytes"):  # numpy, PIL
        return [type(value).__name__, hashlib.sha256(value.tobytes()).hexdigest()]
    known = value is None or isinstance(value, str | bytes | int | float | complex)
    return repr(value) if known else type(value).__qualname__
