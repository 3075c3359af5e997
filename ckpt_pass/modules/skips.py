"""Which layer outputs a model's own forward keeps alive: skips, which no region can free."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ckpt_pass.modules.find import find_layers


@dataclass(frozen=True)
class Skip:
    """An output that lives on after the layer that follows has run.

    Attributes:
        layer: the FQN of the layer that made it.
        until: the last layer at whose beginning it was still there.
        nbytes: its bytes.
    """

    layer: str
    until: str
    nbytes: int


@dataclass
class _Watch:
    """The outputs so far, by layer, in the order of execution."""

    order: list[str] = field(default_factory=list)
    alive: list[tuple[int, weakref.ref[torch.Tensor], int]] = field(default_factory=list)
    until: dict[int, tuple[int, int]] = field(default_factory=dict)

    def begins(self, name: str) -> None:
        """A layer begins: what was made before the layer before it, and is there, is a skip."""
        self.order.append(name)
        now = len(self.order) - 1
        for made, reference, nbytes in self.alive:
            if reference() is not None and now - made > 1:
                self.until[made] = (now, nbytes)

    def ends(self, output: Any) -> None:
        """The layer that began last ends."""
        storages = {
            leaf.untyped_storage()._cdata: leaf
            for leaf in tree_leaves(output)
            if isinstance(leaf, torch.Tensor)
        }
        for tensor in storages.values():
            nbytes = tensor.untyped_storage().nbytes()
            self.alive.append((len(self.order) - 1, weakref.ref(tensor), nbytes))


def skip_values(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Skip, ...]:
    """The layer outputs that the model's forward itself holds past the next layer.

    A U-Net's decoder takes its encoder's outputs. They are there until then whatever is recomputed,
    so an encoder layer as a region frees what is *inside* of it and not its output. Found by
    running the forward once without gradients, in eval mode, and looking which outputs still exist
    when each layer begins.

    Args:
        model: the model; nothing of it is changed.
        args, kwargs: its arguments.

    Returns:
        The values, in the order in which they are made.

    Raises:
        NoLayersError: the model has no layers.
    """
    modules = dict(model.named_modules())
    watch = _Watch()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.no_grad())
        for name in find_layers(model).names:
            for handle in _hooks(modules[name], name, watch):
                stack.callback(handle.remove)
        model(*args, **kwargs)
    return tuple(
        Skip(watch.order[made], watch.order[now], nbytes)
        for made, (now, nbytes) in sorted(watch.until.items())
    )


def _hooks(module: nn.Module, name: str, watch: _Watch) -> Iterator[Any]:
    yield module.register_forward_pre_hook(lambda *_: watch.begins(name))
    yield module.register_forward_hook(lambda _m, _args, output: watch.ends(output))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and each module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
