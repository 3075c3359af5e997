"""The door to inductor's fusion: only ops that stand near to each other share a kernel.

A fused kernel runs where its last op stands, and what its first ones read waits for it. Where a sum
gathers a term of every layer, or one value serves many, inductor fuses ops across the whole
backward, and every layer's values stay alive together.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, cast


def only_near_fusions(distance: int) -> AbstractContextManager[Any]:
    """Inside, inductor fuses no ops that are further apart in the graph's order.

    Args:
        distance: from the first op of a kernel to its last one.
    """
    from torch._inductor.virtualized import V

    usual: Any = type(V.choices)

    class Near(usual):  # type: ignore[misc]  # whatever class the user chose
        def can_fuse(self, scheduler: Any, node1: Any, node2: Any, *rest: Any) -> bool:
            first = min(node1.min_order, node2.min_order)
            last = max(node1.max_order, node2.max_order)
            if last - first > distance:
                return False
            return bool(super().can_fuse(scheduler, node1, node2, *rest))

    return cast(AbstractContextManager[Any], V.set_choices_handler(Near()))
