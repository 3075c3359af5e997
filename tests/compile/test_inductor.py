"""The backend with inductor: right gradients, and caches that never mix two policies."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import ckpt_pass
from ckpt_pass.compile.engine import Partitioner
from tests.zoo import Case, hf, programs, run_step

SMALL = ("dropout-mlp", "batch-norm-conv")
CASES = {case.name: case for case in [*programs.CASES, *hf.CASES]}


def assert_close_to_stock_inductor(case: Case, policy: str) -> None:
    """Ours beside inductor without recomputation, low precision rounded as the program says.

    By default a value that stays inside a kernel keeps more bits than its dtype has, and what
    is recomputed stays inside another kernel than what is saved: bfloat16 gradients then part
    by a few of bfloat16's last bits (relative 6e-3 for ``autocast``, as far as stock
    inductor's are from eager's: 5e-3). ``emulate_precision_casts`` rounds every one, and ours
    are stock's bit for bit; what is left to the tolerance are float32 sums in another order.
    """
    with torch._inductor.config.patch(emulate_precision_casts=True):
        module, inputs = case.make()
        plain = (
            run_step(module, inputs, torch.compile(module, backend="inductor"))
            if case.aot_eager_right
            else run_step(module, inputs)
        )
        torch._dynamo.reset()
        module, inputs = case.make()
        backend = ckpt_pass.make_backend(policy)
        ours = run_step(module, inputs, torch.compile(module, backend=backend))

    torch.testing.assert_close(ours.loss, plain.loss)
    assert ours.gradients.keys() == plain.gradients.keys()
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", SMALL)
def test_gradients(name: str) -> None:
    assert_close_to_stock_inductor(CASES[name], "save-nothing")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["save-matmul-attention", "save-nothing"])
@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_gradients_of_every_case(case: Case, policy: str) -> None:
    assert_close_to_stock_inductor(case, policy)


def compile_and_run(backend: object, x: torch.Tensor, weight: torch.Tensor) -> None:
    torch._dynamo.reset()
    counters.clear()
    torch.compile(lambda x: (x @ weight).sin().exp().sum(), backend=backend)(x).backward()


def test_two_policies_never_share_a_cache_entry() -> None:
    """With inductor's caches on: a hit for the same policy, a miss for another one, or for code."""
    torch.manual_seed(0)
    x, weight = torch.randn(33, 17), torch.randn(17, 9, requires_grad=True)
    with torch._inductor.config.patch(fx_graph_cache=True, fx_graph_remote_cache=False):
        hits = []
        code = ckpt_pass.as_policy(lambda site: None)
        names = ("save-nothing", "save-everything", "save-nothing", "save-everything")
        for policy in (*names, code, code):
            weight.grad = None
            compile_and_run(ckpt_pass.make_backend(policy), x, weight)
            hits.append(counters["inductor"]["fxgraph_cache_hit"] > 0)
    assert hits == [False, False, True, True, False, False]


def test_uuid_of_a_policy_value_and_none_for_code() -> None:
    uuids = {
        Partitioner(ckpt_pass.as_policy(name), regions).uuid()
        for name in ckpt_pass.policies()
        for regions in (None, (), ("layers.*",))
    }
    assert len(uuids) == 3 * len(ckpt_pass.policies())
    assert Partitioner(ckpt_pass.as_policy(lambda site: None)).uuid() is None
    mixed = ckpt_pass.first_match(ckpt_pass.save(op="aten.mm"), lambda site: None)
    assert Partitioner(mixed).uuid() is None


def test_inductors_own_options_pass_through() -> None:
    backend = ckpt_pass.make_backend(inner_options={"fallback_random": True})
    module, inputs = CASES["dropout-mlp"].make()
    expected = run_step(module, inputs)
    module, inputs = CASES["dropout-mlp"].make()
    ours = run_step(module, inputs, torch.compile(module, backend=backend))
    # With fallback_random inductor draws what eager draws, recomputed masks included.
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, rtol=1e-4, atol=1e-5)
