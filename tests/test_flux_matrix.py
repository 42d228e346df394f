"""LazyStep on a tiny Flux pipeline, beside what else people do to one.

Each cell is right or refused by name. Right: under `exact()` the output is bit-identical to the
pipeline's without us; under a policy that skips it is what the same policy gives where nothing else
is done to the pipeline; afterwards every ``__dict__`` is as in a twin that made the same calls
without us. ``python tests/test_flux_matrix.py`` writes the outcomes to docs/matrix.md.
"""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import accelerate
import pytest
import torch
import torch._dynamo.testing
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.utils import logging

import accelerate_hooks as ah
from accelerate_hooks.policies import LazyStep

DOCS = Path(__file__).parent.parent / "docs" / "matrix.md"
SCOPES = ("model", "stack", "site")
STEPS = 8
CPU = torch.device("cpu")

FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 3,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 4, 8),
}


# -- a pipeline, and generations -------------------------------------------------------------------


@functools.cache
def _parts() -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(**FLUX)
        controlnet = FluxControlNetModel(**{**FLUX, "num_layers": 3, "num_single_layers": 2})
        for parameter in (*transformer.parameters(), *controlnet.parameters()):
            torch.nn.init.normal_(parameter, std=0.12)
        vae = AutoencoderKL(
            block_out_channels=(4,), norm_num_groups=1, latent_channels=4,
            use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06,
            scaling_factor=1.5,
        )  # fmt: skip
    return {
        "transformer": transformer.eval(),
        "controlnet": controlnet.eval(),
        "vae": vae.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


def flux(cls: Any = FluxPipeline, **given: Any) -> Any:
    """A tiny real Flux pipeline, with the same weights every time; prompts come as embeddings."""
    parts = copy.deepcopy(_parts())
    if cls is FluxPipeline:
        del parts["controlnet"]
    parts.update(given)
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = cls(**nothing, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(batch: int = 1, seed: int = 1, prefix: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}prompt_embeds": torch.randn(batch, 5, 24, generator=generator),
        f"{prefix}pooled_prompt_embeds": torch.randn(batch, 20, generator=generator),
    }


def generate(pipe: Any, batch: int = 1, **given: Any) -> torch.Tensor:
    call = {
        "height": 8, "width": 8, "num_inference_steps": STEPS, "output_type": "latent",
        "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(3), **prompts(batch),
    }  # fmt: skip
    return pipe(**call | given).images


def skipping(scope: str, **settings: Any) -> LazyStep:
    return LazyStep(
        scope=scope, criterion="cadence", every=2, warmup=2, cooldown=1, max_age=8, **settings
    )


def exact(scope: str) -> LazyStep:
    return dataclasses.replace(LazyStep.exact(), scope=scope)


def skipped(session: Any) -> int:
    return sum(record.skipped for record in session.records.values())


# -- what is compared ------------------------------------------------------------------------------


def assert_same(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    assert torch.equal(got, wanted), f"{what}: off by {float((got - wanted).abs().max()):.2e}"


def assert_close(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    assert torch.allclose(got, wanted, atol=1e-4, rtol=1e-4), (
        f"{what}: off by {float((got - wanted).abs().max()):.2e}"
    )


def assert_no_trace(module: torch.nn.Module, twin: torch.nn.Module) -> None:
    """Every ``__dict__`` is as in the twin, and holds nothing of ours."""
    twins = dict(twin.named_modules())
    modules = dict(module.named_modules())
    assert modules.keys() == twins.keys()
    for name, mine in modules.items():
        seen, wanted = _visible(mine), _visible(twins[name])
        differ = {k: (seen.get(k), wanted.get(k)) for k in seen.keys() | wanted.keys()}
        differ = {k: v for k, v in differ.items() if v[0] != v[1]}
        assert not differ, f"{name or 'model'}: {differ}"
        ours = _ours(mine)
        assert not ours, f"{name or 'model'} still holds {ours}"


def _visible(module: torch.nn.Module) -> dict[str, Any]:
    """Attributes by name, with what can be compared between two modules. A plain bound ``forward``
    is what a hook leaves that was taken off: it is as good as none."""
    found: dict[str, Any] = {}
    for key, value in vars(module).items():
        if key == "forward" and isinstance(value, MethodType) and value.__self__ is module:
            continue
        inner = sorted(map(str, value)) if isinstance(value, (dict, set)) else None
        found[key] = (type(value).__name__, inner, sorted(getattr(value, "__dict__", {})))
    return found


def _ours(root: Any) -> list[str]:
    """What of ours can be reached from a module's attributes, but through other modules."""
    found, seen, waiting = [], set(), list(vars(root).items())
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen or isinstance(value, (torch.nn.Module, torch.Tensor, str, int)):
            continue
        seen.add(id(value))
        if type(value).__module__.startswith("accelerate_hooks"):
            found.append(f"{path}: {type(value).__name__}")
            continue
        if isinstance(value, dict):
            waiting += [(f"{path}[{k}]", v) for k, v in value.items()]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(path, v) for v in value]
        elif isinstance(value, functools.partial):
            waiting += [(f"{path}.func", value.func), (f"{path}.args", value.args)]
        elif isinstance(value, FunctionType):
            waiting += [(f"{path} cell", c.cell_contents) for c in value.__closure__ or ()]
        if hasattr(value, "__dict__") and not isinstance(value, type):
            waiting += [(f"{path}.{k}", v) for k, v in vars(value).items()]
    return found


@functools.cache
def plain(**given: Any) -> torch.Tensor:
    return generate(flux(), **given)


@functools.cache
def lazily(scope: str, **given: Any) -> torch.Tensor:
    """What the skipping policy gives where nothing else is done."""
    pipe, twin = flux(), flux()
    with ah.enable(pipe, skipping(scope)) as session:
        out = generate(pipe, **given)
    generate(twin, **given)
    assert skipped(session) > 0
    assert not torch.allclose(out, plain(**given)), "skipping changes nothing"
    assert_no_trace(pipe.transformer, twin.transformer)
    return out


def sessions(scope: str) -> list[tuple[LazyStep, torch.Tensor]]:
    """(policy, what it has to give): nothing skipped, and much."""
    return [(exact(scope), plain()), (skipping(scope), lazily(scope))]


# -- offload ---------------------------------------------------------------------------------------


def model_offload(pipe: Any) -> Callable[[], None]:
    """What `enable_model_cpu_offload` does, on a machine without an accelerator."""
    _, hook = accelerate.cpu_offload_with_hook(pipe.transformer, CPU)
    return hook.remove


def sequential_offload(pipe: Any) -> Callable[[], None]:
    """What `enable_sequential_cpu_offload` does, on a machine without an accelerator."""
    for model in (pipe.transformer, pipe.vae):
        accelerate.cpu_offload(model, CPU)
    return pipe.remove_all_hooks


def offloaded_before(offload: Any, scope: str) -> None:
    for policy, wanted in sessions(scope):
        for ours_first in (True, False):
            pipe, twin = flux(), flux()
            remove, other = offload(pipe), offload(twin)
            session = ah.enable(pipe, policy)
            assert_same(generate(pipe), wanted, "offloaded, then enabled")
            generate(twin)
            other()
            if ours_first:
                session.disable()
                remove()
            else:
                remove()
                with pytest.warns(ah.InertWarning, match="taken out"):
                    session.disable()
            assert_no_trace(pipe.transformer, twin.transformer)
            assert_same(generate(pipe), plain(), "afterwards")


def offloaded_after(offload: Any, scope: str) -> None:
    for policy, wanted in sessions(scope):
        for ours_first in (True, False):
            pipe, twin = flux(), flux()
            session = ah.enable(pipe, policy)
            remove, other = offload(pipe), offload(twin)
            assert_same(generate(pipe), wanted, "enabled, then offloaded")
            generate(twin)
            if ours_first:
                session.disable()
                assert_no_trace(pipe.transformer, twin.transformer)
                assert_same(generate(pipe), plain(), "disabled, still offloaded")
                generate(twin)
                remove()
                other()
            else:
                remove()
                other()
                assert_same(generate(pipe), generate_with(policy), "no longer offloaded")
                generate(twin)
                session.disable()
            assert_no_trace(pipe.transformer, twin.transformer)
            assert_same(generate(pipe), plain(), "afterwards")


@functools.cache
def generate_with(policy: LazyStep) -> torch.Tensor:
    """The second generation of a session."""
    pipe = flux()
    with ah.enable(pipe, policy):
        generate(pipe)
        return generate(pipe)


# -- LoRA ------------------------------------------------------------------------------------------


def add_lora(pipe: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(5)
    config = LoraConfig(
        r=2, lora_alpha=8, target_modules=["to_q", "to_v", "proj_mlp"], init_lora_weights=False
    )
    pipe.transformer.add_adapter(config, adapter_name="paint")


def lora(scope: str) -> None:
    """Loaded and unloaded while enabled; unloaded while disabled."""
    reference = flux()
    add_lora(reference)
    painted = generate(reference)
    assert not torch.allclose(painted, plain())
    for policy, wanted in sessions(scope):
        with ah.enable(reference, policy):
            wanted_painted = generate(reference)
        pipe, twin = flux(), flux()
        for late in (False, True):
            with ah.enable(pipe, policy) as session:
                assert_same(generate(pipe), wanted, "before LoRA")
                add_lora(pipe)
                session.reset()
                got = generate(pipe)
                if scope != "stack" or policy.max_age == 0:
                    assert_same(got, wanted_painted, "with LoRA")
                assert not torch.allclose(got, wanted), "LoRA changes nothing"
                if not late:
                    pipe.unload_lora_weights()
                    assert_same(generate(pipe), generate_with(policy), "LoRA unloaded")
            if late:
                pipe.unload_lora_weights()
            add_lora(twin)
            generate(twin)
            twin.unload_lora_weights()
            assert_no_trace(pipe.transformer, twin.transformer)
            assert_same(generate(pipe), plain(), "afterwards")


# -- compile ---------------------------------------------------------------------------------------


def compiled(first: bool, scope: str) -> None:
    """`transformer.compile()` before or after `enable`, and `torch.compile(transformer)`."""
    for policy, wanted in sessions(scope):
        for wrap in (False, True):
            torch._dynamo.reset()
            pipe, twin = flux(), flux()
            counter = torch._dynamo.testing.CompileCounter()
            session = None if first else ah.enable(pipe, policy)
            for one in (pipe, twin):
                if wrap:
                    one.transformer = torch.compile(one.transformer, backend=counter)
                else:
                    one.transformer.compile(backend=counter)
            if session is None:
                session = ah.enable(pipe, policy)
            assert_close(generate(pipe), wanted, "compiled")
            assert counter.frame_count > 0, "nothing was compiled"
            frames = counter.frame_count
            generate(pipe)
            generate(pipe)
            again = counter.frame_count
            generate(pipe)
            assert counter.frame_count == again, f"{frames}, {again}, {counter.frame_count} graphs"
            generate(twin)
            session.disable()
            assert_close(generate(pipe), plain(), "afterwards")
            inner = [getattr(p.transformer, "_orig_mod", p.transformer) for p in (pipe, twin)]
            assert_no_trace(*inner)
    torch._dynamo.reset()


def compiled_by_blocks(fullgraph: bool, scope: str) -> str | None:
    """`transformer.compile_repeated_blocks()`, before and after `enable`."""
    for first in (True, False):
        torch._dynamo.reset()
        pipe, told = flux(), None
        if first:
            pipe.transformer.compile_repeated_blocks(fullgraph=fullgraph, backend="eager")
        with ah.enable(pipe, exact(scope)):
            if not first:
                pipe.transformer.compile_repeated_blocks(fullgraph=fullgraph, backend="eager")
            try:
                assert_close(generate(pipe), plain(), "compiled by blocks")
            except torch._dynamo.exc.Unsupported as error:
                told = str(error)
                assert "policy of accelerate_hooks" in told and "fullgraph=False" in told
        assert_close(generate(pipe), plain(), "afterwards")
    torch._dynamo.reset()
    if told is None:
        return None
    return "refused by torch.compile, which names us: a policy inside a graph needs a break"


# -- ControlNet ------------------------------------------------------------------------------------


def control(pipe: Any, scale: float = 1.0, **given: Any) -> torch.Tensor:
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    return generate(pipe, control_image=image, controlnet_conditioning_scale=scale, **given)


def controlnet(scope: str) -> None:
    """Its residuals are added between the blocks, in some steps or in all, whichever came first.

    With `hold`, one step reused and constant inputs the reused step must be what was computed, so
    that it shows if residuals are left out or counted twice.
    """
    pipe = flux(FluxControlNetPipeline)
    wanted, strong = control(pipe), control(pipe, 3.0)
    assert not torch.allclose(wanted, strong)
    for order in ((1.0, 0.0), (0.0, 1.0)):
        pipe = flux(FluxControlNetPipeline)
        twin = flux(FluxControlNetPipeline)
        with ah.enable(pipe, exact(scope)):
            for scale in (*order, *order):
                assert_same(control(pipe, scale), control(twin, scale), f"ControlNet at {scale}")
    _no_residual_is_lost(scope)
    for end in (1.0, 0.5):
        pipe = flux(FluxControlNetPipeline)
        full = control(twin, control_guidance_end=end)
        with ah.enable(pipe, skipping(scope)) as session:
            first = control(pipe, control_guidance_end=end)
            again = control(pipe, control_guidance_end=end)
            assert skipped(session) > 0
        assert float((first - full).norm() / full.norm()) < 0.5
        assert float((again - full).norm() / full.norm()) < 0.5
        control(twin)
        assert_no_trace(pipe.transformer, twin.transformer)


def _no_residual_is_lost(scope: str) -> None:
    """Same inputs at every step: whatever is reused is what would have been computed."""
    model = flux().transformer
    tokens = torch.Generator().manual_seed(4)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=tokens)

    given = {
        "hidden_states": noise(1, 16, 16), "encoder_hidden_states": noise(1, 5, 24),
        "pooled_projections": noise(1, 20), "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3), "return_dict": False,
    }  # fmt: skip
    nothing: dict[str, Any] = {}
    doubles = {"controlnet_block_samples": [noise(1, 16, 16 * 2) for _ in range(3)]}
    singles = {"controlnet_single_block_samples": [noise(1, 16, 16 * 2) for _ in range(2)]}
    policy = dataclasses.replace(_uncorrected(scope), predictor="hold", warmup=1, cooldown=0)
    plans = [nothing, doubles, singles, doubles | singles]
    for plan in ([a, b] for a in plans for b in plans):
        with torch.no_grad(), ah.enable(model, policy) as session:
            for more in plan:
                with session.run():
                    for step in range(6):
                        time = 0.5 - 1e-12 * step  # moves, but not in float32
                        given["timestep"] = torch.tensor([time], dtype=torch.float64)
                        before = skipped(session)
                        got = model(**given, **more)[0]
                assert skipped(session) > before, "the last step was computed"
                assert_close(got, type(model).forward(model, **given, **more)[0], "residuals")


# -- guidance, batches, few steps ------------------------------------------------------------------


def true_cfg(scope: str) -> None:
    """Two branches: each is what it is alone, where decisions do not depend on the data."""
    given = {"true_cfg_scale": 2.0, **prompts(seed=2, prefix="negative_")}
    wanted = generate(flux(), **given)
    pipe, twin = flux(), flux()
    with ah.enable(pipe, exact(scope)):
        assert_same(generate(pipe, **given), wanted, "two branches")
    pipe = flux()
    with ah.enable(pipe, _uncorrected(scope)) as session:
        generate(pipe)
        alone = skipped(session)
        generate(pipe)
        alone = skipped(session) - alone
        got = generate(pipe, **given)
        assert skipped(session) > 2 * alone, "the branches do not skip alike"
    assert_same(got, _two_models(scope, given), "each branch keeps its own state")
    generate(twin)
    generate(twin, **given)
    assert_no_trace(pipe.transformer, twin.transformer)


def _two_models(scope: str, given: dict[str, Any]) -> torch.Tensor:
    """The two branches on two models, each with a session of its own."""
    pipe, other = flux(), flux()
    first = pipe.transformer

    class Both(torch.nn.Module):
        config, dtype, device = first.config, first.dtype, first.device
        name = "cond"

        def cache_context(self, name: str) -> Any:
            self.name = name
            return warnings.catch_warnings()

        def forward(self, **inputs: Any) -> Any:
            return (first if self.name == "cond" else other.transformer)(**inputs)

    one = ah.enable(first, _uncorrected(scope))
    two = ah.enable(other.transformer, _uncorrected(scope))
    pipe.transformer = Both()
    try:
        for _ in range(2):  # in the first one, stacks are not known yet
            with one.run(total=STEPS), two.run(total=STEPS):
                out = generate(pipe, **given)
    finally:
        one.disable()
        two.disable()
    return out


def _uncorrected(scope: str) -> LazyStep:
    """Needs no scheduler: its steps and times are numbers."""
    return skipping(scope, time="index", corrector=False)


def batch_of_prompts(scope: str) -> None:
    """Every row is what it is alone, to the noise of the matrix products."""
    pipe = flux()
    with ah.enable(pipe, exact(scope)):
        assert_same(generate(pipe, batch=3), plain(batch=3), "a batch")
    pipe = flux()
    latents = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(3))
    one = prompts(3)
    with ah.enable(pipe, skipping(scope)):
        generate(pipe)
        together = generate(pipe, **one, latents=latents)
        for row in range(3):
            mine = {k: v[row : row + 1] for k, v in one.items()}
            alone = generate(pipe, **mine, latents=latents[row : row + 1])
            assert_close(together[row : row + 1], alone, f"row {row}")


def four_steps(scope: str) -> str:
    """Too few to leave anything out by default: all are computed, and it is said."""
    pipe = flux()
    wanted = generate(pipe, num_inference_steps=4)
    policy = LazyStep(scope=scope)
    with ah.enable(pipe, policy) as session:
        with pytest.warns(ah.InertWarning, match="4 steps are too few"):
            assert_same(generate(pipe, num_inference_steps=4), wanted, "4 steps")
        assert_same(generate(pipe, num_inference_steps=4), wanted, "4 steps, said once")
        assert skipped(session) == 0
        assert "too few" in str(session.report())
    with ah.enable(pipe, policy, strict=False) as session:
        assert_same(generate(pipe, num_inference_steps=4), wanted, "4 steps, not strict")
        assert "too few" in str(session.report())
    with ah.enable(pipe, dataclasses.replace(policy, max_age=0)):
        generate(pipe, num_inference_steps=4)  # nothing was to be skipped: nothing to say
    return "computed in full, and said (a warning once, a line in the report)"


# -- from_pipe -------------------------------------------------------------------------------------


def sharing(cls: Any, pipe: Any, **given: Any) -> Any:
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns that nothing has to stay in float32
    try:
        second = cls.from_pipe(pipe, **given)
    finally:
        logging.set_verbosity(level)
    second.set_progress_bar_config(disable=True)
    return second


def from_pipe_refused(scope: str) -> str:
    pipe = flux()
    second = sharing(FluxImg2ImgPipeline, pipe)
    with ah.enable(pipe, skipping(scope)) as session:
        with pytest.raises(ah.AlreadyEnabledError, match="transformer already carries lazy_step"):
            ah.enable(second, skipping(scope))
        assert ah.active(second) is session
        assert_same(generate(pipe), lazily(scope), "the first one after the refusal")
    return "a second `enable` is refused: AlreadyEnabledError"


def from_pipe(scope: str) -> None:
    """Generations through a second pipeline that shares the transformer: with the scheduler
    shared, or its own, after a complete or an aborted generation of the first."""
    for policy, wanted in sessions(scope):
        for own in (False, True):
            for stop in (None, 2, 5):
                pipe = flux()
                more = {"scheduler": FlowMatchEulerDiscreteScheduler()} if own else {}
                second = sharing(FluxPipeline, pipe, **more)
                with ah.enable(pipe, policy):
                    assert_same(generate(pipe), wanted, "the first pipeline")
                    if stop is not None:
                        with pytest.raises(ZeroDivisionError):
                            generate(pipe, callback_on_step_end=_abort_at(stop))
                    what = f"own scheduler: {own}, aborted at {stop}"
                    got = generate(second)
                    if policy.max_age == 0:
                        assert_same(got, plain(), what)
                    elif own:
                        assert_same(got, _bare(policy), what)
                    else:
                        assert_same(got, generate_with(policy), what)
                    assert_same(generate(pipe), generate_with(policy), f"the first again; {what}")


def _abort_at(stop: int) -> Any:
    def callback(pipe: Any, step: int, time: Any, kwargs: Any) -> Any:
        return {} if step < stop else 1 // 0

    return callback


@functools.cache
def _bare(policy: LazyStep) -> torch.Tensor:
    """A pipeline whose scheduler is not seen, after another generation of the session."""
    pipe = flux()
    with ah.enable(pipe.transformer, policy):
        generate(pipe)
        return generate(pipe)


def image_to_image(scope: str) -> None:
    """The second pipeline enters the schedule late."""
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    given = {"image": image, "strength": 0.7, "num_inference_steps": 12}
    pipe = flux()
    second = sharing(FluxImg2ImgPipeline, pipe)
    wanted = generate(second, **given)
    with ah.enable(pipe, exact(scope)):
        assert_same(generate(second, **given), wanted, "image to image")
    with ah.enable(pipe, skipping(scope)) as session:
        first = generate(second, **given)
        assert skipped(session) > 0
        summary = session.report().to_dict()["steps"]
        assert {s["step"] for s in summary if s["action"] == "computed"} >= {0, 1, 7}, "cooldown"
        generate(pipe)
        if scope != "stack":
            assert_same(generate(second, **given), first, "again")
        assert float((first - wanted).norm() / wanted.norm()) < 0.5


# -- the table -------------------------------------------------------------------------------------

CELLS: dict[str, Callable[[str], str | None]] = {
    "model offload, then enabled": functools.partial(offloaded_before, model_offload),
    "enabled, then model offload": functools.partial(offloaded_after, model_offload),
    "sequential offload, then enabled": functools.partial(offloaded_before, sequential_offload),
    "enabled, then sequential offload": functools.partial(offloaded_after, sequential_offload),
    "LoRA loaded and unloaded while enabled": lora,
    "compiled, then enabled": functools.partial(compiled, True),
    "enabled, then compiled": functools.partial(compiled, False),
    "compiled by blocks": functools.partial(compiled_by_blocks, False),
    "compiled by blocks, fullgraph=True": functools.partial(compiled_by_blocks, True),
    "ControlNet residuals": controlnet,
    "true CFG (two branches)": true_cfg,
    "from_pipe, enabled twice": from_pipe_refused,
    "from_pipe, generating with the second": from_pipe,
    "from_pipe, image to image": image_to_image,
    "4 steps": four_steps,
    "batch of prompts": batch_of_prompts,
}

QUICK = {"enabled, then model offload", "ControlNet residuals", "4 steps", "batch of prompts"}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "cell", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CELLS]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own
def test_cell(cell: str, scope: str) -> None:
    outcome = CELLS[cell](scope) or "right"
    rows = [line.split(" | ") for line in DOCS.read_text().splitlines()]
    said = next(row[1 + SCOPES.index(scope)] for row in rows if row[0] == f"| {cell}")
    assert said.removesuffix(" |") == outcome, "docs/matrix.md is out of date"


def write() -> None:
    """Run every cell and write the table of outcomes."""
    outcomes = {cell: [run(scope) or "right" for scope in SCOPES] for cell, run in CELLS.items()}
    lines = [
        "# LazyStep beside what else is done to a pipeline",
        "",
        "Written by `python -P tests/test_flux_matrix.py`, from what happens on a tiny real Flux",
        "pipeline; that file says what each cell demands. *Right*: bit-identical to the pipeline",
        "without us where nothing is skipped, the same as on an untouched pipeline where something",
        "is (compiled and batched: to the noise of the matrix products), and nothing of ours stays",
        "behind. Anything else is said by name.",
        "",
        "| beside | " + " | ".join(f"scope `{scope}`" for scope in SCOPES) + " |",
        "|---" * (1 + len(SCOPES)) + "|",
        *(f"| {cell} | {' | '.join(row)} |" for cell, row in outcomes.items()),
        "",
        "Without an accelerator, model offload is `accelerate.cpu_offload_with_hook` and",
        "sequential offload `accelerate.cpu_offload`, which is what diffusers calls. Offload hooks",
        "that are taken off while a session lives take our seams with them if they were there",
        "first: the model then computes in full, and `disable()` warns and names it.",
        "",
    ]
    DOCS.write_text("\n".join(lines))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write()
