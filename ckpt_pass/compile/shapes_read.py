"""Take out of a graph for inductor what ops read the shape of, and no value.

The backward of a pooling is given the input of the forward, of which inductor's loops look at the
size alone. What is saved or made again for that stays alive to the end, though no code reads it.
"""

from __future__ import annotations

import torch
from torch import fx

_aten = torch.ops.aten
#: Of which argument nothing but the shape is read (``torch/_inductor/lowering.py``).
SHAPE_ALONE = {
    _aten.avg_pool2d_backward.default: 1,
    _aten.avg_pool3d_backward.default: 1,
    _aten.max_pool2d_with_indices_backward.default: 1,
}


def read_shapes_alone(module: fx.GraphModule) -> None:
    """Give such ops a constant of that shape, in place, which no code makes either.

    Not where a size is left open, nor for values that lie otherwise than the constant.
    """
    for node in list(module.graph.nodes):
        place = SHAPE_ALONE.get(node.target) if node.op == "call_function" else None
        source = None if place is None else node.args[place]
        if isinstance(source, fx.Node) and _can_stand_in(source.meta.get("val")):
            node.update_arg(place, _constant_like(source, node))
    module.graph.eliminate_dead_code()
    module.recompile()


def _can_stand_in(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or not value.is_contiguous():
        return False
    return all(type(size) is int for size in value.shape)


def _constant_like(source: fx.Node, reader: fx.Node) -> fx.Node:
    value = source.meta["val"]
    how = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
    with reader.graph.inserting_before(reader):
        made = reader.graph.call_function(_aten.full.default, (list(value.shape), 0), how)
    made.meta = {key: held for key, held in reader.meta.items() if key != "recompute"}
    made.meta["val"] = value.new_empty(value.shape)
    return made
