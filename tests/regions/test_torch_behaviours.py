"""What torch documents and tests of ``checkpoint`` and selective checkpointing, with ours in place.

``docs/understand/torch-behaviours.md`` lists each sentence and each of torch's tests with the test
here (or elsewhere) that holds it. ``region`` is our ``checkpoint``; ``hooked`` is torch's with our
``context_fn``.
"""

from __future__ import annotations

import contextlib
import logging
import random
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointPolicy,
    GraphExecGroup,
    SelectiveCheckpointContext,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_debug_enabled,
    set_checkpoint_early_stop,
)
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass
from ckpt_pass.ops.flops import FlopCounter
from tests.told import Told
from tests.zoo.surroundings import no_collector

aten = torch.ops.aten
Region = Callable[..., Any]


def hooked(fn: Callable[..., Any], *args: Any, policy: Any = "save-nothing", **options: Any) -> Any:
    options.setdefault("use_reentrant", False)
    options.setdefault("context_fn", ckpt_pass.context_fn(policy))
    return torch_checkpoint(fn, *args, **options)


def region(fn: Callable[..., Any], *args: Any, policy: Any = "save-nothing", **options: Any) -> Any:
    """Ours, called as torch's is."""
    return ckpt_pass.checkpoint(fn, *args, policy=policy, use_reentrant=False, **options)


def bare(fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return ckpt_pass.checkpoint(fn, *args, use_reentrant=False, **options)


def torchs(fn: Callable[..., Any], *args: Any, policy: Any = (), **options: Any) -> Any:
    """Torch's own, where the two are compared."""
    chosen = list(policy) if isinstance(policy, tuple) else policy
    context_fn = partial(create_selective_checkpoint_contexts, chosen)
    return torch_checkpoint(fn, *args, use_reentrant=False, context_fn=context_fn, **options)


both = pytest.mark.parametrize("ours", [region, hooked])
every = pytest.mark.parametrize("ours", [region, hooked, bare])


class Counted:
    """A function that counts its runs, where a region does not put the count back."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn, self._told = fn, Told()
        self._told.runs = 0

    @property
    def runs(self) -> int:
        return int(self._told.runs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._told.runs += 1
        return self.fn(*args, **kwargs)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def grads(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output.sum(), inputs)


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, one, other))


# --- checkpoint: what the docstring says ----------------------------------------------------


@every
def test_tensors_are_not_kept_alive_but_arguments_are(ours: Region) -> None:
    told = Told()  # which a region does not put back
    told.inner = inner = []

    def fn(x: Tensor) -> Tensor:
        hidden = x.sin()
        told.inner.append(weakref.ref(hidden))
        return hidden.exp().sin()

    x = leaf(4) * 1
    argument = weakref.ref(x)
    out = ours(fn, x)
    assert inner[0]() is None
    del x
    assert argument() is not None
    out.sum().backward()
    assert len(inner) == 2


@every
def test_a_function_that_differs_in_its_second_run(ours: Region) -> None:
    """Torch warns of errors or wrong gradients; another shape or dtype is an error."""

    def changes(change: Callable[[Tensor], Tensor]) -> Counted:
        counted = Counted(lambda v: (v if counted.runs == 1 else change(v)).sin().exp())
        return counted

    for fn in (changes(lambda v: v[:2]), changes(lambda v: v.double())):
        with pytest.raises(CheckpointError, match="different metadata"):
            ours(fn, leaf(4) * 1).sum().backward()


@every
def test_determinism_check(ours: Region) -> None:
    """ "default" compares shapes and dtypes; "none" nothing; others are refused."""
    fn = Counted(lambda v: (v if fn.runs == 1 else v.double()).sin().exp())
    out = ours(fn, leaf(4), determinism_check="none")
    with contextlib.suppress(RuntimeError):  # autograd itself refuses a gradient of another dtype
        out.sum().backward()
    assert fn.runs == 2
    with pytest.raises(ValueError, match="determinism_check"):
        ours(fn, leaf(4), determinism_check="all")


@every
@pytest.mark.parametrize("how", ["argument", "manager"])
def test_early_stop(ours: Region, how: str) -> None:
    """Recomputation stops with the last value needed, unless it is told not to."""
    for wanted in (True, False):
        ends = Counted(lambda v: v.clone())
        fn = lambda v, ends=ends: ends(v.sin().cos())  # noqa: E731
        if how == "argument":
            out = ours(fn, leaf(4), early_stop=wanted)
        else:
            with set_checkpoint_early_stop(wanted):  # only the forward is under it, and it wins
                out = ours(fn, leaf(4), early_stop=not wanted)
        out.sum().backward()
        assert ends.runs == (1 if wanted else 2)


@every
def test_more_values_than_in_the_forward_without_early_stop(ours: Region) -> None:
    fn = Counted(lambda v: v.sin() if fn.runs == 1 else v.sin().sin())
    with pytest.raises(CheckpointError):
        ours(fn, leaf(4), early_stop=False).sum().backward()


@every
def test_nothing_saved_nothing_recomputed(ours: Region) -> None:
    for early_stop in (True, False):
        fn = Counted(lambda v: v.clone())
        ours(fn, leaf(4), early_stop=early_stop).sum().backward()
        assert fn.runs == 1


@every
def test_the_graph_is_recorded_in_the_forward(ours: Region) -> None:
    """A backward inside the region, and hooks on the original graph's nodes."""
    seen: list[str] = []

    def fn(x: Tensor) -> Tensor:
        y = x.sin()
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return slope.exp()

    x = leaf(4)
    out = ours(fn, x)
    out.grad_fn.next_functions[0][0].register_hook(lambda *_: seen.append("hook"))
    assert same(grads(out, x), grads(fn(x), x))
    assert seen == ["hook"]


@every
def test_all_ways_of_performing_the_backward(ours: Region) -> None:
    x, w = leaf(4, 4), leaf(4, 4)
    fn = lambda a, b: (a @ b).sin()  # noqa: E731
    wanted = grads(fn(x, w), x, w)
    assert same(torch.autograd.grad(ours(fn, x, w).sum(), [w]), wanted[1:])
    ours(fn, x, w).sum().backward(inputs=[x])
    assert w.grad is None and torch.equal(x.grad, wanted[0])
    torch.autograd.backward([ours(fn, x, w)], [torch.ones(4, 4)], inputs=[w])
    assert torch.equal(w.grad, wanted[1])


@every
def test_no_input_needs_to_require_a_gradient(ours: Region) -> None:
    layer = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    wanted = grads(layer(x).sin(), *layer.parameters())
    assert same(grads(ours(lambda v: layer(v).sin(), x), *layer.parameters()), wanted)
    assert not ours(torch.sin, x).requires_grad


@every
def test_tensors_in_nested_structures_take_part(ours: Region) -> None:
    x, w = leaf(4), leaf(4)
    fn = lambda pair, more: pair["x"].sin() * more[0].exp()  # noqa: E731
    got = grads(ours(fn, {"x": x}, [w]), x, w)
    assert same(got, grads(fn({"x": x}, [w]), x, w))


@every
def test_detached_tensors_in_a_region(ours: Region) -> None:
    x = leaf(4)

    def fn(v: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scale = v.exp()
        return v.sin() * scale, v.detach().cos()

    out, detached = ours(fn, x)
    assert not detached.requires_grad
    assert same(grads(out, x), grads(fn(x)[0], x))


@every
def test_keywords_go_to_the_function(ours: Region) -> None:
    x, w = leaf(4), leaf(4)
    fn = lambda a, blah=None: (a.sin() * blah).exp()  # noqa: E731
    assert same(grads(ours(fn, x, blah=w), x, w), grads(fn(x, blah=w), x, w))


def test_a_decorated_method() -> None:
    look = Counted(torch.sin)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        @ckpt_pass.checkpoint(policy="save-matmul", early_stop=False)
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            """Scaled."""
            found: Tensor = look(self.linear(x)) * scale
            return found.exp()

    layer, x, scale = Layer(), leaf(4), leaf(4)
    assert Layer.forward.__doc__ == "Scaled."
    wanted = grads((layer.linear(x).sin() * scale).exp(), x, scale, *layer.parameters())
    assert same(grads(layer(x, scale=scale), x, scale, *layer.parameters()), wanted)
    assert look.runs == 2
    again = ckpt_pass.checkpoint(use_reentrant=False)(layer.linear)
    assert same(grads(again(x).sin(), x), grads(layer.linear(x).sin(), x))
    with pytest.raises(ckpt_pass.NoFunctionError, match="Got no function, and Tensor, scale for"):
        ckpt_pass.checkpoint(None, x, scale=scale)


def test_saved_values_and_hooks_around() -> None:
    x = leaf(4)
    options = {"policy": "save-everything", "respect_saved_tensors_hooks": False}
    out = ckpt_pass.checkpoint(torch.exp, x, **options)  # type: ignore[arg-type]
    assert same(grads(out, x), grads(x.exp(), x))
    with pytest.raises(ckpt_pass.SavedHooksError, match="MUST_CPU_OFFLOAD"):
        ckpt_pass.checkpoint(torch.exp, x, respect_saved_tensors_hooks=True)


@every
def test_preserve_rng_state(ours: Region) -> None:
    x = torch.ones(1000, requires_grad=True)
    fn = lambda v: nn.functional.dropout(v.exp(), 0.5).exp()  # noqa: E731
    for preserve in (True, False):
        torch.manual_seed(0)
        (wanted,) = grads(fn(x), x)
        torch.manual_seed(0)
        (got,) = grads(ours(fn, x, preserve_rng_state=preserve), x)
        assert torch.equal(wanted, got) is preserve


def test_contexts_of_context_fn_are_entered(capsys: Any) -> None:
    """The function under the first, its recomputation under the second; also in our own region."""
    entered: list[str] = []

    @contextlib.contextmanager
    def noted(which: str) -> Iterator[None]:
        entered.append(which)
        yield

    pair = lambda: (noted("forward"), noted("recompute"))  # noqa: E731
    for around in (torch_checkpoint, ckpt_pass.checkpoint):
        entered.clear()
        out = around(lambda v: v.sin().exp(), leaf(4), use_reentrant=False, context_fn=pair)
        assert entered == ["forward"]
        out.sum().backward()
        assert entered == ["forward", "recompute"]


def test_torchs_own_contexts_in_our_region() -> None:
    x, w = leaf(4, 4), leaf(4, 4)
    fn = lambda a, b: (a @ b).sin().exp()  # noqa: E731
    contexts = partial(create_selective_checkpoint_contexts, [aten.mm.default])
    out = ckpt_pass.checkpoint(fn, x, w, context_fn=contexts)
    with FlopCounter() as counter:
        got = grads(out, x, w)
    assert counter.flops == 2 * 2 * 4**3  # the backward's two products, none again
    assert same(got, grads(fn(x, w), x, w))


@pytest.mark.parametrize("how", ["argument", "manager"])
def test_debug(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops of both runs are in the error; with a policy torch refuses, and so do we."""
    # Torch's log records have no valid format; only its own handler can take them.
    monkeypatch.setattr(logging.getLogger("LoggingTensor"), "propagate", False)
    fn = Counted(lambda v: v.sin().exp() if fn.runs == 1 else v.cos())
    with set_checkpoint_debug_enabled(True if how == "manager" else None):
        options = {"debug": True} if how == "argument" else {}
        out = bare(fn, leaf(4), **options)
        with pytest.raises(CheckpointError, match=r"aten\.cos\.default|cos\("):
            out.sum().backward()
        for ours in (region, hooked):
            with pytest.raises(ValueError, match="debug=True is incompatible"):
                ours(torch.sin, leaf(4), **options)


def test_use_reentrant() -> None:
    """There is no reentrant variant; torch's own takes no context_fn with it."""
    with pytest.raises(ValueError, match="no reentrant variant"):
        ckpt_pass.checkpoint(torch.sin, leaf(4), use_reentrant=True)
    with pytest.raises(ValueError, match="context_fn"):
        hooked(torch.sin, leaf(4), use_reentrant=True)


def test_only_one_thing_says_what_is_kept() -> None:
    contexts = ckpt_pass.context_fn("save-matmul")
    with pytest.raises(ckpt_pass.ContradictoryRegionError, match="policy and context_fn"):
        region(torch.sin, leaf(4), context_fn=contexts)


@every
def test_the_composition_of_checkpoint_sequential(ours: Region) -> None:
    """Segments by hand, ``ckpt_pass.checkpoint_sequential`` and torch's are the same."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)))
    x = leaf(2, 4)
    wanted = grads(checkpoint_sequential(model, 2, x, use_reentrant=False), x, *model.parameters())
    by_hand = model[2:](ours(model[:2], x))
    whole = ckpt_pass.checkpoint_sequential(model, 2, x, use_reentrant=False)
    for out in (by_hand, whole):
        assert same(grads(out, x, *model.parameters()), wanted)


@every
def test_graph_exec_group(ours: Region) -> None:
    """Several backwards over parts of one region recompute it once (ours also without a group)."""
    fn = Counted(lambda v: (v.sin().exp(), v.cos().exp()))
    one, other = ours(fn, leaf(4))
    with GraphExecGroup():
        one.sum().backward()
        other.sum().backward()
    assert fn.runs == 2


# --- create_selective_checkpoint_contexts: what the docstrings say ---------------------------


def product(x: Tensor, w: Tensor) -> Tensor:
    return torch.sigmoid(torch.matmul(torch.matmul(x, w), w)) * w


def save_products(ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> Any:
    return (
        CheckpointPolicy.MUST_SAVE if op is aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE
    )


def save_products_as_bool(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
    return op is aten.mm.default


FORMS = [[aten.mm.default], save_products, save_products_as_bool]


@both
@pytest.mark.parametrize("policy", FORMS, ids=["list", "policy_fn", "bool"])
def test_a_list_and_a_policy_fn_are_equivalent(ours: Region, policy: Any) -> None:
    """Saved products do not run again: 2 x 2 in the backward, none besides."""
    x, w = leaf(8, 8), leaf(8, 8)
    out = ours(product, x, w, policy=policy)
    with FlopCounter() as counter:
        got = grads(out, x, w)
    assert counter.flops == 4 * 2 * 8**3
    assert same(got, grads(product(x, w), x, w))


@both
@pytest.mark.parametrize(
    ("decision", "again"),
    [
        (CheckpointPolicy.MUST_SAVE, 0),
        (CheckpointPolicy.PREFER_SAVE, 0),
        (CheckpointPolicy.MUST_RECOMPUTE, 2),
        (CheckpointPolicy.PREFER_RECOMPUTE, 2),
    ],
)
def test_members_of_checkpoint_policy(ours: Region, decision: CheckpointPolicy, again: int) -> None:
    x, w = leaf(8, 8), leaf(8, 8)
    out = ours(product, x, w, policy=lambda ctx, op, *args, **kwargs: decision)
    with FlopCounter() as counter:
        got = grads(out, x, w)
    assert counter.flops == (4 + again) * 2 * 8**3
    assert same(got, grads(product(x, w), x, w))


@both
@pytest.mark.parametrize("member", ["MUST_CPU_OFFLOAD", "PREFER_CPU_OFFLOAD"])
def test_offloading_members_are_carried_out(ours: Region, member: str) -> None:
    """Torch itself computes such an op again (2.11 to 2.13)."""
    x, w, decision = leaf(8, 8), leaf(8, 8), getattr(CheckpointPolicy, member)
    out = ours(product, x, w, policy=lambda ctx, op, *args, **kwargs: decision)
    with FlopCounter() as counter:
        got = grads(out, x, w)
    assert counter.flops == 4 * 2 * 8**3
    assert same(got, grads(product(x, w), x, w))


@both
def test_always_prefer_recompute_is_vanilla_checkpointing(ours: Region) -> None:
    x, w = leaf(8, 8), leaf(8, 8)
    vanilla = torch_checkpoint(product, x, w, use_reentrant=False)
    out = ours(product, x, w, policy=lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)
    flops = []
    for output in (vanilla, out):
        with FlopCounter() as counter:
            grads(output, x, w)
        flops.append(counter.flops)
    assert flops[0] == flops[1]


@both
def test_the_context_of_a_policy(ours: Region) -> None:
    """It gets the op's output and arguments, in the forward alone; is_recompute is False."""
    asked: list[tuple[Any, ...]] = []

    def policy(ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append((op, ctx.is_recompute, tuple(ctx.op_output.shape), len(args)))
        return CheckpointPolicy.PREFER_RECOMPUTE

    out = ours(lambda v: v.sin().cos(), leaf(3), policy=policy)
    wanted = [(aten.sin.default, False, (3,), 1), (aten.cos.default, False, (3,), 1)]
    assert asked == wanted
    out.sum().backward()
    assert asked == wanted


@both
def test_a_policy_with_state(ours: Region) -> None:
    """test_policy_with_state: one object is asked; it sees three ops, and no recomputation."""
    counts: list[int] = []

    class Stateful:
        def __call__(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
            counts.append(len(counts) + 1)
            return CheckpointPolicy.PREFER_RECOMPUTE

    ours(lambda v: v.sin().sin().sin(), leaf(3), policy=Stateful()).sum().backward()
    assert counts == [1, 2, 3]


def test_bad_inputs() -> None:
    """test_bad_inputs: numbers are refused. A packet (aten.sin) is taken, for all its overloads."""
    for wrong in ([2], 2):
        with pytest.raises(ckpt_pass.CkptPassError):
            ckpt_pass.context_fn(wrong)
    fn, x = (lambda v: v.sin().cos()), leaf(3)
    assert same(grads(hooked(fn, x, policy=[aten.sin]), x), grads(fn(x), x))


@both
def test_mutation_of_a_saved_value(ours: Region) -> None:
    """test_version_counter: torch refuses unless allow_cache_entry_mutation; ours is right."""
    fn, x = (lambda v: v.sin().mul_(2).cos().exp()), leaf(3)
    with pytest.raises(RuntimeError, match="has been mutated"):
        torchs(fn, x, policy=(aten.sin.default,)).sum().backward()
    assert same(grads(ours(fn, x, policy=[aten.sin.default]), x), grads(fn(x), x))


@both
def test_an_op_with_more_than_one_output(ours: Region) -> None:
    """test_function_with_more_than_one_output: one execution is asked about once."""
    asked: list[Any] = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        if op is not aten.var_mean.correction:
            return CheckpointPolicy.PREFER_RECOMPUTE
        asked.append(op)
        return CheckpointPolicy.MUST_SAVE

    def fn(v: Tensor) -> Tensor:
        variance, mean = torch.var_mean(v)
        return variance * mean

    x = leaf(3)
    assert same(grads(ours(fn, x, policy=policy), x), grads(fn(x), x))
    assert len(asked) == 1


@both
def test_an_op_with_an_output_that_is_no_tensor(ours: Region) -> None:
    """test_function_with_non_tensor_output: it is not computed a second time."""
    runs = [0]
    with torch.library._scoped_library("ckpt_pass_mixed", "FRAGMENT"):

        @torch.library.custom_op("ckpt_pass_mixed::sin_and_number", mutates_args=())
        def op(x: Tensor) -> tuple[Tensor, int]:
            runs[0] += 1
            return x.sin(), 2

        def save(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        op.register_autograd(
            lambda ctx, grad, _: grad * ctx.saved_tensors[0].cos(), setup_context=save
        )

        def fn(v: Tensor) -> Tensor:
            value, number = torch.ops.ckpt_pass_mixed.sin_and_number(v)
            return (value * v.sin().exp()).sin() * number

        x = leaf(3)
        name = "ckpt_pass_mixed.sin_and_number"
        got = grads(ours(fn, x, policy=ckpt_pass.save(op=name)), x)
        assert runs[0] == 1
        assert same(got, grads(fn(x), x))


@both
def test_a_saved_view_of_whole_numbers(ours: Region) -> None:
    """test_output_already_has_autograd_meta."""
    numbers, y = torch.tensor([1, 2, 3]), leaf(3)
    fn = lambda a, b: (a.view(-1), b.sin().cos())  # noqa: E731
    assert same(
        grads(ours(fn, numbers, y, policy=[aten.view.default])[1], y), grads(fn(numbers, y)[1], y)
    )


class Sized(TwoTensor):  # type: ignore[misc]
    """Sizes of such a tensor are asked through dispatch."""


@both
def test_sizes_of_a_subclass(ours: Region) -> None:
    """test_subclass_dispatching_sizes: metadata ops are never saved, whatever the policy says."""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        saves = op in (aten.sym_size.default, aten.sym_stride.default)
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    def fn(x: Tensor) -> Tensor:
        return (x * x.sum()).view(-1).view(4, 3).exp()

    values = torch.randn(4, 3)
    found = []
    for call in (lambda f, v: f(v), partial(ours, policy=policy)):
        x = Sized(values.clone(), values * 2).requires_grad_()
        (gradient,) = torch.autograd.grad(call(fn, x).sum(), x)
        found.append((gradient.a, gradient.b))
    assert same(*found)


@both
@pytest.mark.parametrize("backward", ["never", "kept", "done"])
def test_storage_lifetime(ours: Region, backward: str) -> None:
    """test_storage_lifetime: saved values die with the graph, or once the backward took them."""
    kept: list[weakref.ref[Any]] = []

    def fn(x: Tensor) -> Tensor:
        hidden = x.cos().exp()
        kept.append(weakref.ref(hidden.untyped_storage()))
        return hidden.sin()

    with no_collector():
        x = leaf(3)
        out = ours(fn, x, policy="save-everything")
        held = kept[0]()
        assert held is not None
        del held
        if backward != "never":
            out.sum().backward(retain_graph=backward == "kept")
        if backward != "kept":
            del out
        assert kept[0]() is None


@both
def test_a_second_backward(ours: Region) -> None:
    """test_can_only_trigger_recompute_once, with a message that says so."""
    out = ours(lambda v: v.sin().cos().exp(), leaf(3), policy=[aten.sin.default])
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the first backward has used it"):
        out.sum().backward(retain_graph=True)


@both
def test_other_ops_in_the_recomputation(ours: Region) -> None:
    """test_mismatch_*: an extra execution of a saved op, and ops that the forward did not have.

    Ops that are not saved are not counted, so others of them are no error where the values that
    the backward needs look as before (torch refuses those).
    """
    fn = Counted(lambda v: ((v.sin() if fn.runs == 1 else v.sin().sin()) + 1).exp().cos())
    out = ours(fn, leaf(3), policy=[aten.sin.default])
    with pytest.raises(CheckpointError):
        out.sum().backward()


# --- nested regions, as torch's tests have them ---------------------------------------------


def slope(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.enable_grad():
            (found,) = torch.autograd.grad(fn(x).sum(), x, create_graph=True)
        return found

    return run


class Handle:
    """Lives as long as the node of a graph that it is attached to."""


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("ours", [bare, hooked])
def test_nested_regions_and_gradients(ours: Region, early_stop: bool) -> None:
    """test_nested_checkpoint and test_nested_checkpoint_two_children, and no graph is left."""
    f = lambda v: v.sin().exp().sin()  # noqa: E731
    g = lambda v: v.cos().sin().exp()  # noqa: E731
    c = lambda fn: partial(ours, fn)  # noqa: E731
    x = leaf(3)
    cases = [
        (f, c(c(f))),
        (slope(f), slope(c(c(f)))),
        (slope(slope(f)), slope(c(slope(c(f))))),
        (slope(slope(f)), c(slope(slope(c(f))))),
        (lambda v: g(f(v)), c(lambda v: c(g)(c(f)(v)))),
        (slope(slope(lambda v: g(f(v)))), slope(c(slope(c(lambda v: c(g)(c(f)(v))))))),
    ]
    with set_checkpoint_early_stop(early_stop):
        for plain, nested in cases:
            wanted = plain(x)
            with no_collector():
                got = nested(x)
                handle = Handle()
                held = weakref.ref(handle)
                got.grad_fn.metadata["handle"] = handle
                assert torch.allclose(wanted, got, atol=0, rtol=1e-6)
                del got, handle
                assert held() is None


@every
@pytest.mark.parametrize("early_stop", [True, False])
def test_values_that_are_no_tensors(ours: Region, early_stop: bool) -> None:
    """test_nested_checkpoint_non_tensor_inputs_and_outputs."""
    fn = lambda k, a, b, f: (f(k * a * b.exp()), 1, "abcd")  # noqa: E731
    a, b = leaf(2), leaf(2)
    out, number, word = ours(fn, 3, a, b, torch.sin, early_stop=early_stop)
    assert (number, word) == (1, "abcd")
    assert same(grads(out, a, b), grads(fn(3, a, b, torch.sin)[0], a, b))


@every
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_backward_inside_a_backward(ours: Region, early_stop: bool) -> None:
    """test_nested_checkpoint_reentrant_backwards."""

    def gradient(call: Region) -> Tensor:
        a = torch.full((3,), 1.0, requires_grad=True)

        def fn(v: Tensor) -> tuple[Tensor, Tensor]:
            x = v.sin().cos()
            return x, x.sin()

        x, out = call(fn, a)
        ones = torch.ones(3)
        out.grad_fn.register_hook(lambda *_: x.backward(ones, retain_graph=True))
        out.sum().backward(retain_graph=True)
        assert a.grad is not None
        return a.grad

    assert torch.equal(
        gradient(partial(ours, early_stop=early_stop)), gradient(lambda fn, a: fn(a))
    )


# --- checkpoint: torch's tests in TestAutograd ----------------------------------------------


class Squared(torch.autograd.Function):
    """Saves twice, keeps a tensor and a number as attributes, asks for its values twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x, x.exp())
        ctx.factor, ctx.plain = factor, torch.ones(3)
        return factor * x * x * x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, _ = ctx.saved_tensors
        _, e = ctx.saved_tensors
        return gradient * ctx.factor * (2 * x + x * x) * e * ctx.plain, None


def test_custom_functions() -> None:
    """test_checkpointing_without_reentrant_custom_function_works; torch allows one access."""
    x = leaf(3)
    fn = lambda v: Squared.apply(v.sin(), 2.0).exp()  # noqa: E731
    for ours in (bare, region, hooked):
        assert same(grads(ours(fn, x), x), grads(fn(x), x))
    with pytest.raises(CheckpointError, match="unpacked once"):
        grads(torch_checkpoint(fn, x, use_reentrant=False), x)


@every
def test_a_parameter_in_and_out_of_the_region(ours: Region) -> None:
    """test_checkpointing_without_reentrant_parameter_used_in_an_out."""
    w = leaf(4, 4)
    x = torch.randn(4, 4)
    run = lambda call: call(lambda v: (v @ w).sin() @ w, (x @ w).sin()) @ w  # noqa: E731
    assert same(grads(run(ours), w), grads(run(lambda fn, v: fn(v)), w))


@every
def test_a_reused_output_of_a_region(ours: Region) -> None:
    x = leaf(4)
    run = lambda call: (lambda y: y.sin() * y + y)(call(torch.exp, x))  # noqa: E731
    assert same(grads(run(ours), x), grads(run(lambda fn, v: fn(v)), x))


@every
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_state_is_restored(ours: Region, enabled: bool) -> None:
    """test_checkpointing_non_reentrant_autocast_cpu: the backward runs outside of autocast."""
    layer = nn.Linear(8, 8)
    x = leaf(4, 8)
    fn = lambda v: layer(layer(v).sin())  # noqa: E731

    def run(call: Region) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = call(fn, x)
        assert out.dtype is (torch.bfloat16 if enabled else torch.float32)
        return grads(out.float(), x, *layer.parameters())

    assert same(run(ours), run(lambda f, v: f(v)))


@every
def test_values_are_freed_as_the_backward_goes_on(ours: Region) -> None:
    """test_checkpointing_without_reentrant_early_free."""
    seen: list[bool] = []
    values: list[weakref.ref[Any]] = []

    def fn(v: Tensor) -> Tensor:
        one = v.exp()
        values.append(weakref.ref(one.untyped_storage()))
        one.register_hook(
            lambda _: seen.append(values[-1]() is not None)
        ) if one.requires_grad else None
        return one.sin()

    def watched(v: Tensor) -> Tensor:
        early = v * 1
        early.register_hook(lambda _: seen.append(values[-1]() is not None))
        return early

    x = leaf(64)
    out = ours(lambda v: fn(watched(v)), x)
    with no_collector():
        out.sum().backward()
    assert seen[-1] is False  # by the time the first op's gradient is there


@every
def test_an_error_in_a_forward_leaves_nothing_set(ours: Region) -> None:
    """test_checkpoint_valid_reset_on_error."""

    def fails(v: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ours(fails, leaf(3))
    x = leaf(3)
    assert same(grads(ours(torch.exp, x), x), grads(torch.exp(x), x))


@every
def test_identity_of_arguments(ours: Region) -> None:
    """test_checkpointing_without_reentrant_saved_object_identity: the very tensors come again.

    Their container does not: the recomputation gets it as it was, and the caller's stays as it is.
    """
    told = Told()  # which a region does not put back
    told.seen = seen = []

    def fn(v: Tensor, box: dict[str, Tensor]) -> Tensor:
        told.seen.append((list(box), box["w"]))
        return (v * box["w"]).exp()

    box = {"w": leaf(3)}
    ours(fn, leaf(3), box).sum().backward()
    assert all(found[0] == ["w"] and found[1] is box["w"] for found in seen) and len(seen) == 2


@every
def test_a_generator_that_the_caller_passes(ours: Region) -> None:
    """Torch's checkpoint does not restore it, so that the mask is another one; ours does."""
    x = torch.ones(1000, requires_grad=True)

    def gradient(call: Region) -> Tensor:
        generator = torch.Generator().manual_seed(0)

        def fn(v: Tensor) -> Tensor:
            mask = torch.empty(1000).bernoulli_(0.5, generator=generator)
            return (v.exp() * mask).exp()

        (found,) = grads(call(fn, x), x)
        return found

    wanted = gradient(lambda fn, v: fn(v))
    assert not torch.equal(gradient(partial(torch_checkpoint, use_reentrant=False)), wanted)
    assert torch.equal(gradient(ours), wanted)
    saved = ckpt_pass.save(op="aten.bernoulli")
    if ours is not bare:
        assert torch.equal(gradient(partial(ours, policy=saved)), wanted)


@every
def test_pythons_own_random_numbers(ours: Region) -> None:
    """What Python's generator decides is decided again."""
    fn = lambda v: v[: random.randrange(1, 1 << 20)].sin().exp()  # noqa: E731
    x = leaf(1 << 20)
    random.seed(0)
    wanted = grads(fn(x), x)
    then = random.getstate()
    random.seed(0)
    assert same(grads(ours(fn, x), x), wanted)
    assert random.getstate() == then


# --- hooks, modes and transforms around -----------------------------------------------------


@every
def test_saved_tensors_hooks_around(ours: Region) -> None:
    packed: list[int] = []
    pack = lambda t: (packed.append(1), t)[1]  # noqa: E731
    x = leaf(4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = ours(lambda v: v.sin().exp(), x)
    assert same(grads(out, x), grads(x.sin().exp(), x))


@every
def test_a_dispatch_mode_around(ours: Region) -> None:
    """Modes outside see what really runs: forward once, recomputation once, saved ops once."""

    class Sees(TorchDispatchMode):
        sines = 0

        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.sines += op is aten.sin.default
            return op(*args, **(kwargs or {}))

    with Sees() as sees:
        ours(lambda v: v.sin().exp().sin(), leaf(3)).sum().backward()
    assert sees.sines == 3  # the second one is not needed again
