"""Which model something was made for: its class and a hash of its config, and which versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

VOLATILE = {"transformers_version", "torch_dtype", "dtype", "name_or_path", "architectures"}


def config_hash(model: nn.Module) -> str:
    """SHA-256 of the model's class name and config, or of its parameters' names and shapes.

    What differs between two loads of the same weights does not count: private keys, versions,
    dtypes, paths.
    """
    model = _uncompiled(model)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        config = {name: list(p.shape) for name, p in model.named_parameters()}
    content = [type(model).__name__, _stable(cast("Mapping[str, Any]", config))]
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def identity(model: nn.Module) -> dict[str, str]:
    """The part of an artifact's meta that says for which model it was made."""
    model = _uncompiled(model)
    return {"model": type(model).__name__, "config_hash": config_hash(model)}


def versions() -> dict[str, str]:
    """The installed versions of what shapes a fit."""
    found: dict[str, str] = {}
    for name in ("accelerate-hooks", "diffusers", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def canonical(value: Any) -> str:
    """JSON that is the same for equal values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # what torch.compile(model) wraps


def _stable(value: Any) -> Any:
    if isinstance(value, Mapping):
        items = cast("Mapping[object, Any]", value).items()
        kept = {str(key): _stable(item) for key, item in items}
        return {k: v for k, v in kept.items() if not k.startswith("_") and k not in VOLATILE}
    if isinstance(value, list | tuple):
        return [_stable(item) for item in cast("list[Any]", value)]
    if isinstance(value, set | frozenset):
        return sorted(map(str, cast("set[Any]", value)))
    return value
