"""What is allocated besides the outputs where ranks exchange tensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import fx

import ckpt_pass
from ckpt_pass.graph.collectives import collective_workspace_bytes

if dist.is_available():
    import torch.distributed.fsdp  # names FSDP2's own operators

FULL, HALF = torch.float32, torch.bfloat16
ROWS = [(8, 16), (8, 15), (7, 16), (7, 15), (1, 30)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("buffer", [FULL, HALF])
@pytest.mark.parametrize("dtypes", [(FULL, FULL), (HALF, HALF), (FULL, HALF)])
def test_gradients_that_are_copied_to_be_shared_out(
    dtypes: tuple[torch.dtype, ...], buffer: torch.dtype, rows: tuple[int, int], ranks: int = 4
) -> None:
    mixed = getattr(torch.ops.fsdp, "chunk_cat_mixed_dtype", None)  # torch 2.15
    if mixed is None and len(set(dtypes)) > 1:
        pytest.skip("this torch copies gradients of one dtype alone")
    op = (torch.ops.fsdp.chunk_cat if mixed is None else mixed).default
    grads = [torch.randn(n, 64, dtype=dtype) for n, dtype in zip(rows, dtypes, strict=True)]
    out = torch.empty(ranks, sum(-(-n // ranks) for n in rows) * 64, dtype=buffer)
    graph = fx.Graph()
    nodes = [graph.placeholder(f"grad_{index}") for index in range(len(grads))]
    whole = graph.placeholder("whole")
    for node, value in zip((*nodes, whole), (*grads, out), strict=True):
        node.meta["val"] = value
    call = graph.call_function(op, (nodes, 0, ranks), {"out": whole})
    measured = ckpt_pass.measure_step(lambda: op(grads, 0, ranks, out=out), repeats=1, params=[])
    assert collective_workspace_bytes(call) == measured.peak_bytes
