"""Formulas of backwards that go another way on fake tensors than on real ones, measured.

Of real tensors some of autograd's formulas write in place what they have just made, or look at a
value and take a shorter way; of a tensor of any subclass, and while a dispatch mode is on, they do
not (``areAnyTensorSubclassLike`` in torch's ``FunctionsManual.cpp``). What they allocate is not
seen in a recording then. Such a formula is run alone, on made-up data, as kernels are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ckpt_pass._torch import autograd
from ckpt_pass.graph.kernel_call import Call, Run, TensorSpec, call_of, mapped
from ckpt_pass.policy.sites import output_tensors

#: The nodes of the graph whose formulas do so, found by running those of all ops that torch tests
#: with a dispatch mode and without one (torch 2.13): what runs in the latter case only is an op in
#: place, or one that asks for a value. Left out is that of ``eigh``: what it does depends on which
#: of its results have a gradient, which a recording does not see.
TWO_WAYS = frozenset(
    f"{name}Backward{number}"
    for names, number in (
        ("Clamp Cumprod Cummax Cummin Gather IndexSelect Kthvalue Topk Mode Ormqr", 0),
        ("LinalgDet LinalgSlogdet LinalgHouseholderProduct", 0),
        ("BinaryCrossEntropy BinaryCrossEntropyWithLogits", 0),
        ("Max Median Min Nanmedian Prod Sort", 0),
        ("Max Median Min Nanmedian Prod Sort MaskedFill", 1),
    )
    for name in names.split()
)


@dataclass(frozen=True)
class FormulaCall(Call):
    """The formula of an op's backward, to be run: of one that is called so.

    Attributes:
        needs: which of the op's tensors require a gradient, in their order.
    """

    needs: tuple[bool, ...] = ()

    def __str__(self) -> str:
        needs = "".join("g" if needed else "-" for needed in self.needs)
        return f"backward of {super().__str__()} for {needs}"

    def prepared(self) -> Run:
        """Run the op; return what runs the formula for it, as often as one likes."""
        made: list[torch.Tensor] = []

        def make(value: Any) -> Any:
            if isinstance(value, TensorSpec):
                made.append(value.make())
                return made[-1].requires_grad_(self.needs[len(made) - 1])
            return torch.Generator(value.device) if isinstance(value, torch.Generator) else value

        with torch.enable_grad():
            args = mapped(self.args, make)
            output = self.target(*args, **{k: mapped(v, make) for k, v in self.kwargs.items()})
        results = [result for result in output_tensors(output) if result.grad_fn is not None]
        if not results:
            raise ValueError(f"{self.target} makes no node of the graph")
        formula, gradients = autograd.formula_of(results)
        given = {t.untyped_storage()._cdata for t in (*made, *results, *gradients) if t is not None}

        def run() -> tuple[Any, set[int]]:
            with torch.no_grad():
                return formula(*gradients), given

        return run


def formula_call(node: fx.Node, needs: tuple[bool, ...]) -> FormulaCall:
    """The call of the formula for the backward of an op.

    Args:
        node: calls the op.
        needs: which of its tensors require a gradient.

    Raises:
        KernelError: an argument is none that can be made up.
    """
    call = call_of(node)
    return FormulaCall(call.target, call.args, call.kwargs, call.device, call.with_grad, needs)
