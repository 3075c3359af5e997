"""The op taxonomy: complete over torch's registry, and right about the ops that people know."""

from __future__ import annotations

import importlib
import math
import operator
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

import ckpt_pass
from ckpt_pass._torch.operators import (
    HigherOrderOperator,
    OpOverload,
    all_higher_order_ops,
    all_overloads,
    load_late_registrations,
    packet_of,
    split_name,
)
from ckpt_pass.ops import tables
from ckpt_pass.ops import taxonomy as ops
from ckpt_pass.ops.flops import FlopCounter
from ckpt_pass.ops.taxonomy import (
    RULES,
    OpClass,
    classify,
    draws_random,
    explain_class,
    functional_twin,
    is_expensive,
    never_recompute,
    op_name,
    taxonomy_counts,
)

aten = torch.ops.aten
prims = torch.ops.prims


def _shown(value: object) -> str:
    """A test's name for a value: the same in every process, so without addresses and data."""
    shapes = tree_map_only(torch.Tensor, lambda tensor: tuple(tensor.shape), value)
    return re.sub(r" at 0x[0-9a-f]+", "", str(shapes))


@pytest.fixture(scope="module")
def registry() -> list[OpOverload]:
    load_late_registrations()
    builtin = tables.BUILTIN_NAMESPACES
    return [op for op in all_overloads() if split_name(op.name())[0] in builtin]


@pytest.fixture(scope="module")
def library() -> Iterator[torch.library.Library]:
    with torch.library._scoped_library("ckpt_pass_test_ops", "DEF") as scoped:
        pointwise, seeded = torch.Tag.pointwise, torch.Tag.nondeterministic_seeded
        scoped.define("opaque(Tensor x) -> Tensor")
        scoped.define("mm(Tensor x) -> Tensor")
        scoped.define("scaled(Tensor x) -> Tensor", tags=(pointwise,))
        scoped.define("scaled_(Tensor(a!) x) -> Tensor(a!)")
        scoped.define("total(Tensor x) -> Tensor", tags=(torch.Tag.reduction,))
        scoped.define("noisy(Tensor x) -> Tensor", tags=(seeded,))
        scoped.define("noisy_attention(Tensor x, float dropout_p=0.) -> Tensor", tags=(seeded,))
        scoped.define("shape_of_data(Tensor x) -> Tensor", tags=(torch.Tag.dynamic_output_shape,))
        scoped.define("part(Tensor(a) x) -> Tensor(a)")
        scoped.define("log_into(Tensor(a!) x, Tensor y) -> ()")
        yield scoped


# -- the whole registry --------------------------------------------------------------------------


def test_every_builtin_overload_has_a_class(registry: list[OpOverload]) -> None:
    assert len(registry) > 3000
    assert [str(op) for op in registry if classify(op) is OpClass.UNCLASSIFIED] == []


@pytest.mark.slow
def test_a_fresh_torch_has_no_namespace_that_is_unknown() -> None:
    code = (
        "from ckpt_pass._torch.operators import *; load_late_registrations();"
        "print(*{split_name(op.name())[0] for op in all_overloads()})"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = set(shown.stdout.split()) - {"ckpt_pass"}  # the library's own ops that move values
    assert found <= tables.BUILTIN_NAMESPACES


def test_higher_order_ops_are_all_in_the_table() -> None:
    load_late_registrations()
    own = [op for op in all_higher_order_ops() if type(op).__module__.startswith("torch.")]
    assert len(own) > 35
    assert {op.name() for op in own} <= set(ops._HIGHER_ORDER)


def test_no_rule_is_dead(registry: list[OpOverload], library: torch.library.Library) -> None:
    used = Counter(explain_class(op)[1] for op in registry)
    used[explain_class(torch.ops.ckpt_pass_test_ops.opaque.default)[1]] += 1
    assert [rule.name for rule in RULES if not used[rule.name]] == []


def test_rule_names_and_table_names_are_unique() -> None:
    assert max(Counter(rule.name for rule in RULES).values()) == 1
    for table in (tables.EXCEPTIONS, tables.NAMES, tables.HIGHER_ORDER, tables.PYTHON_CALLABLES):
        names = Counter(name for column in table.values() for name in column.split())
        assert [name for name, count in names.items() if count > 1] == []


def test_mutating_variants_have_the_class_of_their_twin(registry: list[OpOverload]) -> None:
    differ = [op for op in registry if classify(op) is not classify(functional_twin(op))]
    assert differ == []


def test_twins_mutate_nothing_and_are_their_own_twins(registry: list[OpOverload]) -> None:
    twins = [functional_twin(op) for op in registry if functional_twin(op) is not op]
    assert len(twins) > 1300
    assert [str(twin) for twin in twins if twin._schema.is_mutable] == []
    assert [str(twin) for twin in twins if functional_twin(twin) is not twin] == []


def test_out_variants_of_aten_have_twins(registry: list[OpOverload]) -> None:
    outs = [op for op in registry if op.namespace == "aten" and op._schema.arguments]
    outs = [op for op in outs if op._schema.arguments[-1].is_out]
    without = {str(op) for op in outs if functional_twin(op) is op}
    assert len(without) <= len(outs) // 100
    assert "aten.mm.out" not in without


def test_counts_cover_the_registry(registry: list[OpOverload]) -> None:
    counts = taxonomy_counts()
    assert list(counts) == list(OpClass)
    assert sum(counts.values()) == len(registry) + len(all_higher_order_ops())
    assert min(counts.values()) > 0


# Names that look like a product of matrices, a convolution, attention or a recurrent net, and are
# none, with the reason.
EXCLUDED: dict[str, str] = {
    r"backward": "has a class of its own",
    r"prepack|unpack|(^|_)pack_|_to_int4pack|_reorder_|flatten_weight|cell_params": "packs weights",
    r"upsample|affine": "resamples; named after its interpolation",
    r"_(stride|\w*padding|dilation|groups|transpose)$": "reads a field of packed parameters",
    r"_use_cudnn|sdp_choice": "asks about a backend",
    r"linear_quantize_weight": "quantises weights",
}
LOOKS_LIKE: tuple[tuple[str, OpClass], ...] = (
    (r"mm(_|$|v)|matmul|gemm|linear|(^|_)(mv|addmv)(_|$)", OpClass.MATMUL),
    (r"conv(\d|olution|_)", OpClass.CONVOLUTION),
    (r"attention|attn|sdp", OpClass.ATTENTION),
    (r"lstm|gru|rnn", OpClass.RECURRENT),
)


@pytest.mark.parametrize(("pattern", "expected"), LOOKS_LIKE)
def test_expensive_families_are_complete(
    pattern: str, expected: OpClass, registry: list[OpOverload]
) -> None:
    excluded = re.compile("|".join(EXCLUDED))
    names = {op: split_name(op.name())[1] for op in registry}
    # what communicates is a collective first, whatever product it is fused with
    hits = [op for op in registry if classify(op) is not OpClass.COLLECTIVE]
    hits = [op for op in hits if re.search(pattern, names[op].rstrip("_"))]
    hits = [op for op in hits if not excluded.search(names[op])]
    assert len(hits) >= 20
    assert [str(op) for op in hits if classify(op) is not expected] == []


def test_each_exclusion_excludes_something(registry: list[OpOverload]) -> None:
    names = [split_name(op.name())[1] for op in registry]
    looks = [name for name in names if any(re.search(row[0], name) for row in LOOKS_LIKE)]
    assert [row for row in EXCLUDED if not any(re.search(row, name) for name in looks)] == []


# -- the well-known ones -------------------------------------------------------------------------

WELL_KNOWN: dict[str, str] = {
    "matmul": """
        mm addmm bmm baddbmm matmul linear mv dot einsum _scaled_mm _grouped_mm _scaled_grouped_mm
        _int_mm _weight_int4pack_mm addmm_ bilinear
        """,
    "convolution": "convolution conv2d cudnn_convolution mkldnn_convolution _slow_conv2d_forward",
    "attention": """
        scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_flash_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_efficient_attention
        """,
    "pointwise": "gelu silu relu relu_ tanh rsqrt clamp neg tril masked_fill.Scalar add.Tensor",
    "reduction": "sum.dim_IntList mean.dim amax argmax var.correction logsumexp max.dim",
    "normalisation": """
        _softmax _log_softmax native_layer_norm native_batch_norm _native_batch_norm_legit
        native_group_norm _fused_rms_norm cudnn_batch_norm
        """,
    "view": """
        view t transpose.int permute expand slice.Tensor select.int unsqueeze _unsafe_view detach
        split.Tensor unbind.int alias as_strided reshape t_
        """,
    "cast": "_to_copy to.dtype type_as",
    "copy": "clone cat stack constant_pad_nd repeat copy copy_ contiguous view_copy roll",
    "creation": "zeros full.default arange.start empty_like scalar_tensor fill_.Scalar zero_ eye",
    "indexing": """
        embedding gather index.Tensor index_put scatter_add slice_scatter select_scatter index_put_
        nonzero index_select masked_select where.default
        """,
    "pooling": "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d upsample_bilinear2d",
    "scan-sort": "cumsum sort topk cumprod",
    "loss": "nll_loss_forward mse_loss binary_cross_entropy_with_logits _ctc_loss",
    "linalg-fft": "linalg_cholesky_ex _linalg_svd _fft_r2c linalg_lu",
    "recurrent": "lstm.input gru.input _cudnn_rnn mkldnn_rnn_layer _thnn_fused_lstm_cell",
    "random": "native_dropout bernoulli rand normal_ randperm multinomial rrelu uniform_ dropout",
    "effectful": """
        _assert_async.msg _print _fused_adamw_ record_stream resize_ set_.source_Tensor
        sym_constrain_range _assert_scalar
        """,
    "metadata": "sym_size.int sym_numel is_pinned _local_scalar_dense item equal",
    "quantised": "quantize_per_tensor fake_quantize_per_channel_affine_cachemask",
    "backward": """
        convolution_backward threshold_backward native_layer_norm_backward embedding_dense_backward
        _scaled_dot_product_flash_attention_for_cpu_backward _softmax_backward_data
        """,
}


def aten_op(name: str) -> OpOverload:
    """The overload ``base.overload`` of aten; without an overload the default or first one."""
    base, _, overload = name.partition(".")
    packet = getattr(aten, base)
    found = getattr(packet, overload or packet.overloads()[0])
    assert isinstance(found, OpOverload)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [(name, value) for value, names in WELL_KNOWN.items() for name in names.split()],
)
def test_well_known_ops(name: str, expected: str) -> None:
    assert classify(aten_op(name)) == expected


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (operator.getitem, "multi-output-access"),
        (operator.mul, "metadata"),
        (math.floor, "metadata"),
        (torch.sym_max, "metadata"),
        (torch._check, "effectful"),
        (torch.nn.functional.relu, "unclassified"),
        (torch.ops.higher_order.cond, "control"),
        (torch.ops.higher_order.with_effects, "effectful"),
        (torch.ops.higher_order.tag_activation_checkpoint, "control"),
        (torch.ops.higher_order.run_and_save_rng_state, "random"),
        (torch.ops.higher_order.auto_functionalized, "unclassified"),
        (torch.ops.higher_order.flex_attention, "attention"),
        (torch.ops._c10d_functional.all_reduce.default, "collective"),
        (torch.ops._c10d_functional.wait_tensor.default, "collective"),
        (prims.convert_element_type.default, "cast"),
        (prims.add.default, "pointwise"),
        (aten._foreach_add_.List, "pointwise"),
        (torch.ops.quantized.add.default, "quantised"),
        (torch.ops.quantized.linear.default, "matmul"),
        (torch.ops.quantized.linear_prepack.default, "copy"),
    ],
    ids=_shown,
)
def test_other_kinds_of_op(op: ops.Op, expected: str) -> None:
    assert classify(op) == expected


@pytest.mark.parametrize("thing", ["aten.mm.default", aten.mm, 3], ids=_shown)
def test_what_is_no_op_is_refused(thing: Any) -> None:
    with pytest.raises(ops.NotAnOpError, match="cannot classify"):
        classify(thing)


def test_names() -> None:
    assert op_name(aten.mm.default) == "aten.mm.default"
    assert op_name(aten.add.Tensor) == "aten.add.Tensor"
    assert op_name(torch.ops.higher_order.cond) == "higher_order.cond"
    assert op_name(operator.getitem) == "operator.getitem"
    assert op_name(torch.sym_max) == "torch.sym_max"


def test_expensive_classes() -> None:
    assert is_expensive(classify(aten.bmm.default))
    assert is_expensive(classify(aten.convolution.default))
    assert not is_expensive(classify(aten.gelu.default))
    assert not is_expensive(classify(aten.view.default))
    assert {cls.value for cls in OpClass if is_expensive(cls)} == {
        *("matmul", "convolution", "attention", "recurrent", "linalg-fft"),
        *("backward", "control", "unclassified"),
    }


# -- custom ops ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("opaque", "unclassified"),
        ("mm", "unclassified"),  # a custom op's name says nothing
        ("scaled", "pointwise"),
        ("scaled_", "pointwise"),
        ("total", "reduction"),
        ("noisy", "unclassified"),
        ("part", "view"),
        ("log_into", "effectful"),
    ],
)
def test_custom_ops(name: str, expected: str, library: torch.library.Library) -> None:
    assert classify(getattr(torch.ops.ckpt_pass_test_ops, name).default) == expected


def test_custom_ops_that_draw_or_must_not_repeat(library: torch.library.Library) -> None:
    mine = torch.ops.ckpt_pass_test_ops
    assert draws_random(mine.noisy.default, (None,))
    assert not draws_random(mine.noisy_attention.default, (None,))
    assert draws_random(mine.noisy_attention.default, (None,), {"dropout_p": 0.1})
    assert never_recompute(mine.log_into.default)
    assert never_recompute(mine.scaled_.default)
    assert never_recompute(mine.shape_of_data.default)
    assert not never_recompute(mine.opaque.default)


# -- functional twins ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "twin"),
    [
        (aten.add_.Tensor, aten.add.Tensor),
        (aten.add.out, aten.add.Tensor),
        (aten.mm.out, aten.mm.default),
        (aten.sum.IntList_out, aten.sum.dim_IntList),
        (aten.relu_.default, aten.relu.default),
        (aten.copy_.default, aten.copy.default),
        (aten.normal_.default, aten.normal_functional.default),
        (aten.bernoulli_.float, aten.bernoulli.p),
        (aten.empty.out, aten.empty.memory_format),
        (aten._unsafe_view.default, aten.view.default),
        (aten._unsafe_view.out, aten.view.default),
        (aten._native_batch_norm_legit.default, aten._native_batch_norm_legit_functional.default),
        (aten.rrelu_with_noise.default, aten.rrelu_with_noise_functional.default),
        (aten.__iand__.Tensor, getattr(aten, "__and__").Tensor),  # noqa: B009 (name mangling)
        (aten.index_put_.default, aten.index_put.default),
        (aten._foreach_add_.Scalar, aten._foreach_add.Scalar),
        (
            torch.ops._c10d_functional.all_reduce_.default,
            torch.ops._c10d_functional.all_reduce.default,
        ),
        (aten.mm.default, aten.mm.default),
        (aten.reshape.default, aten.reshape.default),
        (aten.fill_diagonal_.default, aten.fill_diagonal_.default),
        (operator.mul, operator.mul),
        (torch.ops.higher_order.cond, torch.ops.higher_order.cond),
    ],
    ids=_shown,
)
def test_functional_twin(op: ops.Op, twin: ops.Op) -> None:
    assert functional_twin(op) is twin


# -- ops of other libraries ----------------------------------------------------------------------


def foreign(name: str) -> OpOverload:
    """An op of ``STANDS_FOR``, once its library is imported."""
    namespace, base, overload = name.split(".")
    importlib.import_module({"transformers": "transformers.integrations.moe"}[namespace])
    found = getattr(packet_of(namespace, base), overload)
    assert isinstance(found, OpOverload)
    return found


@pytest.mark.parametrize("name", tables.STANDS_FOR)
def test_ops_that_stand_for_one_of_atens(name: str) -> None:
    op = foreign(name)
    twin = functional_twin(op)
    assert isinstance(twin, OpOverload)
    assert op_name(twin) == tables.STANDS_FOR[name]
    assert explain_class(op) == explain_class(twin)
    assert not never_recompute(op) and not draws_random(op)

    own, atens = ([str(arg.type) for arg in o._schema.arguments] for o in (op, twin))
    assert len(own) <= len(atens)
    for mine, its in zip(own, atens, strict=False):
        assert mine in (its, its.removeprefix("Optional[").removesuffix("]"))


def test_a_rule_knows_such_an_op_by_either_name() -> None:
    for name, twin in tables.STANDS_FOR.items():
        op = foreign(name)
        packet = name.removesuffix(".default")
        for given in (op, op.overloadpacket, name, packet):
            assert ckpt_pass.save(op=given) == ckpt_pass.save(op=twin), given


GROUPS, ROWS, INNER, COLUMNS = 4, 32, 16, 24
Matrices = Iterable[tuple[torch.Tensor, torch.Tensor]]


@pytest.mark.parametrize(
    ("left", "right", "ends_at", "pairs"),
    [
        (
            (ROWS, INNER),
            (GROUPS, INNER, COLUMNS),
            ROWS,
            lambda x, y: zip(x.chunk(GROUPS), y, strict=True),
        ),
        (
            (GROUPS, ROWS, INNER),
            (INNER, COLUMNS),
            COLUMNS,
            lambda x, y: zip(x, y.chunk(GROUPS, dim=1), strict=True),
        ),
        (
            (ROWS, INNER),
            (INNER, COLUMNS),
            INNER,
            lambda x, y: zip(x.chunk(GROUPS, dim=1), y.chunk(GROUPS), strict=True),
        ),
        (
            (GROUPS, ROWS, INNER),
            (GROUPS, INNER, COLUMNS),
            None,
            lambda x, y: zip(x, y, strict=True),
        ),
    ],
    ids=["groups of rows", "groups of columns", "groups of the inner dimension", "batch"],
)
def test_flops_of_a_grouped_matmul_are_those_of_its_groups(
    left: tuple[int, ...],
    right: tuple[int, ...],
    ends_at: int | None,
    pairs: Callable[[torch.Tensor, torch.Tensor], Matrices],
) -> None:
    x, y = torch.randn(left), torch.randn(right)
    ends = None
    if ends_at is not None:
        ends = torch.arange(1, GROUPS + 1, dtype=torch.int32) * (ends_at // GROUPS)
    with FlopCounter() as grouped:
        aten._grouped_mm.default(x, y, ends)
    with FlopCounter() as single:
        for a, b in pairs(x, y):
            torch.mm(a, b)
    assert grouped.flops == single.flops > 0


def test_a_step_through_the_fallback_has_the_flops_of_atens() -> None:
    x = torch.randn(ROWS, INNER, requires_grad=True)
    weight = torch.randn(GROUPS, INNER, COLUMNS, requires_grad=True)
    ends = torch.tensor([5, 5, 20, ROWS], dtype=torch.int32)
    for op in (aten._grouped_mm.default, foreign("transformers.grouped_mm_fallback.default")):
        with FlopCounter() as counter:
            op(x, weight, ends).square().sum().backward()
        assert counter.flops == 3 * 2 * ROWS * INNER * COLUMNS, op


# -- random numbers ------------------------------------------------------------------------------

Q = torch.ones(1, 2, 4, 8)
X = torch.ones(3, 4)


def lstm_args(layers: int, dropout: float, train: bool) -> tuple[Any, ...]:
    cell = torch.nn.LSTM(4, 4, layers)
    state = torch.zeros(layers, 1, 4)
    weights = [p.detach() for p in cell.parameters()]
    return X[:, None], (state, state), weights, True, layers, dropout, train, False, False


CPU_FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
MATH = aten._scaled_dot_product_attention_math.default

# Calls that run on a CPU: what is said of them is compared with what the generator does.
DRAWS: list[tuple[OpOverload, tuple[Any, ...], dict[str, Any], bool]] = [
    (CPU_FLASH, (Q, Q, Q), {}, False),
    (CPU_FLASH, (Q, Q, Q, 0.0, True), {}, False),
    (MATH, (Q, Q, Q), {"dropout_p": 0.5}, True),
    (MATH, (Q, Q, Q, None, 0.5), {}, True),
    (MATH, (Q, Q, Q), {}, False),
    (aten._fused_sdp_choice.default, (Q, Q, Q), {}, False),
    (aten.native_dropout.default, (X, 0.5, True), {}, True),
    (aten.native_dropout.default, (X, 0.5, None), {}, True),
    (aten.native_dropout.default, (X, 0.5, False), {}, False),
    (aten.native_dropout.default, (X, 0.0, True), {}, True),
    (aten.dropout.default, (X, 0.5, True), {}, True),
    (aten.dropout.default, (X, 0.0, True), {}, False),
    (aten.dropout.default, (X, 0.5, False), {}, False),
    (aten.dropout_.default, (X.clone(), 0.0, True), {}, False),
    (aten.alpha_dropout.default, (X, 0.0, True), {}, False),
    (aten.feature_dropout.default, (Q, 0.5, True), {}, True),
    (aten.bernoulli.default, (X * 0.5,), {}, True),
    (aten.bernoulli_.float, (X.clone(), 0.5), {}, True),
    (aten.rand.default, ((2,),), {}, True),
    (aten.randn_like.default, (X,), {}, True),
    (aten.normal_.default, (X.clone(),), {}, True),
    (aten.uniform_.default, (X.clone(),), {}, True),
    (aten.randperm.default, (5,), {}, True),
    (aten.multinomial.default, (X, 1), {}, True),
    (aten.rrelu_with_noise.default, (X, X.clone(), 0.1, 0.3, False), {}, False),
    (aten.rrelu_with_noise.default, (-X, X.clone(), 0.1, 0.3, True), {}, True),
    (aten.lstm.input, lstm_args(2, 0.5, True), {}, True),
    (aten.lstm.input, lstm_args(1, 0.5, True), {}, False),
    (aten.lstm.input, lstm_args(2, 0.5, False), {}, False),
    (aten.lstm.input, lstm_args(2, 0.0, True), {}, False),
    (aten.mm.default, (X, X.t()), {}, False),
    (aten.cumsum.default, (X, 0), {}, False),
]


@pytest.mark.parametrize(("op", "args", "kwargs", "expected"), DRAWS, ids=_shown)
def test_draws_random_says_what_the_generator_does(
    op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], expected: bool
) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    op(*args, **kwargs)
    assert (not torch.equal(before, torch.get_rng_state())) is expected
    assert draws_random(op, args, kwargs) is expected


def test_draws_random_where_no_cpu_call_can_show_it() -> None:
    flash = aten._scaled_dot_product_flash_attention.default
    assert not draws_random(flash, (Q, Q, Q, 0.0))
    assert draws_random(flash, (Q, Q, Q, 0.1))
    assert draws_random(flash, (Q, Q, Q), {"dropout_p": 0.1})
    assert not draws_random(aten._scaled_dot_product_efficient_attention.default, (Q, Q, Q, None))
    assert not draws_random(aten._scaled_dot_product_efficient_attention_backward.default)
    assert draws_random(aten._fused_dropout.default, (X, 0.0))  # its p is the share kept
    assert not draws_random(torch.ops.rngprims.philox_rand.default)  # seed and offset are given
    assert draws_random(torch.ops.higher_order.run_and_save_rng_state)
    assert not draws_random(torch.ops.higher_order.run_with_rng_state)
    assert not draws_random(operator.mul, (2, 3))


def test_draws_random_with_fx_arguments() -> None:
    graph = torch.fx.Graph()
    x, p = graph.placeholder("x"), graph.placeholder("p")
    assert not draws_random(aten.native_dropout.default, (x, 0.5, False))
    assert draws_random(aten.native_dropout.default, (x, p, True))
    assert draws_random(CPU_FLASH, (x, x, x, p))
    assert not draws_random(CPU_FLASH, (x, x, x), {"attn_mask": x})


def branch(op: OpOverload, *flags: Any) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    graph.output(graph.call_function(op, (graph.placeholder("x"), *flags)))
    return torch.fx.GraphModule({}, graph)


def test_a_higher_order_op_draws_if_its_graphs_do() -> None:
    cond: HigherOrderOperator = torch.ops.higher_order.cond
    still, noisy = branch(aten.relu.default), branch(aten.native_dropout.default, 0.5, True)
    assert not draws_random(cond, (True, still, still, [X]))
    assert draws_random(cond, (True, still, noisy, [X]))
    root = torch.nn.Module()
    root.still, root.noisy = still, noisy
    graph = torch.fx.Graph(owning_module=root)  # type: ignore[arg-type]
    x = graph.placeholder("x")
    nodes = graph.get_attr("still"), graph.get_attr("noisy")
    assert draws_random(cond, (x, *nodes, (x,)))
    assert not draws_random(cond, (x, nodes[0], nodes[0], (x,)))


# -- what may run twice --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (aten.mm.default, False),
        (aten.native_dropout.default, False),
        (aten.view.default, False),
        (aten.add_.Tensor, True),
        (aten.add.out, True),
        (aten.copy_.default, True),
        (aten.nonzero.default, True),
        (aten._local_scalar_dense.default, True),
        (aten.masked_select.default, True),
        (aten._assert_async.msg, True),
        (torch.ops._c10d_functional.all_gather_into_tensor.default, True),
        (torch.ops._c10d_functional.wait_tensor.default, True),
        (torch.ops.higher_order.with_effects, True),
        (aten._native_batch_norm_legit.default, True),
        (aten._native_batch_norm_legit_functional.default, False),
        (aten.native_batch_norm.default, True),
        (operator.getitem, False),
        (aten.sym_size.int, False),
    ],
    ids=_shown,
)
def test_never_recompute(op: ops.Op, expected: bool) -> None:
    assert never_recompute(op) is expected


def test_arguments_clear_what_is_safe_to_repeat() -> None:
    index, mask = torch.tensor([0, 2]), torch.tensor([True, False, True])
    assert never_recompute(aten.index.Tensor)
    assert not never_recompute(aten.index.Tensor, (X, [index]))
    assert not never_recompute(aten.index.Tensor, (X, [None, index]))
    assert never_recompute(aten.index.Tensor, (X, [mask]))
    node = torch.fx.Graph().placeholder("i")
    assert never_recompute(aten.index.Tensor, (X, [node]))
    node.meta["val"] = index
    assert not never_recompute(aten.index.Tensor, (X, [node]))
    mean = torch.zeros(4)
    norm = aten.native_batch_norm.default
    assert never_recompute(norm, (X, None, None, mean, mean, True, 0.1, 1e-5))
    assert not never_recompute(norm, (X, None, None, mean, mean, False, 0.1, 1e-5))
    assert not never_recompute(norm, (X, None, None, None, None, True, 0.1, 1e-5))


def test_the_hidden_mutation_is_real() -> None:
    mean, var = torch.zeros(4), torch.ones(4)
    op = aten.native_batch_norm.default
    assert not op._schema.is_mutable
    op(X, None, None, mean, var, True, 0.5, 1e-5)
    assert torch.equal(mean, torch.full((4,), 0.5))
