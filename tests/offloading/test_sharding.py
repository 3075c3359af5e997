"""What is sharded: options, rules, how tensors lie, and checksums; no ranks are started here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

import ckpt_pass
from ckpt_pass import InvalidShardingError, ShardGroupError, Sharding
from ckpt_pass.offloading.checksums import checksum, weighted_sum
from ckpt_pass.offloading.sharding import as_sharding
from ckpt_pass.offloading.shards import is_shardable, lie_of


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"check": "never"}, "one of always, first"),
        ({"arguments": "last"}, "one of all, first"),
        ({"min_bytes": -1}, "0 or more"),
        ({"group": 3}, "of type int to shard over"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidShardingError, match=says):
        Sharding(**options)  # type: ignore[arg-type]


def test_what_stands_for_options() -> None:
    assert as_sharding(None) is None and as_sharding(False) is None
    assert as_sharding(True) == Sharding()
    assert as_sharding("3") == Sharding("3") and str(Sharding("3")) == "shard over group 3"


def test_without_a_process_group() -> None:
    with pytest.raises(ShardGroupError, match=r"Expected init_process_group"):
        Sharding().found_group()


def test_rules_print_and_compare() -> None:
    policy = ckpt_pass.shard(op_class="matmul", min_bytes=64) | ckpt_pass.recompute()
    assert str(policy) == "shard(op_class=matmul, min_bytes=64) | recompute()"
    assert str(ckpt_pass.shard("7")) == "shard(group=7)"
    assert ckpt_pass.shard("7") == ckpt_pass.shard("7") != ckpt_pass.shard()
    assert hash(ckpt_pass.shard("7")) == hash(ckpt_pass.shard("7"))
    assert ckpt_pass.shard(min_bytes=64).decision == Sharding(min_bytes=64)
    assert ckpt_pass.save().decision is CheckpointPolicy.MUST_SAVE


LIES: list[tuple[Callable[[Tensor], Tensor], tuple[int, bool] | None]] = [
    (lambda x: x, (120, True)),
    (lambda x: x.permute(2, 0, 1), (120, True)),
    (lambda x: x[:, :, 1:2], (20, False)),
    (lambda x: x[1:], (96, True)),
    (lambda x: x[:, 1:], (90, False)),
    (lambda x: x[:, :1].expand(5, 4, 6), (30, False)),
    (lambda x: x[0].expand(3, 4, 6), (24, True)),
    (lambda x: x.view(-1).unfold(0, 8, 4), None),
    (lambda x: x[0, 0, 0], (1, True)),
]


@pytest.mark.parametrize(("make", "expected"), LIES)
def test_how_tensors_lie(
    make: Callable[[Tensor], Tensor], expected: tuple[int, bool] | None
) -> None:
    found = lie_of(make(torch.zeros(5, 4, 6)))
    assert (None if found is None else (found.numel, found.dense)) == expected


def test_what_is_too_small_or_no_plain_tensor() -> None:
    assert is_shardable(torch.zeros(256), 1024) and not is_shardable(torch.zeros(255), 1024)
    assert not is_shardable(torch.zeros(0, 4), 0)
    assert not is_shardable(torch.eye(64).to_sparse(), 0)


@pytest.mark.parametrize("numel", [1, 7, 4096, (1 << 15) + 3])
def test_checksums_see_a_changed_and_a_swapped_byte(numel: int) -> None:
    data = torch.arange(2 * numel).to(torch.int16).view(torch.uint8)[3 : 3 + 2 * numel - 3]
    for code in (checksum, weighted_sum):
        before = code(data)
        assert before == code(data.clone()) and 0 <= before < 2**63
        if numel > 1:
            other = data.clone()
            other[-1] += 1
            assert code(other) != before
        if numel > 7:
            other = data.clone()
            other[0], other[10] = data[10] + 1, data[0]
            assert code(other) != before
