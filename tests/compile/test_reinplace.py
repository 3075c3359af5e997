"""Results that take the memory of an input: the same bits, a buffer less, never one in use."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx

import ckpt_pass
from ckpt_pass._torch.operators import OpOverload
from ckpt_pass.compile.reinplace import overwrite_in_place
from ckpt_pass.graph.capture import capture
from ckpt_pass.graph.joint import storage_keys
from ckpt_pass.graph.reinplace import _makers, _variants, makes_anew, overwritable_inputs
from ckpt_pass.planner.liveness import simulate
from ckpt_pass.planner.problem import InvalidProblemError
from ckpt_pass.planner.schedule import schedule
from tests.planner.test_planner import MIB, chain
from tests.zoo import hf

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Sizes around the vector width of CPU kernels, with a rest.
LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "rows": lambda dtype: torch.randn(7, 37).to(dtype),
    "columns": lambda dtype: torch.randn(37, 7).to(dtype).t(),
    "large": lambda dtype: torch.randn(3, 130, 129).to(dtype),
    "one": lambda dtype: torch.randn(1, 1).to(dtype),
}
#: What ops take besides tensors of one shape.
EXTRA: dict[str, tuple[Any, ...]] = {
    "aten::pow.Tensor_Scalar": (3.0,),
    "aten::clamp": (-0.5, 0.5),
    "aten::clamp_min": (0.1,),
    "aten::clamp_max": (0.1,),
    "aten::threshold_backward": (0.0,),
    "aten::hardtanh_backward": (-1.0, 1.0),
    "aten::leaky_relu_backward": (0.1, False),
    "aten::elu_backward": (1.0, 1.0, 1.0, True),
    "aten::softplus_backward": (1.0, 20.0),
    "aten::_softmax": (-1, False),
    "aten::_log_softmax": (-1, False),
}


def arguments(op: OpOverload, make: Callable[[], Tensor]) -> list[Any]:
    """Arguments of an op: fresh tensors of one shape, and what else it takes."""
    tensors = [a for a in op._schema.arguments if str(a.type) == "Tensor"]
    given: list[Any] = [make().abs() + 0.1 for _ in tensors]
    if op is aten.where.self:
        given[0] = given[0] > 0.7
    if op.name() in ("aten::_softmax_backward_data", "aten::_log_softmax_backward_data"):
        return [*given, -1, given[0].dtype]
    if op.name() == "aten::elu_backward":  # the result comes last
        return [given[0], *EXTRA[op.name()], given[1]]
    return [*given, *EXTRA.get(op.name(), ())]


@pytest.mark.parametrize("op", list(_variants()), ids=str)
def test_writing_over_an_input_gives_the_same_bits(op: OpOverload) -> None:
    variant, _ = _variants()[op]
    out = next(a.name for a in variant._schema.arguments if a.is_out)
    overwrote = 0
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        args = arguments(op, lambda: LAYOUTS[layout](dtype))  # noqa: B023
        wanted = op(*args)
        for place, given in enumerate(args):
            if not isinstance(given, Tensor) or given.dtype != dtype:
                continue
            own = [a.clone(memory_format=torch.preserve_format) if a is given else a for a in args]
            if own[place].stride() != wanted.stride():  # softmax lays its result out anew
                continue
            result = variant(*own, **{out: own[place]})
            assert result.data_ptr() == own[place].data_ptr()
            assert torch.equal(result, wanted), (dtype, layout, place)
            overwrote += 1
    assert overwrote >= len(DTYPES) * (len(LAYOUTS) - 1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "bert", "vit", "resnet"])
def test_what_makes_memory_anew_does(name: str) -> None:
    model, args = getattr(hf, name)()
    seen: set[Any] = set()

    class Watched(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.op == "call_function" and n.target in _makers():
                seen.add(n.target)
                inputs = {self.env[source].untyped_storage().data_ptr() for source in tensors(n)}
                outputs = [t for t in flat(result) if t.untyped_storage().nbytes()]
                assert all(t.untyped_storage().data_ptr() not in inputs for t in outputs), n
            return result

    def tensors(node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if isinstance(self_env(n), Tensor)]

    def self_env(node: fx.Node) -> Any:
        return interpreter.env.get(node)

    with capture(model, *args) as joint:
        interpreter = Watched(joint.module, garbage_collect_values=False)
        with unset_fake_temporarily():
            interpreter.run(*[real(node) for node in joint.nodes if node.op == "placeholder"])
    assert len(seen) > 5


def flat(result: Any) -> list[Tensor]:
    found = result if isinstance(result, (tuple, list)) else [result]
    return [t for t in found if isinstance(t, Tensor)]


def real(node: fx.Node) -> Tensor:
    """A tensor like a placeholder's fake one; small whole numbers index anything."""
    fake = node.meta["val"]
    if fake.dtype.is_floating_point:
        return torch.rand(fake.shape, dtype=fake.dtype)
    return torch.zeros(fake.shape, dtype=fake.dtype)


def traced(fn: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    return make_fx(fn, tracing_mode="fake")(*args)


X = torch.randn(8, 16)


@pytest.mark.parametrize(
    ("fn", "count"),
    [
        (lambda x: (x.exp().sin() * 2,), 2),  # sin over exp, mul over sin; never over x
        (lambda x: ((e := x.exp()).sin() * e,), 1),
        (lambda x: (x.exp().sin().t(),), 1),  # a view of the result is an output
        (lambda x: ((e := x.exp()), e.sin()), 0),  # exp is an output
        (lambda x: ((e := x.exp()).sin() + e.view(16, 8).view(8, 16),), 1),  # read once more
        (lambda x: (x.exp().t().sin(),), 1),  # a view that has all of its memory to itself
        (lambda x: (x.exp()[:4].sin(),), 0),  # a part of its memory
        (lambda x: (x.exp() @ x.t(),), 0),
        (lambda x: (x.exp() + x.exp()[0],), 1),
        (lambda x: ((x.exp() > 1).float(),), 0),  # another dtype
        (lambda x: (x.sin(),), 0),
        (lambda x: ((e := x.exp()) * e.t().t(),), 0),  # two ways to read one memory
    ],
)
def test_only_what_nothing_reads_any_more(fn: Callable[..., Any], count: int) -> None:
    plain, written = traced(fn, X), traced(fn, X)
    assert overwrite_in_place(written) == count
    before = X.clone()
    for one, other in zip(plain(X), written(X), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(X, before)


def test_the_planner_counts_one_buffer_less() -> None:
    step = chain()
    ops = list(step.ops)
    ops[4] = replace(ops[4], overwrites=(5,))  # da over db
    counted = simulate(replace(step, ops=tuple(ops)), schedule(step, (0, 1)))
    plain = simulate(step, schedule(step, (0, 1)))
    assert counted.bytes_at[-1] == plain.bytes_at[-1] - MIB
    assert counted.bytes_at[:-1] == plain.bytes_at[:-1]


def test_what_is_saved_is_not_overwritten() -> None:
    step = chain()
    ops = list(step.ops)
    ops[4] = replace(ops[4], overwrites=(1,))  # da over a, which the forward saved
    wanted = simulate(step, schedule(step, (0, 1)))
    assert simulate(replace(step, ops=tuple(ops)), schedule(step, (0, 1))) == wanted
    again = simulate(replace(step, ops=tuple(ops)), schedule(step, ()))  # made in the backward
    assert again.bytes_at[-1] == simulate(step, schedule(step, ())).bytes_at[-1] - MIB


def test_a_problem_that_overwrites_what_does_not_fit() -> None:
    step = chain()
    ops = list(step.ops)
    ops[4] = replace(ops[4], overwrites=(4,))
    with pytest.raises(InvalidProblemError, match="overwrites storage 4"):
        replace(step, ops=tuple(ops))


class Chain(nn.Module):
    """Elementwise ops between two products: a backward with much to write over."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            h = self.up(x)
            x = x + self.down(h * torch.tanh(h * h * 0.1 + h) * torch.sigmoid(h))
        return x.square().mean()


def test_a_second_backward_through_a_retained_graph() -> None:
    model, x = Chain(), torch.randn(128, 64)
    backend = ckpt_pass.make_backend("save-matmul", inner="aot_eager")
    loss = torch.compile(model, backend=backend)(x)
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    plain = torch.autograd.grad(model(x), list(model.parameters()))
    for one, other, wanted in zip(first, second, plain, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, wanted)


def test_the_peak_is_lower_and_as_predicted() -> None:
    model, x = Chain(), torch.randn(2048, 64)
    backend = ckpt_pass.make_backend("save-matmul", inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    measured = ckpt_pass.measure_step(lambda: compiled(x), params=model.parameters())
    assert abs(measured.peak_bytes - backend.plans[-1].peak_bytes) <= 64
    functional = ckpt_pass.make_backend("save-matmul", inner="inductor")
    compiled = torch.compile(model, backend=functional)
    compiled(x).backward()
    assert functional.plans[-1].peak_bytes > backend.plans[-1].peak_bytes


def test_inputs_and_their_views_are_found() -> None:
    graph = traced(lambda x: (x.exp().view(16, 8).t().contiguous().sin(),), X).graph
    sin = next(n for n in graph.nodes if n.target is aten.sin.default)
    (source,) = overwritable_inputs(sin)
    assert makes_anew(source) and storage_keys(source.meta["val"])


def test_outputs_of_one_op_have_memory_each() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        y, mean, _ = aten.native_layer_norm(x, [16], None, None, 1e-5)
        return y.sin(), mean  # sin over y, though another output of its op is read later

    plain, written = traced(fn, X), traced(fn, X)
    assert overwrite_in_place(written) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain(X), written(X), strict=True))


def test_one_output_taken_twice_is_one_memory() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        found = aten.native_layer_norm(x, [16], None, None, 1e-5)
        return found[0].sin() + found[0].cos(), found[1]

    written = traced(fn, X)
    graph = written.graph
    first = next(n for n in graph.nodes if n.op == "call_function" and n.args[1:] == (0,))
    cos = next(n for n in graph.nodes if n.target is aten.cos.default)
    with graph.inserting_before(cos):
        again = graph.node_copy(first)
    cos.replace_input_with(first, again)
    written.recompile()
    expected = traced(fn, X)(X)
    assert overwrite_in_place(written) == 2  # cos over the output, and the sum; not sin
    assert all(torch.equal(a, b) for a, b in zip(expected, written(X), strict=True))


class Looked(nn.Module):
    """Two tables whose gradients are sparse; one's values are read again further down."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Embedding(5, 8, sparse=True) for _ in range(2))
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tensor([0, 1, 1, 4])
        h = (self.fc(x).tanh() * 3 + self.first(rows)).tanh()
        return ((h + self.second(rows)).tanh() + h).square().mean()


def test_values_of_a_sparse_gradient_are_left_alone() -> None:
    torch.manual_seed(0)
    model, x = Looked(), torch.randn(4, 8)
    wanted = torch.autograd.grad(model(x), list(model.parameters()))
    backend = ckpt_pass.make_backend("save-matmul", inner="aot_eager")
    got = torch.autograd.grad(torch.compile(model, backend=backend)(x), list(model.parameters()))
    assert wanted[0].is_sparse
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one.to_dense(), other.to_dense())


class _Turned(nn.Module):
    """A norm of a transposed value: its kernel's results lie otherwise than fake ones."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(16, 16), norm

    def forward(self, x: Tensor) -> Tensor:
        turned = self.up(x).relu()[None].transpose(1, 2)
        made: Tensor = x + self.norm(turned).transpose(1, 2)[0]
        return made


@pytest.mark.parametrize("norm", [nn.InstanceNorm1d(16), nn.BatchNorm1d(16), nn.LayerNorm(128)])
def test_what_lies_otherwise_than_its_fake_is_left_alone(norm: nn.Module) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(_Turned(norm) for _ in range(2))), torch.randn(128, 16)
    ours = ckpt_pass.make_backend(policy="save-everything", inner="aot_eager")
    steps = [torch.compile(model, backend=backend) for backend in ("aot_eager", ours)]
    ckpt_pass.compare_gradients(
        lambda: steps[0](x).square().mean(), lambda: steps[1](x).square().mean(), model
    ).raise_if_different()
