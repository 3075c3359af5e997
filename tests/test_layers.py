"""The table of rooms is a fact: imports go only down it, in no circle, and torch has one door.

The table is the one of ``docs/design.md``.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import networkx as nx
import pytest

import ckpt_pass

PACKAGE = "ckpt_pass"
PROJECT = Path(__file__).resolve().parent.parent
ROOT = PROJECT / PACKAGE
_ROW = re.compile(r"^\| (\d+) \| ([^|]*) \|", re.MULTILINE)


def table_of(page: str) -> dict[str, int]:
    """The layer of each room, from the table of a page; a room in a room is ``outer/inner``."""
    rows = _ROW.findall(page)
    assert [int(number) for number, _ in rows] == list(range(len(rows)))
    rooms = [(room, int(n)) for n, names in rows for room in re.findall(r"`([\w/]+)`", names)]
    assert len(dict(rooms)) == len(rooms), "a room stands in two rows"
    return dict(rooms)


LAYER_OF = table_of((PROJECT / "docs" / "design.md").read_text())
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


def room_of(module: str) -> str:
    """The room of a module (``ckpt_pass.room...``): the longest of its parts in the table."""
    parts = module.split(".")[1:]
    names = ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((name for name in names if name in LAYER_OF), parts[0] if parts else "")


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
    room = room_of(module)
    if room not in LAYER_OF:
        return [f"{module}: the room {room!r} has no row in the layer table"]
    tree = ast.parse(source)
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for line, name in imported(tree, package):
        where = f"{module}:{line}: {name}"
        parts = name.split(".")
        if parts[0] == PACKAGE:
            found += [f"{where}: {why}" for why in _wrong_inside(room, name)]
        elif parts[0] in ("torch", "functorch") and room == "planner":
            found.append(f"{where}: planner/ is free of torch")
        elif parts[0] == "torch" and _is_private(parts) and room != "_torch":
            found.append(f"{where}: torch's private modules go through _torch/")
    if room != "_torch":
        names = ((n.lineno, dotted(n)) for n in ast.walk(tree) if isinstance(n, ast.Attribute))
        found += [f"{module}:{at}: {n}: private to torch" for at, n in names if n in PRIVATE]
    return found


def _is_private(parts: list[str]) -> bool:
    return len(parts) > 1 and parts[1].startswith("_") and not parts[1].startswith("__")


def _wrong_inside(room: str, name: str) -> Iterator[str]:
    target = room_of(name)
    if target == room:
        return
    if target not in LAYER_OF:  # the index of the public API, which imports everything
        yield "no row in the layer table; __init__.py is for users, and no module imports from it"
    elif LAYER_OF[target] >= LAYER_OF[room]:
        yield f"imports go only down: {room} is layer {LAYER_OF[room]}, {target} {LAYER_OF[target]}"
    elif room == "planner" and target != "_errors":
        yield "planner/ imports no other room but _errors"


def modules() -> list[tuple[str, Path]]:
    """Return (dotted name, path) of every module but the package's own ``__init__``."""
    found = []
    for path in sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"):
        name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        found.append((name.removesuffix(".__init__"), path))
    return found


def sources() -> dict[str, str]:
    """The source of each module, by name."""
    return {name: path.read_text() for name, path in modules()}


def test_every_module_keeps_to_its_layer() -> None:
    found = modules()
    assert found
    wrong = [
        line
        for name, path in found
        for line in violations(path.read_text(), name, is_package=path.name == "__init__.py")
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_of_the_table_is_there() -> None:
    assert set(LAYER_OF) == {room_of(name) for name, _ in modules()}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ckpt_pass.plans.value", "from ckpt_pass.compile.backend import x"),
        ("ckpt_pass.plans.value", "from ckpt_pass import compile"),
        ("ckpt_pass.plans.value", "from ckpt_pass import ckpt_backend"),
        ("ckpt_pass.plans.value", "from .. import cli"),
        ("ckpt_pass.graph.joint", "from ..plans import Plan"),
        ("ckpt_pass.graph.joint", "def f():\n    import ckpt_pass.cli"),
        ("ckpt_pass.graph.joint", "from ckpt_pass.regions import frame"),
        ("ckpt_pass.modules.layers.find", "from ckpt_pass.modules.choice import Choice"),
        ("ckpt_pass.planner.problem", "import torch"),
        ("ckpt_pass.planner.problem", "from torch import nn"),
        ("ckpt_pass.planner.problem", "from ..ops import table"),
        ("ckpt_pass.planner.problem", "from ckpt_pass import _torch"),
        ("ckpt_pass.measure.step", "import torch._dynamo"),
        ("ckpt_pass.measure.step", "from torch import _inductor"),
        ("ckpt_pass.measure.step", "from torch._subclasses.fake_tensor import FakeTensorMode"),
        ("ckpt_pass.measure.step", "import torch\ntorch._functorch.config.functionalize_rng_ops"),
        ("ckpt_pass.newcomer", "x = 1"),
    ],
)
def test_the_check_sees(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ckpt_pass.plans.value", "import torch\nfrom ckpt_pass.graph.joint import JointGraph"),
        ("ckpt_pass.graph.joint", "from .cost import bytes_of\nfrom .. import _torch"),
        ("ckpt_pass.planner.problem", "from ckpt_pass._errors import CkptPassError"),
        ("ckpt_pass.planner.solver", "from .problem import Problem\nimport numpy as np"),
        ("ckpt_pass._torch.modes", "import torch._dynamo\ntorch._C._len_torch_dispatch_stack()"),
        (
            "ckpt_pass.cli.commands",
            "from ckpt_pass import demo, report",
        ),
        ("ckpt_pass.measure.step", "from torch.utils._python_dispatch import TorchDispatchMode"),
        ("ckpt_pass.modules.choice", "from ckpt_pass.modules.layers.find import Layers"),
    ],
)
def test_the_check_lets_pass(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_a_subpackage_init_belongs_to_its_room() -> None:
    source = "from .joint import JointGraph as JointGraph"
    assert violations(source, "ckpt_pass.graph", is_package=True) == []
    assert violations("from ..cli import main", "ckpt_pass.graph", is_package=True)


# --- circles --------------------------------------------------------------------------------


def import_graph(code: Mapping[str, str]) -> nx.DiGraph[str]:
    """Which module imports which, of those given; imports for annotations are imports, too."""
    found: nx.DiGraph[str] = nx.DiGraph()
    packages = {name.rpartition(".")[0] for name in code}
    for module, source in code.items():
        package = module if module in packages else module.rpartition(".")[0]
        for _, name in imported(ast.parse(source), package):
            target = name if name in code else name.rpartition(".")[0]
            if target in code and target != module:
                found.add_edge(module, target)
    return found


def circles(graph: nx.DiGraph[str], name_of: Callable[[str], str]) -> list[list[str]]:
    """Groups of modules, or of what ``name_of`` makes of them, that import each other."""
    found: nx.DiGraph[str] = nx.DiGraph()
    pairs = ((name_of(one), name_of(other)) for one, other in graph.edges)
    found.add_edges_from((one, other) for one, other in pairs if one != other)
    return [sorted(group) for group in nx.strongly_connected_components(found) if len(group) > 1]


def test_nothing_imports_in_a_circle() -> None:
    graph = import_graph(sources())
    assert graph.number_of_edges() > len(modules())
    assert circles(graph, str) == []
    assert circles(graph, room_of) == []


def test_a_circle_is_seen() -> None:
    code = sources()
    code["ckpt_pass.plans.parts"] += "\nif TYPE_CHECKING:\n    from ckpt_pass.plans import value\n"
    (group,) = circles(import_graph(code), str)
    assert {"ckpt_pass.plans.parts", "ckpt_pass.plans.value"} <= set(group)
    code = sources()
    code["ckpt_pass.ops.tables"] += "\nfrom ckpt_pass.policy.sites import CallSite\n"
    assert circles(import_graph(code), room_of) == [["ops", "policy"]]


# --- names ----------------------------------------------------------------------------------


def exported() -> frozenset[str]:
    """The functions and classes that ``ckpt_pass`` exports."""
    return frozenset(
        name
        for name, value in vars(ckpt_pass).items()
        if inspect.isclass(value) or inspect.isroutine(value)
    )


def shared_names(names: Iterable[str], taken: frozenset[str]) -> list[str]:
    """The modules, by dotted name, that are called like something exported."""
    return [name for name in names if taken.intersection(name.split(".")[1:])]


def test_no_module_is_called_like_what_is_exported() -> None:
    taken = exported()
    assert {"plan", "fit", "verify", "Plan", "checkpoint"} <= taken
    assert shared_names((name for name, _ in modules()), taken) == []


def test_such_a_name_is_seen() -> None:
    odd = ["ckpt_pass.plan", "ckpt_pass.tools.verify", "ckpt_pass.plans.value"]
    assert shared_names(odd, exported()) == odd[:2]
