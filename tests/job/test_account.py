"""What optimizers take, counted on copies that step on fake tensors: to the byte, and unseen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import ckpt_pass
from ckpt_pass import ForeignOptimizerError, InvalidJobError, Job, OptimizerFailedError
from ckpt_pass.job.counting import Around, account_of
from ckpt_pass.job.named import UnknownOptimizerError, optimizer_named, optimizer_names
from ckpt_pass.plans.account import CLIPPING, FIRST_UPDATE, PASS, UPDATE, Account
from tests.job.jobs import Blocks, peak_above

#: Kernels may make a few numbers of their own, which are counted as if they all did.
NUMBERS = 16
X = torch.randn(8, 32)
Made = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def account(model: nn.Module, *args: Any, **job: Any) -> Account:
    return account_of(Around.of_step(model, (X,), {}), Job(*args, **job))


def phase(found: Account, name: str) -> int:
    above = next(phase.above_bytes for phase in found.phases if phase.name == name)
    assert above is not None
    return above


def trained(model: Blocks) -> list[nn.Parameter]:
    return list(model.blocks.parameters())


def stepped(model: Blocks, optimizer: torch.optim.Optimizer) -> int:
    """The peak of one step, with gradients there."""
    for parameter in trained(model):
        parameter.grad = torch.randn_like(parameter)
    return peak_above(optimizer.step)


def check(made: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]) -> Account:
    """Predicted as measured, in the first step and in the second."""
    model = Blocks()
    optimizer = made(model.parameters())
    found = account(model, optimizer)
    names = [phase.name for phase in found.phases]
    first, second = stepped(model, optimizer), stepped(model, optimizer)
    wanted = phase(found, FIRST_UPDATE if FIRST_UPDATE in names else UPDATE)
    assert 0 <= wanted - first <= NUMBERS
    assert 0 <= phase(found, UPDATE) - second <= NUMBERS
    return found


FEW = ("SGD", "AdamW", "Adafactor", "NAdam", "ASGD")


@pytest.mark.parametrize(
    "name",
    [
        name if name in FEW else pytest.param(name, marks=pytest.mark.slow)
        for name in optimizer_names()
        if name != "Muon"
    ],
)
def test_every_optimizer_of_torch_by_its_own_step(name: str) -> None:
    check(lambda parameters: getattr(torch.optim, name)(parameters))


@pytest.mark.parametrize(
    "made",
    [
        lambda p: torch.optim.SGD(p, momentum=0.9),
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.AdamW(p, amsgrad=True, maximize=True),
        lambda p: torch.optim.Adafactor(p, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3)),
    ],
)
def test_the_ways_that_they_may_go(made: Made) -> None:
    check(made)


def test_foreach_takes_more_than_the_loop_and_fused_nothing() -> None:
    def temporaries(**how: bool) -> int:
        model = Blocks()
        return phase(account(model, torch.optim.AdamW(model.parameters(), **how)), UPDATE)

    loop, foreach, fused = temporaries(), temporaries(foreach=True), temporaries(fused=True)
    assert foreach > loop > fused <= NUMBERS


def test_several_optimizers_step_one_after_the_other() -> None:
    model = Blocks()
    two = [p for p in trained(model) if p.ndim == 2]
    rest = [p for p in trained(model) if p.ndim != 2]
    optimizers = [torch.optim.AdamW(rest), torch.optim.SGD(two, momentum=0.9)]
    if hasattr(torch.optim, "Muon"):
        optimizers[1] = torch.optim.Muon(two)
    found = account(model, optimizers)
    for parameter in trained(model):
        parameter.grad = torch.randn_like(parameter)
    measured = peak_above(lambda: [optimizer.step() for optimizer in optimizers])
    assert 0 <= phase(found, FIRST_UPDATE) - measured <= NUMBERS


class Averaged(torch.optim.Optimizer):
    """A user's own: bytes with scales as states, an average of the weights in an attribute."""

    def __init__(self, params: Iterable[nn.Parameter], every: int = 1) -> None:
        super().__init__(params, {"lr": 0.1})
        self.average: dict[Tensor, Tensor] = {}
        self.inner = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.seen = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        self.seen += 1
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if p not in self.average:
                    self.average[p] = p.detach().clone()
                    self.state[p]["codes"] = torch.zeros_like(p, dtype=torch.uint8)
                    self.state[p]["scale"] = p.new_ones(p.shape[0])
                self.average[p].lerp_(p, 0.1)
        self.inner.step()


def test_a_foreign_class_by_its_own_state() -> None:
    found = check(lambda parameters: Averaged(parameters))
    model = Blocks()
    sizes = [(p.numel(), p.shape[0]) for p in trained(model)]
    assert found.states_bytes == sum(4 * n + 4 * n + n + 4 * rows for n, rows in sizes)


class Wrapped(Averaged):
    """Fails in its second step, having changed all that it has."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        super().step()
        if self.seen > 1:
            raise ValueError("no second step")


@pytest.mark.parametrize("cls", [Averaged, Wrapped])
def test_optimizer_and_model_stay_as_they_were(cls: type[Averaged]) -> None:
    model = Blocks()
    optimizer = cls(model.parameters())
    called: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: called.append(1))
    handle = register_optimizer_step_post_hook(lambda *_: called.append(2))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    grad = torch.ones_like(model.blocks[0][1].weight)
    model.blocks[0][1].weight.grad = grad
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = dict(vars(optimizer))
    random = torch.get_rng_state()
    try:
        if cls is Wrapped:
            with pytest.raises(OptimizerFailedError, match="no second step"):
                account(model, optimizer)
        else:
            account(model, optimizer)
    finally:
        handle.remove()
    assert not called and not optimizer.average and not optimizer.state and optimizer.seen == 0
    assert not optimizer.inner.state and scheduler.last_epoch == 0
    assert all(value is attributes[name] for name, value in vars(optimizer).items())
    assert model.blocks[0][1].weight.grad is grad and bool((grad == 1).all())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_states_that_are_there_already_are_no_addition() -> None:
    model = Blocks()
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    found = account(model, optimizer)
    assert found.states_now_bytes == found.states_bytes > 0
    names = [phase.name for phase in found.phases]
    assert names == [PASS, UPDATE]
    kept = copy.deepcopy(optimizer.state_dict())
    account(model, optimizer)
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, kept["state"][number][key]) for key, value in state.items())


def test_gradients_are_those_that_the_loss_gives() -> None:
    model = Blocks()
    found = account(model, torch.optim.SGD(model.parameters()))
    assert found.gradients_bytes == sum(4 * p.numel() for p in trained(model))
    held = [*model.parameters(), *model.buffers()]
    assert found.parameters_bytes + found.buffers_bytes == sum(t.nbytes for t in held)
    assert found.inputs_bytes == X.nbytes


def test_clipping_is_a_part_of_the_job() -> None:
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters())
    found = account(model, optimizer, clip_norm=1.0)
    for parameter in trained(model):
        parameter.grad = torch.randn_like(parameter)
    measured = peak_above(lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    assert 0 <= phase(found, CLIPPING) - measured <= NUMBERS


def test_meta_tensors_have_the_account_of_real_ones() -> None:
    with torch.device("meta"):
        other = Blocks()
    model = Blocks()
    for_real = account(model, torch.optim.AdamW(model.parameters(), foreach=True))
    around = Around.of_step(other, (X.to("meta"),), {})
    job = Job(torch.optim.AdamW(other.parameters(), foreach=True))
    assert account_of(around, job) == for_real


def test_an_accelerator_that_is_not_here_takes_its_own_kernels_and_blocks() -> None:
    """The multi-tensor kernels are the default there, and storages are blocks of 512 bytes."""
    model = Blocks().to("meta")
    job = Job(torch.optim.AdamW(model.parameters()))
    with torch.device("cuda:0"):  # which meta tensors stand for
        held = tuple(model.parameters())
        around = Around(held, tuple(model.buffers()), (X.to("meta"),), tuple(trained(model)))
        found = account_of(around, job)
    sizes = [-(-p.nbytes // 512) * 512 for p in model.blocks.parameters()]
    assert found.device.startswith("cuda") and found.gradients_bytes == sum(sizes)
    assert found.states_bytes == 2 * sum(sizes)  # the counts of steps are on the host
    assert sum(sizes) <= phase(found, UPDATE) <= 1.1 * sum(sizes)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"optimizer": 3}, "expected a torch.optim.Optimizer"),
        ({"optimizer": []}, "expected a torch.optim.Optimizer"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"accumulate": True}, "accumulate=True"),
        ({"set_to_none": 1}, "set_to_none=1"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
        ({"scaler": 2.0}, "scaler=2.0"),
    ],
)
def test_a_job_says_what_it_takes(how: dict[str, Any], words: str) -> None:
    given = {"optimizer": torch.optim.SGD(Blocks().parameters()), **how}
    with pytest.raises(InvalidJobError, match=words):
        Job(**given)


def test_optimizers_that_do_not_go() -> None:
    model = Blocks()
    with pytest.raises(InvalidJobError, match="LBFGS"):
        Job(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ForeignOptimizerError, match=r"\[32, 32\] of torch.float32, is none"):
        account(model, torch.optim.SGD(Blocks().parameters()))


def test_optimizers_by_name() -> None:
    model = Blocks()
    found = optimizer_named("sgd(momentum=0.9)", model)
    assert isinstance(found, torch.optim.SGD) and found.defaults["momentum"] == 0.9
    for text in ("Adamm", "SGD(0.1)", "SGD(lr=print)", "AdamW(betas=3)", "__import__('os')"):
        with pytest.raises(UnknownOptimizerError):
            optimizer_named(text, model)


def test_a_step_that_compiles_parts_of_itself() -> None:
    class Compiled(torch.optim.SGD):
        """Its step is compiled, and keeps a state of 8 bits."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            """One step."""
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["moment"] = torch.zeros_like(parameter, dtype=torch.uint8)
                    torch.compile(torch.add, fullgraph=True)(parameter.detach(), parameter.grad)

    model = Blocks()
    found = account(model, Compiled(model.parameters(), lr=0.1))
    assert 4 * found.states_bytes == found.gradients_bytes
    assert phase(found, UPDATE) == max(4 * p.numel() for p in trained(model)) + NUMBERS


class Unpooling(nn.Module):
    """Kernels that allocate as much as they return: convolutions, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h, at = nn.functional.max_pool2d(torch.relu(self.down(x)), 2, return_indices=True)
        return nn.functional.mse_loss(self.up(nn.functional.max_unpool2d(h, at, 2)), x)


def test_an_account_without_a_budget_counts_what_kernels_allocate() -> None:
    model, x = Unpooling(), torch.randn(4, 3, 32, 32)
    optimizer = torch.optim.AdamW(model.parameters())
    found = ckpt_pass.verify(model, x, policy="save-everything", optimizer=optimizer)
    assert found.ok, str(found)


class Careful(torch.optim.Optimizer):
    """Steps where all of a gradient is finite."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"]):
            if torch.isfinite(p.grad).all() and not torch.isnan(p.grad).any():
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                p.sub_(state["mean"].lerp_(p.grad, 0.1))


def test_an_optimizer_that_looks_whether_gradients_are_finite() -> None:
    model = nn.Linear(64, 64)
    plan = ckpt_pass.plan(
        model,
        torch.randn(2, 64),
        budget=1.0,
        optimizer=Careful(model),
        mode="eager",
        loss_fn=torch.sum,
    )
    assert plan.account is not None
    assert plan.account.states_bytes == sum(p.nbytes for p in model.parameters())
