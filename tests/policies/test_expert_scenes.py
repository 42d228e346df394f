"""ExpertSkip where models are used: generation, caches, chat servers, and layouts of weights it
must do right or refuse. The oracle is a plain patch of each experts module, without us."""

import contextlib
import copy
import fnmatch
import threading

import pytest
import torch
import torch.distributed as dist
from tiny_models import TINY
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import parametrize
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    TextIteratorStreamer,
)
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from accelerate_hooks import ExpertSkip, LazyStep, UnsupportedModelError, enable
from accelerate_hooks.policies._experts import read_experts
from accelerate_hooks.seam import Override

NAMES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"]
POLICIES = [ExpertSkip(ratio=0.8), ExpertSkip(top_k=2)]
every = pytest.mark.parametrize("name", NAMES)
each = pytest.mark.parametrize("policy", POLICIES, ids=str)
PROMPTS = [[0, 0, 0, 11, 12, 13, 14], [21, 22, 23, 24, 25, 26, 27]]


class Weighed:
    """An experts module's forward with weights of zero at what the policy drops."""

    def __init__(self, module, policy):
        self.forward, self.policy, self.normalises = module.forward, policy, None

    def __call__(self, hidden, indices, weights):
        ranked, order = weights.sort(dim=-1, descending=True, stable=True)
        kept = self.policy.keep(ranked, self.policy.top_k)
        total = ranked.sum(-1, keepdim=True)
        if self.normalises is None:
            self.normalises = bool((total.amax() - total.amin()) / total.amax() < 1e-2)
        some = ranked * kept
        if self.normalises:
            some = some * (total / some.sum(-1, keepdim=True))
        return self.forward(hidden, indices.gather(1, order), some)


@contextlib.contextmanager
def by_hand(model, policy):
    modules = [m for n, m in model.named_modules() if n.endswith(".experts")]
    for module in modules:
        module.forward = Weighed(module, policy)
    with torch.no_grad():
        yield
    for module in modules:
        del module.forward


@contextlib.contextmanager
def by_us(model, policy):
    with torch.no_grad(), enable(model, policy) as session:
        yield
    assert sum(session.skips.values())


def both(model, policy, work):
    with by_hand(model, policy):
        wanted = work()
    with by_us(model, policy):
        got = work()
    return got, wanted


def padded():
    ids = torch.tensor(PROMPTS)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def generated(model, **settings):
    out = model.generate(
        **padded(), min_new_tokens=6, max_new_tokens=6, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **settings,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


@every
@each
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_batches_with_left_padding(name, policy, cache):
    model = TINY[name].build()
    (ids, logits), (wanted_ids, wanted) = both(
        model, policy, lambda: generated(model, cache_implementation=cache)
    )
    assert torch.equal(ids, wanted_ids)
    assert torch.allclose(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])  # DeepSeek-V3 gives none
@each
def test_router_logits_are_the_routers_own(name, policy):
    model = TINY[name].build()

    def work():
        out = model(**padded(), output_router_logits=True, use_cache=False)
        return [out.logits, *(out.router_logits or ()), out.aux_loss]

    for got, wanted in zip(*both(model, policy, work), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)


class Tokenizer:
    """As much of one as a streamer asks for."""

    def decode(self, ids, **_):
        return "".join(f"{int(i)} " for i in ids)


def chat(model, first, turns=3):
    """A conversation whose cache is kept from turn to turn; what its user reads."""
    cache, ids, read = DynamicCache(config=model.config), first, []
    for turn in range(turns):
        ids = torch.cat((ids, torch.tensor([[30 + turn, 31 + turn]])), 1)
        streamer = TextIteratorStreamer(Tokenizer(), skip_prompt=True, timeout=60)
        settings = dict(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
            streamer=streamer, min_new_tokens=5, max_new_tokens=5, do_sample=False,
        )  # fmt: skip
        worker = threading.Thread(target=model.generate, kwargs=settings)
        worker.start()
        words = "".join(streamer).split()
        worker.join()
        read += words
        ids = torch.cat((ids, torch.tensor([[int(w) for w in words]])), 1)
    return read


@every
@each
def test_a_chat_server(name, policy):
    """Two conversations at once, each generating in a thread of its own."""
    model = TINY[name].build()
    prompts = [torch.tensor([row]) for row in ([5, 6, 7, 8], [41, 42, 43, 44, 45, 46])]

    def together():
        read = {}

        def serve(i):
            read[i] = chat(model, prompts[i])

        users = [threading.Thread(target=serve, args=(i,)) for i in range(len(prompts))]
        for user in users:
            user.start()
        for user in users:
            user.join()
        return [read[i] for i in range(len(prompts))]

    with by_hand(model, policy):
        wanted = [chat(model, prompt) for prompt in prompts]
    with by_us(model, policy):
        assert together() == wanted


def batched(model, prompts):
    """Continuous batching: requests of several lengths, packed in one row of tokens."""
    out = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(
            max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=16, block_size=16, max_batch_tokens=32
        ),
        progress_bar=False,
    )
    return [out[key].generated_tokens for key in sorted(out)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "prompts"), [("gpt_oss", [[11, 12, 13, 14], PROMPTS[1]]), ("glm4_moe", PROMPTS[1:])]
)
@each
def test_continuous_batching(name, policy, prompts):
    model = TINY[name].build()
    for module in model.modules():
        if hasattr(module, "routed_scaling_factor"):
            module.routed_scaling_factor = 2.5
    got, wanted = both(model, policy, lambda: batched(model, prompts))
    assert all(len(ids) == 6 for ids in wanted)
    assert got == wanted


class Packed(nn.Module):
    """8-bit weights and a scale a row, as quantisers put in the place of the experts' class."""

    def __init__(self, plain):
        super().__init__()
        self.act_fn = plain.act_fn
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(plain, name).detach()
            scale = weight.abs().amax(-1, keepdim=True) / 127
            whole = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
            self.register_parameter(name, whole)
            self.register_buffer(f"{name}_scale", scale)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        up = self.gate_up_proj * self.gate_up_proj_scale
        down = self.down_proj * self.down_proj_scale
        out = torch.zeros_like(hidden_states)
        for s in range(top_k_index.shape[1]):
            e = top_k_index[:, s]
            gate, linear = torch.einsum("th,tfh->tf", hidden_states, up[e]).chunk(2, -1)
            y = torch.einsum("ti,thi->th", self.act_fn(gate) * linear, down[e])
            out = out + top_k_weights[:, s : s + 1] * y
        return out


class Unpack(nn.Module):
    def forward(self, packed):
        return packed * 0.5


class Subclass(torch.Tensor):
    """What stands for a tensor whose numbers lie elsewhere."""


def packed(model):
    for module in model.modules():
        if isinstance(getattr(module, "experts", None), nn.Module):
            module.experts = Packed(module.experts)


def parametrized(model):
    for module in [m for n, m in model.named_modules() if n.endswith(".experts")]:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(module, name, Unpack(), unsafe=True)


def subclassed(model):
    for module in [m for n, m in model.named_modules() if n.endswith(".experts")]:
        for name in ("gate_up_proj", "down_proj"):
            own = getattr(module, name).detach()
            setattr(module, name, nn.Parameter(own.as_subclass(Subclass), requires_grad=False))


def offloaded(model):
    accelerate = pytest.importorskip("accelerate")
    for module in [m for n, m in model.named_modules() if n.endswith(".experts")]:
        accelerate.cpu_offload(module, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("change", [packed, parametrized, subclassed, offloaded])
@each
def test_weights_that_are_no_plain_tensors(change, policy):
    """The kernel must not read them: the module's own forward runs, on fewer slots."""
    model = TINY["mixtral"].build()
    change(model)
    experts = [m for n, m in model.named_modules() if n.endswith(".experts")]
    with torch.no_grad(), enable(model, policy) as session:
        got = model(**padded(), use_cache=False).logits
        assert sum(session.skips.values())
    own = [vars(m).get("forward") for m in experts]
    for module in experts:
        module.forward = Weighed(module, policy)
    with torch.no_grad():
        wanted = model(**padded(), use_cache=False).logits
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert all(read_experts(m) is None for m in experts)
    assert not any(isinstance(f, Override) for f in own)


@pytest.fixture
def ranks():
    """A group of one rank, so that weights are distributed tensors."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(model, mesh, kind):
    """Expert or tensor parallel experts, as transformers' plan for the model says."""
    plan = getattr(model.config, f"base_model_{kind}_plan")
    named = [*(n for n, _ in model.named_modules()), *(n for n, _ in model.named_parameters())]
    mine = {
        name: style
        for name in named
        for pattern, style in plan.items()
        if "experts" in pattern and fnmatch.fnmatchcase(name, f"model.{pattern}")
    }
    assert mine
    if kind == "ep":
        apply_expert_parallelism(model, mesh, mesh, mine)
    else:
        apply_tensor_parallelism(model, mesh, mine)


@pytest.mark.parametrize("kind", ["ep", "tp"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@each
def test_expert_and_tensor_parallel(ranks, kind, name, policy, monkeypatch):
    model, plain = TINY[name].build(), TINY[name].build()
    with by_hand(plain, policy):
        wanted = plain(**padded(), use_cache=False).logits
    sharded(model, ranks, kind)
    with by_us(model, policy):
        got = model(**padded(), use_cache=False).logits
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    if policy.decides == "ahead":
        enable(model, policy).disable()
    else:
        with pytest.raises(UnsupportedModelError, match="expert_skip decides from data"):
            enable(model, policy)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def adapt(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], r=2,
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(3)
    return peft.get_peft_model(model, config).eval()


def other_activation(model):
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = nn.ReLU()
    return model


def parametrised(model):
    for layer in model.model.layers:
        parametrize.register_parametrization(layer.mlp.experts, "gate_up_proj", Doubled())
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads a deprecated name
@pytest.mark.parametrize("change", [adapt, other_activation, parametrised])
def test_what_is_made_of_experts_while_enabled_is_seen(change):
    policy, inputs = ExpertSkip(mass=0.6), TINY["qwen3_moe"].inputs(2)
    with torch.no_grad():
        model = change(TINY["qwen3_moe"].build())
        with enable(model, policy):
            wanted = model(**inputs).logits
        model = TINY["qwen3_moe"].build()
        session = enable(model, policy)
        before = model(**inputs).logits
        got = change(model)(**inputs).logits
        session.disable()
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, before, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads a deprecated name
@pytest.mark.parametrize("change", [adapt, parametrised])
def test_experts_that_somebody_has_wrapped_are_not_taken_out(change):
    model, inputs = TINY["qwen3_moe"].build(), TINY["qwen3_moe"].inputs(2)
    model = change(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        words = "wrapped the experts|not what it computes with"
        with pytest.raises(UnsupportedModelError, match=words):
            enable(model, ExpertSkip(prune=0.25, free_memory=True))
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads a deprecated name
@each
def test_an_adapter_on_the_experts(policy):
    peft = pytest.importorskip("peft")
    model = TINY["mixtral"].build()
    config = peft.LoraConfig(
        r=2, init_lora_weights=False,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config).eval()
    experts = [m for m in model.modules() if type(m).__name__ == "MixtralExperts"]
    with by_us(adapted, policy):
        got = adapted(**padded(), use_cache=False).logits
    for module in experts:
        module.forward = Weighed(module, policy)
    with torch.no_grad():
        wanted = adapted(**padded(), use_cache=False).logits
        for module in experts:
            del module.forward
        with adapted.disable_adapter(), enable(adapted, policy):
            without = adapted(**padded(), use_cache=False).logits
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, without, rtol=1e-2, atol=1e-2)


def test_a_module_that_is_an_mlp_and_its_experts():
    """HiDream's mixtures call a list of experts themselves: LazyStep reuses their output as that of
    an MLP, ExpertSkip acts inside, and nothing of either stays."""
    model, inputs = TINY["hidream"].build(), TINY["hidream"].inputs(2)
    before = [dict(vars(module)) for module in model.modules()]
    with torch.no_grad():
        plain = model(**inputs)[0]
        with enable(model, [LazyStep(scope="site"), ExpertSkip(top_k=1)]) as session:
            paths = {(site.kind, site.path) for site in session.sites}
            assert not torch.equal(model(**inputs)[0], plain)
            assert torch.equal(copy.deepcopy(model)(**inputs)[0], plain)
            mixture = model.double_stream_blocks[0].block.ff_i
            replica = mixture._replicate_for_data_parallel()
            assert not any(isinstance(value, Override) for value in vars(replica).values())
        assert torch.equal(model(**inputs)[0], plain)
    path = "double_stream_blocks.0.block.ff_i"
    assert {("mlp", path), ("experts", path)} <= paths
    assert [dict(vars(module)) for module in model.modules()] == before


def test_experts_that_are_asked_in_another_way_are_refused():
    """As transformers' MXFP4 GPT-OSS does: what nobody calls cannot be intercepted."""

    class Routed(type(TINY["mixtral"].build().model.layers[0].mlp.experts)):
        def forward_routed(self, hidden, routing):
            return self.forward(hidden, *routing)

    class Mixture(nn.Module):
        def __init__(self, plain):
            super().__init__()
            self.gate, self.experts = plain.gate, plain.experts
            self.experts.__class__ = Routed

        def forward(self, hidden):
            _, weights, indices = self.gate(hidden.flatten(0, -2))
            routed = self.experts.forward_routed(hidden.flatten(0, -2), (indices, weights))
            return routed.view(hidden.shape)

    model = TINY["mixtral"].build()
    for layer in model.model.layers:
        layer.mlp = Mixture(layer.mlp)
    with pytest.raises(UnsupportedModelError, match="expert_skip found no experts site"):
        enable(model, ExpertSkip(top_k=1))


def test_a_decision_inside_a_cuda_graph_is_refused(monkeypatch):
    model = TINY["mixtral"].build()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch.no_grad(), enable(model, ExpertSkip(top_k=2)):
        model(**padded())
    refused = pytest.raises(UnsupportedModelError, match="a CUDA graph is being captured")
    with torch.no_grad(), enable(model, ExpertSkip(ratio=0.8)), refused:
        model(**padded())
