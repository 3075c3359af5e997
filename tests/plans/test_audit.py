"""What print(plan) and explain warn of, and what they keep quiet about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass import Plan, save

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, dim=-1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1)).relu()


class Net(nn.Module):
    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.layers[0].requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def plan(policy: Any = None, net: nn.Module | None = None, **options: Any) -> Plan:
    x = torch.randn(2, 8, WIDTH)
    return ckpt_pass.plan(net or Net(), x, policy=policy, **options)


def only(found: Plan) -> str:
    (warning,) = found.warnings
    assert f"WARNING      {warning}" in str(found).splitlines()
    assert f"WARNING      {warning}" in found.listing().splitlines()
    return warning


ATTENTION = save(op_class="attention")


def test_nothing_to_say() -> None:
    for policy in ("save-matmul-attention", "save-nothing", "save-everything"):
        assert plan(policy).warnings == ()
    for mode in ("compiled", "eager"):
        assert plan(budget=1.0, mode=mode).warnings == ()


def test_an_op_that_the_step_does_not_have() -> None:
    warning = only(plan(save(op=("aten.addmm", "aten.adddmm"), label="mine") | ATTENTION))
    assert warning == (
        "mine of the policy matched nothing: no op of the step is named aten.adddmm. "
        "Did you mean 'aten.addmm.default'?"
    )


def test_a_module_that_the_model_does_not_have() -> None:
    policy = save(op_class="matmul", module="layers.*.qvk") | save(op_class=("matmul", "attention"))
    warning = only(plan(policy))
    assert "no op ran in a module named layers.*.qvk. Did you mean" in warning


def test_a_class_a_count_and_a_size_that_nothing_has() -> None:
    rest = save(op_class=("matmul", "attention"))
    assert "is of class convolution" in only(plan(save(op_class="convolution") | rest))
    assert "all of its conditions" in only(plan(save(op_class="matmul", nth=99) | rest))
    assert "all of its conditions" in only(plan(save(op_class="matmul", min_bytes=1 << 40) | rest))


def test_an_expensive_op_that_is_recomputed() -> None:
    warning = only(plan("save-matmul"))
    assert warning.startswith("3 expensive ops are recomputed, since no rule is about them: aten._")
    assert plan(save(op_class="matmul") | ckpt_pass.recompute(op_class="attention")).warnings == ()


def test_an_op_that_nobody_classified() -> None:
    with torch.library._scoped_library("ckpt_pass_audit", "DEF"):

        @torch.library.custom_op("ckpt_pass_audit::twice", mutates_args=())
        def twice(x: Tensor) -> Tensor:
            return x * 2

        twice.register_fake(torch.empty_like)
        twice.register_autograd(lambda ctx, gradient: gradient * 2)

        class Odd(Net):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(twice(x.sin() * self.layers[0].out.bias))

        with pytest.warns(ckpt_pass.UnclassifiedOpWarning):
            found = plan("save-matmul-attention", Odd())
    assert "1 ops are in no class" in only(found) and "ckpt_pass_audit.twice" in only(found)


def test_a_region_that_wrapped_nothing() -> None:
    warning = only(plan("save-matmul-attention", Net(frozen=True)))
    assert warning == "regions that wrapped nothing which the backward needs: layers.0"
    warning = only(plan("save-matmul-attention", regions=("layers.*", "layer.*")))
    assert warning.startswith("the region pattern layer.* wrapped nothing")


class Breaks(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        return super().forward(x)


def test_a_graph_break() -> None:
    backend = ckpt_pass.make_backend("save-matmul-attention", inner="aot_eager")
    compiled = torch.compile(Breaks(), backend=backend)
    compiled(torch.randn(2, 8, WIDTH)).backward()
    first, last = backend.plans
    assert "graph break at test_audit.py:" in only(first) and " in forward (" in only(first)
    assert last.warnings == ()
    assert "WARNING      graph break at test_audit.py:" in ckpt_pass.explain(compiled)
    assert Plan.from_json(first.to_json()) == first
