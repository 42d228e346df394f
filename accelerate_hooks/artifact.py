"""What fitting made: gates, thresholds, probes, budgets, plans. One format, one loader.

A file is safetensors. Its header carries `format`, `version` and `meta`, a JSON object that says
what the tensors were made for; `Artifact.check` compares that with what is at hand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from accelerate_hooks._files import write_atomically
from accelerate_hooks._identity import canonical, config_hash, identity, versions
from accelerate_hooks.errors import ArtifactError

__all__ = ["Artifact", "config_hash"]

FORMAT, VERSION = "accelerate_hooks.artifact", "1"
REQUIRED = ("policy", "model", "config_hash")


@dataclass(frozen=True, eq=False)
class Artifact:
    """Tensors and what they were made for; equal and hashed by content, never changed.

    tensors: by name; copied to the CPU, detached.
    meta: JSON values. `policy`, `model` (class name) and `config_hash` are required; `steps`,
        `scheduler`, `resolution`, `guidance`, `data`, `versions` and more may be there.
    path: the file it was last saved to or loaded from, if any; no part of the content.

    Raises ArtifactError if `meta` is not JSON or lacks a required key.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    meta: Mapping[str, Any]
    path: Path | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in sorted(self.tensors.items())
        }
        try:
            meta = json.loads(json.dumps(dict(self.meta), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"the meta of an artifact has to be JSON: {error}") from error
        if missing := [key for key in REQUIRED if not isinstance(meta.get(key), str)]:
            raise ArtifactError(f"the meta of an artifact lacks {', '.join(missing)}")
        object.__setattr__(self, "tensors", MappingProxyType(tensors))
        object.__setattr__(self, "meta", MappingProxyType(meta))

    @classmethod
    def create(
        cls, tensors: Mapping[str, Tensor], *, policy: str, model: nn.Module, **meta: Any
    ) -> Artifact:
        """A new artifact for this policy and model; fills in class, config hash and versions."""
        made_for = {"policy": policy, **identity(model), "versions": versions()}
        return cls(tensors, made_for | meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Artifact:
        """Reads a file that `save` wrote; ArtifactError names path, cause and fix otherwise."""
        path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                header = cast("dict[str, str]", file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise ArtifactError(f"{path}: no such artifact; check the path or fit again") from error
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{path}: not a readable safetensors file, perhaps truncated ({error}); "
                "copy it again from its source or fit again"
            ) from error
        if header.get("format") != FORMAT:
            raise ArtifactError(
                f"{path}: safetensors, but no artifact of accelerate_hooks (its metadata lacks "
                f"format={FORMAT!r}); give the file that `policy.artifact.save(path)` wrote"
            )
        if (version := header.get("version")) != VERSION:
            raise ArtifactError(
                f"{path}: format version {version!r}, this release reads {VERSION!r}; "
                "fit again or install the release that wrote it"
            )
        try:
            return cls(tensors, dict(json.loads(header["meta"])), path=path)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: damaged metadata ({error}); fit again") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file in one move, so that no reader and no crash ever sees half of it."""
        path = Path(path)
        header = {"format": FORMAT, "version": VERSION, "meta": canonical(dict(self.meta))}
        try:
            write_atomically(path, to_bytes(dict(self.tensors), header))
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be written ({error})") from error
        object.__setattr__(self, "path", path)

    def check(
        self,
        *,
        policy: str | None = None,
        model: nn.Module | None = None,
        steps: int | None = None,
        scheduler: str | None = None,
        resolution: Sequence[int] | None = None,
        guidance: float | None = None,
    ) -> None:
        """Compares what it was made for with what is at hand.

        Skips what is None here or was never recorded. Raises ArtifactError naming the field, what
        the artifact expects and what it got.
        """
        at_hand: dict[str, Any] = {"policy": policy}
        at_hand |= identity(model) if model is not None else {}
        at_hand |= {"steps": steps, "scheduler": scheduler, "guidance": guidance}
        at_hand |= {"resolution": None if resolution is None else list(resolution)}
        for key, got in at_hand.items():
            expected = self.meta.get(key)
            if got is None or expected is None or expected == got:
                continue
            name = f"{self.path}: the artifact" if self.path else "the artifact"
            raise ArtifactError(
                f"{name} was made for {key}={expected!r}, got {key}={got!r}; "
                f"use it with {expected!r} or fit again"
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content: the same for the same tensors and meta, wherever they lie."""
        content = to_bytes(dict(self.tensors)) + canonical(dict(self.meta)).encode()
        return hashlib.sha256(content).hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Artifact) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Artifact, path=self.path), (dict(self.tensors), dict(self.meta))
