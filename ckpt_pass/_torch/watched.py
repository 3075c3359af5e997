"""The door to fake tensors that are watched: each op that runs on them is told to somebody."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch._guards import TracingContext
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

Watcher: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any], Callable[[Any], Any]], Any]
"""``watcher(func, args, kwargs, run)`` returns what the op returns, which is ``run(func)``."""


class WatchedFakeMode(FakeTensorMode):
    """Fake tensors, whose ops a watcher may see.

    A dispatch mode around the step would do, but that dynamo then leaves the step to Python.

    Attributes:
        watcher: called for each op that the step runs, not for those that an op is made of, nor
            while a part of it is compiled; ``None`` for nobody.
    """

    #: Rules of higher-order operators are found by the very class of a mode; see below.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.watcher: Watcher | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op, or a higher-order operator as it is run on fake tensors."""
        if not isinstance(func, HigherOrderOperator) or func in _as_ops():
            return super().__torch_dispatch__(func, types, args, kwargs)
        rule = func.python_key_table[FakeTensorMode]
        watcher, given = self.watcher, dict(kwargs or {})
        if watcher is None or _is_compiling():
            return rule(self, *args, **given)
        # The ops inside are watched as well: what they make is known already then.
        return watcher(func, tuple(args), given, lambda _: rule(self, *args, **given))

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op on fake tensors; the signature is torch's."""
        watcher, given = self.watcher, dict(kwargs or {})
        if watcher is None or _is_compiling():
            return super().dispatch(func, types, args, given)
        plain = super().dispatch
        self.watcher = None
        try:
            return watcher(func, tuple(args), given, lambda op: plain(op, types, args, given))
        finally:
            self.watcher = watcher


class WatchedMode(TorchDispatchMode):
    """Real tensors, whose ops a watcher may see, those of compiled parts as well.

    Attributes:
        watcher: as of :class:`WatchedFakeMode`.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watcher: Watcher | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo may run what it has compiled (read by torch)."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op."""
        watcher, given = self.watcher, dict(kwargs or {})
        if watcher is None or _is_compiling():
            return func(*args, **given)
        return watcher(func, tuple(args), given, lambda op: op(*args, **given))


def _is_compiling() -> bool:
    """Whether dynamo or AOTAutograd looks at ops of a step, rather than the step running them."""
    return TracingContext.try_get() is not None


def _as_ops() -> Mapping[Any, Any]:
    """The higher-order operators that come to ``dispatch`` as ops do; none in torch 2.11."""
    from torch._higher_order_ops import utils

    found: Mapping[Any, Any] = getattr(utils, "registered_hop_fake_fns", {})
    return found
