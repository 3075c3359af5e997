"""Placements under ``torch.compile``: bit by bit the compiled step without them, in one graph.

All placements on all models take some ten minutes and are marked ``slow``; three are not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn

import ckpt_pass
from ckpt_pass import Megatron, Segments, applied, apply, remove
from tests.zoo import Case, StepResult, assert_same_step, modular, run_step
from tests.zoo.modular import TRANSFORMER, UNET
from tests.zoo.placed import CASES, MEASURED, PLACEMENTS, SIX, TRANSFORMERS, placed

GPT2 = SIX[0]
BACKENDS = ["aot_eager", "ckpt"]
QUICK = {
    ("bert", "all", "aot_eager"),
    ("unet", "segments-2-nested", "aot_eager"),
    ("vit", "alternate", "ckpt"),
}
SEQ2SEQ = [modular.T5, modular.BART]


def regions_in(graph: fx.GraphModule) -> int:
    """The checkpoint regions that dynamo put into a graph."""
    tag = torch.ops.higher_order.tag_activation_checkpoint
    return len(graph.graph.find_nodes(op="call_function", target=tag))


def compiled(model: nn.Module, backend: str) -> tuple[Callable[..., Any], list[int]]:
    """The model compiled without graph breaks, and a list: each graph's number of regions."""
    if backend == "ckpt":
        inner: Any = ckpt_pass.make_backend(inner="aot_eager")
    else:
        inner = torch._dynamo.lookup_backend(backend)
    graphs = []

    def counting(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(regions_in(graph))
        return inner(graph, inputs)  # type: ignore[no-any-return]

    return torch.compile(model, backend=counting, fullgraph=True), graphs


def bytes_saved(step: Callable[[], Any]) -> int:
    """Bytes of what autograd saves in a step; of a compiled one what its backward takes."""
    sizes = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        sizes.append(value.nbytes)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        step()
    return sum(sizes)


@functools.cache
def plain(case: Case, backend: str) -> StepResult:
    """The compiled step without regions; all these cases have the bits of eager."""
    torch._dynamo.reset()
    model, inputs = case.make()
    forward, graphs = compiled(model, backend)
    step = run_step(model, inputs, forward)
    assert graphs == [0]
    assert_same_step(step, run_step(*case.make()))
    return step


def calls_of(case: Case, names: Sequence[str]) -> int:
    """How often a step calls the modules: each call is a region of its own."""
    model, inputs = case.make()
    called: list[str] = []
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda *_, n=name: called.append(n))
    model(*inputs)
    return len(called)


def assert_as_plain(case: Case, backend: str, *asked: Any, **options: Any) -> None:
    """The compiled step with a placement equals that without, and has a region for each call."""
    expected = plain(case, backend)
    torch._dynamo.reset()
    model, inputs = case.make()
    if options:
        options["example_inputs"] = inputs
    with applied(model, *asked, **options) as choice:
        forward, graphs = compiled(model, backend)
        assert_same_step(run_step(model, inputs, forward), expected)
    assert graphs == [calls_of(case, choice.names)]
    assert choice or "none" in asked


def every_combination() -> Iterator[Any]:
    for case in CASES:
        for name in [*PLACEMENTS, *MEASURED]:
            for backend in BACKENDS:
                quick = (case.name, name, backend) in QUICK
                marks = [] if quick else [pytest.mark.slow]
                label = f"{case}-{name}-{backend}"
                yield pytest.param(case, name, backend, marks=marks, id=label)


@pytest.mark.parametrize(("case", "name", "backend"), list(every_combination()))
def test_every_placement_gives_the_same_step(case: Case, name: str, backend: str) -> None:
    assert_as_plain(case, backend, placed(name, case))


def test_a_compiled_model_follows_apply_and_remove() -> None:
    """Dynamo's guards see both: what is compiled for one placement is not run with another."""
    model, inputs = UNET.make()
    running = {name: buffer.clone() for name, buffer in model.named_buffers()}
    forward, graphs = compiled(model, "aot_eager")
    expected = plain(UNET, "aot_eager")
    saved_bytes = {}
    for placement in ("none", "all", "none", "segments-2"):
        model.load_state_dict(running, strict=False)  # each step moves running statistics
        choice = apply(model, placement)
        assert_same_step(run_step(model, inputs, forward), expected)
        saved_bytes[placement] = bytes_saved(lambda: forward(*inputs))
        remove(model)
    assert graphs == [0, 5, 5]  # and nothing is compiled twice
    assert saved_bytes["all"] == saved_bytes["segments-2"] < 0.5 * saved_bytes["none"]
    assert len(choice.names) == 5


def test_nested_segments_refuse_a_policy_compiled_or_not() -> None:
    model, inputs = UNET.make()
    forward, graphs = compiled(model, "aot_eager")
    with pytest.raises(ckpt_pass.SegmentError, match="handed out once"):
        apply(model, Segments(1, nested=True), "save-matmul")
    assert_same_step(run_step(model, inputs, forward), plain(UNET, "aot_eager"))
    assert graphs[-1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("modules", [("core_attn",), ("layernorm",), ("core_attn", "layernorm")])
@pytest.mark.parametrize("case", TRANSFORMERS, ids=str)
def test_megatron_selective(case: Case, modules: tuple[str, ...], backend: str) -> None:
    assert_as_plain(case, backend, Megatron(modules=modules))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("modules", [("mlp",), ("mlp_act",), ("layernorm", "mlp")])
@pytest.mark.parametrize("case", SIX[:2], ids=str)
def test_megatron_selective_mlp(case: Case, modules: tuple[str, ...], backend: str) -> None:
    assert_as_plain(case, backend, Megatron(modules=modules))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("placement", ["all", "alternate", "segments-2", "megatron-selective"])
@pytest.mark.parametrize("case", SEQ2SEQ, ids=str)
def test_encoder_decoders(case: Case, placement: str, backend: str) -> None:
    assert_as_plain(case, backend, placement)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", ["save-matmul-attention", "save-nothing"])
@pytest.mark.parametrize("placement", ["alternate", "segments-2", "megatron-full"])
@pytest.mark.parametrize("case", [GPT2, UNET], ids=str)
def test_a_policy_says_what_regions_keep(
    case: Case, placement: str, policy: str, backend: str
) -> None:
    assert_as_plain(case, backend, placement, policy)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [GPT2, UNET, TRANSFORMER], ids=str)
def test_a_budget(case: Case, backend: str) -> None:
    assert_as_plain(case, backend, budget=0.8)
