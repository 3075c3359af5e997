"""Models whose parameters have no shape yet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ckpt_pass


@pytest.mark.parametrize("options", [{}, {"mode": "eager"}], ids=["compiled", "eager"])
def test_a_lazy_module_is_refused_until_it_has_run(options: dict[str, Any]) -> None:
    model, x = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(4, 6)
    arguments: dict[str, Any] = {"budget": 1.0, "loss_fn": torch.sum, **options}
    with pytest.raises(ckpt_pass.errors.UninitializedParameterError, match=r"0\.(weight|bias)"):
        ckpt_pass.plan(model, x, **arguments)
    assert isinstance(model[0], nn.LazyLinear)
    model(x)
    assert ckpt_pass.plan(model, x, **arguments).peak_bytes > 0
