"""Bad input to the compiled side: one class and one message each, and nothing left patched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.modules import module as module_hooks
from torch.utils.checkpoint import CheckpointPolicy

import ckpt_pass
from ckpt_pass.compile.tagging import tag
from ckpt_pass.graph.capture import capture


def torch_state() -> dict[str, object]:
    """What this library might leave changed in torch."""
    return {
        "functorch": torch._functorch.config.get_config_copy(),
        "inductor": torch._inductor.config.get_config_copy(),
        "pre_hooks": len(module_hooks._global_forward_pre_hooks),
        "hooks": len(module_hooks._global_forward_hooks),
        "compiling": torch.compiler.is_compiling(),
        "modes": torch._C._len_torch_dispatch_stack(),
        "grad": torch.is_grad_enabled(),
        "meta": dict(torch.fx.traceback.current_meta),
    }


@pytest.fixture(autouse=True)
def _nothing_left_patched() -> Iterator[None]:

    before = torch_state()
    yield
    assert torch_state() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"polcy": "save-matmul"}, r"no option 'polcy'. Did you mean 'policy'\?"),
        ({"inner": "inductr"}, r"inner='inductr'.*Did you mean 'inductor'\?"),
        ({"policy": "save-all"}, r"no policy named 'save-all'"),
        ({"inner": "aot_eager", "inner_options": {"max_autotune": True}}, r"takes none"),
        ({"inner_options": {"max_autotun": True}}, r"no option 'max_autotun'. Did you mean"),
        ({"regions": 3}, r"regions=3, expected module name patterns"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ckpt_pass.CkptPassError, match=message):
        ckpt_pass.ckpt_backend.with_options(options)

    compiled = torch.compile(nn.Linear(2, 2), backend=ckpt_pass.ckpt_backend, options=options)
    with pytest.raises(BackendCompilerFailed, match=message):
        compiled(torch.randn(1, 2))


def test_mode_is_inductors() -> None:
    backend = ckpt_pass.make_backend(inner="aot_eager")
    compiled = torch.compile(nn.Linear(2, 2), backend=backend, mode="max-autotune")
    with pytest.raises(BackendCompilerFailed, match="has no modes"):
        compiled(torch.randn(1, 2))


def test_policy_that_returns_nonsense_under_compile() -> None:
    def shrug(site: ckpt_pass.SiteContext) -> str:
        return "shrug"

    backend = ckpt_pass.make_backend(shrug, inner="aot_eager")
    compiled = torch.compile(nn.Linear(2, 2), backend=backend)
    with pytest.raises(BackendCompilerFailed, match=r"shrug returned 'shrug' at"):
        compiled(torch.randn(1, 2))


class _Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, _ = self.fc(x).sort()
        return values.sin().sum()


def test_contradictory_tags_name_node_both_tags_and_cure() -> None:
    with capture(_Split(), torch.randn(2, 4)) as joint:
        sort = next(n for n in joint.forward if n.target is torch.ops.aten.sort.default)
        output = next(user for user in sort.users if user in joint.forward_set)
        sort.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        output.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        with pytest.raises(
            ckpt_pass.ContradictoryTagsError,
            match=r"getitem.* is tagged MUST_SAVE.*of sort, tagged MUST_RECOMPUTE.*same tag",
        ):
            tag(joint, ckpt_pass.as_policy("save-nothing"))


def test_an_effect_cannot_be_recomputed() -> None:
    must = ckpt_pass.rule(CheckpointPolicy.MUST_RECOMPUTE)

    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * torch.nonzero(x.detach()).sum()).sum()

    with (
        # Otherwise dynamo cuts the step at an op whose shape the data decide.
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
        pytest.raises(
            ckpt_pass.ContradictoryTagsError, match=r"nonzero.*MUST_RECOMPUTE.*never recomputed"
        ),
        capture(Masked(), torch.randn(2, 2, requires_grad=True)) as joint,
    ):
        tag(joint, must)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_numbers_of_tensors_are_no_sizes(dtype: torch.dtype) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("times", torch.tensor(1, dtype=dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            times: Any = self.times
            return (torch.tanh(self.layer(x)) * times.item()).sum()

    model, x = Scaled(), torch.randn(16, 8)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        plan = ckpt_pass.plan(model, x, budget="1MiB")
        step = torch.compile(model, backend=ckpt_pass.make_backend(plan=plan))
        measured = ckpt_pass.measure_step(lambda: step(x), repeats=1, params=model.parameters())
    assert measured.peak_bytes <= plan.peak_bytes


class _Turned(nn.Module):
    """What it must compute again is read through a view elsewhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x)
        turned = y.transpose(0, 1)
        return (turned * turned).sum() + y.view(-1).cos().sum()


def test_what_must_be_recomputed_is_not_kept_by_its_views() -> None:
    def policy(site: ckpt_pass.SiteContext) -> CheckpointPolicy:
        must = site.site.op == "aten.tanh.default"
        return CheckpointPolicy.MUST_RECOMPUTE if must else CheckpointPolicy.MUST_SAVE

    plan = ckpt_pass.plan(_Turned(), torch.randn(4, 8, requires_grad=True), policy=policy)
    (tanh,) = (d for d in plan.decisions if d.site.op == "aten.tanh.default")
    assert tanh.fate == "recomputed" and tanh.times == 1


class _LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        if y.sum() > 0:  # the line that the error names
            return y.sum()
        return y.square().sum()


def test_a_model_that_cannot_be_traced_says_where() -> None:
    with torch.device("meta"):
        model, x = _LooksAtValues(), torch.randn(2, 4)
    with pytest.raises(
        ckpt_pass.NotTraceableError,
        match=r"_LooksAtValues cannot be traced at .*test_compile_errors\.py:\d+ in forward: "
        r"if y\.sum\(\) > 0",
    ):
        ckpt_pass.explain(model, x)


def test_an_error_of_the_models_own_is_chained() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x

    with pytest.raises(ckpt_pass.NotTraceableError, match=r"return x @ x") as caught:
        ckpt_pass.explain(Broken(), torch.randn(2, 4, requires_grad=True))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_nothing_to_differentiate() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ckpt_pass.NothingToDifferentiateError, match="requires a gradient"):
        ckpt_pass.explain(frozen, torch.randn(1, 2))


def test_capture_computes_nothing_and_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()

    ckpt_pass.explain(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(1)))

    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
