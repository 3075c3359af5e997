"""The layer table is a fact: imports go only down it, and torch's private side has one door."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "ckpt_pass"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "version", "_torch", "_torch_autograd", "_torch_compile", "_torch_ops"}),
    frozenset({"planner", "ops", "_op_tables", "flops", "allocations"}),
    frozenset(
        {
            "budget",
            "goal",
            "sites",
            "module_stack",
            "shapes",
            "policy",
            "opinion",
            "policies",
            "graph",
        }
    ),
    frozenset({"eager"}),
    frozenset(
        {"plan", "plan_text", "plan_audit", "plan_plot", "plan_regions", "plan_parts"}
        | {"plan_read", "plan_write", "plan_signature"}
        | {"plan_expressions", "plan_schema", "timeline", "drawing"}
    ),
    frozenset({"compile", "eager_planning", "eager_prediction", "plan_diff"}),
    frozenset({"modules", "measure", "compare", "timing"}),
    frozenset(
        {"explain", "testing", "factory", "report", "fit", "sweep", "sweep_report"}
        | {"verify", "distributed", "lightning", "_demo_model", "cli", "__main__"}
        | {"memory_profiler", "strategies", "strategy_table", "strategy_plots", "html_report"}
        | {"cli_parts", "cli_compare", "demo", "demo_variants", "demo_report"}
    ),
)
LAYER_OF = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
DOORS = frozenset({"_torch", "_torch_autograd", "_torch_compile", "_torch_ops"})
# Modules whose use counts even without an import statement: `torch._dynamo.reset()`.
PRIVATE = frozenset(
    {
        "torch._functorch",
        "torch._inductor",
        "torch._dynamo",
        "torch._subclasses",
        "torch._C",
        "torch._ops",
        "torch._higher_order_ops",
    }
)


def dotted(node: ast.expr) -> str:
    """Return ``a.b.c`` for such an expression, otherwise an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of all imports, however deep; relative ones made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parts if node.level else []), *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return what is wrong with the imports of ``module`` (``ckpt_pass.room...``)."""
    room = module.split(".")[1]
    if room not in LAYER_OF:
        return [f"{module}: the room {room!r} has no row in the layer table"]
    tree = ast.parse(source)
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for line, name in imported(tree, package):
        where = f"{module}:{line}: {name}"
        parts = name.split(".")
        if parts[0] == PACKAGE:
            found += [f"{where}: {why}" for why in _wrong_inside(room, parts)]
        elif parts[0] in ("torch", "functorch") and room == "planner":
            found.append(f"{where}: planner/ is free of torch")
        elif parts[0] == "torch" and _is_private(parts) and room not in DOORS:
            found.append(f"{where}: torch's private modules go through _torch.py")
    if room not in DOORS:
        names = ((n.lineno, dotted(n)) for n in ast.walk(tree) if isinstance(n, ast.Attribute))
        found += [f"{module}:{at}: {n}: private to torch" for at, n in names if n in PRIVATE]
    return found


def _is_private(parts: list[str]) -> bool:
    return len(parts) > 1 and parts[1].startswith("_") and not parts[1].startswith("__")


def _wrong_inside(room: str, parts: list[str]) -> Iterator[str]:
    target = parts[1] if len(parts) > 1 else ""
    if target == room or room == "__init__":
        return
    if target not in LAYER_OF:  # the index of the public API, which imports everything
        if LAYER_OF[room] < len(LAYERS) - 1:
            yield "no row in the layer table, and only the top layer may import from __init__.py"
    elif LAYER_OF[target] > LAYER_OF[room]:
        yield f"imports go only down: {room} is layer {LAYER_OF[room]}, {target} {LAYER_OF[target]}"
    elif room == "planner" and target != "errors":
        yield "planner/ imports no other room but errors"


def modules() -> list[tuple[str, Path]]:
    """Return (dotted name, path) of every module but the package's own ``__init__``."""
    found = []
    for path in sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"):
        name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        found.append((name.removesuffix(".__init__"), path))
    return found


def test_every_module_keeps_to_its_layer() -> None:
    found = modules()
    assert found
    wrong = [
        line
        for name, path in found
        for line in violations(path.read_text(), name, is_package=path.name == "__init__.py")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ckpt_pass.plan", "from ckpt_pass.compile.backend import x"),
        ("ckpt_pass.plan", "from ckpt_pass import compile"),
        ("ckpt_pass.plan", "from ckpt_pass import ckpt_backend"),
        ("ckpt_pass.plan", "from . import cli"),
        ("ckpt_pass.graph.joint", "from ..plan import Plan"),
        ("ckpt_pass.graph.joint", "def f():\n    import ckpt_pass.cli"),
        ("ckpt_pass.planner.problem", "import torch"),
        ("ckpt_pass.planner.problem", "from torch import nn"),
        ("ckpt_pass.planner.problem", "from ..ops import table"),
        ("ckpt_pass.planner.problem", "from ckpt_pass import _torch"),
        ("ckpt_pass.measure", "import torch._dynamo"),
        ("ckpt_pass.measure", "from torch import _inductor"),
        ("ckpt_pass.measure", "from torch._subclasses.fake_tensor import FakeTensorMode"),
        ("ckpt_pass.measure", "import torch\ntorch._functorch.config.functionalize_rng_ops"),
        ("ckpt_pass.newcomer", "x = 1"),
    ],
)
def test_the_check_sees(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ckpt_pass.plan", "import torch\nfrom ckpt_pass.graph.joint import JointGraph"),
        ("ckpt_pass.graph.joint", "from .cost import bytes_of\nfrom .. import _torch"),
        ("ckpt_pass.planner.problem", "from ckpt_pass.errors import CkptPassError"),
        ("ckpt_pass.planner.solver", "from .problem import Problem\nimport numpy as np"),
        ("ckpt_pass._torch", "import torch._dynamo\ntorch._C._len_torch_dispatch_stack()"),
        ("ckpt_pass.cli", "from ckpt_pass import plan, demo\nfrom ckpt_pass.report import table"),
        ("ckpt_pass.measure", "from torch.utils._python_dispatch import TorchDispatchMode"),
    ],
)
def test_the_check_lets_pass(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_a_subpackage_init_belongs_to_its_room() -> None:
    source = "from .joint import JointGraph as JointGraph"
    assert violations(source, "ckpt_pass.graph", is_package=True) == []
    assert violations("from ..cli import main", "ckpt_pass.graph", is_package=True)
