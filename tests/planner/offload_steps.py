"""A chain written by hand, whose copies can be followed with a pencil."""

from __future__ import annotations

import random

from ckpt_pass.planner.problem import Op, Problem


def chain(length: int = 4, nbytes: int = 10, forward_s: float = 1.0) -> Problem:
    """Ops in a row, each read by the next and by its own backward; the loss reads the last.

    Storages 0 to ``length`` - 1 are the results, of ``nbytes`` each; then the loss, the gradients
    of the results (1 byte each), and the tangent. Forward ops take ``forward_s``, backward ones
    twice as long.
    """
    ops: list[Op] = []
    for i in range(length):
        inputs = (i - 1,) if i else ()
        ops.append(
            Op(f"f{i}", inputs, (i,), (i,), (i, *inputs), True, time_s=forward_s, savable=True)
        )
    loss, tangent = length, 2 * length + 1
    ops.append(Op("loss", (length - 1,), (loss,), (loss,), (loss, length - 1), True))
    for i in reversed(range(length)):
        previous = () if i == length - 1 else (len(ops) - 1,)
        made = 2 * length - i
        reads = (made, i, made - 1 if previous else tangent)
        ops.append(
            Op(f"b{i}", (i, *previous), (made,), (made,), reads, False, late=True,
               time_s=2 * forward_s)
        )  # fmt: skip
    return Problem(
        ops=tuple(ops),
        storage_bytes=(*([nbytes] * length), 1, *([1] * length), 1),
        forward_outputs=(loss,),
        forward_roots=(length,),
        backward_outputs=(len(ops) - 1,),
        output_storages=(2 * length,),
        given=(tangent,),
    )


def some_step(seed: int, most: int = 5) -> Problem:
    """A random chain of up to ``most`` values, some of which are read again further on.

    Sizes and times are such that computing again, moving and keeping are all worth it somewhere.
    """
    rng = random.Random(seed)
    length = rng.randint(3, most)
    ops: list[Op] = []
    sizes = [rng.choice([2, 4, 4, 6, 8]) for _ in range(length)]
    for i in range(length):
        inputs = {i - 1} if i else set()
        if i > 1 and rng.random() < 0.3:
            inputs.add(rng.randrange(i - 1))
        read = tuple(sorted(inputs))
        ops.append(
            Op(f"f{i}", read, (i,), (i,), (i, *read), True, time_s=float(rng.randint(1, 4)),
               savable=True, workspace_bytes=rng.choice([0, 0, 3]))
        )  # fmt: skip
    loss, tangent = length, 2 * length + 1
    ops.append(Op("loss", (length - 1,), (loss,), (loss,), (loss, length - 1), True))
    for i in reversed(range(length)):
        previous = () if i == length - 1 else (len(ops) - 1,)
        made = 2 * length - i
        inputs = {i, *ops[i].inputs} if rng.random() < 0.5 else {i}
        read = tuple(sorted(inputs))
        touches = (made, *read, made - 1 if previous else tangent)
        ops.append(
            Op(f"b{i}", (*read, *previous), (made,), (made,), touches, False, late=True,
               time_s=float(rng.randint(1, 6)), workspace_bytes=rng.choice([0, 0, 2]))
        )  # fmt: skip
    return Problem(
        ops=tuple(ops),
        storage_bytes=(*sizes, 1, *(rng.choice([1, 2, 4]) for _ in range(length)), 1),
        forward_outputs=(loss,),
        forward_roots=(length,),
        backward_outputs=(len(ops) - 1,),
        output_storages=(2 * length,),
        given=(tangent,),
    )
