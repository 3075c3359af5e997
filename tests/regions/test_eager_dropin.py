"""``ckpt_pass.context_fn`` in the place of torch's selective checkpoint contexts.

Every region runs beside the same code without a checkpoint, and gradients agree to the last bit;
where torch's own contexts behave otherwise, a test shows both.
"""

from __future__ import annotations

import functools
import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import ckpt_pass
from tests.told import Told
from tests.zoo.surroundings import SINCE_2_13, on_threads

ROWS, WIDTH = 4, 8
aten = torch.ops.aten
Region = Callable[..., Any]

SELECTOR = ckpt_pass.save(op_class="matmul", module="*.mlp", nth=2) | ckpt_pass.recompute()
POLICIES = ["save-matmul-attention", "save-nothing", "every-other-matmul", SELECTOR]
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: str(p)[:24])


def save_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """A policy function as torch wants it."""
    saves = op == aten.mm.default
    return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE


def torchs(policy_fn: Any = save_products) -> Callable[[], Any]:
    """What ``context_fn`` is a drop-in for."""
    return functools.partial(create_selective_checkpoint_contexts, policy_fn)


def ours(policy: Any) -> Callable[[], Any]:
    return ckpt_pass.context_fn(policy)


def run(region: Region, context: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(region, *args, use_reentrant=False, context_fn=context, **kwargs)


def leaves() -> dict[str, Tensor]:
    names = {"x": ROWS, "w1": WIDTH, "w2": WIDTH}
    return {name: torch.randn(rows, WIDTH, requires_grad=True) for name, rows in names.items()}


def assert_same(region: Region, context: Callable[[], Any], compiled: bool = False) -> None:
    """The region's gradients are those of the plain code, to the last bit."""
    given_leaves = leaves()
    args = tuple(given_leaves.values())

    def plain() -> Tensor:
        loss: Tensor = region(*args).square().mean()
        return loss

    def selective() -> Tensor:
        loss: Tensor = run(region, context, *args).square().mean()
        return loss

    other = torch.compile(selective, backend="aot_eager", fullgraph=True) if compiled else selective
    ckpt_pass.compare_gradients(plain, other, given_leaves).raise_if_different()


def mlp(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return torch.relu(x @ w1) @ w2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(torch.sin(self.proj(x)))
        return out


class Net(nn.Module):
    """Two blocks, each a checkpoint region if there is a context."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, context: Callable[[], Any] | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x) if context is None else run(layer, context, x)
        return x.square().mean()


# --- the same step --------------------------------------------------------------------------


@every_policy
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_model_with_dropout_trains_the_same(policy: Any, early_stop: bool) -> None:
    net, x = Net(), torch.randn(ROWS, WIDTH)
    with set_checkpoint_early_stop(early_stop):
        for context in (ours(policy), torchs()):
            step = functools.partial(net, x, context)
            ckpt_pass.compare_gradients(lambda: net(x), step, net).raise_if_different()


@every_policy
def test_a_compiled_model_trains_the_same(policy: Any) -> None:
    net, x = Net(), torch.randn(ROWS, WIDTH)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    ckpt_pass.compare_gradients(
        lambda: net(x), lambda: compiled(x, ours(policy)), net
    ).raise_if_different()


@pytest.mark.parametrize("policy", [save_products, [aten.mm.default], "save-matmul", SELECTOR])
@pytest.mark.parametrize("inside", [True, False])
def test_a_context_built_inside_or_outside_compiled_code(policy: Any, inside: bool) -> None:
    values = leaves()
    outside = ours(policy)

    def step(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        context = ckpt_pass.context_fn(policy) if inside else outside
        return run(mlp, context, x, w1, w2).square().mean()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    args = tuple(values.values())
    ckpt_pass.compare_gradients(
        lambda: mlp(*args).square().mean(), lambda: compiled(*args), values
    ).raise_if_different()


pairs = pytest.mark.parametrize(
    ("outer", "inner"), [("ours", "ours"), ("ours", "torch"), ("torch", "ours")]
)


def assert_nested_same(policy: Any, outer: str, inner: str, compiled: bool) -> None:
    contexts = {"ours": ours(policy), "torch": torchs()}

    def region(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return mlp(run(mlp, contexts[inner], torch.sin(x @ w1), w1, w2), w2, w1)

    assert_same(region, contexts[outer], compiled)


@every_policy
@pairs
@pytest.mark.parametrize("early_stop", [True, False])
def test_nested_regions(policy: Any, outer: str, inner: str, early_stop: bool) -> None:
    with set_checkpoint_early_stop(early_stop):
        assert_nested_same(policy, outer, inner, compiled=False)


@pairs
def test_nested_regions_compiled(outer: str, inner: str) -> None:
    assert_nested_same("every-other-matmul", outer, inner, compiled=True)


@every_policy
def test_keywords_several_outputs_and_plain_arguments(policy: Any) -> None:
    values = leaves()

    def region(x: Tensor, power: int, *, weights: dict[str, Tensor], scale: float) -> Any:
        hidden = (x @ weights["w1"]) ** power
        return hidden @ weights["w2"] * scale, {"hidden": hidden, "power": power}

    def loss(call: Callable[..., Any]) -> Tensor:
        out, more = call(values["x"], 2, weights=values, scale=0.5)
        assert more["power"] == 2
        return (out.sin() + more["hidden"]).square().mean()

    for context in (ours(policy), torchs()):
        ckpt_pass.compare_gradients(
            lambda: loss(region),
            lambda context=context: loss(functools.partial(run, region, context)),
            values,
        ).raise_if_different()


@every_policy
def test_without_gradients_nothing_is_kept(policy: Any) -> None:
    args = tuple(leaves().values())
    expected = mlp(*args)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), ckpt_pass.watch_regions() as regions:
            out = run(mlp, ours(policy), *args)
        assert torch.equal(out, expected) and not out.requires_grad
        assert not regions


@every_policy
def test_autocast_and_a_weight_in_its_cache(policy: Any) -> None:
    """Forward casts ``w1`` before the region, the recomputation inside it (pytorch#193338)."""
    values = leaves()

    def region(x: Tensor, w1: Tensor) -> Tensor:
        return (x @ w1).relu() @ w1

    def loss(call: Callable[..., Any]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = values["x"] @ values["w1"]
            return call(hidden, values["w1"]).float().square().mean()

    ckpt_pass.compare_gradients(
        lambda: loss(region), lambda: loss(functools.partial(run, region, ours(policy))), values
    ).raise_if_different()
    if SINCE_2_13:
        with pytest.raises(RuntimeError, match="_to_copy"):
            loss(functools.partial(run, region, torchs())).backward()


@every_policy
def test_a_tensor_subclass(policy: Any) -> None:
    values = leaves()

    def gradients(call: Callable[..., Any]) -> list[Tensor]:
        x = TwoTensor(values["x"].detach(), values["x"].detach() * 3).requires_grad_()
        out = call(x, values["w1"].detach(), values["w2"].detach()).square().mean()
        (grad,) = torch.autograd.grad(out, x)
        return [grad.a, grad.b]

    def region(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        hidden = x @ w1
        later = hidden.exp()
        hidden.mul_(2)
        return hidden.clone().relu_() @ w2 + later

    expected = gradients(region)
    got = gradients(functools.partial(run, region, ours(policy)))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_higher_order_ops_in_a_region() -> None:
    def region(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        hidden = x @ w1
        out = torch.cond(hidden.sum() > 0, lambda h: h.sin(), lambda h: h.cos(), (hidden,))
        return out @ w2

    assert_same(region, ours("save-matmul"))
    assert_same(region, ours("save-matmul"), compiled=True)
    with pytest.raises(NotImplementedError, match="cond"):
        assert_same(region, torchs())


# --- random numbers -------------------------------------------------------------------------


def two_dropouts(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return F.dropout(F.dropout(x @ w1, 0.5) @ w2, 0.5).sin()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_saved_draw_leaves_the_later_ones_alone(nth: int, compiled: bool) -> None:
    """A dropout that is recomputed after a saved one draws the mask of its forward."""
    one = ckpt_pass.save(op=("aten.bernoulli", "aten.native_dropout"), nth=nth)
    assert_same(two_dropouts, ours(one | ckpt_pass.recompute()), compiled)


def test_without_a_preserved_random_state_the_stream_goes_on() -> None:
    one = ckpt_pass.save(op="aten.bernoulli", nth=1) | ckpt_pass.recompute()
    out = run(two_dropouts, ours(one), *leaves().values(), preserve_rng_state=False)
    torch.manual_seed(7)
    out.sum().backward()
    after = torch.get_rng_state()
    torch.manual_seed(7)
    torch.empty(ROWS, WIDTH).bernoulli_(0.5)  # the one mask that was drawn again
    assert torch.equal(after, torch.get_rng_state())


@every_policy
def test_running_statistics_move_once(policy: Any) -> None:
    norm, x = nn.BatchNorm1d(WIDTH), torch.randn(ROWS, WIDTH)
    norm.num_batches_tracked = None  # counted by the module's Python code, so counted again
    region = nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.Tanh())

    def step(context: Callable[[], Any]) -> Tensor:
        return run(region, context, x).square().mean()

    def compare(context: Callable[[], Any]) -> ckpt_pass.GradientComparison:
        return ckpt_pass.compare_gradients(
            lambda: region(x).square().mean(), lambda: step(context), region
        )

    compare(ours(policy)).raise_if_different()
    assert compare(torchs()).different == ("1.running_mean", "1.running_var")


# --- values changed in place ----------------------------------------------------------------


def changes_a_product(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    hidden = x @ w1
    before = hidden.exp()
    hidden.view(-1).mul_(0.5)
    hidden[:, :2].zero_()
    return hidden @ w2 + before


@every_policy
@pytest.mark.parametrize("compiled", [False, True])
def test_a_saved_value_is_copied_before_it_changes(policy: Any, compiled: bool) -> None:
    assert_same(changes_a_product, ours(policy), compiled)


def test_torch_refuses_what_we_copy() -> None:
    assert_same(changes_a_product, ours(save_products))
    with pytest.raises(RuntimeError, match="has been mutated"):
        assert_same(changes_a_product, torchs())


def test_a_saved_value_changed_after_its_region() -> None:
    def region(x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x @ w1
        return hidden.sin() @ w2, hidden

    for context, error, message in (
        (ours(save_products), ckpt_pass.MutatedActivationError, r"aten\.mm\.default was changed"),
        (torchs(), RuntimeError, "has been mutated"),
    ):
        out, hidden = run(region, context, *leaves().values())
        hidden.detach().add_(1)
        with pytest.raises(error, match=message):
            out.sum().backward()


# --- backward more than once ----------------------------------------------------------------


@pytest.mark.parametrize("policy", ["save-matmul-attention", "every-other-matmul"])
def test_backward_twice(policy: Any) -> None:
    refusing: list[tuple[Any, type[Exception]]] = [(ours(policy), ckpt_pass.BackwardTwiceError)]
    if SINCE_2_13:
        refusing.append((torchs(), RuntimeError))
    for context, error in refusing:
        loss = run(mlp, context, *leaves().values()).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(error):
            loss.backward()


def test_backward_twice_where_nothing_was_saved() -> None:
    values = leaves()
    loss = run(mlp, ours("save-nothing"), *values.values()).sum()
    first = torch.autograd.grad(loss, values["x"], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, values["x"])[0])


def two_outputs(x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    return torch.relu(x @ w1) @ w2, (x @ w2).sin()


@every_policy
@pytest.mark.parametrize("which", [0, 1])
def test_backward_through_one_of_two_outputs(policy: Any, which: int) -> None:
    assert_same(lambda *a: two_outputs(*a)[which], ours(policy))
    values = leaves()
    ckpt_pass.compare_gradients(
        lambda: two_outputs(*values.values())[which].sum(),
        lambda: run(two_outputs, ours(policy), *values.values())[which].sum(),
        values,
    ).raise_if_different()


def test_backward_through_both_outputs_one_by_one() -> None:
    """The second backward takes what the first has left; torch's own uses a saved value twice."""

    def one_by_one(context: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        values = leaves()
        for output in run(two_outputs, context, *values.values()):
            output.sum().backward()
        return {name: value.grad for name, value in values.items() if value.grad is not None}

    torch.manual_seed(0)
    plain = leaves()
    for output in two_outputs(*plain.values()):
        output.sum().backward()
    for name, gradient in one_by_one(ours(save_products)).items():
        assert torch.equal(gradient, plain[name].grad)
    with pytest.raises(RuntimeError):
        one_by_one(torchs())


# --- what goes wrong ------------------------------------------------------------------------


def test_an_op_that_runs_more_often_in_the_recomputation() -> None:
    runs: queue.SimpleQueue[int] = queue.SimpleQueue()  # state that regions do not put back
    runs.put(1)
    runs.put(2)

    def region(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        for _ in range(runs.get()):
            x = x + 1
        return (x @ w1).sin() @ w2

    loss = run(region, ours([aten.add.Tensor]), *leaves().values()).sum()
    with pytest.raises(ckpt_pass.RecomputeMismatchError, match=r"aten\.add\.Tensor 2 times"):
        loss.backward()
    assert issubclass(ckpt_pass.RecomputeMismatchError, ckpt_pass.CkptPassError)


def active() -> tuple[int, ...]:
    """Dispatch modes and global module hooks that are in place now."""
    hooks = (
        module_hooks._global_forward_pre_hooks,
        module_hooks._global_forward_hooks,
        module_hooks._global_forward_hooks_always_called,
    )
    return (torch._C._len_torch_dispatch_stack(), *(len(table) for table in hooks))


class Failing(Block):
    """Raises in its n-th call, in the middle of its work."""

    def __init__(self, at_call: int) -> None:
        super().__init__()
        self.at_call, self.told = at_call, Told()  # which a region does not put back
        self.told.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.told.calls += 1
        hidden = torch.sin(self.proj(x))
        if self.told.calls == self.at_call:
            raise ValueError("on purpose")
        return super().forward(hidden)


@every_policy
@pytest.mark.parametrize("at_call", [1, 2], ids=["forward", "recomputation"])
def test_an_exception_leaves_nothing_behind(policy: Any, at_call: int) -> None:
    before = active()
    block, x = Failing(at_call), torch.randn(ROWS, WIDTH)
    with ckpt_pass.watch_regions(), pytest.raises(ValueError, match="on purpose"):
        run(block, ours(policy), x).sum().backward()
    assert active() == before


def test_two_threads_with_names_of_their_own() -> None:
    net = Net()
    xs = [torch.randn(ROWS, WIDTH) for _ in range(2)]
    net.eval()  # dropout would draw from one generator in an order that nobody knows
    context = ours(SELECTOR)
    expected = [torch.autograd.grad(net(x), list(net.parameters())) for x in xs]
    barrier = threading.Barrier(2)
    failures: list[object] = []

    def work(x: Tensor, gradients: tuple[Tensor, ...]) -> None:
        barrier.wait()
        for _ in range(20):
            with ckpt_pass.watch_regions() as regions:
                loss = net(x, context)
            sites = [str(site) for region in regions for site in region.saved_sites]
            wanted = [f"layers.{i}.mlp.3 aten.addmm.default" for i in range(2)]
            got = torch.autograd.grad(loss, list(net.parameters()))
            if sites != wanted or not all(map(torch.equal, got, gradients)):
                failures.append(sites)

    on_threads(work, zip(xs, expected, strict=True))
    assert not failures


def returns_a_word(site: Any) -> Any:
    return "save"


def returns_a_number(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    return 3


@pytest.mark.parametrize("policy", [returns_a_word, returns_a_number])
def test_a_policy_that_returns_nonsense(policy: Any) -> None:
    with pytest.raises(ckpt_pass.PolicyReturnError) as caught:
        run(mlp, ours(policy), *leaves().values())
    assert policy.__name__ in str(caught.value)
    assert "aten.mm.default" in str(caught.value)
    assert "0x" not in str(caught.value)
    traceback.clear_frames(caught.tb)  # torch 2.11 leaves a region only when its frame is gone


@pytest.mark.parametrize("compiled", [False, True])
def test_a_policy_without_an_opinion(compiled: bool) -> None:
    assert_same(mlp, ours(lambda site: None), compiled)
    assert_same(mlp, ours(lambda ctx, op, *args, **kwargs: None), compiled)


# --- any program, any saved ops -------------------------------------------------------------

Step = Callable[[Tensor, Tensor], Tensor]
STEPS: dict[str, Step] = {
    "mm": lambda x, w: x @ w,
    "add": lambda x, w: x + x.mean(),
    "mul": lambda x, w: x * 1.5,
    "relu": lambda x, w: torch.relu(x),
    "sin": lambda x, w: torch.sin(x),
    "add_": lambda x, w: (x * 1).add_(0.25),
    "mul_": lambda x, w: (x @ w).mul_(0.5),
    "relu_": lambda x, w: (x + 0.1).relu_(),
    "view": lambda x, w: x.reshape(2, -1).sin().view(ROWS, WIDTH),
    "transpose": lambda x, w: (x.t().contiguous() * 2).t(),
    "change a view": lambda x, w: _change_a_view(x @ w),
    "cat": lambda x, w: torch.cat(x.split(WIDTH // 2, 1)[::-1], 1),
    "dropout": lambda x, w: F.dropout(x, 0.3),
}
SAVED = [
    aten.mm.default, aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor,
    aten.relu.default, aten.relu_.default, aten.sin.default, aten.clone.default,
    aten.cat.default, aten.bernoulli_.float, aten.div_.Scalar, aten.mean.default,
]  # fmt: skip


def _change_a_view(x: Tensor) -> Tensor:
    x[:, ::2].mul_(2)
    return x


def saved_subsets() -> Iterator[Any]:
    """All saved ops in a list, or only some executions of them by a rule that counts."""
    ops = st.lists(st.sampled_from(SAVED), min_size=1, unique=True)
    yield ops
    yield ops.map(lambda found: ckpt_pass.save(op=found, every=2) | ckpt_pass.recompute())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(STEPS)), min_size=3, max_size=12), st.one_of(*saved_subsets())
)
def test_any_program_with_any_saved_ops(program: list[str], policy: Any) -> None:
    def region(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        for index, name in enumerate(program):
            x = STEPS[name](x, (w1, w2)[index % 2])
        return x

    assert_same(region, ours(policy))
