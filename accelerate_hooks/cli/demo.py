"""Generate with and without LazyStep on the shipped model, and show what was gained and lost."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from accelerate_hooks.errors import AccelerateHooksError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=32, help="images a run (default 32)")
    parser.add_argument("--rounds", type=int, default=1, help="passes over all rows (default 1)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default 50)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for what is written")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")


def run(options: argparse.Namespace) -> int:
    for name in ("batch", "rounds", "steps", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise AccelerateHooksError(f"--{name} must be at least 1")
    if (options.threads or 1) > (os.cpu_count() or 1):
        raise AccelerateHooksError(f"--threads {options.threads}: there are {os.cpu_count()} cores")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AccelerateHooksError(f"--out {options.out} is no folder: {error}") from error
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise AccelerateHooksError(
            "the demo needs diffusers; pip install 'accelerate-hooks[demo]'"
        ) from error
    import torch

    from accelerate_hooks.demo import show

    if options.threads:
        torch.set_num_threads(options.threads)
    result = show.measure(options.batch, options.rounds, options.steps)
    print(f"\n{options.batch} images of {options.steps} steps, guidance 2, two branches a step\n")
    print(result)
    print()
    if options.steps != show.STEPS:
        print(f"the learned gates are good for {show.STEPS} steps, and were left out\n")
    for path in show.write(result, options.out):
        print(f"wrote {path}")
    return 0
