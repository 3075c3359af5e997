"""The door to inductor's generated code: caught before its kernels are compiled, and run dry.

Inductor writes a Python module for each half of a step, the *wrapper*: it allocates, frees and
reuses buffers, calls kernels of libraries, and launches those that inductor generates. Compiling
these takes most of a compilation's time, and happens when the module is loaded
(``GraphLowering._compile_to_module_lines``).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

#: Names of the wrapper's header that are replaced when it is run dry.
_REPLACED = re.compile(r"empty_strided\w*|assert_\w+|reinterpret_tensor|alloc_from_pool")
#: What generated modules say of what the backward gets besides saved values.
_NOT_SAVED = ("tangents", "bwd_")


@dataclass
class GeneratedHalf:
    """One half of a step as inductor generated it.

    Attributes:
        text: the wrapper's source.
        constants: what the module is given by name.
        language: what it is written in; only Python can be run dry.
        inputs: what the graph was traced with: fake or real tensors, sizes, other objects.
        input_names: their names.
        is_backward: which half it is.
        compile_kernels: compiles the kernels, after which the half can run; once.
    """

    text: str
    language: str
    constants: Mapping[str, Any]
    inputs: Sequence[Any]
    input_names: Sequence[str]
    is_backward: bool
    compile_kernels: Callable[[], None] = field(repr=False)

    @property
    def given(self) -> int:
        """How many inputs of a backward its forward saved; they come first."""
        saved = (n for n, name in enumerate(self.input_names) if name.startswith(_NOT_SAVED))
        return next(saved, len(self.input_names))

    def dry(self, constants: Mapping[str, Any]) -> Callable[[list[Any]], Sequence[Any]]:
        """The wrapper's function, with generated kernels that do nothing.

        It runs under a fake tensor mode: allocations are plain calls of ``empty_strided`` that a
        dispatch mode sees, with the device of the real ones.

        Args:
            constants: stand for the module's own.

        Raises:
            ValueError: the wrapper is not Python.
        """
        if self.language != "Python":
            raise ValueError(f"its wrapper is {self.language}, by an option of inductor's")
        tree = _WithoutAsserts().visit(ast.parse(self.text))
        tree.body = [kept for node in tree.body if (kept := _without_replaced(node)) is not None]
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        namespace: dict[str, Any] = {
            "__name__": "ckpt_pass_dry_run",
            "AsyncCompile": _NoCompiler,
            "reinterpret_tensor": _reinterpret,
            "alloc_from_pool": _from_pool,
            "empty_strided": torch.empty_strided,
            **{name: _nothing for name in names if name.startswith("assert_")},
            **{name: _allocator(name) for name in names if name.startswith("empty_strided_")},
            **constants,
        }
        exec(compile(tree, "<wrapper>", "exec"), namespace)
        call: Callable[[list[Any]], Sequence[Any]] = namespace["call"]
        return call


def catch_generated(
    graph: Any, patches: Mapping[str, Any], on_half: Callable[[GeneratedHalf], None]
) -> None:
    """Have a graph that is being lowered hand over its code instead of compiling its kernels.

    Only this one graph is changed. What inductor gets in the place of the loaded module stands for
    it, and runs once :attr:`GeneratedHalf.compile_kernels` has been called.

    Args:
        graph: inductor's ``GraphLowering``.
        patches: inductor's configuration, with which the kernels are compiled later.
        on_half: told the code.
    """
    from torch._inductor import config
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.virtualized import V

    load = type(graph)._compile_to_module_lines

    def half(text: str, language: str, compile_kernels: Callable[[], None]) -> GeneratedHalf:
        return GeneratedHalf(
            text,
            language,
            {**graph.constants, **graph.torchbind_constants},
            tuple(graph.example_inputs or ()),
            tuple(graph.graph_input_names),
            bool(graph.is_backward),
            compile_kernels,
        )

    def caught(code: Any) -> _Module:
        key, path = PyCodeCache.write(code.value)
        # What inductor's caches are given, as the loading of the module would set it.
        graph.cache_key, graph.cache_path = key, path
        graph.cache_linemap = [(line, node.stack_trace) for line, node in code.line_map]
        module = _Module(path, has_runner=bool(re.search(r"^runner = ", code.value, re.MULTILINE)))
        debug = V.debug

        def compile_kernels() -> None:
            chosen = config.patch(dict(patches))
            with chosen, V.set_graph_handler(graph), V.set_debug_handler(debug):
                module.loaded_as(load(graph, code))

        del graph._compile_to_module_lines  # the class's own is back
        language = "C++" if graph.cpp_wrapper else "Python"
        on_half(half(code.value, language, compile_kernels))
        return module

    if getattr(graph, "fx_wrapper", False):
        on_half(half("", "a graph", _nothing))
    else:
        graph._compile_to_module_lines = caught


class _Runner:
    """Stands for a module's runner: what is to be applied to its parts is kept for it."""

    def __init__(self) -> None:
        self.partitions: list[Any] = []
        self.functions: list[Sequence[Any]] = []

    def recursively_apply_fns(self, fns: Sequence[Any]) -> None:
        self.functions.append(fns)


class _Module:
    """Stands for a generated module until that is loaded."""

    def __init__(self, path: str, has_runner: bool) -> None:
        self.__file__ = path
        self.runner = _Runner() if has_runner else None
        self._call: Callable[[list[Any]], Any] | None = None

    def loaded_as(self, module: Any) -> None:
        for functions in self.runner.functions if self.runner is not None else ():
            module.runner.recursively_apply_fns(functions)
        self._call = module.call

    def call(self, args: list[Any]) -> Any:
        assert self._call is not None, "the kernels of a plan that was not taken are not compiled"
        return self._call(args)


# --- what stands for the wrapper's header -------------------------------------------------------


class _WithoutAsserts(ast.NodeTransformer):
    """Assertions of values (``nan_asserts``) ask nothing; what they compute on tensors is there."""

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        match node.test:
            case ast.UnaryOp(operand=ast.Call(func=ast.Attribute(value=kept, attr="item"))):
                pass
            case kept:
                pass
        return ast.copy_location(ast.Expr(kept), node)


def _without_replaced(node: ast.stmt) -> ast.stmt | None:
    """A statement of the module without what is replaced; ``None`` where nothing is left."""
    if isinstance(node, ast.ImportFrom):
        names = [a for a in node.names if a.name not in ("AsyncCompile", "empty_strided")]
        return ast.copy_location(ast.ImportFrom(node.module, names, 0), node) if names else None
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return None if _REPLACED.fullmatch(node.targets[0].id) else node
    return node


class _NoKernel:
    """A kernel that does nothing, however it is launched."""

    def __call__(self, *args: object, **kwargs: object) -> None:
        return None

    def __getitem__(self, grid: object) -> _NoKernel:
        return self

    run = __call__


class _NoCompiler:
    """Stands for ``AsyncCompile``: whatever it is told to compile does nothing."""

    def __getattr__(self, language: str) -> Callable[..., _NoKernel]:
        return lambda *args, **kwargs: _NoKernel()

    def wait(self, scope: object) -> None:
        return None


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def _allocator(name: str) -> Callable[..., torch.Tensor]:
    device = name.removeprefix("empty_strided_").partition("_")[0]

    def allocate(
        size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, *rest: object
    ) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    return allocate


def _reinterpret(
    value: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int
) -> torch.Tensor:
    return value.as_strided(size, stride, value.storage_offset() + offset)


def _from_pool(
    pool: torch.Tensor,
    offset_bytes: int,
    dtype: torch.dtype,
    size: Sequence[int],
    stride: Sequence[int],
) -> torch.Tensor:
    values = pool.view(dtype)
    return values.as_strided(size, stride, values.storage_offset() + offset_bytes // dtype.itemsize)
