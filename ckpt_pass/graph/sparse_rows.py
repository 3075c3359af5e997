"""How many rows the sparse gradients of bags of embeddings have.

The rules for fake tensors know none where a sum over bags does not write down which bag each row is
of (its backward finds out), and where rows of a padding index are left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

BAG_BACKWARD = torch.ops.aten._embedding_bag_backward.default
#: The place of ``padding_idx`` among its arguments, and what it is where there is none.
_PADDING, _NONE = 11, -1


def tell_rows(graph: fx.Graph) -> None:
    """Give the fake sparse gradients of a graph as many rows as they may have."""
    for node in graph.find_nodes(op="call_function", target=BAG_BACKWARD):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.layout is torch.sparse_coo:
            args = fx.map_arg(node.args, lambda given: given.meta.get("val"))
            with value.fake_mode:  # type: ignore[attr-defined]
                node.meta["val"] = with_all_rows(value, args)


def with_all_rows(gradient: Tensor, args: Any) -> Tensor:
    """A sparse gradient of bags with a row for each index; those of padding are left out later.

    Args:
        gradient: what the rules for fake tensors say.
        args: of the op.
    """
    indices = args[1]
    padding = args[_PADDING] if len(args) > _PADDING else _NONE
    # Without padding they are the step's own (``embedding_sparse_backward``, Embedding.cpp).
    is_view = padding == _NONE and indices.dtype is torch.int64
    rows = indices.reshape(1, -1) if is_view else indices.new_empty((1, indices.numel()))
    values = args[0].new_empty((indices.numel(), *gradient.shape[1:]))
    size = gradient.shape
    return torch.sparse_coo_tensor(rows.long(), values, size, check_invariants=False)


def without_padding(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of the op under which indices of 0 are no padding, and others may be."""
    if len(args) <= _PADDING or args[_PADDING] != 0:
        return args
    return (*args[:_PADDING], 1, *args[_PADDING + 1 :])
