"""What would make a training job fit: changes of the job, each of them computed."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import nn

from ckpt_pass._errors import CkptPassError
from ckpt_pass._torch.wrappers import wraps
from ckpt_pass.job.copies import Copier
from ckpt_pass.job.counting import STEPS, Around, OptimizerFailedError, kept_in
from ckpt_pass.job.jobs import Job
from ckpt_pass.job.totals import Cure, InfeasibleTotalError, JobAsked
from ckpt_pass.offloading.options import Offload
from ckpt_pass.offloading.stores import OffloadLike
from ckpt_pass.planner.device import Device
from ckpt_pass.planner.devices import DEVICES
from ckpt_pass.plans.budget import DEVICE_RESERVE
from ckpt_pass.plans.step_plan import StepPlan
from ckpt_pass.plans.value import Plan
from ckpt_pass.state.untouched import untouched
from ckpt_pass.steps.running import FakeStep
from ckpt_pass.tools.axis import Axis, UnknownDimensionError

#: Cures that a message names.
MOST = 3
#: Halvings of a microbatch that are tried: each is a plan of its own.
_HALVINGS = 3

#: Plans a step of a job, with a place that values may move to.
Place: TypeAlias = "OffloadLike | bool | None"
Try: TypeAlias = Callable[[FakeStep, JobAsked, Place], Plan | StepPlan]


def changes_of(
    error: InfeasibleTotalError,
    step: FakeStep,
    asked: JobAsked,
    offload: Place,
    tried: Try,
) -> tuple[Cure, ...]:
    """Changes that may make a job fit its total, each computed: those that change least first.

    Others are looked for until three of them are enough.

    Args:
        error: tells by how much it does not.
        step, asked, offload: what was planned.
        tried: plans it.
    """
    found: list[Cure] = []
    enough = 0
    ways = (
        _by_optimizer(error, step, asked),
        _by_gradients(step, asked, offload, tried),
        _by_batch(error, step, asked, offload, tried),
        _by_offload(error, step, asked, offload, tried),
        _by_states(error, step, asked),
        _by_dtype(error, step, asked, offload, tried),
        _by_device(error, asked),
    )
    for cure in (cure for way in ways for cure in way if cure is not None):
        found.append(cure)
        enough += cure.is_enough(error.total_bytes)
        if enough == MOST:
            break
    return tuple(found)


def _by_optimizer(error: InfeasibleTotalError, step: FakeStep, asked: JobAsked) -> Iterator[Cure]:
    """Other kernels of the same optimizer: its step takes less, and does the same."""
    if error.account.peak_phase.is_pass:
        return
    around = Around.of_step(step.model, step.args, step.kwargs, step.loss_fn)
    least = next(p.above_bytes or 0 for p in error.account.phases if p.is_pass)
    for words, options in (
        ("fused=True", {"fused": True, "foreach": False}),
        ("foreach=False", {"fused": False, "foreach": False}),
    ):
        job = _with_options(asked.job, options)
        if job is None:
            continue
        with contextlib.suppress(OptimizerFailedError):  # kernels that do not take such tensors
            account = replace(asked, job=job).account(around)
            needed = account.with_step(least, error.account.outputs_bytes).peak_bytes
            yield Cure(f"the optimizer with {words}", needed)


def _with_options(job: Job, options: dict[str, bool]) -> Job | None:
    """The job with other kernels for its optimizers; ``None`` where they have no such ones."""
    copied = Copier(_itself)
    found = []
    for optimizer in job.optimizers:
        other: torch.optim.Optimizer = copied(optimizer)
        for group in other.param_groups:
            if not options.keys() <= group.keys():
                return None
            group.update(options)
        found.append(other)
    return replace(job, optimizer=tuple(found))


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _planned(
    words: str, tried: Try, step: FakeStep, asked: JobAsked, offload: Place
) -> Cure | None:
    """A change, and what the job needs for its total then: what it takes, where that fits.

    ``None`` where no plan can be made of the changed job, such as of a model that does not run
    with a smaller batch.
    """
    try:
        account = tried(step, asked, offload).account
        assert account is not None
        return Cure(words, account.peak_bytes)
    except InfeasibleTotalError as error:
        return Cure(words, error.needed_bytes)
    except CkptPassError:
        return None


def _by_gradients(
    step: FakeStep, asked: JobAsked, offload: Place, tried: Try
) -> Iterator[Cure | None]:
    if not asked.job.set_to_none:
        changed = replace(asked, job=replace(asked.job, set_to_none=True))
        yield _planned("set_to_none=True", tried, step, changed, offload)


def _by_batch(
    error: InfeasibleTotalError,
    step: FakeStep,
    asked: JobAsked,
    offload: Place,
    tried: Try,
) -> Iterator[Cure | None]:
    """A smaller microbatch and more of them: the same gradients."""
    given: dict[int | str, Any] = dict(enumerate(step.args))
    given.update(step.kwargs)
    try:
        axis = Axis.of(given, "batch")
    except UnknownDimensionError:
        return
    if not _is_the_steps(error, error.account.inputs_bytes):
        return
    size, count = axis.size, asked.job.accumulate
    for _ in range(_HALVINGS):
        if size % 2:
            return
        size, count = size // 2, count * 2
        args, kwargs = axis.resized(size)
        smaller = replace(step, args=args, kwargs=kwargs)
        changed = replace(asked, job=replace(asked.job, accumulate=count))
        words = f"microbatches of {size}, accumulate={count}"
        found = _planned(words, tried, smaller, changed, offload)
        yield found
        if found is None or found.is_enough(error.total_bytes):
            return


def _is_the_steps(error: InfeasibleTotalError, less_bytes: int = 0) -> bool:
    """Whether all would fit but for what forward and backward allocate.

    Args:
        error: tells by how much it does not.
        less_bytes: of what stands there now, how much may go.
    """
    account = error.account
    rest = max((phase.peak_bytes for phase in account.updates), default=0)
    return max(rest, account.pass_standing_bytes) - less_bytes < error.total_bytes


def _by_offload(
    error: InfeasibleTotalError,
    step: FakeStep,
    asked: JobAsked,
    offload: Place,
    tried: Try,
) -> Iterator[Cure | None]:
    if not offload and _is_the_steps(error):
        yield _planned("offload=True", tried, step, asked, Offload())


def _by_states(error: InfeasibleTotalError, step: FakeStep, asked: JobAsked) -> Iterator[Cure]:
    """Moments of 8 bits, by torchao's optimizers where they are installed.

    Their step is compiled, and is counted op by op: it takes no more than that.
    """
    job = _with_small_states(asked.job)
    if job is None:
        return
    around = Around.of_step(step.model, step.args, step.kwargs, step.loss_fn)
    least = next(p.above_bytes or 0 for p in error.account.phases if p.is_pass)
    account = replace(asked, job=job, total=error.total_bytes).account(around)
    needed = account.with_step(least, error.account.outputs_bytes).peak_bytes
    names = dict.fromkeys(type(one).__name__ for one in job.optimizers)
    yield Cure(f"torchao.optim.{' and '.join(names)}", needed)


def _with_small_states(job: Job) -> Job | None:
    """The job with states of 8 bits; ``None`` where there are no such optimizers."""
    known = {torch.optim.Adam: "Adam8bit", torch.optim.AdamW: "AdamW8bit"}
    if not any(type(one) in known for one in job.optimizers):
        return None
    try:
        small: Any = importlib.import_module("torchao.optim")
    except ImportError:
        return None
    found: list[torch.optim.Optimizer] = []
    for one in job.optimizers:
        if type(one) not in known:
            found.append(one)
            continue
        names = ("params", "lr", "betas", "eps", "weight_decay")
        groups = [{name: group[name] for name in names} for group in one.param_groups]
        amsgrad = any(group["amsgrad"] for group in one.param_groups)
        found.append(getattr(small, known[type(one)])(groups, amsgrad=amsgrad))
    return replace(job, optimizer=tuple(found))


def _by_dtype(
    error: InfeasibleTotalError,
    step: FakeStep,
    asked: JobAsked,
    offload: Place,
    tried: Try,
) -> Iterator[Cure | None]:
    """Gradients of half the size, where the optimizer's step takes them."""
    around = Around.of_step(step.model, step.args, step.kwargs, step.loss_fn)
    single = [p for p in around.trained if p.is_leaf and kept_in(p) is torch.float32]
    if any(wraps([type(p)]) for p in single):
        return  # what shards parameters casts their gradients itself
    if not single or not hasattr(torch.Tensor, "grad_dtype"):
        return
    if not _takes_gradients(asked.job, torch.bfloat16):
        return
    changed = replace(asked, total=error.total_bytes)  # gradients that are there are put aside
    with _gradients_kept_in(torch.bfloat16, single):
        words = "gradients in bfloat16 (grad_dtype of each parameter)"
        found = _planned(words, tried, step, changed, offload)
    yield found


def _takes_gradients(job: Job, dtype: torch.dtype) -> bool:
    """Whether the optimizers step on gradients of another dtype: tried on a few numbers, as often
    as accounts step.

    Fake tensors do not tell: kernels look at it, and the rules for fake ones do not.
    """
    copies: tuple[torch.optim.Optimizer, ...] = Copier(_small)(tuple(job.optimizers))
    with untouched(*(vars(one) for one in job.optimizers)):
        try:
            for one in copies * STEPS:
                for parameter in (p for group in one.param_groups for p in group["params"]):
                    parameter.grad_dtype = dtype
                    parameter.grad = torch.zeros_like(parameter, dtype=dtype)
                one.step()
        except Exception:  # whatever the optimizer's own code raises: it does not take them
            return False
    return True


def _small(tensor: torch.Tensor) -> torch.Tensor:
    """As many dimensions, none of them longer than two."""
    shape = [min(size, 2) for size in tensor.shape]
    found = torch.zeros(shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(found) if isinstance(tensor, nn.Parameter) else found


@contextlib.contextmanager
def _gradients_kept_in(dtype: torch.dtype, parameters: list[torch.Tensor]) -> Iterator[None]:
    """Have parameters say so for a while; a gradient of another dtype cannot be there then."""
    before = [(parameter, parameter.grad_dtype, parameter.grad) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
            parameter.grad_dtype = dtype
        yield
    finally:
        for parameter, said, grad in before:
            parameter.grad_dtype = said
            parameter.grad = grad


def _by_device(error: InfeasibleTotalError, asked: JobAsked) -> Iterator[Cure]:
    """All of the device on paper that it is planned for, or the smallest that has enough."""
    own = asked.device
    if own is None:
        return
    if _room_bytes(own) >= error.needed_bytes:
        yield Cure(f"all that {own} has", error.needed_bytes, is_device=True)
        return
    for device in sorted(DEVICES.values(), key=_room_bytes):
        if device.kind == own.kind and _room_bytes(device) >= error.needed_bytes:
            yield Cure(f"a {device}", error.needed_bytes, is_device=True)
            return


def _room_bytes(device: Device) -> int:
    return int(device.memory_bytes * (1 - DEVICE_RESERVE))
