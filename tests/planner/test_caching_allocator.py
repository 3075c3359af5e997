"""What torch's caching allocator hands out: by its rules, and beside a real one."""

from __future__ import annotations

import random

import pytest
import torch

from ckpt_pass.planner.caching_allocator import Lifetime, handed_out

MIB = 1 << 20


def at_the_end(*sizes: int) -> int:
    """The bytes handed out once storages of these sizes are there, all to the end."""
    lifetimes = [Lifetime(index, len(sizes), nbytes) for index, nbytes in enumerate(sizes)]
    return handed_out(lifetimes, {}, len(sizes))[-1]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        pytest.param([700, 700, 0], 2_048, id="small blocks are multiples of 512 bytes"),
        pytest.param([12 * MIB], 12 * MIB, id="a segment of its own"),
        pytest.param([12 * MIB - 700], 12 * MIB, id="a rest of at most 1 MiB is not split off"),
        # 20 MiB are shared by requests from 1 to 10 MiB: the thirteenth gets the last 2 MiB.
        pytest.param([3 * MIB // 2] * 12, 18 * MIB, id="a shared segment"),
        pytest.param([3 * MIB // 2] * 13, 20 * MIB, id="the last of a shared segment"),
    ],
)
def test_blocks_are_a_little_larger_than_what_is_asked_for(sizes: list[int], expected: int) -> None:
    assert at_the_end(*sizes) == expected


def test_a_freed_block_is_used_again_whole_if_little_is_left() -> None:
    first = Lifetime(0, 1, 14 * MIB)
    alike, smaller = Lifetime(1, 2, 13 * MIB), Lifetime(1, 2, 11 * MIB)
    assert handed_out([first, alike], {}, 2) == [14 * MIB, 14 * MIB]
    assert handed_out([first, smaller], {}, 2) == [14 * MIB, 11 * MIB]


def test_workspaces_are_there_at_their_moment_alone() -> None:
    assert handed_out([Lifetime(0, 3, 512)], {1: 1_000}, 3) == [512, 512 + 1_024, 512]


def some_lifetimes(seed: int) -> list[Lifetime]:
    rng = random.Random(seed)
    sizes = [rng.choice([300, 4_096, 700_000, 3 * MIB // 2, 5 * MIB, 12 * MIB, 17 * MIB + 1])]
    sizes += [rng.randrange(1, 24 * MIB) for _ in range(7)]
    found = []
    for born in range(60):
        died = rng.choice([born + 1, born + 3, born + 20, 60])
        found.append(Lifetime(born, min(died, 60), rng.choice(sizes)))
    return found


def test_neighbours_that_are_free_are_one_again() -> None:
    for seed in range(50):
        lifetimes = some_lifetimes(seed)
        alive = [sum(x.nbytes for x in lifetimes if x.born <= m < x.died) for m in range(60)]
        blocks = handed_out(lifetimes, {}, 60)
        surplus = [ours - asked for ours, asked in zip(blocks, alive, strict=True)]
        assert min(surplus) >= 0
        assert max(surplus) <= MIB * sum(x.nbytes > MIB for x in lifetimes)


@pytest.mark.gpu
def test_a_real_allocator_hands_out_the_same() -> None:
    for seed in range(20):
        lifetimes = some_lifetimes(seed)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        for _ in range(2):
            found: list[int] = []
            held: dict[int, torch.Tensor] = {}
            for moment in range(60):
                for number in [n for n, one in enumerate(lifetimes) if one.died == moment]:
                    del held[number]
                for number in [n for n, one in enumerate(lifetimes) if one.born == moment]:
                    nbytes = lifetimes[number].nbytes
                    held[number] = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
                found.append(torch.cuda.memory_allocated() - before)
            for number in sorted(held):
                del held[number]
        assert found == handed_out(lifetimes, {}, 60)
