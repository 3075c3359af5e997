"""Budgets on a GPU: gradients with dropout, and peaks of the caching allocator. Needs a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from tests.zoo import loss_of
from tests.zoo.hf import TrainStep, next_token_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LINKS = {
    "kept": None,
    "host": ckpt_pass.Offload("host", d2h_bytes_per_s=2e10, h2d_bytes_per_s=2e10),
}
#: What is left of a large block is handed out with it below 1 MiB (c10's CUDACachingAllocator).
UNSPLIT = 2**20
#: Of the plain peak; 0 is the least that a refusal names.
PARTS = (0.0, 0.5, 0.7)


def built() -> tuple[nn.Module, Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4,
        n_embd=256,
        n_head=4,
        vocab_size=512,
        n_positions=256,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    step = TrainStep(GPT2LMHeadModel(config).train(), next_token_loss).cuda()
    return step, torch.randint(512, (8, 256), device="cuda")


def gradients(model: nn.Module, step: Callable[..., Any], tokens: Tensor) -> list[Tensor]:
    """The loss and all gradients, from the same seed each time."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = loss_of(step(tokens))
    loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [loss.detach().clone(), *found]


def planned(model: nn.Module, tokens: Tensor, part: float, **options: Any) -> ckpt_pass.Plan:
    if part:
        return ckpt_pass.plan(model, tokens, budget=part, **options)
    with pytest.raises(ckpt_pass.InfeasibleBudgetError) as caught:
        ckpt_pass.plan(model, tokens, budget=1, **options)
    return ckpt_pass.plan(model, tokens, budget=caught.value.least_feasible_bytes, **options)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_step_with_dropout(mode: str, link: str, part: float) -> None:
    """Recomputed dropout draws the numbers of the plain step; `torch.manual_seed` holds."""
    model, tokens = built()
    wanted = gradients(model, model, tokens)
    torch._dynamo.reset()
    plan = planned(model, tokens, part, mode=mode, offload=LINKS[link])
    step: Callable[..., Any] = model
    with contextlib.ExitStack() as stack:
        if mode == "eager":
            stack.enter_context(plan.applied(model))
        else:
            backend = ckpt_pass.make_backend(plan=plan, inner="aot_eager")
            step = torch.compile(model, backend=backend)
        for _ in range(2):
            assert all(map(torch.equal, gradients(model, step, tokens), wanted))
        measured = ckpt_pass.measure_step(
            lambda: loss_of(step(tokens)), repeats=1, params=list(model.parameters())
        )
    # Besides what the allocator hands out of a block that it does not split, at most once here.
    assert plan.budget_bytes is not None
    assert measured.peak_bytes <= plan.budget_bytes + UNSPLIT
    assert abs(measured.peak_bytes - plan.peak_bytes) <= UNSPLIT
