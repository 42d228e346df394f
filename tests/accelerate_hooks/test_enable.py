"""What users get wrong: an error of our tree or the documented behaviour, and a model left as it
was."""

import copy
from pathlib import Path

import contract
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
)
from tiny_models import TINY
from torch import nn

import accelerate_hooks as ah
from accelerate_hooks import LazyStep, enable
from accelerate_hooks.errors import (
    AccelerateHooksError,
    AlreadyEnabledError,
    ArtifactError,
    SpecError,
    UnsupportedModelError,
)
from accelerate_hooks.kernels import _dispatch
from accelerate_hooks.seam import Ledger

FLUX = TINY["flux"]
DIT = TINY["dit"]


class Pipe(DiffusionPipeline):
    def __init__(
        self, transformer: FluxTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def __call__(self, steps):
        self.scheduler.set_timesteps(steps)
        given = FLUX.inputs(2)
        x = given.pop("hidden_states")
        with torch.no_grad():
            for t in self.scheduler.timesteps:
                given["timestep"] = t.expand(2) / 1000
                out = self.transformer(hidden_states=x, **given)[0]
                x = self.scheduler.step(out, t, x, return_dict=False)[0]
        return x


@pytest.fixture
def model():
    return FLUX.build()


@pytest.fixture
def pipe(model):
    return Pipe(model, FlowMatchEulerDiscreteScheduler())


def state(model):
    return {path: dict(vars(module)) for path, module in model.named_modules()}


@pytest.mark.parametrize(
    ("policy", "error", "named"),
    [
        ("lazzy_step", SpecError, "lazzy_step"),
        ("lazy_step:treshold=0.1", SpecError, "treshold"),
        ("lazy_step:tolerance=-1", SpecError, "tolerance"),
        ("lazy_step:every=zero", SpecError, "every"),
        ("lazy_step:scope=everything", SpecError, "scope"),
        ("", SpecError, ""),
        (LazyStep, SpecError, "LazyStep()"),
        (None, SpecError, "NoneType"),
        (3, SpecError, "int"),
        ([], SpecError, ""),
        (Path("no such file.json"), ArtifactError, "no such file.json"),
        (Path("lazy_step"), ArtifactError, "lazy_step"),
        ("no such file.json", ArtifactError, "no such file.json"),
    ],
)
def test_a_wrong_policy(model, policy, error, named):
    before = state(model)
    with pytest.raises(error) as raised:
        enable(model, policy)
    assert named in str(raised.value)
    assert isinstance(raised.value, AccelerateHooksError)
    assert state(model) == before


def test_a_value_out_of_range_is_told_when_the_policy_is_built():
    with pytest.raises(SpecError, match="tolerance=nan"):
        LazyStep(tolerance=float("nan"))


@pytest.mark.parametrize("target", [None, 3, "model", torch.zeros(1), object(), nn.Linear])
def test_something_that_is_no_model(target):
    with pytest.raises(UnsupportedModelError, match=r"nn\.Module"):
        enable(target, LazyStep())


def test_a_model_without_sites():
    with pytest.raises(UnsupportedModelError, match="block"):
        enable(nn.Linear(2, 2), contract.BlockSkip())


def test_only_is_a_glob(model):
    before = state(model)
    with pytest.raises(UnsupportedModelError, match="nothing like it"):
        enable(model, contract.BlockReuse(), only="nothing like it")
    assert state(model) == before
    with enable(model, contract.BlockReuse(), only="transformer_blocks.[12]") as session:
        assert [s.path for s in session.sites] == ["transformer_blocks.1", "transformer_blocks.2"]
        contract.outputs(model, FLUX.inputs(2))
        assert all(session.record(site).skipped for site in session.sites)
        skipped = {r.site.path for r in session.records.values() if r.skipped}
        assert skipped == {"transformer_blocks.1", "transformer_blocks.2"}


@pytest.mark.parametrize("only", [5, ["a"], b"x"])
def test_only_is_text(model, only):
    with pytest.raises(SpecError, match="glob"):
        enable(model, LazyStep(), only=only)


@pytest.mark.parametrize("total", ["8", -1, 0, 2.5, True])
def test_a_run_has_a_whole_number_of_steps(model, total):
    with (
        enable(model, LazyStep()) as session,
        pytest.raises(SpecError, match="number of steps"),
        session.run(total),
    ):
        pass


def test_outputs_that_are_no_tensor_are_left_alone():
    """A ControlNet gives lists of residuals."""
    model = ControlNetModel(
        in_channels=4, block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16,
        norm_num_groups=4, conditioning_embedding_out_channels=(8, 8),
    ).eval()  # fmt: skip
    x, context, picture = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        plain = model(x, torch.tensor(5), context, picture)
        for policy in (LazyStep.exact(), LazyStep()):
            with enable(model, policy) as session, pytest.warns(ah.InertWarning, match="list"):
                got = model(x, torch.tensor(5), context, picture)
            assert "nothing is reused" in str(session.report())
            pairs = zip(got[0], plain[0], strict=True)
            assert torch.equal(got[1], plain[1]) and all(torch.equal(a, b) for a, b in pairs)


def test_a_recipe_of_a_session_acts_where_it_acted(model, tmp_path):
    path = tmp_path / "recipe.json"
    wanted = "lazy_step@single*:scope=site,criterion=cadence"
    with enable(model, wanted) as session:
        session.save_recipe(path)
        sites = [site.path for site in session.sites]
    assert sites and all(site.startswith("single") for site in sites)
    for given in (path, str(path), [path]):
        with enable(model, given) as session:
            assert [site.path for site in session.sites] == sites


def test_not_strict_is_noted(model):
    plain = contract.outputs(model, FLUX.inputs(2), 2)
    with enable(model, contract.BlockReuse(), only="nowhere", strict=False) as session:
        assert contract.equal(contract.outputs(model, FLUX.inputs(2), 2), plain)
        assert any("block_reuse" in note and "nowhere" in note for note in session.notes)


@pytest.mark.parametrize(
    "second",
    [
        lambda m: m,
        lambda m: m.transformer_blocks[0],
        lambda m: nn.ModuleDict({"inner": m}),
        lambda m: Pipe(m, FlowMatchEulerDiscreteScheduler()),
        lambda m: Pipe.from_pipe(Pipe(m, FlowMatchEulerDiscreteScheduler())),
    ],
    ids=["itself", "a part", "a parent", "a pipeline", "from_pipe"],
)
def test_a_second_enable(model, second):
    with enable(model, contract.BlockReuse()) as session:
        before = state(model)
        with pytest.raises(AlreadyEnabledError, match=r"block_reuse.*disable"):
            enable(second(model), contract.BlockReuse())
        assert state(model) == before
        assert session.active
        assert ah.active(second(model)) is session
    assert ah.active(model) is None
    with enable(second(model), contract.BlockReuse(), only="*", strict=False):
        pass


@pytest.mark.parametrize("scope", ["model", "site"])
def test_a_part_of_an_enabled_model(model, scope):
    block = model.transformer_blocks[0]
    with enable(model, LazyStep(scope=scope)) as session:
        before = state(model)
        with pytest.raises(AlreadyEnabledError, match=r"lazy_step.*disable"):
            enable(block, LazyStep())
        assert state(model) == before
        assert ah.active(block) is session
        assert ah.active(copy.deepcopy(block)) is None
    assert ah.active(block) is None
    with enable(block, contract.BlockSkip(), strict=False):
        pass


def test_a_pipe_that_shares_the_transformer(pipe):
    other = Pipe.from_pipe(pipe)
    assert other.transformer is pipe.transformer
    with enable(pipe, LazyStep.example()) as session:
        with pytest.raises(AlreadyEnabledError):
            enable(other, LazyStep())
        assert ah.active(other) is session
        ah.disable(other)
        assert not session.active
    with enable(other, LazyStep()):
        assert ah.active(pipe) is not None


class Stages(DiffusionPipeline):
    """Denoisers and schedulers under names of their own, as combined pipelines have them."""

    def __init__(self, prior_prior, prior_scheduler, transformer, unconditional_transformer,
                 decoder_scheduler, controlnet, vae):  # fmt: skip
        super().__init__()
        given = {name: value for name, value in locals().items() if name != "self"}
        self.register_modules(**{n: v for n, v in given.items() if not n.startswith("_")})

    def __call__(self, steps):
        x = DIT.inputs(2)["hidden_states"]
        labels = torch.tensor([1, 2])
        stages = (
            (self.prior_scheduler, [self.prior_prior]),
            (self.decoder_scheduler, [self.transformer, self.unconditional_transformer]),
        )
        for scheduler, models in stages:
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                with torch.no_grad():
                    self.controlnet(x, t)
                    out = sum(m(x, t.expand(2), labels, return_dict=False)[0] for m in models)
                x = scheduler.step(out[:, :4], t, x, return_dict=False)[0]
        return x


class ControlNet(nn.Linear):
    def forward(self, x, timestep):
        return [super().forward(x)]


def test_every_model_that_is_given_a_timestep_is_a_denoiser():
    models = [DIT.build() for _ in range(3)]
    schedulers = [FlowMatchEulerDiscreteScheduler() for _ in range(2)]
    pipe = Stages(
        models[0], schedulers[0], models[1], models[2], schedulers[1], ControlNet(8, 8),
        nn.Linear(2, 2),
    )  # fmt: skip
    plain = pipe(8)
    with enable(pipe, LazyStep.exact()) as session:
        assert torch.equal(pipe(8), plain)
        assert "controlnet (ControlNet): computes plainly" in str(session.report())
    with enable(pipe, LazyStep(criterion="cadence", warmup=1)) as session:
        names = [root.name for root in session.roots]
        assert names == ["transformer", "prior_prior", "unconditional_transformer"]
        first = pipe(8)
        assert torch.equal(pipe(8), first) and not torch.equal(first, plain)
        assert all(session.record(root.site).skipped for root in session.roots)
        assert ah.active(models[2]) is session


def test_the_environment_switches_us_off(model, monkeypatch):
    before = state(model)
    monkeypatch.setenv("ACCELERATE_HOOKS", "0")
    with enable(model, LazyStep.example()) as session:
        assert not session.active
        assert state(model) == before
        assert any("ACCELERATE_HOOKS=0" in note for note in session.notes)
        assert "ACCELERATE_HOOKS=0" in str(session.report())
    with pytest.raises(SpecError):
        enable(model, "no_such_policy")


def test_an_unknown_choice_of_kernels_is_told_beforehand(model, monkeypatch):
    before = state(model)
    for choice in (*_dispatch.CHOICES, "", " Torch "):
        monkeypatch.setenv("ACCELERATE_HOOKS_KERNELS", choice)
        enable(model, LazyStep.example()).disable()
    monkeypatch.setenv("ACCELERATE_HOOKS_KERNELS", "cuda")
    with pytest.raises(SpecError, match="'cuda'; give one of auto, torch, triton"):
        enable(model, LazyStep.example())
    assert state(model) == before


@pytest.mark.parametrize("value", ["off", "false", "00", "lazy_step:preset=fast"])
def test_the_environment_is_understood_or_told(model, monkeypatch, value):
    monkeypatch.setenv("ACCELERATE_HOOKS", value)
    with pytest.raises(SpecError, match=f"ACCELERATE_HOOKS='{value}'; give 0"):
        enable(model, LazyStep())
    for on in ("", "1", " 1 "):
        monkeypatch.setenv("ACCELERATE_HOOKS", on)
        with enable(model, LazyStep()) as session:
            assert session.active


def test_a_generation_that_raises(pipe):
    pipe.set_progress_bar_config(disable=True)
    plain = pipe(6)
    with enable(pipe, LazyStep.example()):
        expected = pipe(6)
    assert not torch.equal(plain, expected)

    def bomb(*_):
        raise RuntimeError("half-way")

    with enable(pipe, LazyStep.example()) as session:
        handle = pipe.transformer.proj_out.register_forward_pre_hook(
            lambda *_: bomb() if session.forwards == 3 else None
        )
        with pytest.raises(RuntimeError, match="half-way"):
            pipe(6)
        handle.remove()
        assert not contract.cached(session)
        assert torch.equal(pipe(6), expected)
    assert torch.equal(pipe(6), plain)


def test_nan_inside(model):
    """NaN goes through as it would in the plain model, and is gone with its run."""
    given = FLUX.inputs(2)
    good = contract._fresh(model, given, LazyStep.example())
    broken = {**given, "hidden_states": given["hidden_states"] * float("nan")}
    with enable(model, LazyStep.example()):
        out = contract.outputs(model, broken)
        assert all(t.isnan().any() for step in out for t in step)
        assert contract.equal(contract.outputs(model, FLUX.inputs(2)), good)


@pytest.mark.parametrize("criterion", ["error", "change"])
def test_nan_is_never_a_reason_to_skip(model, criterion):
    given = FLUX.inputs(2)
    broken = {**given, "hidden_states": given["hidden_states"] * float("nan")}
    with enable(model, LazyStep(criterion=criterion, warmup=1)) as session:
        contract.outputs(model, broken)
    assert not session.skips


@pytest.mark.parametrize("scope", ["model", "stack"])
@pytest.mark.parametrize("paused", [False, True])
def test_what_is_exported_is_the_plain_model(scope, paused):
    model, given = TINY["dit"].build(), TINY["dit"].inputs(2)
    with torch.no_grad():
        (plain,) = model(**given)
        with enable(model, LazyStep(criterion="cadence", scope=scope, warmup=1)) as session:
            if paused:
                with session.paused():
                    program = torch.export.export(model, (), given)
            else:
                with pytest.warns(ah.InertWarning, match="exported"):
                    program = torch.export.export(model, (), given)
            assert not contract.cached(session)
            assert torch.equal(model(**given)[0], plain)
        assert torch.equal(program.module()(**given)[0], plain)


def test_what_cannot_be_undone_keeps_nothing_else():
    ledger, done = Ledger(), []

    def fails():
        raise KeyError("first")

    for undo in (lambda: done.append(1), fails, lambda: done.append(2)):
        ledger.note(undo)
    with pytest.raises(KeyError, match="first"):
        ledger.undo()
    assert done == [2, 1] and ledger.undo() == []
