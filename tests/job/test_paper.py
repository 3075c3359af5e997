"""Plans for a device that is not here: from its data sheet, on tensors of any kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import ckpt_pass
from ckpt_pass import (
    Device,
    InfeasibleTotalError,
    InvalidDeviceError,
    Job,
    Offload,
    Plan,
    UnknownCostError,
    UnknownDeviceError,
)
from ckpt_pass.graph.paper import attention_workspace
from ckpt_pass.planner.devices import DEVICES, as_device
from ckpt_pass.plans.account import UPDATE
from tests.job.jobs import Blocks

X = torch.randn(64, 32)
SMALL = Device("small", 10**6, (("bfloat16", 2e14), ("float32", 1e13)), 1e12, 1e10)


def job(model: nn.Module) -> Job:
    return Job(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))


def planned(model: nn.Module, x: torch.Tensor, **how: Any) -> Plan:
    found = ckpt_pass.plan(model, x, optimizer=job(model), **{"device": SMALL, **how})
    assert isinstance(found, Plan)
    return found


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_meta_fake_and_real_tensors_give_one_plan(mode: str) -> None:
    """To the byte, the account too; nothing is allocated for it."""
    torch.manual_seed(0)
    real = planned(Blocks(), X, total=600_000, mode=mode)
    with torch.device("meta"):
        other = Blocks()
    meta = planned(other, X.to("meta"), total=600_000, mode=mode)
    with FakeTensorMode():
        third, x = Blocks(), torch.randn(64, 32)
    fake = planned(third, x, total=600_000, mode=mode)
    for found in (meta, fake):
        assert found.decisions == real.decisions and found.regions == real.regions
        assert found.peak_bytes == real.peak_bytes
        assert found.account == real.account
        assert found.predicted.timeline == real.predicted.timeline


def test_plans_know_what_they_are_for(tmp_path: Any) -> None:
    found = planned(Blocks(), X, total="device", mode="eager")
    assert found.account is not None
    assert found.account.total_bytes == int(SMALL.memory_bytes * 0.92)
    assert "small (0 GB), on paper" in found.account.device
    assert "on paper     for small" in str(found)
    read = Plan.load(found.save(tmp_path / "plan.json"))
    assert read.asked.goal is not None and read.asked.goal.cost == SMALL
    assert planned(Blocks(), X, budget="device", mode="eager").account == found.account


def test_times_are_the_devices() -> None:
    """Products at its rate for their dtype, all else at its bandwidth."""
    slow = replace(SMALL, flops_per_s=(("float32", 1e9),), launch_s=1e-9)
    fast = replace(slow, flops_per_s=(("float32", 1e15),))
    assert slow.time_s("float32", 7 * 10**8, 0) == pytest.approx(1.0)
    assert slow.time_s("float32", 0, 7 * 10**11) == pytest.approx(1.0)
    assert SMALL.rate_of("float16") == SMALL.rate_of("float32") < SMALL.rate_of("bfloat16")
    times = [
        planned(Blocks(), X, budget=1.0, device=device, mode="eager").predicted.step_time_s
        for device in (slow, fast)
    ]
    assert times[0] > 100 * times[1]


def test_times_of_a_policys_plan_are_the_devices() -> None:
    """With a budget and without; the ops are the same, and so is their time."""
    budgeted = planned(Blocks(), X, budget=1.0)
    by_policy = ckpt_pass.plan(Blocks(), X, policy="save-matmul", device=SMALL)
    assert by_policy.step_time_s == pytest.approx(budgeted.step_time_s, rel=1e-9)
    here = ckpt_pass.plan(Blocks(), X, policy="save-matmul")
    assert by_policy.peak_bytes == here.peak_bytes
    assert by_policy.step_time_s != pytest.approx(here.step_time_s, rel=0.1)


def test_no_kernel_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> Any:
        raise AssertionError("a kernel was run")

    monkeypatch.setattr("ckpt_pass.graph.kernels._measure", run)
    with torch.device("meta"):
        model, x = Blocks(), torch.randn(64, 32)
    for mode in ("eager", "compiled"):
        assert planned(model, x, total=600_000, mode=mode)


def test_the_link_is_the_devices() -> None:
    """A fast one moves values where a slow one does not."""
    model = Blocks()
    least = _least(model, device=SMALL)
    fast = replace(SMALL, host_bytes_per_s=1e15, flops_per_s=(("float32", 1e9),))
    found = planned(model, X, total=least + 40_000, device=fast, offload=Offload(min_bytes=1))
    assert found.with_fate("offloaded")


def _least(model: nn.Module, **how: Any) -> int:
    with pytest.raises(InfeasibleTotalError) as told:
        planned(model, X, total=1000, **how)
    return told.value.needed_bytes


def test_optimizers_go_as_on_the_device() -> None:
    """On an accelerator the multi-tensor kernels are the default."""
    model = Blocks()
    on_cuda = planned(model, X, budget=1.0, mode="eager").account
    on_cpu = planned(model, X, budget=1.0, device="cpu", mode="eager").account
    assert on_cuda is not None and on_cpu is not None
    above = [next(p.above_bytes for p in a.phases if p.name == UPDATE) for a in (on_cuda, on_cpu)]
    assert above[0] >= on_cuda.gradients_bytes > above[1]


def test_the_table_says_what_it_can() -> None:
    assert {"h100", "a100-40gb", "rtx-4090", "l4", "mi300x", "cpu"} <= set(DEVICES)
    assert as_device("RTX 4090") is as_device("rtx_4090") is DEVICES["rtx-4090"]
    for device in DEVICES.values():
        assert device.rate_of("bfloat16") >= device.rate_of("float32")


@pytest.mark.parametrize(
    ("error", "words", "how"),
    [
        (UnknownDeviceError, "Did you mean 'h100'", {"device": "h10"}),
        (InvalidDeviceError, "of type int", {"device": 3}),
        (InvalidDeviceError, "cost='measured'", {"device": "h100", "cost": "measured"}),
        (UnknownCostError, "roofline", {"device": None, "cost": "h100"}),
    ],
)
def test_devices_that_do_not_go(error: type[Exception], words: str, how: dict[str, Any]) -> None:
    with pytest.raises(error, match=words):
        planned(Blocks(depth=1), X, **{"budget": 1.0, **how})


def test_what_is_free_of_a_device_on_paper_depends_on_the_job() -> None:
    with pytest.raises(InvalidDeviceError, match="without an optimizer"):
        ckpt_pass.plan(Blocks(depth=1), X, budget="device", device="l4")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("memory_bytes", 0),
        ("memory_bytes", 1.5),
        ("bytes_per_s", 0.0),
        ("host_bytes_per_s", float("inf")),
        ("flops_per_s", (("float32", 0.0),)),
        ("flops_per_s", ()),
        ("flops_per_s", (("fp8", 1e15),)),
        ("launch_s", -1.0),
        ("attained", 1.5),
        ("kind", "tpu"),
    ],
)
def test_a_device_has_rates_to_divide_by(field: str, value: Any) -> None:
    with pytest.raises(InvalidDeviceError, match=field):
        replace(SMALL, **{field: value})


def test_a_devices_memory_may_be_written_as_a_float() -> None:
    given: Any = 24e9
    assert repr(replace(SMALL, memory_bytes=given).memory_bytes) == "24000000000"


def attended(groups: int, mask: bool, dtype: torch.dtype = torch.bfloat16) -> list[int | None]:
    """What each op of attention's forward and backward allocates, where that is bounded."""

    def step(query: torch.Tensor, key: torch.Tensor) -> Any:
        ones = torch.ones(100, 100, dtype=torch.bool).tril() if mask else None
        found = nn.functional.scaled_dot_product_attention(
            query, key, key, attn_mask=ones, is_causal=not mask, enable_gqa=groups > 1
        )
        return torch.autograd.grad(found.float().square().sum(), (query, key))

    query = torch.randn(2, 4, 100, 24, dtype=dtype, requires_grad=True)
    key = torch.randn(2, 4 // groups, 100, 24, dtype=dtype, requires_grad=True)
    graph = make_fx(step, tracing_mode="fake")(query, key).graph
    found = [attention_workspace(node) for node in graph.nodes if "attention" in str(node.target)]
    assert len(found) == 2
    return found


def test_the_backward_of_flash_attention_is_bounded() -> None:
    """Sums of 128 rows and 32 channels, and a row, in fp32; keys' gradients of all heads."""
    sums = 2 * 4 * 128 * (32 + 1) * 4
    assert attended(1, mask=False) == [None, sums]
    assert attended(2, mask=False) == [None, sums + 2 * (2 * 4 * 100 * 24) * 2]
    assert attended(1, mask=True) == [None, None]
    assert attended(1, mask=False, dtype=torch.float32) == [None, None]


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(24, 24, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of what is attended to."""
        x = self.project(x)
        return nn.functional.scaled_dot_product_attention(x, x, x).sum()


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_plans_on_paper_count_what_is_bounded(mode: str) -> None:
    """The peak is in attention's backward, on a card alone; products have their room anyway."""
    model, x = Attends(), torch.randn(2, 4, 100, 24, dtype=torch.bfloat16)
    card = replace(SMALL, product_workspace_bytes=5000)
    here, there = (
        ckpt_pass.plan(model, x, budget=1.0, optimizer=job(model), device=device, mode=mode)
        for device in (replace(SMALL, kind="cpu"), card)
    )
    assert there.peak_bytes > here.peak_bytes + 2 * 4 * 128 * 33 * 2
    account = there.account
    assert account is not None and here.account is not None
    assert account.workspaces_bytes == 5000 and not here.account.workspaces_bytes
    assert ("products' workspace", 5000) in account.rows()
    assert all(dict(account.parts(p))["products' workspace"] == 5000 for p in account.phases)
    assert all(sum(dict(account.parts(p)).values()) == p.peak_bytes for p in account.phases)
    assert Plan.from_json(there.to_json()).account == account


def test_a_workspace_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidDeviceError, match="product_workspace_bytes"):
        replace(SMALL, product_workspace_bytes=-1)
    assert DEVICES["h100"].product_workspace_bytes > DEVICES["l4"].product_workspace_bytes > 0
