"""``ckpt_pass.checkpoint``: gradients as without it, whatever goes in, around and through."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import queue
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass
from ckpt_pass import checkpoint
from ckpt_pass._torch import autograd
from ckpt_pass.regions.wrapping import RegionSpec, applied_regions, apply_regions
from tests.told import Told
from tests.zoo.surroundings import no_collector, on_threads

Fn = Callable[..., Any]


@pytest.fixture(autouse=True)
def _nothing_left_active() -> Iterator[None]:
    yield
    assert autograd.saved_hooks() is None
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert torch.is_grad_enabled()


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        hidden = self.dropout(F.gelu(self.up(self.norm(x))))
        return x + scale * self.down(hidden)  # type: ignore[no-any-return]


def values(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [value.to(dtype).requires_grad_() for value in made]


def gradients(fn: Fn, inputs: list[Tensor], module: nn.Module | None = None) -> list[Any]:
    """The gradients of ``fn``'s sum, from a fixed random state; nothing is left behind."""
    leaves = [*inputs, *(module.parameters() if module is not None else ())]
    torch.manual_seed(0)
    output = fn(*inputs)
    loss = sum(part.abs().sum() for part in torch.utils._pytree.tree_leaves(output)
               if isinstance(part, Tensor) and part.requires_grad)  # fmt: skip
    loss.backward()
    found = [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


def assert_same(fn: Fn, other: Fn, inputs: list[Tensor], module: nn.Module | None = None) -> None:
    wanted, got = gradients(fn, inputs, module), gradients(other, inputs, module)
    assert any(gradient is not None for gradient in wanted)
    for one, two in zip(wanted, got, strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)


def region(fn: Fn, **options: Any) -> Fn:
    return lambda *args, **kwargs: checkpoint(fn, *args, **options, **kwargs)


POLICIES = [None, "save-matmul", "save-nothing", "save-everything"]
every_policy = pytest.mark.parametrize("policy", POLICIES)


# --- what a region may do -------------------------------------------------------------------


def in_place(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    y.sin_()
    return (y * 2).relu_()


def several(x: Tensor, w: Tensor) -> tuple[Tensor, dict[str, Any]]:
    y = x @ w
    return y.sin(), {"view": y.t(), "text": "unused", "constant": torch.ones(2)}


def views(x: Tensor, w: Tensor) -> Tensor:
    return (x[:, :4].t() @ x[:, 4:]).exp().flatten()[::2] * w[0, 0]


def inner_gradient(x: Tensor, w: Tensor) -> Tensor:
    y = (x @ w).sin()
    (slope,) = torch.autograd.grad(y.sum(), w, create_graph=True)
    return y.exp() + slope.square().sum()


def complex_numbers(x: Tensor, w: Tensor) -> Tensor:
    return torch.fft.fft(x @ w).abs().log1p()


@every_policy
@pytest.mark.parametrize("fn", [in_place, several, views, inner_gradient, complex_numbers])
def test_functions(fn: Fn, policy: Any) -> None:
    if fn is inner_gradient and policy in ("save-matmul", "save-everything"):
        pytest.skip("a saved value is handed out once, and both backwards ask")
    assert_same(fn, region(fn, policy=policy), values((6, 8), (8, 8)))


@every_policy
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_modules(policy: Any, dropout: float) -> None:
    block = Block(dropout)
    assert_same(block, region(block, policy=policy), values((4, 8)), block)
    assert_same(
        lambda x: block(x, scale=0.5),
        lambda x: checkpoint(block, x, policy=policy, scale=0.5),
        values((4, 8)),
        block,
    )


def test_only_parameters_require_a_gradient() -> None:
    block = Block()
    x = torch.randn(4, 8)
    assert_same(lambda: block(x), lambda: checkpoint(block, x), [], block)


def test_tensors_inside_containers() -> None:
    def fn(pair: dict[str, Any], k: int) -> Tensor:
        return (pair["x"] @ pair["more"][0]).sin() * k

    x, w = values((4, 8), (8, 8))
    assert_same(
        lambda x, w: fn({"x": x, "more": [w]}, 2),
        lambda x, w: checkpoint(fn, {"x": x, "more": [w]}, 2),
        [x, w],
    )


def test_without_the_random_state_another_mask_is_drawn() -> None:
    block = Block(0.5)
    (x,) = values((64, 8))
    plain = gradients(block, [x], block)
    other = gradients(region(block, preserve_rng_state=False), [x], block)
    assert not all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))


def test_the_programs_random_numbers_go_on() -> None:
    block = Block(0.5)
    (x,) = values((4, 8))
    torch.manual_seed(0)
    block(x).sum().backward()
    wanted = torch.rand(3)
    torch.manual_seed(0)
    checkpoint(block, x).sum().backward()
    assert torch.equal(wanted, torch.rand(3))


def test_running_statistics_move_once() -> None:
    block, other = Block(norm=nn.BatchNorm1d), Block(norm=nn.BatchNorm1d)
    other.load_state_dict(block.state_dict())
    (x,) = values((4, 8))
    block(x).sum().backward()
    checkpoint(other, x).sum().backward()
    for mine, theirs in zip(other.buffers(), block.buffers(), strict=True):
        assert torch.equal(mine, theirs)


@every_policy
def test_autocast(policy: Any) -> None:
    block = Block()

    def under(fn: Fn) -> Fn:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                first = fn(x)
            return first.float().sin()

        return run

    assert_same(under(block), under(region(block, policy=policy)), values((4, 8)), block)


def test_a_default_device() -> None:
    def fn(x: Tensor) -> Tensor:
        return (x * torch.ones(8)).sin()

    (x,) = values((4, 8))
    with torch.device("cpu"):
        y = checkpoint(fn, x)
    with torch.device("meta"):
        y.sum().backward()
    assert x.grad is not None and x.grad.device.type == "cpu"


# --- backwards ------------------------------------------------------------------------------


def test_double_backward() -> None:
    x, w = values((4, 8), (8, 8))

    def second(fn: Fn) -> Fn:
        def run(x: Tensor, w: Tensor) -> Tensor:
            (slope,) = torch.autograd.grad(fn(x, w).sum(), x, create_graph=True)
            return slope.square()

        return run

    fn = lambda x, w: (x @ w).sin()  # noqa: E731
    assert_same(second(fn), second(region(fn)), [x, w])


def test_gradients_of_chosen_inputs() -> None:
    x, w = values((4, 8), (8, 8))
    fn = lambda x, w: (x @ w).sin().sum()  # noqa: E731
    (wanted,) = torch.autograd.grad(fn(x, w), [w])
    (got,) = torch.autograd.grad(checkpoint(fn, x, w), [w])
    assert torch.equal(wanted, got) and x.grad is None


def test_two_backwards_through_one_graph() -> None:
    x, w = values((4, 8), (8, 8))
    loss = checkpoint(lambda x, w: (x @ w).sin().exp(), x, w).sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * first)


def test_hooks_on_tensors_and_modules_run_once() -> None:
    block = Block()
    seen: list[str] = []
    block.register_forward_hook(lambda *_: seen.append("forward"))
    block.register_full_backward_hook(lambda *_: seen.append("backward"))
    (x,) = values((4, 8))
    with applied_regions(nn.ModuleDict({"block": block}), {"block": RegionSpec()}):
        y = block(x)
        y.register_hook(lambda _: seen.append("tensor"))
        y.sum().backward()
    assert seen == ["forward", "tensor", "backward"]


# --- inside and around ----------------------------------------------------------------------


def torchs(fn: Fn) -> Fn:
    return lambda *args: torch_checkpoint(fn, *args, use_reentrant=False)


@pytest.mark.parametrize("outer", [region, torchs])
@pytest.mark.parametrize("inner", [region, torchs])
def test_nested(outer: Fn, inner: Fn) -> None:
    block = Block(0.5)

    def twice(wrap: Fn) -> Fn:
        return lambda x: wrap(block)(wrap(block)(x).sin()).exp()

    assert_same(twice(lambda fn: fn), outer(twice(inner)), values((4, 8)), block)
    three = outer(lambda x: outer(twice(inner))(x).cos())
    assert_same(lambda x: twice(lambda fn: fn)(x).cos(), three, values((4, 8)), block)


def test_offloading_hooks_around() -> None:
    block = Block()

    def offloaded(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return checkpoint(block, x).sin()  # type: ignore[no-any-return]

    assert_same(lambda x: block(x).sin(), offloaded, values((4, 8)), block)


def test_hooks_inside() -> None:
    def fn(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            y = x.sin()
        return y.exp()

    assert_same(fn, region(fn), values((4, 8)))


def test_torch_func() -> None:
    x, w = values((4, 8), (8, 8))
    fn = lambda x, w: (x @ w).sin().sum()  # noqa: E731
    assert torch.equal(torch.func.grad(region(fn))(x, w), torch.func.grad(fn)(x, w))
    per_row = torch.func.vmap(region(lambda row: row.sin() * 2))
    assert torch.equal(per_row(x), x.sin() * 2)
    block = Block()
    weights = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    call = torch.func.functional_call(block, weights, (x,))
    assert torch.equal(checkpoint(torch.func.functional_call, block, weights, (x,)), call)


@every_policy
def test_compiled_around(policy: Any) -> None:
    block = Block()
    compiled = torch.compile(region(block, policy=policy), backend="aot_eager", fullgraph=True)
    assert_same(block, compiled, values((4, 8)), block)


def test_compiled_inside() -> None:
    block = Block()
    compiled = torch.compile(block, backend="aot_eager")
    assert_same(block, region(compiled), values((4, 8)), block)


def test_threads() -> None:
    block = Block(0.0)
    (x,) = values((4, 8))
    (wanted, *_) = gradients(block, [x])
    found: list[Tensor] = []

    def work() -> None:
        mine = x.detach().clone().requires_grad_()
        checkpoint(copy.deepcopy(block), mine).abs().sum().backward()
        found.append(mine.grad)

    on_threads(work, [()] * 8)
    assert len(found) == 8 and all(torch.equal(wanted, gradient) for gradient in found)


# --- errors ---------------------------------------------------------------------------------


class Failing:
    """Fails in its n-th run."""

    def __init__(self, at: int) -> None:
        self.at, self.told = at, Told()  # which a region does not put back
        self.told.runs = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.told.runs += 1
        y = x.sin()
        if self.told.runs == self.at:
            raise ValueError("no more")
        return y.exp()


@pytest.mark.parametrize("policy", [None, "save-nothing"])
def test_exceptions(policy: Any) -> None:
    (x,) = values((4, 8))
    with pytest.raises(ValueError, match="no more"):
        checkpoint(Failing(1), x, policy=policy)
    y = checkpoint(Failing(2), x, policy=policy)
    with pytest.raises(ValueError, match="no more"):
        y.sum().backward()
    assert_same(torch.sin, region(torch.sin, policy=policy), [x])


def test_a_changed_argument() -> None:
    (x,) = values((4, 8))
    y = x * 1
    z = checkpoint(lambda v: v.sin().exp(), y)
    y.mul_(2)
    with pytest.raises(ckpt_pass.MutatedArgumentError, match="changed in place"):
        z.sum().backward()


def queued(*numbers: int) -> queue.SimpleQueue[int]:
    """State that regions do not put back."""
    found: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in numbers:
        found.put(number)
    return found


def test_other_shapes_and_fewer_values_in_the_recomputation() -> None:
    (x,) = values((4, 8))
    sizes = queued(4, 2)
    y = checkpoint(lambda v: v[: sizes.get()].sin().exp(), x)
    with pytest.raises(ckpt_pass.RecomputeMismatchError, match=r"(?s)different metadata.*\[2, 8\]"):
        y.sum().backward()
    deep = queued(3, 1)

    def fn(v: Tensor) -> Tensor:
        for _ in range(deep.get()):
            v = v.sin()
        return v

    y = checkpoint(fn, x)
    with pytest.raises(ckpt_pass.RecomputeMismatchError, match=r"during recomputation: 1\b"):
        y.sum().backward()


def test_a_recomputation_that_differs_leaves_nothing() -> None:
    def failing() -> list[weakref.ref[Tensor]]:
        (x,) = values((4, 8))
        sizes, h = queued(4, 2), x * 1.0
        y = checkpoint(lambda v: v[: sizes.get()].sin().exp(), h)
        with pytest.raises(ckpt_pass.RecomputeMismatchError):
            y.sum().backward()
        return [weakref.ref(h), weakref.ref(y)]

    left = failing()
    gc.collect()
    assert [one() for one in left] == [None, None]


def test_an_unknown_policy() -> None:
    with pytest.raises(ckpt_pass.UnknownPolicyError):
        checkpoint(torch.sin, torch.randn(2, requires_grad=True), policy="save-matmuls")


def test_without_gradients_it_just_runs() -> None:
    runs = Failing(2)
    with torch.no_grad():
        checkpoint(runs, torch.randn(2))
    assert runs.told.runs == 1


# --- memory ---------------------------------------------------------------------------------


def test_nothing_lives_longer_than_its_graph() -> None:
    (x,) = values((4, 8))
    held = x * 1
    seen = weakref.ref(held)
    with no_collector():
        y = checkpoint(lambda v: v.sin().exp(), held)
        del held
        assert seen() is not None
        y.sum().backward()
        del y
        assert seen() is None


def test_the_peak_is_not_above_torchs() -> None:
    blocks = [Block() for _ in range(4)]
    (x,) = values((256, 8))

    def peak(wrap: Fn) -> int:
        def step() -> Tensor:
            y = x
            for block in blocks:
                y = wrap(block)(y)
            return y.sum()

        return ckpt_pass.measure_step(step, repeats=1).peak_bytes

    assert peak(region) <= peak(torchs)


# --- regions of a model ---------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


SPECS = {"blocks.0": RegionSpec(), "blocks.1": RegionSpec(policy="save-matmul")}


def test_a_copy_and_a_pickle_run_their_own_parameters() -> None:
    model, (x,) = Model(), values((4, 8))
    apply_regions(model, SPECS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(other(x), x)
        other(x).sum().backward()
        assert other.blocks[0].up.weight.grad is not None
        assert model.blocks[0].up.weight.grad is None
        x.grad = None


def test_a_forward_that_was_replaced_before() -> None:
    model, (x,) = Model(), values((4, 8))
    own = model.blocks[0].forward
    wrapped = functools.wraps(own)(lambda v: own(v) * 3)
    model.blocks[0].forward = wrapped
    wanted = gradients(model, [x], model)
    with applied_regions(model, SPECS):
        got = gradients(model, [x], model)
    assert all(torch.equal(one, two) for one, two in zip(wanted, got, strict=True))
    assert model.blocks[0].forward is wrapped


def test_applied_and_compiled() -> None:
    model = Model()
    plain = copy.deepcopy(model)
    apply_regions(model, SPECS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (x,) = values((4, 8))
    wanted, got = gradients(plain, [x], plain), gradients(compiled, [x], model)
    assert all(torch.equal(one, two) for one, two in zip(wanted, got, strict=True))


def test_recomputation_is_named_in_profiles() -> None:
    model, (x,) = Model(), values((4, 8))
    with applied_regions(model, SPECS), torch.profiler.profile() as profile:
        model(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"recompute blocks.0", "recompute blocks.1"} <= names
