"""The backend against torch's own ``aot_eager``: bitwise, for every case of the zoo."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import ckpt_pass
from tests.zoo import Case, StepResult, assert_same_step, hf, loss_of, programs, run_step

CASES = {case.name: case for case in [*programs.CASES, *hf.CASES]}
POLICIES = ["save-matmul-attention", "save-nothing", "every-other-matmul", "save-everything"]


@functools.cache
def plain_step(name: str) -> StepResult:
    """The step under torch's ``aot_eager``; eager's where that one is wrong."""
    case = CASES[name]
    module, inputs = case.make()
    if not case.aot_eager_right:
        return run_step(module, inputs)
    torch._dynamo.reset()
    return run_step(module, inputs, torch.compile(module, backend="aot_eager", fullgraph=True))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_same_step_and_saved_bytes_and_peak_to_the_byte(case: Case, policy: str) -> None:
    module, inputs = case.make()
    backend = ckpt_pass.make_backend(policy, inner="aot_eager")
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    expected = plain_step(case.name)

    # Where it is not bitwise: on two threads not even with itself.
    assert_same_step(run_step(module, inputs, compiled), expected, case.bitwise_repeats)

    (plan,) = backend.plans
    kept = []  # what the forward returns stays alive, as a caller's would

    def step() -> torch.Tensor:
        kept.append(compiled(*inputs))
        return loss_of(kept[-1])

    measured = ckpt_pass.measure_step(step, warmup=0, repeats=1)
    assert measured.saved_bytes == plan.saved_bytes + plan.output_bytes
    convolves = any(decision.op_class == "convolution" for decision in plan.decisions)
    if case in hf.CASES and not convolves:  # a convolution needs workspace besides
        assert plan.peak_bytes is not None
        # What the autograd engine holds for a moment: scalars. Workspaces are measured where there
        # is a budget; BERT's dropout has one, and is at the peak when it is recomputed.
        besides = 0.03 * plan.peak_bytes if case.name == "bert" else 0
        assert -64 <= measured.peak_bytes - plan.peak_bytes <= 64 + besides


@pytest.mark.parametrize("policy", ["save-matmul-attention", "save-nothing"])
@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_saved_activations_ahead_of_time_are_those_of_the_compiled_model(
    case: Case, policy: str
) -> None:
    module, inputs = case.make()
    ahead = ckpt_pass.saved_activations(module, *inputs, policy=policy)

    backend = ckpt_pass.make_backend(policy, inner="aot_eager")
    run_step(module, inputs, torch.compile(module, backend=backend, fullgraph=True))

    assert ahead.saved_bytes == backend.plans[-1].saved_bytes
    ours = [(a.kind, a.nbytes, a.site) for a in backend.plans[-1].saved if a.site is not None]
    assert [(a.kind, a.nbytes, a.site) for a in ahead if a.site is not None] == ours


def test_save_nothing_saves_the_borders_of_layers_and_no_matmul() -> None:
    module, inputs = CASES["llama"].make()
    plan = ckpt_pass.plan(module, *inputs, policy="save-nothing")

    assert plan.regions == tuple(f"model.model.layers.{index}" for index in range(3))
    assert {decision.op_class for decision in plan.with_fate("saved")} <= {
        "pointwise", "indexing", "copy", "creation", "cast",
    }  # fmt: skip
    borders = [d for d in plan.with_fate("saved") if d.region and d.rule == "border of a region"]
    assert [d.region for d in borders] == list(plan.regions)


def test_regions_option_overrides_the_layers_found() -> None:
    module, inputs = CASES["llama"].make()
    none = ckpt_pass.plan(module, *inputs, policy="save-nothing", regions=())
    some = ckpt_pass.plan(module, *inputs, policy="save-nothing", regions=("*.self_attn", "*.mlp"))

    assert none.regions == ()
    assert len(some.regions) == 6
    assert none.saved_bytes < ckpt_pass.plan(
        module, *inputs, policy="save-nothing"
    ).saved_bytes < some.saved_bytes  # fmt: skip


def test_backward_recomputes_each_value_just_before_its_first_use() -> None:
    module, inputs = CASES["llama"].make()
    compiled = {
        policy: torch.compile(
            module, backend=ckpt_pass.make_backend(policy, inner="aot_eager"), fullgraph=True
        )
        for policy in ("save-nothing", "save-everything")
    }
    peaks = {
        policy: ckpt_pass.measure_step(lambda f=f: f(*inputs), repeats=1).peak_bytes
        for policy, f in compiled.items()
    }
    assert peaks["save-nothing"] < 0.6 * peaks["save-everything"]


def test_a_recomputed_dropout_has_the_mask_of_its_forward() -> None:
    """Stock torch draws it anew at a budget below 1 (pytorch#190758)."""
    module, inputs = CASES["dropout-mlp"].make()
    backend = ckpt_pass.make_backend("save-nothing", inner="aot_eager")
    compiled = torch.compile(module, backend=backend, fullgraph=True)

    comparison = ckpt_pass.compare_gradients(
        lambda: module(*inputs), lambda: compiled(*inputs), module
    )

    assert comparison.equal and comparison.max_abs_diff == 0.0
    states = backend.plans[-1].saved.of_kind("random state")
    assert {state.site.op for state in states} == {"aten.native_dropout.default"}


def test_one_compilation_serves_two_batch_sizes() -> None:
    layers = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8), torch.nn.GELU()
    )
    backend = ckpt_pass.make_backend("save-matmul", inner="aot_eager")
    compiled = torch.compile(layers, backend=backend, dynamic=True, fullgraph=True)

    for batch in (3, 7):
        x = torch.randn(batch, 8)
        comparison = ckpt_pass.compare_gradients(
            lambda x=x: layers(x).square().sum(), lambda x=x: compiled(x).square().sum(), layers
        )
        assert comparison.equal, str(comparison)

    (plan,) = backend.plans
    (symbol,) = plan.saved_bytes.free_symbols
    assert plan.saved_bytes.subs(symbol, 7) == 7 * 4 * (16 + 8)


def test_users_own_checkpoint_regions_bind() -> None:
    """What ``torch.utils.checkpoint`` tagged is recomputed even where our policy saves it."""
    from torch.utils.checkpoint import checkpoint

    first, second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def step(x: torch.Tensor) -> torch.Tensor:
        return second(checkpoint(lambda y: first(y).sin(), x, use_reentrant=False)).sin().sum()

    backend = ckpt_pass.make_backend("save-everything", inner="aot_eager")
    x = torch.randn(4, 8)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    comparison = ckpt_pass.compare_gradients(
        lambda: step(x), lambda: compiled(x), torch.nn.ModuleList([first, second])
    )

    assert comparison.equal
    fates = [(d.site.op, d.fate) for d in backend.plans[-1].decisions if "addmm" in d.site.op]
    assert [fate for _, fate in fates] == ["recomputed", "saved"]


def test_by_name_without_an_import_of_ours() -> None:
    """The entry point makes ``backend="ckpt"`` known to torch."""
    import subprocess
    import sys

    code = (
        "import torch; m = torch.nn.Linear(4, 4); f = torch.compile(m, backend='ckpt',"
        " options={'inner': 'aot_eager'}); f(torch.randn(2, 4)).sum().backward();"
        "print('grad', m.weight.grad is not None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "grad True"


def test_two_graphs_have_two_plans_and_explain_shows_both() -> None:
    linear = torch.nn.Linear(4, 4)

    def broken(x: torch.Tensor) -> torch.Tensor:
        y = linear(x).sin()
        torch._dynamo.graph_break()
        return linear(y).cos().sum()

    backend = ckpt_pass.make_backend(inner="aot_eager")
    torch.compile(broken, backend=backend)(torch.randn(2, 4)).backward()

    assert len(backend.plans) == 2
    assert ckpt_pass.explain(backend).count("policy       save-matmul-attention") == 2


def test_explain_and_saved_activations_of_a_compiled_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    compiled = torch.compile(model, backend=ckpt_pass.make_backend(inner="aot_eager"))
    with pytest.raises(ckpt_pass.NothingCompiledError, match="no plan yet"):
        ckpt_pass.explain(compiled)

    compiled(torch.randn(2, 4)).sum().backward()

    assert "aten.addmm.default" in ckpt_pass.explain(compiled)
    saved = ckpt_pass.saved_activations(compiled)
    assert [a.site.op for a in saved.of_kind("activation")] == ["aten.addmm.default"]
    with pytest.raises(ckpt_pass.NothingCompiledError, match="not compiled with a ckpt backend"):
        ckpt_pass.explain(torch.compile(model, backend="eager"))


def test_no_gradient_no_partition() -> None:
    model = torch.nn.Linear(4, 4)
    backend = ckpt_pass.make_backend(inner="aot_eager")
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    assert not backend.plans


def test_a_copy_of_a_backend_is_the_backend() -> None:
    backend = ckpt_pass.make_backend(inner="aot_eager")
    assert copy.deepcopy({"backend": backend})["backend"] is backend
