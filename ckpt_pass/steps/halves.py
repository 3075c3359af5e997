"""The halves of a graph made again for another plan, and run where those that were compiled do.

What AOTAutograd wraps around a graph's forward and backward hands the saved values from one to the
other, and is made for as many as there were. All but their number is the same under every plan. So
the values that a forward of another plan saves go in one tensor without elements, which stands for
each of them: it is held, and let go of, by whom they would be.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ckpt_pass._torch import autograd, compilers, functorch

#: Under which name a tensor that stands for saved values has these.
_SAVED = "ckpt_pass_saved"


class LostValuesError(Exception):
    """Halves of another plan cannot stand in for the compiled ones; the step is compiled anew."""


@dataclass(frozen=True)
class Layout:
    """How a forward hands over its results.

    Attributes:
        inputs: how many values it is given.
        outputs: how many of its results are the caller's.
        tensors, sizes: how many further ones its backward gets, tensors before sizes; the backward
            takes the sizes first.
    """

    inputs: int
    outputs: int
    tensors: int
    sizes: int


@dataclass(frozen=True)
class Halves:
    """Both halves of a graph under a plan, run op by op.

    Attributes:
        layout: of the forward.
        backward_inputs: how many values the backward is given.
    """

    forward: compilers.RunHalf
    backward: compilers.RunHalf
    layout: Layout
    backward_inputs: int

    def run_forward(
        self, args: list[Any], compiled: Layout, unseen: Callable[[], AbstractContextManager[Any]]
    ) -> tuple[Any, ...]:
        """Run the forward where the one of another layout was compiled.

        Args:
            args: what the forward is given.
            compiled: the layout that is waited for.
            unseen: inside it, ops are none of the step's.

        Raises:
            LostValuesError: what it saves cannot be handed on, or other values are given.
        """
        mine = self.layout
        carries = compiled.tensors or not (mine.tensors or mine.sizes)
        if len(args) != mine.inputs or compiled.outputs != mine.outputs or not carries:
            raise LostValuesError
        made = list(self.forward(args))
        saved = made[mine.outputs :]
        returned = {id(value) for value in made[: mine.outputs]}
        with unseen():
            carrier = torch.empty(0, device="cpu")
            # An output, or what is a view of one, holds its node, which holds the carrier.
            tensors = [
                value.detach() if id(value) in returned or value._is_view() else value
                for value in saved[: mine.tensors]
            ]
        vars(carrier)[_SAVED] = [*saved[mine.tensors :], *tensors]
        return (
            *made[: mine.outputs],
            *([carrier] * compiled.tensors),
            *([0] * compiled.sizes),
        )

    def run_backward(self, args: list[Any], compiled: Layout) -> Any:
        """Run the backward where the one of another layout was compiled.

        Raises:
            LostValuesError: the saved values did not come through.
        """
        carrier = args[compiled.sizes] if compiled.tensors else None
        saved = vars(carrier).get(_SAVED) if isinstance(carrier, Tensor) else []
        if saved is None:
            raise LostValuesError
        del carrier
        # Nothing else may hold a value from here on: the backward lets go of each when it can.
        args[: compiled.sizes + compiled.tensors] = saved
        if not autograd.keeps_graph():
            saved.clear()
        if len(args) != self.backward_inputs:
            raise LostValuesError
        return self.backward(args)


def layout_of(forward: fx.GraphModule, outputs: int) -> Layout | None:
    """The layout of a forward; ``None`` where what it saves is neither tensors nor sizes.

    Args:
        forward: the graph.
        outputs: how many of its results are the caller's.
    """
    given = len(forward.graph.find_nodes(op="placeholder"))
    (output,) = forward.graph.find_nodes(op="output")
    saved = [node for node in output.args[0][outputs:] if isinstance(node, fx.Node)]
    sizes = [functorch.is_sym_node(node) for node in saved]
    count = sum(sizes)
    opaque = any(functorch.is_opaque(node) for node in saved)
    if opaque or any(sizes[: len(sizes) - count]):
        return None
    return Layout(given, outputs, len(saved) - count, count)


def halves_of(forward: fx.GraphModule, backward: fx.GraphModule, layout: Layout) -> Halves:
    """Both halves of a graph, ready to run."""
    return Halves(
        compilers.half_as_it_is(forward),
        compilers.half_as_it_is(backward),
        layout,
        len(backward.graph.find_nodes(op="placeholder")),
    )
