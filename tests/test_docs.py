"""The documentation runs: its Python blocks do, and print what stands below them."""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?P<page>[\w./-]+\.md)(?:#(?P<part>[\w-]+))?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: what the fence says, the text, and the line of the page it begins on."""

    info: str
    text: str
    line: int


@dataclass(frozen=True)
class Example:
    """A Python block and what it prints, if the page says."""

    code: Block
    output: Block | None


def blocks(page: str) -> list[Block]:
    return [
        Block(match["info"].strip(), match["body"], page.count("\n", 0, match.start()) + 1)
        for match in _FENCE.finditer(page)
    ]


def examples(page: str) -> Iterator[Example]:
    """The Python blocks of a page in order, each with the output block right after it."""
    found = blocks(page)
    for block, following in itertools.zip_longest(found, found[1:]):
        if block.info == "python":
            is_output = following is not None and following.info == "text output"
            yield Example(block, following if is_output else None)


WITH_CODE = [path for path in PAGES if list(examples(path.read_text()))]
#: Pages that take about a minute.
LONG = ("shapes.md", "whole-job.md")
EACH = [pytest.param(p, marks=[pytest.mark.slow] if p.name in LONG else []) for p in WITH_CODE]


def run(page: str, name: str) -> list[str]:
    """Execute a page's examples in one namespace; return what differs from what it says."""
    namespace: dict[str, Any] = {"__name__": f"docs.{name}"}
    wrong = []
    for example in examples(page):
        code = ast.parse(example.code.text)
        ast.increment_lineno(code, example.code.line)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(DOCS / name), "exec"), namespace)
        if example.output is not None and printed.getvalue() != example.output.text:
            wrong.append(f"{name}:{example.output.line} prints\n{printed.getvalue()}")
    return wrong


def test_most_pages_have_examples() -> None:
    assert {"start-here.md", "policies.md", "golden-tests.md"} <= {path.name for path in WITH_CODE}


@pytest.mark.parametrize("path", EACH, ids=lambda path: path.name)
def test_a_page_runs_and_prints_what_it_says(path: Path) -> None:
    wrong = run(path.read_text(), path.name)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_fences_are_of_a_known_kind(path: Path) -> None:
    known = {"python", "python no-run", "text output", ""}
    assert {block.info for block in blocks(path.read_text())} <= known


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in _LINK.finditer(path.read_text()):
        target = path.parent / link["page"]
        assert target.exists(), link.group()
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        parts = {heading.lower().replace(" ", "-") for heading in headings}
        assert link["part"] is None or link["part"] in parts, link.group()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_tests_that_are_named_are_there(path: Path) -> None:
    for name in re.findall(r"`(tests/[\w/]+\.py)", path.read_text()):
        assert (DOCS.parent / name).exists(), name


def test_the_check_sees_wrong_output() -> None:
    page = "```python\nx = 1\nprint(x)\n```\n\n```text output\n2\n```\n"
    assert run(page, "page.md") == ["page.md:6 prints\n1\n"]
    assert run(page.replace("2\n", "1\n"), "page.md") == []


def test_the_check_runs_all_blocks_in_one_namespace() -> None:
    page = "```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n"
    with pytest.raises(AssertionError):
        run(page, "page.md")
    skipped = page.replace("```python\nassert", "```python no-run\nassert")
    assert run(skipped, "page.md") == []
