"""Under autocast an input that the recomputation gets anew is no weight, whose cast is cached."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ckpt_pass
from ckpt_pass import Offload, recompute, save

POLICIES = (save(), save(op="aten._to_copy") | recompute())
Step = Callable[[nn.Sequential, Tensor], Tensor]


class Block(nn.Module):
    """Two products, whose inputs are cast, around sums that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.b(x)


def gradients(step: Step) -> list[Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block() for _ in range(3))), torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(model, x).float().square().sum()
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def in_regions(
    model: nn.Sequential, x: Tensor, policy: ckpt_pass.Policy, **options: object
) -> Tensor:
    for block in model:
        x = ckpt_pass.checkpoint(block, x, policy=policy, **options)
    return x


def moved(model: nn.Sequential, x: Tensor, policy: ckpt_pass.Policy) -> Tensor:
    return in_regions(model, x, policy, offload=Offload(min_bytes=0), offload_inputs=True)


def saved_on_cpu(model: nn.Sequential, x: Tensor, policy: ckpt_pass.Policy) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return in_regions(model, x, policy)


def nested(model: nn.Sequential, x: Tensor, policy: ckpt_pass.Policy) -> Tensor:
    out: Tensor = ckpt_pass.checkpoint(lambda x: in_regions(model, x, policy), x)
    return out


def in_torchs(model: nn.Sequential, x: Tensor, policy: ckpt_pass.Policy) -> Tensor:
    out: Tensor = torch_checkpoint(lambda x: in_regions(model, x, policy), x, use_reentrant=False)
    return out


def in_segments(model: nn.Sequential, x: Tensor, policy: ckpt_pass.Policy) -> Tensor:
    ckpt_pass.apply(model, "segments-2", policy)
    out: Tensor = model(x)
    return out


@pytest.mark.parametrize("policy", POLICIES, ids=["all", "casts"])
@pytest.mark.parametrize("way", [moved, saved_on_cpu, nested, in_torchs, in_segments])
def test_gradients_are_those_of_the_plain_step(
    way: Callable[[nn.Sequential, Tensor, ckpt_pass.Policy], Tensor], policy: ckpt_pass.Policy
) -> None:
    ours = gradients(lambda model, x: way(model, x, policy))
    plain = gradients(lambda model, x: model(x))
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


def test_an_input_that_is_made_again_may_be_changed_in_place() -> None:
    """It is no leaf, as it was none in the forward."""

    def fn(x: Tensor) -> Tensor:
        return (x.add_(1).sin() * x).cos()

    x = torch.randn(4, 4, requires_grad=True)
    fn(x * 1.0).sum().backward()
    expected, x.grad = x.grad, None
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        y = ckpt_pass.checkpoint(fn, x * 1.0)
    y.sum().backward()
    assert x.grad is not None and expected is not None and torch.equal(x.grad, expected)


def test_an_input_that_hooks_keep_as_it_is_must_not_be_changed_in_place() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():  # it is there already
        y = ckpt_pass.checkpoint(lambda x: (x.add_(1).sin() * x).cos(), x * 1.0)
    with pytest.raises(ckpt_pass.MutatedArgumentError, match="in place 1 times"):
        y.sum().backward()
