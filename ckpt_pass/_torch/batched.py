"""The door to backwards that run once for a batch of gradients (``is_grads_batched``, jacobians).

``torch.autograd`` maps over them by a mode of its own, older than ``torch.vmap``, which has no rule
for ops that write into a tensor they are given, nor for torch's operators that set random states
(torch 2.13). Values of the forward are no batches, nor is what is recomputed of them: the mode is
to see what a batched gradient reaches, and that in its functional form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

#: On a node whose op was made to write over an input: the op as it was, and how the argument that
#: it writes into is named now.
FUNCTIONAL = "ckpt_pass_functional"


def or_batched(half: fx.GraphModule, run: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """``run``, or the graph node by node where it is given a batch of gradients.

    Args:
        half: a backward graph.
        run: what runs it; takes a list, which it empties.
    """

    def either(args: list[Any]) -> Any:
        if not any(map(_is_batched, args)):
            return run(args)
        return _Functional(half).boxed_run(args)

    either._boxed_call = True  # type: ignore[attr-defined]  # it may empty the list
    return either


class _Functional(fx.Interpreter):
    """Runs a graph whose nodes write over nothing, and hides from the mode what is no batch."""

    def run_node(self, n: fx.Node) -> Any:
        target, written = n.meta.get(FUNCTIONAL, (n.target, None))
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        kwargs = {name: value for name, value in kwargs.items() if name != written}
        run = getattr(self, n.op)
        if any(map(_is_batched, tree_leaves((args, kwargs)))):
            return run(target, args, kwargs)
        with torch._C._ExcludeDispatchKeyGuard(_keys()):
            return run(target, args, kwargs)


def _is_batched(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and torch._C._dispatch_keys(value).has(_key("Batched"))


@functools.cache
def _keys() -> torch._C.DispatchKeySet:
    """What tells of batches, and of the mode."""
    batched, mode = map(torch._C.DispatchKeySet, (_key("Batched"), _key("VmapMode")))
    return batched | mode


@functools.cache
def _key(name: str) -> torch._C.DispatchKey:
    """A key of torch's dispatcher that the enumeration in Python leaves out."""
    found = torch._C._parse_dispatch_key(name)
    assert found is not None
    return found
