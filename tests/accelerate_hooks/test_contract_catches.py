"""The contract suite catches what it is there to catch: each law is broken on purpose."""

import contract
import pytest
import torch
from tiny_models import TINY

from accelerate_hooks import seam
from accelerate_hooks.seam import Override, Seam


def make_model():
    return TINY["dit"].build()


INPUTS = TINY["dit"].inputs


class LeavesAnAttribute(contract.BlockReuse):
    def around(self, call):
        call.site.module.last_step = call.step.index
        return super().around(call)


def test_an_attribute_left_behind():
    with pytest.raises(AssertionError, match=r"no trace left.*last_step"):
        contract.no_trace_left(make_model, INPUTS, LeavesAnAttribute)


class CountsVisits(contract.BlockReuse):
    """Counts steps where they outlive the run: odd after a generation that died in its middle."""

    seen: dict = {}  # noqa: RUF012 (that is what is wrong with it)

    def around(self, call):
        number = self.seen[call.site.path] = self.seen.get(call.site.path, -1) + 1
        return call.skip() if number % 2 else call.proceed()


def test_state_that_survives_an_abort():
    CountsVisits.seen.clear()
    with pytest.raises(AssertionError, match="state belongs to the run"):
        contract.state_belongs_to_the_run(make_model, INPUTS, CountsVisits)


class SharesASlot(contract.BlockReuse):
    """Starts clean with every generation, but keeps its values where all threads see them."""

    shared: dict = {}  # noqa: RUF012

    def around(self, call):
        if call.step.index == 0:
            self.shared.pop(call.site.path, None)
        if call.step.index % 2 and call.site.path in self.shared:
            added = self.shared[call.site.path]
            return call.skip(call.x + added[: len(call.x)].expand_as(call.x))
        out = call.proceed()
        self.shared[call.site.path] = call.outputs(out)[0] - call.x
        return out


def test_two_threads_that_share_a_slot():
    with pytest.raises(AssertionError, match=r"state belongs to the run.*(threads|tasks) share"):
        contract.state_belongs_to_the_run(make_model, INPUTS, SharesASlot)


def test_a_deep_copy_that_runs_the_originals_weights(monkeypatch):
    monkeypatch.setattr(seam, "_take_out", lambda state, owner: None)
    monkeypatch.setattr(Override, "__deepcopy__", lambda self, memo: self.original)
    with pytest.raises(AssertionError, match=r"copies are plain.*own weights"):
        contract.copies_are_plain(make_model, INPUTS, contract.BlockReuse)


def test_a_copy_that_carries_a_seam(monkeypatch):
    monkeypatch.setattr(seam, "_take_out", lambda state, owner: None)
    with pytest.raises(AssertionError, match=r"copies are plain.*of ours"):
        contract.copies_are_plain(make_model, INPUTS, contract.BlockReuse)


def test_a_hook_that_compile_ignores(monkeypatch):
    def call(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        return self.session._visit(self, args, kwargs)

    monkeypatch.setattr(Seam, "__call__", call)
    with pytest.raises(AssertionError, match=r"compile.*not what eager gives"):
        contract.compile_keeps_up(
            lambda depth: make_model(), INPUTS, contract.BlockReuse, compile_first=False
        )


class NeverSkips(contract.BlockReuse):
    @classmethod
    def example(cls):
        return cls.exact()


def test_a_policy_that_never_skips():
    with pytest.raises(AssertionError, match="never a silent nothing"):
        contract.never_a_silent_nothing(make_model, INPUTS, NeverSkips)


class ReadsTheHost(contract.BlockReuse):
    def around(self, call):
        return call.proceed() if call.x.abs().mean() > 1e9 else super().around(call)


class ReadsTooOften(contract.BlockReuse):
    def around(self, call):
        call.read(call.x.abs().mean())
        return super().around(call)


@pytest.mark.parametrize("policy", [ReadsTheHost, ReadsTooOften])
def test_a_host_read_that_nobody_declared(policy):
    with pytest.raises(AssertionError, match="host reads are declared"):
        contract.host_reads_are_declared(make_model, INPUTS, policy)


class Recompiles(contract.BlockReuse):
    """Changes with every step what Dynamo guards on."""

    def around(self, call):
        torch.set_num_threads(1 + call.step.index)
        return super().around(call)


def test_recompilation_that_grows_with_steps():
    threads = torch.get_num_threads()
    try:
        with pytest.raises(AssertionError, match=r"compile.*grow with steps"):
            contract.compile_keeps_up(lambda depth: make_model(), INPUTS, Recompiles, regional=True)
    finally:
        torch.set_num_threads(threads)


class CachesAGraph(contract.BlockReuse):
    def around(self, call):
        last = call.slot(dict, scope="stack")
        with torch.enable_grad():
            last["graph"] = call.x.mean() * torch.ones(1, requires_grad=True)
        return super().around(call)


def test_a_graph_that_is_kept():
    with pytest.raises(AssertionError, match=r"inference only.*graph"):
        contract.inference_only(make_model, INPUTS, CachesAGraph)


class Hoards(contract.BlockReuse):
    kept: list = []  # noqa: RUF012

    def around(self, call):
        out = super().around(call)
        self.kept.append(call.outputs(out)[0])
        return out


def test_memory_that_grows():
    with pytest.raises(AssertionError, match="bounded memory"):
        contract.bounded_memory(make_model, INPUTS, Hoards)
    Hoards.kept.clear()


class UsesTheGlobalGenerator(contract.BlockReuse):
    def around(self, call):
        torch.rand(1)
        return super().around(call)


def test_a_random_state_that_moved():
    with pytest.raises(AssertionError, match=r"exact at zero.*random state"):
        contract.exact_at_zero(make_model, INPUTS, UsesTheGlobalGenerator)
