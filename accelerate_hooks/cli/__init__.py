"""The command line: ``accelerate-hooks`` or ``python -m accelerate_hooks``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from accelerate_hooks import __version__
from accelerate_hooks.errors import AccelerateHooksError

COMMANDS = {
    "demo": "generate with and without LazyStep on a shipped, really trained model",
    "inspect": "list the sites of a model and the policies that there are",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 for one of our errors, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="accelerate-hooks", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"accelerate_hooks.cli.{name}")
        module.arguments(commands.add_parser(name, help=summary, description=summary))
    options = parser.parse_args(argv)
    command = importlib.import_module(f"accelerate_hooks.cli.{options.command}")
    try:
        status = command.run(options)
        sys.stdout.flush()
        return status
    except AccelerateHooksError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
