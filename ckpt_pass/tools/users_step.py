"""The user's step, as tools that measure it compile and run it, and how far their work is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ckpt_pass.graph.capture import LossFn

#: Told what is being done, how many parts of the whole are done, and how many there are.
Progress = Callable[[str, int, int], None]


@dataclass
class Told:
    """Counts the parts of the work."""

    progress: Progress
    total: int
    done: int = 0

    def __call__(self, what: str) -> None:
        self.done = min(self.done + 1, self.total)
        self.progress(what, self.done, self.total)


class UsersStep:
    """The user's step, and whose gradients it fills."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        loss_fn: LossFn | None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.args, self.loss_fn = model, args, loss_fn
        self.kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, self.kwargs)) if isinstance(t, Tensor)]
        self.leaves = [t for t in (*model.parameters(), *tensors) if t.requires_grad]
        self.device = self.leaves[0].device if self.leaves else torch.device("cpu")

    def compiled(self, backend: Any) -> Callable[[], Any]:
        """The step under a backend.

        Dynamo keeps what it compiles by code object, tries all of it in turn, and gives up at the
        ninth; so each point has one of its own, and the model's is left alone.
        """
        model, args, loss_fn = self.model, self.args, self.loss_fn
        kwargs = self.kwargs

        def step(*inputs: Any, **named: Any) -> Any:
            output = model(*inputs, **named)
            return output if loss_fn is None else loss_fn(output)

        step.__code__ = step.__code__.replace()  # another object, the same code
        made = torch.compile(step, backend=backend, dynamic=False)
        return lambda: made(*args, **kwargs)

    def clear(self) -> None:
        """Drop the gradients."""
        for leaf in self.leaves:
            leaf.grad = None

    def synchronise(self) -> None:
        """Wait for the accelerator."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
