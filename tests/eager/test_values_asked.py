"""Eager plans of models whose Python looks at values; planning leaves the model as it was."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_pass


class Asking(nn.Module):
    """Layers, a norm with statistics and dropout; subclasses look at values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3)
        )
        self.norm, self.dropout = nn.BatchNorm1d(16), nn.Dropout(0.1)

    def look(self, x: Tensor, number: int) -> bool:
        return True

    def pick(self, x: Tensor, labels: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if self.look(x, number):
                x = x + layer(x)
        return self.pick(self.dropout(self.norm(x)), labels).square().mean()


class Finite(Asking):
    def look(self, x: Tensor, number: int) -> bool:
        return bool(x.isfinite().all())


class DropsLayers(Asking):
    def look(self, x: Tensor, number: int) -> bool:
        return bool(torch.rand([]) < 0.7)


class PicksRows(Asking):
    def pick(self, x: Tensor, labels: Tensor) -> Tensor:
        return x[labels > 3]


class PicksByValue(Asking):
    def pick(self, x: Tensor, labels: Tensor) -> Tensor:
        return x[(x.sum(-1) > 0).nonzero()[:, 0]] / (labels.max().item() + 1)


class SplitsByCounts(Asking):
    """Rows to experts, by lists of numbers."""

    def pick(self, x: Tensor, labels: Tensor) -> Tensor:
        sizes = torch.bincount((x[:, 0] > 0).long(), minlength=2).tolist()
        best = x.sum(0).topk(4).indices.view(2, 2).tolist()
        first, second = x.split(sizes)
        return torch.cat([first * 2, second])[:, best[0]] * x[:, best[1]]


class Masked(Asking):
    def __init__(self, boolean: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.boolean = boolean

    def pick(self, x: Tensor, labels: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(len(x))
        masked: Tensor = self.encoder(x[None], mask=mask.isinf() if self.boolean else mask)
        return masked


class Counting(Asking):
    """Goes another way each time that it is called."""

    calls = itertools.count(1)  # of the class: what an instance holds would be put back

    def look(self, x: Tensor, number: int) -> bool:
        return next(self.calls) % 2 == 0 or bool(x.sum() > -1e9)


def step(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    model.zero_grad()
    model(x, labels).backward()
    return tuple(torch.zeros(()) if p.grad is None else p.grad for p in model.parameters())


@pytest.mark.parametrize(
    "build",
    [
        Finite,
        DropsLayers,
        PicksRows,
        PicksByValue,
        SplitsByCounts,
        Masked,
        lambda: Masked(boolean=True),
    ],
)
def test_the_plan_is_made_and_met(build: type[Asking]) -> None:
    torch.manual_seed(0)
    model, x, labels = build(), torch.randn(96, 16), torch.arange(96) % 7
    x.requires_grad_()
    before = copy.deepcopy(dict(model.state_dict()))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    plan = ckpt_pass.plan(model, x, labels, budget=0.75, mode="eager")
    assert torch.equal(state, torch.get_rng_state()) and plan.regions
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and x.grad is None

    plain = step(copy.deepcopy(model), x.detach(), labels)
    with plan.applied(model):
        torch.manual_seed(3)
        measured = ckpt_pass.measure_step(lambda: model(x, labels), repeats=1)
        model.load_state_dict(before)
        ours = step(model, x.detach(), labels)
    assert plan.budget_bytes is not None and measured.peak_bytes <= plan.budget_bytes
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


def test_a_mask_that_no_layer_reads_counts_while_regions_hold_it() -> None:
    model, x, labels = Masked(), torch.randn(64, 16), torch.arange(64)
    plan = ckpt_pass.plan(model, x, labels, budget=0.75, mode="eager")
    with plan.applied(model):
        measured = ckpt_pass.measure_step(lambda: model(x, labels), repeats=1)
    assert abs(measured.peak_bytes - plan.peak_bytes) <= 256  # one mask is 16 kB


class Mapped(Asking):
    """A transform of ``torch.func``, which eager plans do not take."""

    def pick(self, x: Tensor, labels: Tensor) -> Tensor:
        return torch.vmap(self.layers[0])(x)


def test_a_transform_of_torch_func_is_refused_as_such() -> None:
    with pytest.raises(ckpt_pass.NotTraceableError, match=r"no transform of torch\.func"):
        ckpt_pass.plan(Mapped(), torch.randn(8, 16), torch.arange(8), budget=0.9, mode="eager")


def test_a_forward_that_goes_another_way_is_refused() -> None:
    with pytest.raises(ckpt_pass.OtherPathError, match="takes the same way twice"):
        ckpt_pass.plan(Counting(), torch.randn(8, 16), torch.arange(8), budget=0.9, mode="eager")


class _Filled(nn.Module):
    """Fills a learnt value in by a mask, counts classes, converts a part, names one by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.fill = nn.Parameter(torch.randn(16))
        self.parts = nn.ModuleDict({f"part_{k}": nn.Linear(16, 16) for k in range(3)})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.parts["part_0"].to(torch.float32)(x).tanh() + 1
        h[mask] = self.fill
        chosen = F.one_hot(h.argmax(-1), 16).sum((0, 1)).argmax() % 2 + 1
        return self.parts[f"part_{chosen}"](h[mask]).square().mean() + h.sin().mean()


def test_masks_conversions_and_names_by_values() -> None:
    torch.manual_seed(0)
    model, x, mask = _Filled(), torch.randn(4, 8, 16), torch.rand(4, 8) < 0.4
    plan = ckpt_pass.plan(model, x, mask, mode="eager", budget=1.0)
    measured = ckpt_pass.measure_step(lambda: model(x, mask), repeats=1)
    # What an op by a mask needs besides is measured on a mask that leaves nothing out.
    assert 0.9 * plan.peak_bytes <= measured.peak_bytes <= plan.peak_bytes
    assert type(model.parts["part_0"].weight) is nn.Parameter
    assert "_apply" not in vars(model)


class Slope(nn.Module):
    """Looks at a value, and takes a gradient in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        (slope,) = torch.autograd.grad(h.tanh().square().sum(), h, create_graph=True)
        return (h - 0.1 * slope) * float(h.detach().mean())


def test_a_gradient_inside_a_forward_that_looks_at_values() -> None:
    model, x = nn.Sequential(Slope(), Slope()), torch.randn(4, 8)
    plan = ckpt_pass.plan(model, x, loss_fn=torch.sum, budget=1.0, mode="eager")
    assert plan.peak_bytes > 0


class Aligned(nn.Module):
    """A CTC loss; of a batch or of one sequence."""

    def __init__(self, reduction: str, zero_infinity: bool, batch: int) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.loss = nn.CTCLoss(reduction=reduction, zero_infinity=zero_infinity)
        self.batch = batch

    def forward(self, x: Tensor) -> Tensor:
        rows = self.fc(x).log_softmax(-1)
        count = max(self.batch, 1)
        targets = torch.ones(count, 3, dtype=torch.long)
        if not self.batch:
            targets = targets[0]
        else:
            rows = rows[:, None].repeat(1, self.batch, 1)
        found: Tensor = self.loss(rows, targets, (12,) * count, [3] * count)
        return found.sum()


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize(
    ("reduction", "zero_infinity"), [("mean", False), ("sum", True), ("none", False)]
)
def test_lengths_that_are_numbers(reduction: str, zero_infinity: bool, batch: int) -> None:
    model, x = Aligned(reduction, zero_infinity, batch), torch.randn(12, 16)
    plan = ckpt_pass.plan(model, x, budget=1.0, mode="eager")
    assert ckpt_pass.measure_step(lambda: model(x), repeats=1).peak_bytes == plan.peak_bytes
