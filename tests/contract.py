"""The laws that every policy and patch keeps, as functions.

Each takes ``(make_model, make_inputs, policy)``, raises an AssertionError that begins with the
law's name, and can be used for policies of other packages:

    from contract import LAWS
    for law in LAWS:
        law(make_model, make_inputs, MyPolicy)

make_model() gives a model in eval mode, with the same weights every time. make_inputs(batch) gives
keyword arguments of its forward, the first rows of any larger batch. policy is a `Policy` class (or
anything with ``exact()`` and ``example()``). Everything runs on the CPU without gradients.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import gc
import pickle
import random
import subprocess
import sys
import tempfile
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from accelerate_hooks import enable
from accelerate_hooks.errors import AccelerateHooksError, UnsupportedModelError
from accelerate_hooks.policy import Policy

Model = Callable[[], nn.Module]
Inputs = Callable[[int], dict[str, Any]]
Outputs = list[list[torch.Tensor]]  # one list of tensors a step

STEPS = 6
TIMES = ("timestep", "timesteps", "t", "decoder_noise_time")
SAMPLES = ("hidden_states", "sample", "x", "decoder_input_tokens")


# -- generations -----------------------------------------------------------------------------------


def generation(model: nn.Module, inputs: dict[str, Any], steps: int = STEPS) -> Iterator[Any]:
    """The outputs of a generation, one a step: a denoising loop if the model takes a timestep,
    greedy decoding with a KV cache if it generates text, else the same forward again and again."""
    given = dict(inputs)
    time = next((name for name in TIMES if name in given), None)
    if time is not None:
        yield from _denoise(model, given, time, steps)
    elif "input_ids" in given and _generates(model) and len(given["input_ids"].shape) == 2:
        yield from _decode(model, given, steps)
    else:
        for _ in range(steps):
            yield model(**given)


def _generates(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    can = getattr(model, "can_generate", None)
    return bool(can and can()) and not getattr(config, "is_encoder_decoder", False)


def _denoise(model: nn.Module, given: dict[str, Any], time: str, steps: int) -> Iterator[Any]:
    first = given[time]
    sample = next((name for name in SAMPLES if name in given), None)
    for step in range(steps):
        given[time] = (first * (1 - step / steps)).to(first.dtype)
        out = model(**given)
        yield out
        if sample is not None:
            given[sample] = _moved(given[sample], out)


def _moved(x: Any, out: Any) -> Any:
    """The next sample: a step along the output where it is shaped like x."""
    if isinstance(x, list):
        return [_moved(row, [o]) for row, o in zip(x, flat(out), strict=False)]
    first = next((t for t in flat(out) if t.shape == x.shape), None)
    if first is None:
        return x * 0.9
    return x - 0.1 * (first / first.abs().amax().clamp_min(1.0)).to(x.dtype)


def _decode(model: nn.Module, given: dict[str, Any], steps: int) -> Iterator[Any]:
    given = {**given, "use_cache": True}
    mask = given.get("attention_mask")
    for _ in range(steps):
        out = model(**given)
        yield out.logits
        token = out.logits[:, -1:].argmax(-1)
        given.update(input_ids=token, past_key_values=out.past_key_values)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            given["attention_mask"] = mask


def outputs(model: nn.Module, inputs: dict[str, Any], steps: int = STEPS) -> Outputs:
    with torch.no_grad():
        return [[t.clone() for t in flat(out)] for out in generation(model, inputs, steps)]


def flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [t for child in value for t in flat(child)]
    return []


def equal(a: Outputs, b: Outputs) -> bool:
    return len(a) == len(b) and all(
        len(x) == len(y) and all(same(u, v) for u, v in zip(x, y, strict=True))
        for x, y in zip(a, b, strict=True)
    )


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def check(law: str, ok: bool, what: str) -> None:
    if not ok:
        raise AssertionError(f"{law}: {what}")


def _fresh(model: nn.Module, inputs: dict[str, Any], policy: Any, steps: int = STEPS) -> Outputs:
    """What a session of its own gives."""
    with enable(model, policy):
        return outputs(model, inputs, steps)


# -- the laws --------------------------------------------------------------------------------------


def exact_at_zero(make_model: Model, make_inputs: Inputs, policy: Any) -> None:
    """Under ``exact()`` outputs and random states are bit-identical to the model without us."""
    law = "exact at zero"
    model = make_model()
    random.seed(0)
    torch.manual_seed(0)
    plain = outputs(model, make_inputs(2))
    states = random.getstate(), torch.get_rng_state()
    random.seed(0)
    torch.manual_seed(0)
    with enable(model, policy.exact()) as session:
        ours = outputs(model, make_inputs(2))
    check(law, equal(plain, ours), "the outputs under exact() differ from the plain model's")
    check(law, random.getstate() == states[0], "Python's random state differs")
    check(law, torch.equal(torch.get_rng_state(), states[1]), "torch's random state differs")
    check(law, not any(session.skips.values()), "something was skipped under exact()")


def no_trace_left(make_model: Model, make_inputs: Inputs, policy: Any) -> None:
    """After ``disable()`` everything is as in a twin that made the same calls without us."""
    law = "no trace left"
    model, twin = make_model(), make_model()
    before = _Snapshot(model)
    for settings in (policy.example(), policy.exact()):
        session = enable(model, settings)
        with torch.no_grad():
            for _ in generation(model, make_inputs(2), 3):
                pass
            for _ in generation(twin, make_inputs(2), 3):
                pass
        left = session.disable()
        check(law, not left, f"disable() could not undo {left}")
        check(law, session.disable() == [], "a second disable() is not a no-op")
    unused = enable(model, policy.example())
    unused.disable()
    session = enable(model, policy.example())
    unused.disable()
    check(law, session.active, "disabling an old session ended a new one")
    session.disable()
    before.compare(law, model, twin)
    check(
        law, equal(outputs(model, make_inputs(2)), outputs(twin, make_inputs(2))), "outputs differ"
    )


class _Snapshot:
    """What can be seen of a model, its class and the registries of its library."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {name: dict(vars(m)) for name, m in model.named_modules()}
        self.inner = {
            name: {k: dict(v) for k, v in vars(m).items() if isinstance(v, dict)}
            for name, m in model.named_modules()
        }
        self.classes = {type(m): dict(vars(type(m))) for m in model.modules()}
        self.config = copy.deepcopy(_config(model))
        self.registries = _registries()

    def compare(self, law: str, model: nn.Module, twin: nn.Module) -> None:
        twins = dict(twin.named_modules())
        now = dict(model.named_modules())
        check(law, now.keys() == self.modules.keys(), "the tree of modules changed")
        for name, module in now.items():
            state, old, other = vars(module), self.modules[name], vars(twins[name])
            where = name or type(module).__name__
            extra = state.keys() ^ other.keys()
            check(law, not extra, f"{where}: attributes {sorted(extra)} are not as in the twin")
            moved = [k for k in state.keys() & old.keys() if state[k] is not old[k]]
            moved = [k for k in moved if other[k].__class__ is not state[k].__class__]
            check(law, not moved, f"{where}: {moved} are other objects than before")
            for key, entries in self.inner[name].items():
                mine, theirs = state.get(key), other.get(key)
                if not isinstance(mine, dict) or not isinstance(theirs, dict):
                    continue
                check(law, len(mine) == len(theirs), f"{where}.{key}: other entries than the twin")
                if key in ("_parameters", "_buffers", "_modules"):
                    ids = {k: id(v) for k, v in mine.items()}
                    kept = ids == {k: id(v) for k, v in entries.items()} or key == "_buffers"
                    check(law, kept, f"{where}.{key}: other objects than before")
        for cls, content in self.classes.items():
            check(law, dict(vars(cls)) == content, f"the class {cls.__name__} changed")
        check(law, _config(model) == self.config, "the config changed")
        check(law, _registries() == self.registries, "an entry is left in a library's registry")


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else config and dict(config)


def _registries() -> dict[str, Any]:
    found: dict[str, Any] = {"modules": set()}
    if "transformers.modeling_utils" in sys.modules:
        registry = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
        found["attention"] = sorted(registry.valid_keys())
    return found


def copies_are_plain(make_model: Model, make_inputs: Inputs, policy: Any) -> None:
    """Deep copies, unpickled models and replicas compute plainly with their own weights; shallow
    copies plainly with those they share."""
    law = "copies are plain"
    model = make_model()
    try:
        could = pickle.dumps(model)
    except (TypeError, AttributeError, pickle.PicklingError):
        could = None
    state = {k: v.clone() for k, v in model.state_dict().items()}
    halved = make_model()
    _halve(halved)
    expected = outputs(halved, make_inputs(2), 2)
    with tempfile.TemporaryDirectory() as folder:
        _save(model, Path(folder, "before"))
        with enable(model, policy.example()) as session:
            outputs(model, make_inputs(2), 2)
            check(law, model.state_dict().keys() == state.keys(), "state_dict has other keys")
            check(
                law, all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), "state"
            )
            _save(model, Path(folder, "after"))
            copies = {"a deep copy": copy.deepcopy(model)}
            if _replicates(halved, make_inputs(2)):
                copies["a replica"] = replica(model)
            shared = {path: copy.copy(module) for path, module in model.named_modules()}
            if could is not None:
                data = pickle.dumps(model)
                check(law, b"accelerate_hooks" not in data, "a pickle refers to us")
                copies["an unpickled model"] = pickle.loads(data)
            outputs(model, make_inputs(2), 2)
        for name, other in copies.items():
            _nothing_of_ours(law, name, dict(other.named_modules()))
            _halve(other)
            seen = session.forwards
            got = outputs(other, make_inputs(2), 2)
            check(law, equal(got, expected), f"{name} does not compute with its own weights")
            check(law, session.forwards == seen, f"{name} reaches the session")
        _nothing_of_ours(law, "a shallow copy", shared)
        same_files = _files(Path(folder, "before")) == _files(Path(folder, "after"))
        check(law, same_files, "save_pretrained writes other bytes while enabled")
    check(law, _bound(model), "a method of the model is bound to something else")


def _nothing_of_ours(law: str, name: str, modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        ours = [k for k, v in vars(module).items() if _is_ours(v)]
        check(law, not ours, f"{name} carries {ours} of ours at {path or 'its root'}")


def _is_ours(value: Any) -> bool:
    return type(value).__module__.split(".")[0] == "accelerate_hooks"


def _bound(model: nn.Module) -> bool:
    return all(getattr(m.forward, "__self__", m) is m for m in model.modules())


def _halve(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in parameters(model):
            parameter.mul_(0.5)


def parameters(model: nn.Module) -> list[torch.Tensor]:
    """Each parameter once; of a replica, whose parameters are plain attributes, too."""
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for key in module._parameters:
            value = getattr(module, key, None)
            if value is not None:
                found[id(value)] = value
        for key in getattr(module, "_former_parameters", {}):
            value = vars(module).get(key)
            if value is not None:
                found[id(value)] = value
    return list(found.values())


def _replicates(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Some models ask for ``parameters()`` in forward, which replicas do not have."""
    try:
        outputs(replica(model), inputs, 1)
    except RuntimeError:
        return False
    return True


def replica(model: nn.Module) -> nn.Module:
    """What ``torch.nn.DataParallel`` makes of a model on each device (it wants CUDA for that)."""
    modules = list(model.modules())
    copies = {id(m): m._replicate_for_data_parallel() for m in modules}
    for twin in copies.values():
        twin._former_parameters = {}
    clones: dict[int, torch.Tensor] = {}
    for module in modules:
        twin = copies[id(module)]
        for key, child in module._modules.items():
            twin._modules[key] = None if child is None else copies[id(child)]
        for key, parameter in module._parameters.items():
            if parameter is None:
                twin._parameters[key] = None
                continue
            clone = clones.setdefault(id(parameter), parameter.detach().clone())
            setattr(twin, key, clone)
            twin._former_parameters[key] = clone
        for key, buffer in module._buffers.items():
            twin._buffers[key] = None if buffer is None else buffer.clone()
    return copies[id(model)]


def _save(model: nn.Module, path: Path) -> None:
    if hasattr(model, "save_pretrained"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(str(path))


def _files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def unpickles_without_us(pickles: dict[str, bytes]) -> None:
    """Models that were pickled while enabled load and run where accelerate_hooks cannot be
    imported; ``pickles`` holds pickles of ``(model, inputs)`` by name."""
    law = "copies are plain"
    script = (
        "import sys, pickle, torch; sys.modules['accelerate_hooks'] = None\n"
        "for name, data in pickle.load(sys.stdin.buffer).items():\n"
        "    model, inputs = pickle.loads(data)\n"
        "    with torch.no_grad(): model(**inputs)\n"
        "    print(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", script],
        input=pickle.dumps(pickles),
        capture_output=True,
        check=False,
    )
    names = done.stdout.decode().split()
    check(law, names == list(pickles), f"a pickle needs us: {done.stderr.decode()[-800:]}")


def state_belongs_to_the_run(make_model: Model, make_inputs: Inputs, policy: Any) -> None:
    """Repeats, threads, tasks, aborts, other batches and dtypes: as in a session of their own."""
    law = "state belongs to the run"
    model, settings = make_model(), policy.example()
    one, two = make_inputs(1), _other(make_inputs(2))
    prompts = {"first": make_inputs(2), "another prompt": two, "another batch": one}
    alone = {name: _fresh(model, inputs, settings) for name, inputs in prompts.items()}
    with enable(model, settings):
        outputs(model, _copied(prompts["first"]), 1)  # ports are confirmed in a first forward
        for name in ("first", "first", "another batch", "another prompt", "first"):
            got = outputs(model, _copied(prompts[name]))
            check(law, equal(got, alone[name]), f"{name}: not as in a session of its own")
    with enable(model, settings):
        _abort(law, model, prompts["first"])
        got = outputs(model, prompts["first"])
        check(law, equal(got, alone["first"]), "state survives an aborted generation")
        stopped = generation(model, prompts["first"])
        with torch.no_grad():
            for _ in range(3):
                next(stopped)
        del stopped
        got = outputs(model, _copied(prompts["first"]))
        check(law, equal(got, alone["first"]), "state survives a generation that was given up")
    with enable(model, settings):
        got = _in_threads(model, prompts)
        for name in prompts:
            check(law, equal(got[name], alone[name]), f"{name}: threads share state")
    with enable(model, settings):
        got = asyncio.run(_in_tasks(model, prompts))
        for name in prompts:
            check(law, equal(got[name], alone[name]), f"{name}: tasks share state")
    _dtypes(law, make_model, make_inputs, settings)


def _dtypes(law: str, make_model: Model, make_inputs: Inputs, settings: Any) -> None:
    """The model goes to bf16 between two generations of one session."""
    low = cast(make_inputs(2), torch.bfloat16)
    model = make_model().bfloat16()
    try:
        outputs(model, low, 1)
    except (RuntimeError, TypeError):
        return  # the plain model does not run in bf16
    alone = _fresh(model, low, settings)
    model = make_model()
    with enable(model, settings):
        outputs(model, make_inputs(2))
        model.bfloat16()
        reference = make_model().bfloat16()
        expected = _fresh(reference, low, settings)
        got = outputs(model, low)
    check(law, equal(alone, expected), "bf16 is not deterministic")
    plain = outputs(model, low)
    finite = all(a.isfinite().all() for step in plain for a in step if a.is_floating_point())
    close = all(
        a.dtype == b.dtype and a.isfinite().all()
        for x, y in zip(got, plain, strict=True)
        for a, b in zip(x, y, strict=True)
        if a.is_floating_point()
    )
    check(law, close or not finite, "another dtype: outputs of another dtype, or not finite")


def _other(inputs: dict[str, Any]) -> dict[str, Any]:
    """Another prompt: floating-point inputs but the time are changed, tokens rolled."""

    def change(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1:
            return value * 0.5 + 0.25
        if isinstance(value, torch.Tensor) and value.ndim == 2 and value.dtype != torch.bool:
            return value.roll(1, -1)
        if isinstance(value, list):
            return [change(v) for v in value]
        return value

    return {
        k: v if k in TIMES or ("id" in k and k != "input_ids") else change(v)
        for k, v in inputs.items()
    }


def _copied(inputs: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(inputs)


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, dict):
        return {k: v if k in TIMES else cast(v, dtype) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(cast(v, dtype) for v in value)
    return value


class _Abort(Exception):
    pass


def _abort(law: str, model: nn.Module, inputs: dict[str, Any]) -> None:
    """A generation that dies inside the model, in its fourth step."""
    leaf = list(m for m in model.modules() if isinstance(m, nn.Linear))[-1]
    seen = 0

    def bomb(*_: Any) -> None:
        raise _Abort

    try:
        with torch.no_grad():
            for _ in generation(model, inputs):
                seen += 1
                if seen == 3:
                    handles = [
                        m.register_forward_pre_hook(bomb) for m in {leaf, *_first_linears(model)}
                    ]
                if seen > 3:
                    for handle in handles:
                        handle.remove()
                    seen = -1000  # the policy skipped what was to die
    except _Abort:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _first_linears(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)][:1]


def _in_threads(model: nn.Module, prompts: dict[str, dict[str, Any]]) -> dict[str, Outputs]:
    """All prompts at once, each in its thread, in lockstep so that their steps interleave."""
    got: dict[str, Outputs] = {}
    failed: list[BaseException] = []
    barrier = threading.Barrier(len(prompts), timeout=120)

    def work(name: str) -> None:
        try:
            steps = []
            with torch.no_grad():
                for out in generation(model, prompts[name]):
                    steps.append([t.clone() for t in flat(out)])
                    barrier.wait()
            got[name] = steps
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(name,)) for name in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise next(
            (e for e in failed if not isinstance(e, threading.BrokenBarrierError)), failed[0]
        )
    return got


async def _in_tasks(model: nn.Module, prompts: dict[str, dict[str, Any]]) -> dict[str, Outputs]:
    async def work(name: str) -> Outputs:
        steps = []
        for out in generation(model, prompts[name]):
            steps.append([t.clone() for t in flat(out)])
            await asyncio.sleep(0)
        return steps

    with torch.no_grad():
        tasks = {name: asyncio.create_task(work(name)) for name in prompts}
        return {name: await task for name, task in tasks.items()}


def never_a_silent_nothing(make_model: Model, make_inputs: Inputs, policy: Any) -> None:
    """``example()`` skips, and the output shows it; a policy without a site is an error."""
    law = "never a silent nothing"
    model = make_model()
    plain = outputs(model, make_inputs(2))
    with enable(model, policy.example()) as session:
        ours = outputs(model, make_inputs(2))
        text = str(session.report())
    check(law, any(session.skips.values()), "nothing was skipped under example()")
    check(law, not equal(plain, ours), "the output is that of the plain model")
    check(law, bool(text), "the report is empty")
    try:
        enable(model, policy.example(), only="no such site").disable()
    except UnsupportedModelError:
        pass
    else:
        check(law, False, "a policy without a site is no error")
    with enable(model, policy.example(), only="no such site", strict=False) as session:
        check(law, bool(session.notes), "strict=False: nothing is noted")
        check(law, equal(plain, outputs(model, make_inputs(2))), "strict=False: another output")


def inference_only(make_model: Model, make_inputs: Inputs, policy: Any) -> None:
    """With gradients on or in training mode policies are inert and say so; what is cached has no
    graph."""
    law = "inference only"
    from accelerate_hooks.session import InertWarning

    model, inputs = make_model(), make_inputs(2)
    with torch.enable_grad():
        plain = flat(next(generation(model, inputs)))
    with enable(model, policy.example()) as session:
        with warnings.catch_warnings(record=True) as caught, torch.enable_grad():
            warnings.simplefilter("always")
            for _, out in zip(range(3), generation(model, inputs), strict=False):
                last = flat(out)
        told = [w for w in caught if issubclass(w.category, InertWarning)]
        check(law, len(told) == 1, f"gradients on: {len(told)} warnings, wanted one")
        check(law, not any(session.skips.values()), "gradients on: something was skipped")
        check(law, any(t.requires_grad for t in last), "gradients on: the output has no graph")
        check(law, "gradient" in str(session.report()), "gradients on: the report does not say so")
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            again = flat(next(generation(model, inputs)))
        check(law, all(map(same, again, plain)), "gradients on: another output than the plain one")
        model.train()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            for _ in generation(model, inputs, 3):
                pass
        model.eval()
        check(law, not any(session.skips.values()), "training mode: something was skipped")
        with torch.no_grad():
            for _ in generation(model, inputs, 3):
                for tensor in cached(session):
                    check(
                        law, tensor.grad_fn is None and not tensor.requires_grad, "a graph is kept"
                    )


def cached(session: Any) -> list[torch.Tensor]:
    """The tensors that the session's living runs hold for policies."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()

    def walk(value: Any) -> None:
        if id(value) in seen or isinstance(value, (type, types.ModuleType, nn.Module)):
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for child in value.values():
                walk(child)
        elif isinstance(value, (list, tuple, set, frozenset)) or type(value).__name__ == "deque":
            for child in value:
                walk(child)
        elif hasattr(value, "__dict__") and not callable(value):
            walk(vars(value))

    for root in session.roots:
        for run in root.recogniser.runs():
            walk({k: slot.value for k, slot in run.slots.items()})
    return found


def bounded_memory(make_model: Model, make_inputs: Inputs, policy: Any, runs: int = 8) -> None:
    """What a run held dies with it, and nothing else grows with the number of runs."""
    law = "bounded memory"
    model = make_model()
    old: list[weakref.ref[torch.Tensor]] = []
    alive = []
    gc.collect()
    gc.freeze()  # what is there already is not looked at: faster, and not disturbed by others
    with contextlib.ExitStack() as stack:
        stack.callback(gc.unfreeze)
        session = stack.enter_context(enable(model, policy.example()))
        for number in range(runs):
            inputs = make_inputs(1 + number % 2)
            inner = generation(model, inputs, 4)
            with torch.no_grad():
                for _ in range(3):
                    next(inner)
                if number < runs - 2:
                    inputs_ids = {id(t) for t in flat(inputs)}
                    old += [weakref.ref(t) for t in cached(session) if id(t) not in inputs_ids]
                for _ in inner:
                    pass
            del inner, inputs, _
            if number in (3, runs - 1):
                gc.collect()
                alive.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
        left = sum(ref() is not None for ref in old)
        check(law, not left, f"{left} tensors of finished runs are alive")
        check(law, alive[1] <= alive[0] + 1, f"tensors alive after 4 and {runs} runs: {alive}")
        check(law, len(session.trace) <= session.trace._entries.maxlen, "the trace is no ring")
        held = [sum(len(r.slots) for r in root.recogniser.runs()) for root in session.roots]
        session.reset()
        check(law, not cached(session), f"reset() leaves slots ({held})")


READS = {"item", "tolist", "cpu", "numpy", "nonzero", "is_nonzero", "equal", "allclose"}
READS |= {f"__{name}__" for name in ("bool", "float", "int", "index", "complex", "contains")}
# The runtime's own looks at host tensors: a timestep on the CPU, the check of a partial visit.
_ALLOWED = (
    "clock.py",
    "rows.py",
    "reading.py",
    "tokens.py",
    "audit.py",
    "report.py",
    "_survey.py",
)


class Reads(TorchFunctionMode):
    """Counts host reads that code of ours (not the model's) makes, by place."""

    def __init__(self, sources: set[str]) -> None:
        super().__init__()
        self.sources = sources
        self.places: dict[str, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in READS:
            self._look()
        return func(*args, **(kwargs or {}))

    def _look(self) -> None:
        frame = sys._getframe(2)
        while frame is not None:
            path = frame.f_code.co_filename
            if frame.f_code.co_name == "__torch_function__":  # another mode, passing the call on
                frame = frame.f_back
                continue
            ours = path in self.sources or f"{Path(path).parent.name}" == "accelerate_hooks"
            if ours:
                if Path(path).name not in _ALLOWED:
                    place = f"{Path(path).name}:{frame.f_code.co_name}"
                    self.places[place] = self.places.get(place, 0) + 1
                return
            if "torch" not in Path(path).parts and path != __file__:
                return  # the model's own
            if f"{Path(path).parent.name}" == "modules" and path.endswith("module.py"):
                return
            frame = frame.f_back


def host_reads_are_declared(make_model: Model, make_inputs: Inputs, policy: Any) -> None:
    """``ahead``: none; ``step``: one a forward; ``site``: one a visit; all by ``call.read``."""
    law = "host reads are declared"
    model, settings = make_model(), policy.example()
    sources = {sys.modules[cls.__module__].__file__ or "" for cls in type(settings).__mro__[:-1]}
    with enable(model, settings) as session, Reads(sources) as reads:
        outputs(model, make_inputs(2))
        visits = sum(
            session.record(site).computed + session.record(site).skipped for site in session.sites
        )
    declared = {k: n for k, n in reads.places.items() if k.startswith("call.py:read")}
    hidden = {k: n for k, n in reads.places.items() if k not in declared}
    check(law, not hidden, f"host reads that nobody declared: {hidden}")
    most = {"ahead": 0, "step": session.forwards, "site": visits}[settings.decides]
    check(
        law,
        session.host_reads <= most,
        f"{session.host_reads} reads where decides={settings.decides!r} allows {most}",
    )


def runs_in_bf16(make_model: Model, make_inputs: Inputs, policy: Any) -> None:
    """The same dtypes out, exact at zero, and example() still skips."""
    law = "bf16"
    model = make_model().bfloat16()
    inputs = cast(make_inputs(2), torch.bfloat16)
    plain = outputs(model, inputs)
    check(law, equal(plain, _fresh(model, inputs, policy.exact())), "exact() is not exact")
    with enable(model, policy.example()) as session:
        ours = outputs(model, inputs)
    check(law, any(session.skips.values()), "nothing was skipped under example()")
    kinds = [[t.dtype for t in step] for step in plain] == [
        [t.dtype for t in step] for step in ours
    ]
    check(law, kinds, "outputs have other dtypes")


def lets_go(make_model: Model, make_inputs: Inputs, policy: Any) -> None:
    """A session that is over keeps its report, not its model."""
    law = "lets go"
    model = make_model()
    gone = [weakref.ref(module) for module in model.modules()]
    with torch.no_grad(), enable(model, policy.example()) as session:
        for _ in generation(model, make_inputs(2), 3):
            pass
    report = str(session.report())
    here = all(site.module is model.get_submodule(site.path) for site in session.sites)
    check(law, here, "sites do not say which modules they were")
    del model, _
    gc.collect()
    left = {type(module()).__name__ for module in gone} - {"NoneType"}
    check(law, not left, f"{sorted(left)} are kept alive by a session that is over")
    check(law, str(session.report()) == report, "the report changed with the end of the model")


LAWS = (
    exact_at_zero,
    no_trace_left,
    copies_are_plain,
    state_belongs_to_the_run,
    never_a_silent_nothing,
    inference_only,
    bounded_memory,
    host_reads_are_declared,
    runs_in_bf16,
    lets_go,
)


# -- compile ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Graphs:
    """How many graphs Dynamo handed to the backend after each step, and what came out."""

    counts: list[int]
    results: Outputs


def graphs(
    model: nn.Module,
    inputs: dict[str, Any],
    policy: Any = None,
    *,
    regional: bool = False,
    compile_first: bool = True,
    steps: int = STEPS,
) -> Graphs:
    """Compile (the whole model, or each block by itself) and enable, in either order."""
    import torch._dynamo

    from accelerate_hooks.registry import patch_for

    torch._dynamo.reset()
    seen: list[int] = []

    def backend(module: Any, example: Any) -> Any:
        seen.append(1)
        return module.forward

    def compiled() -> Any:
        if not regional:
            return torch.compile(model, backend=backend)
        blocks = {s.module for s in patch_for(model).sites(model) if s.kind == "block"}
        for block in blocks:
            block.compile(backend=backend)
        return model

    counts, results = [], []
    try:
        with contextlib.ExitStack() as stack, torch.no_grad():
            target = compiled() if compile_first else None
            if policy is not None:
                stack.enter_context(enable(model, policy))
            target = target if target is not None else compiled()
            for out in generation(target, inputs, steps):
                results.append([t.clone() for t in flat(out)])
                counts.append(len(seen))
    finally:
        torch._dynamo.reset()
    return Graphs(counts, results)


def compile_keeps_up(
    make_model: Callable[[int], nn.Module],
    make_inputs: Inputs,
    policy: Any,
    *,
    regional: bool = False,
    compile_first: bool = True,
    constant: int = 6,
) -> None:
    """Graphs grow with depth no more than the plain model's, later steps add none, and results are
    those of eager mode. ``make_model`` takes the number of blocks.

    Frames are compiled by class: a break splits the model's, and that of each class of blocks into
    three, so ``constant`` graphs for the first class and three for each further one are what a
    policy may cost.
    """
    from accelerate_hooks.registry import patch_for

    law = "compile"
    more = {}
    model = make_model(3)
    kinds = {type(s.module) for s in patch_for(model).sites(model) if s.kind == "block"}
    constant += 3 * (len(kinds) - 1)
    settings = policy.example()
    for depth in (3, 6):
        how = {"regional": regional, "compile_first": compile_first}
        plain = graphs(make_model(depth), make_inputs(2), **how)
        ours = graphs(make_model(depth), make_inputs(2), settings, **how)
        eager = _fresh(make_model(depth), make_inputs(2), settings)
        for got, wanted in zip(ours.results, eager, strict=True):
            close = all(
                torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, wanted, strict=True)
            )
            check(law, close, "compiled under the policy is not what eager gives")
        check(law, ours.counts[-1] > 0, "nothing was compiled")
        late = ours.counts[-1] - ours.counts[2]
        allowed = plain.counts[-1] - plain.counts[2]
        check(law, late <= allowed, f"graphs grow with steps: {ours.counts}")
        more[depth] = ours.counts[-1] - plain.counts[-1]
    grown = more[6] - more[3]
    check(law, grown <= 0, f"graphs beyond the plain model's grow with depth: {more}")
    wanted = f"{more[6]} graphs more than the plain model needs, {constant} at most"
    check(law, more[6] <= constant, wanted)


# -- policies for tests of the core ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockReuse(Policy):
    """In every second step each block but the first of its list adds what it added last."""

    name: ClassVar[str] = "block_reuse"
    every: int = 2

    @property
    def kinds(self) -> tuple[Any, ...]:
        return ("block",)

    @classmethod
    def exact(cls) -> BlockReuse:
        return cls(every=1)

    @classmethod
    def example(cls) -> BlockReuse:
        return cls()

    def around(self, call: Any) -> Any:
        x, context = call.x, call.context
        last = call.slot(dict)
        if call.step.index % self.every and "x" in last and last["x"].shape == x.shape:
            other = last["context"]
            return call.skip(x + last["x"], None if other is None else context + other)
        out = call.proceed()
        if self.every > 1:
            new, other = call.outputs(out)
            last["x"] = new - x
            last["context"] = None if other is None or context is None else other - context
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSkip(Policy):
    """Leaves out every block whose number is odd, and what it would add."""

    name: ClassVar[str] = "block_skip"
    skips: bool = True

    @property
    def kinds(self) -> tuple[Any, ...]:
        return ("block",)

    @classmethod
    def exact(cls) -> BlockSkip:
        return cls(skips=False)

    @classmethod
    def example(cls) -> BlockSkip:
        return cls()

    def around(self, call: Any) -> Any:
        number = int(call.site.path.rpartition(".")[2]) + call.site.visit
        return call.skip() if self.skips and number % 2 else call.proceed()


def raises_ours(call: Callable[[], Any]) -> AccelerateHooksError:
    """The error of our tree that ``call`` raises."""
    try:
        call()
    except AccelerateHooksError as error:
        return error
    raise AssertionError("no error of accelerate_hooks was raised")
