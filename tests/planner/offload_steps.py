"""A chain written by hand, whose copies can be followed with a pencil."""

from __future__ import annotations

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
