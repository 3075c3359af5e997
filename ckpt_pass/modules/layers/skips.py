"""Which layer outputs a model's forward uses again later: skips, which no region can free."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ckpt_pass.modules.layers.find import find_layers
from ckpt_pass.state.untouched import untouched


@dataclass(frozen=True)
class Skip:
    """An output that is used after the layer that follows has run.

    Attributes:
        layer: the FQN of the layer that made it.
        used_by: the last layer that it goes into, itself or what is made of it on the way; empty
            where that is after all layers.
        nbytes: its bytes.
    """

    layer: str
    used_by: str
    nbytes: int


class _Watch(TorchDispatchMode):
    """Sees which ops take the outputs of layers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.order: list[str] = []
        self.used_by: dict[int, str] = {}
        self.outputs: dict[int, torch.Tensor] = {}
        self._maker: dict[int, int] = {}
        self._finished = 0
        self._inside: str | None = None
        self._waiting: set[int] = set()

    def begins(self, name: str) -> None:
        """A layer begins."""
        self._inside = name
        self.used_by |= dict.fromkeys(self._waiting, name)
        self._waiting.clear()

    def ends(self, output: Any) -> None:
        """It ends."""
        assert self._inside is not None
        self.order.append(self._inside)
        self._inside = None
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._maker[leaf.untyped_storage()._cdata] = self._finished
                self.outputs[self._finished] = leaf  # held: its storage's address is its name
        self._finished += 1

    def close(self) -> None:
        """The model's forward has ended."""
        self.used_by |= dict.fromkeys(self._waiting, "")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, torch.Tensor):
                self._used(leaf)
        return func(*args, **(kwargs or {}))

    def _used(self, tensor: torch.Tensor) -> None:
        made = self._maker.get(tensor.untyped_storage()._cdata)
        # The layer after the maker may take it; whoever comes once that has ended makes it a skip.
        if made is None or self._finished - made < 2:
            return
        if self._inside is None:
            self._waiting.add(made)
        else:
            self.used_by[made] = self._inside


def skip_values(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Skip, ...]:
    """The layer outputs that a model's forward uses again after the next layer has run.

    A U-Net's decoder takes its encoder's outputs. They are there until then whatever is recomputed,
    so an encoder layer as a region frees what is *inside* of it and not its output. Found by
    running the forward once without gradients, in eval mode, and looking at what each op takes.

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
        kept = stack.enter_context(untouched(model, args, kwargs, values=True))
        stack.enter_context(torch.no_grad())
        model.eval()
        for name in find_layers(model).names:
            for handle in _hooks(modules[name], name, watch):
                stack.callback(handle.remove)
        stack.enter_context(watch)
        model(*kept[1], **kept[2])
    watch.close()
    return tuple(
        Skip(watch.order[made], used_by, watch.outputs[made].untyped_storage().nbytes())
        for made, used_by in sorted(watch.used_by.items())
    )


def _hooks(module: nn.Module, name: str, watch: _Watch) -> Iterator[Any]:
    yield module.register_forward_pre_hook(lambda *_: watch.begins(name))
    yield module.register_forward_hook(lambda _m, _args, output: watch.ends(output))
