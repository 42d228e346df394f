"""C sources of this folder, compiled for the CPU at hand when first needed.

The compiler is ``$CC``, or the first of ``cc``, ``gcc`` and ``clang``; the library stays in
``$XDG_CACHE_HOME/accelerate_hooks`` (by default ``~/.cache``) under a hash of source, compiler,
flags and CPU. Without a compiler an op says why and takes its PyTorch path.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
_LOCK = threading.Lock()
_BUILT: dict[str, ctypes.CDLL | str] = {}


class Unavailable(Exception):
    """Why there is no compiled code here."""


def library(name: str) -> ctypes.CDLL:
    """The compiled ``<name>.c``; raises `Unavailable` with the reason, every time the same."""
    found = _BUILT.get(name)
    if found is None:
        with _LOCK:
            found = _BUILT.get(name) or _build(name)
            _BUILT[name] = found
    if isinstance(found, str):
        raise Unavailable(found)
    return found


def is_built(name: str) -> bool:
    return isinstance(_BUILT.get(name), ctypes.CDLL)


def _build(name: str) -> ctypes.CDLL | str:
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        return "no C compiler (set CC, or install gcc or clang)"
    source = Path(__file__).with_name(f"{name}.c")
    try:
        command = [*shlex.split(compiler), *FLAGS]
        path = _cache() / f"{name.lstrip('_')}-{_key(source, command)}.so"
        if path.exists():
            with contextlib.suppress(OSError):  # damaged: build it again
                return ctypes.CDLL(str(path))
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            done = subprocess.run(
                [*command, str(source), "-o", str(made), "-lm"],
                capture_output=True, text=True, timeout=120,
            )  # fmt: skip
            if done.returncode:
                return f"{compiler} fails on {source.name}: {done.stderr.strip()[:300]}"
            made.replace(path)  # whole or not at all, whoever else builds it now
        return ctypes.CDLL(str(path))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"{compiler} cannot build {source.name}: {error}"


def _key(source: Path, command: list[str]) -> str:
    """Of all that makes the library what it is: a home may be shared between machines."""
    version = subprocess.run([command[0], "--version"], capture_output=True, timeout=60).stdout
    parts = [source.read_bytes(), version, " ".join(command).encode(), _cpu().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu() -> str:
    """What `-march=native` may make use of."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {line.split(":", 1)[0].strip(): line for line in lines if ":" in line}
    features = [told.get(name, "") for name in ("model", "cpu family", "flags", "Features")]
    return "\n".join((platform.machine(), platform.processor(), *features))


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "accelerate_hooks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    made = tempfile.mkdtemp(prefix="accelerate_hooks-")  # for this process alone
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def on_every_thread(function: ctypes._CFuncPtr, argument: ctypes.Structure) -> None:
    """Call ``function(&argument)`` on as many threads as PyTorch uses, and wait for all."""
    parallel()(function, ctypes.byref(argument), torch.get_num_threads(), 0)


@functools.cache
def parallel() -> ctypes._CFuncPtr:
    """``parallel(function, argument, threads, 0)`` in C calls a function on so many threads.

    They are PyTorch's own where those are GNU OpenMP's: while those still spin after PyTorch's last
    operation, threads of ours would wait for a core. Else they are new ones.
    """
    try:
        found = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return _PARALLEL(_new_threads)
    found.argtypes, found.restype = _PARALLEL._argtypes_, None
    return found


_WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def _new_threads(function: int, argument: int, count: int, _flags: int) -> None:
    work, new = _WORK(function), list[threading.Thread]()
    with contextlib.suppress(RuntimeError):  # no more threads: those that there are do all jobs
        for _ in range(count - 1):
            thread = threading.Thread(target=work, args=(argument,), daemon=True)
            thread.start()
            new.append(thread)
    work(argument)
    for thread in new:
        thread.join()
