"""What ranks tell each other before the first step: through the group's store, within a time limit.

A collective could not be waited for with a limit, and a rank that has failed would not come to it.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch import functorch

_STORE_IS_GONE = "keeps the store of the process group, and is gone"


class RankMissingError(CkptPassError):
    """A rank did not come to compare its plan in time."""


class NoProcessGroupError(CkptPassError):
    """There is no process group to compare plans in."""


class Exchange:
    """One conversation of the ranks of the default process group.

    The first of a rank under a name is with the first of every other, the second with the second:
    what was said in an earlier one is not heard again.

    Args:
        prefix: names the conversation.
        tool: the function that every rank calls, for messages.
        timeout_s: how long to wait for all of the others together, at each question.

    Raises:
        NoProcessGroupError: ``torch.distributed`` is not initialised.
        RankMissingError: the rank that keeps the store is gone.

    Attributes:
        rank, size: this rank, and how many there are.
    """

    def __init__(self, prefix: str, tool: str, timeout_s: float) -> None:
        if not dist.is_initialized():
            raise NoProcessGroupError(
                f"{tool}() compares the plans of a process group, but torch.distributed is not "
                f"initialised. Call init_process_group first, or leave {tool}() out on one process."
            )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._tool = tool
        self._timeout_s = timeout_s
        named = dist.PrefixStore(prefix, functorch.default_store())
        try:
            number = named.add(f"begun/{self.rank}", 1)
        except (RuntimeError, ValueError) as error:
            raise self._missing(0, _STORE_IS_GONE) from error
        self._store = dist.PrefixStore(str(number), named)

    def tell(self, what: str, value: Any) -> None:
        """Give the others a value that JSON can carry.

        Raises:
            RankMissingError: the rank that keeps the store is gone.
        """
        try:
            self._store.set(f"{what}/{self.rank}", json.dumps(value))
        except (RuntimeError, ValueError) as error:
            raise self._missing(0, _STORE_IS_GONE) from error

    def ask_all(self, what: str) -> list[Any]:
        """What each rank has told, this one among them.

        Raises:
            RankMissingError: one did not come in time.
        """
        until = time.monotonic() + self._timeout_s
        return [self._ask(what, rank, until - time.monotonic()) for rank in range(self.size)]

    def ask(self, what: str, rank: int) -> Any:
        """What one rank has told.

        Raises:
            RankMissingError: it did not come in time.
        """
        return self._ask(what, rank, self._timeout_s)

    def _ask(self, what: str, rank: int, limit_s: float) -> Any:
        key = f"{what}/{rank}"
        try:
            self._store.wait([key], timedelta(seconds=max(limit_s, 0.001)))
            return json.loads(self._store.get(key))
        except (RuntimeError, ValueError) as error:  # DistStoreError, or as other stores say it
            said = f"did not bring its plan within {self._timeout_s:g} s"
            raise self._missing(rank, said) from error

    def _missing(self, rank: int, said: str) -> RankMissingError:
        return RankMissingError(
            f"Rank {rank} {said}. Expected {self._tool}() on every rank before the first step: "
            "look whether that rank failed, or does not call it. Once one has missed a call, give "
            "the next ones another name=: calls of one name are told apart by their number."
        )
