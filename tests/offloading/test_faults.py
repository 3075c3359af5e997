"""Disks that are full, break or are cut, processes that fork or are killed: nothing is left."""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt_pass
from ckpt_pass.offloading import files
from ckpt_pass.offloading.disk import FileCarrier
from ckpt_pass.offloading.files import open_unnamed
from ckpt_pass.offloading.store import PooledStore
from ckpt_pass.offloading.stores import disk_store, host_store

linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")


def model_and_input() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)) for _ in range(3)]
    return nn.Sequential(*layers), torch.randn(32, 64)


def step(model: nn.Module, x: Tensor, store: Any, inputs: bool = True) -> list[Tensor]:
    """One step whose regions offload everything."""
    model.zero_grad()
    for layer in model:  # type: ignore[attr-defined]
        x = ckpt_pass.checkpoint(
            layer, x, policy=ckpt_pass.offload(), offload=store, offload_inputs=inputs
        )
    loss = x.square().mean()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]


def plain(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]


def same(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(map(torch.equal, got, wanted))


def file_of(store: PooledStore) -> int:
    carrier = store.carrier
    assert isinstance(carrier, FileCarrier)
    return carrier.fd


# --- a disk that does not do as it should -----------------------------------------------------


@pytest.mark.parametrize("make", [host_store, disk_store])
def test_a_store_that_is_full(make: Any) -> None:
    (model, x), store = model_and_input(), make(budget_bytes=4 * 8192)
    wanted = plain(model, x)
    for _ in range(2):
        with pytest.raises(ckpt_pass.StoreFullError, match="host_budget"):
            step(model, x, store)
    assert store.used_bytes == 0
    assert same(step(model, x, make(budget_bytes=20 * 8192)), wanted)


def test_a_disk_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    (model, x), store = model_and_input(), disk_store()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(ckpt_pass.StoreFullError, match="no room for 67,108,864 bytes more"):
            step(model, x, store)
    assert store.allocated_bytes == store.used_bytes == 0
    assert same(step(model, x, store), plain(model, x))


def test_a_file_system_that_sets_no_room_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    (model, x), store = model_and_input(), disk_store()
    assert same(step(model, x, store), plain(model, x))
    assert os.fstat(file_of(store)).st_size == store.allocated_bytes


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    (model, x), store = model_and_input(), disk_store()
    wanted, write, writes = plain(model, x), os.pwrite, 0

    def fails(fd: int, data: Any, offset: int) -> int:
        nonlocal writes
        writes += 1
        if writes > 4:
            raise OSError(error, os.strerror(error))
        return write(fd, data[:1000], offset)  # and no more at once, as systems may

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails)
        with pytest.raises(ckpt_pass.StoreWriteError, match="cannot be written"):
            step(model, x, store)
    assert store.used_bytes == 0
    assert same(step(model, x, store), wanted)


def test_a_file_that_somebody_cut() -> None:
    (model, x), store = model_and_input(), disk_store()
    out = ckpt_pass.checkpoint(model, x, policy=ckpt_pass.offload(), offload=store)
    os.ftruncate(file_of(store), 10_000)
    with pytest.raises(ckpt_pass.StoreReadError, match="cut it"):
        out.sum().backward()
    del out
    assert store.used_bytes == 0


def test_a_read_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    (model, x), store = model_and_input(), disk_store()
    out = ckpt_pass.checkpoint(model, x, policy=ckpt_pass.offload(), offload=store)

    def broken(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(ckpt_pass.StoreReadError, match="cannot be read"):
        out.sum().backward()


# --- a step that does not end as it should ----------------------------------------------------


@pytest.mark.parametrize("make", [host_store, disk_store])
def test_an_error_in_forward_or_recomputation(make: Any) -> None:
    (model, x), store = model_and_input(), make()

    def layer(value: Tensor, fails: str) -> Tensor:
        made = model(value)
        where = "forward" if torch._C._current_graph_task_id() == -1 else "backward"
        if where == fails:
            raise ValueError(where)
        return made.tanh()

    run = partial(ckpt_pass.checkpoint, layer, x, policy=ckpt_pass.offload(), offload=store)
    with pytest.raises(ValueError, match="forward"):
        run("forward")
    assert store.used_bytes == 0
    out = run("backward")
    with pytest.raises(ValueError, match="backward"):
        out.sum().backward()
    del out
    assert store.used_bytes == 0
    run("").sum().backward()
    assert store.used_bytes == 0


def what_is_open() -> tuple[int, int]:
    """Files and threads; those of earlier tests may go meanwhile."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@linux
@pytest.mark.parametrize("make", [host_store, disk_store])
def test_two_hundred_steps_leave_nothing(make: Any) -> None:
    (model, x), store = model_and_input(), make()
    layer = model[0]

    def run(number: int) -> None:
        out = ckpt_pass.checkpoint(
            layer, x, policy=ckpt_pass.offload(), offload=store, offload_inputs=True
        )
        if number % 3:  # for some, no backward comes
            out.sum().backward()

    for number in range(3):
        run(number)
    before = what_is_open()
    for number in range(200):
        run(number)
    assert store.used_bytes == 0 and store.allocated_bytes == 64 * 2**20
    assert what_is_open() <= before


@linux
def test_a_store_leaves_neither_file_nor_thread() -> None:
    gc.collect()
    before, _ = what_is_open()
    store = disk_store()
    store.put(torch.ones(1000)).release()
    assert what_is_open()[0] == before + 1
    del store
    assert what_is_open()[0] == before


# --- files --------------------------------------------------------------------------------------


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = open_unnamed(tmp_path / "deep" / "er")
    os.close(fd)
    assert stat.S_IMODE((tmp_path / "deep" / "er").stat().st_mode) == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(ckpt_pass.StoreFolderError, match="Name another"):
        open_unnamed(tmp_path / "file")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    os.close(open_unnamed(None))
    (own,) = tmp_path.glob("ckpt_pass-*")
    assert stat.S_IMODE(own.stat().st_mode) == 0o700 and not list(own.iterdir())
    own.chmod(0o777)
    with pytest.raises(ckpt_pass.StoreFolderError, match="mode 777"):
        open_unnamed(None)
    own.rmdir()
    own.symlink_to(tmp_path)
    with pytest.raises(ckpt_pass.StoreFolderError):
        open_unnamed(None)


def test_files_with_a_name_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", 0, raising=False)
    store = disk_store(tmp_path)
    ticket = store.put(torch.ones(1000))
    assert not list(tmp_path.iterdir())
    assert torch.equal(ticket.take(), torch.ones(1000))

    process = subprocess.run([sys.executable, "-c", "pass"], check=True)
    assert process.returncode == 0
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    left = [tmp_path / f"ckpt_pass-{pid}-ab12.slab" for pid in (gone.pid, os.getpid())]
    other = tmp_path / "ckpt_pass-notes.slab"
    for path in (*left, other):
        path.write_text("")
    os.close(files.open_unnamed(tmp_path))
    assert sorted(tmp_path.iterdir()) == sorted((left[1], other))  # somebody's, who is there


def in_a_child(work: Callable[[], str]) -> tuple[int, str]:
    """Run something in a process that is forked; how that ended, and what it returned."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writes, work().encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as said:
        words = said.read()
    return os.waitpid(child, 0)[1], words


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@forks
@pytest.mark.parametrize("named", [False, True])
def test_a_process_that_is_killed_leaves_no_file(tmp_path: Path, named: bool) -> None:
    def work() -> str:
        if named:
            os.O_TMPFILE = 0  # type: ignore[misc]
        store = disk_store(tmp_path)
        tickets = [store.put(torch.ones(1000)) for _ in range(4)]
        tickets[0].release()
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    status, _ = in_a_child(work)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert not list(tmp_path.iterdir())


@forks
def test_files_that_may_not_grow() -> None:
    def work() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            disk_store().put(torch.ones(10))
        except ckpt_pass.StoreFullError as error:
            return str(error)
        return "it may"

    assert "no room for 67,108,864 bytes more" in in_a_child(work)[1]


@forks
@pytest.mark.parametrize("make", [host_store, disk_store])
def test_a_process_that_forks(make: Any) -> None:
    store = make()
    ticket, late = store.put(torch.ones(1000)), make(bytes_per_s=1e4).put(torch.ones(1000))
    ticket.release()

    def work() -> str:
        said = []
        for one in (ticket.take, late.release):
            try:
                one()
                said.append("there")
            except ckpt_pass.ForkedStoreError:
                said.append("forked")
        assert torch.equal(late.take(), torch.ones(1000))
        own = store.put(torch.full((1000,), 3.0))
        own.release()
        assert torch.equal(own.take(), torch.full((1000,), 3.0))
        return " ".join(said)

    status, said = in_a_child(work)
    assert said == ("there forked" if make is host_store else "forked forked")
    assert status == 0 and torch.equal(ticket.take(), torch.ones(1000))


@forks
@pytest.mark.parametrize("make", [host_store, disk_store])
def test_a_forked_process_has_steps_of_its_own(make: Any) -> None:
    """While a graph of the process that it was forked from waits for its backward.

    Of small ops only: kernels with threads hang in a process that was forked.
    """
    weights, store = [torch.rand(50, requires_grad=True) for _ in range(4)], make()
    begun = weights[0].exp()  # moved in both processes

    def loss() -> Tensor:
        y = begun
        for weight in weights[1:]:
            y = ckpt_pass.checkpoint(
                lambda y, weight=weight: (y * weight).sin(), y, offload=store, offload_inputs=True
            )
        return (y * y).sum()

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, weights[1:]))

    wanted, waiting = gradients(loss()), loss()
    status, said = in_a_child(lambda: str(all(map(torch.equal, gradients(loss()), wanted))))
    assert (status, said) == (0, "True")
    assert all(map(torch.equal, gradients(waiting), wanted))
