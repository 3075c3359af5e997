"""A plan's page in a real Chromium: what it shows at any moment, and that it asks nobody."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ckpt_pass
from ckpt_pass.plans.contents import Contents
from ckpt_pass.plans.page_data import NO_CONTENTS
from tests.plans.test_page_data import FAST, NAME, Net, contents_of, planned, small

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
READY = "document.documentElement.dataset.ready === 'true'"
LISTED = 12
#: The page's words for what memory is there for.
WORDS = {
    "output": "outputs",
    "gradient": "gradients",
    "passing": "passing (forward)",
    "backward": "passing (backward)",
    "workspace": "workspaces",
    "random state": "random states",
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    where = next(filter(None, map(shutil.which, BROWSERS)), None)
    if where is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=where, args=list(FLAGS))
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages that are looked at."""
    folder = tmp_path_factory.mktemp("pages")
    plans = {
        "compiled": small(),
        "eager": small("eager"),
        "moved": moved(),
        "cut": planned(Net(0.0, cut=True), budget=0.8),
        "loaded": ckpt_pass.Plan.from_json(small().to_json()),
        "names": planned(policy=ckpt_pass.save(op="aten.addmm", label=NAME)),
    }
    return {name: plan.report(folder / f"{name}.html") for name, plan in plans.items()}


def moved() -> ckpt_pass.Plan:
    found: ckpt_pass.Plan = planned(Net(0.0), budget=0.6, offload=FAST)
    return found


class Shown:
    """A page that is open, and what it complained about or asked for."""

    def __init__(self, browser: Any, path: Path) -> None:
        self.faults: list[str] = []
        self.context = browser.new_context(viewport={"width": 1200, "height": 900}, offline=True)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.faults.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.faults.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self._requested(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function(READY)

    def _requested(self, url: str) -> None:
        if not url.startswith(("file:", "data:", "blob:")):
            self.faults.append(f"request: {url}")

    def rows(self, table: str) -> list[list[str]]:
        """The texts of a table's cells."""
        script = "(rows) => rows.map((row) => [...row.cells].map((cell) => cell.textContent))"
        found: list[list[str]] = self.page.eval_on_selector_all(f"#{table} tbody tr", script)
        return found

    def hover(self, place: int) -> None:
        """Point at the moment at which an op begins to run."""
        script = """(place) => {
            const plot = document.getElementById("memory-plot");
            const box = plot.querySelector(".nsewdrag").getBoundingClientRect();
            return [box.left + plot._fullLayout.xaxis.l2p(place), box.top + box.height / 2];
        }"""
        self.page.locator("#memory-plot").scroll_into_view_if_needed()
        x, y = self.page.evaluate(script, place)
        self.page.mouse.move(x - 3, y)
        self.page.mouse.move(x, y)
        self.page.wait_for_function(
            f"document.getElementById('moment-words').dataset.place === '{place}'", timeout=20_000
        )


@pytest.fixture(scope="module")
def opened() -> Iterator[dict[str, Shown]]:
    """Pages that are open; a page takes a second or two to load."""
    found: dict[str, Shown] = {}
    yield found
    for page in found.values():
        page.context.close()


@pytest.fixture
def show(browser: Any, pages: dict[str, Path], opened: dict[str, Shown]) -> Iterator[Any]:
    """Open a page; afterwards it has complained about nothing and asked for nothing."""

    def open_page(name: str) -> Shown:
        if name not in opened:
            opened[name] = Shown(browser, pages[name])
        return opened[name]

    yield open_page
    assert [fault for page in opened.values() for fault in page.faults] == []


def bytes_words(nbytes: int) -> str:
    """Bytes as the page writes them."""
    power = next(p for p in range(4, -1, -1) if nbytes >= 1024**p or p == 0)
    value = nbytes / 1024**power
    digits = 0 if power == 0 else 2 if value < 100 else 1
    return f"{value:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def expected_rows(found: Contents, place: int) -> list[list[str]]:
    """Bytes, layer, maker and fate of the largest values at a moment."""
    return [
        [
            bytes_words(life.nbytes),
            found.name(life).layer,
            found.name(life).words,
            WORDS.get(life.kind, life.kind),
        ]
        for life in found.at(place)[:LISTED]
    ]


@pytest.mark.parametrize("name", ["compiled", "eager", "moved"])
def test_hovering_shows_what_is_alive(show: Any, name: str) -> None:
    plan = {"compiled": small, "eager": lambda: small("eager"), "moved": moved}[name]()
    found, curve = contents_of(plan), plan.timeline
    page = show(name)
    border = curve.forward_length
    for place in (border // 2, border + (len(curve.bytes_at) - border) // 2, curve.peak_index):
        page.hover(place)
        words = page.page.inner_text("#moment-words")
        assert found.running(place).words in words
        assert words.startswith(bytes_words(curve.bytes_at[place]))
        assert ("forward" if place < border else "backward") in words.partition("(op ")[2]
        assert [row[:4] for row in page.rows("alive")][:LISTED] == expected_rows(found, place)
        others = len(found.at(place)) - LISTED
        if others > 0:
            assert page.rows("alive")[LISTED][2] == f"{others} others"


def test_by_layer_the_bytes_are_the_same(show: Any) -> None:
    page, found, place = show("compiled"), contents_of(small()), small().timeline.peak_index
    page.page.click("#to-peak")
    page.page.select_option("#grouping", "layer")
    sums: dict[str, int] = {}
    for life in found.at(place):
        layer = found.name(life).layer or "(no layer)"
        sums[layer] = sums.get(layer, 0) + life.nbytes
    shown = {row[1]: row[0] for row in page.rows("alive")}
    assert shown == {layer: bytes_words(nbytes) for layer, nbytes in sums.items()}
    page.page.select_option("#grouping", "value")


def test_the_slider_and_the_clock(show: Any) -> None:
    """Every moment is reached without a pointer, and along modelled time too."""
    page, curve = show("compiled"), small().timeline
    page.page.select_option("#axis", "time")
    page.page.focus("#place")
    page.page.keyboard.press("Home")
    assert page.page.inner_text("#moment-words").startswith(bytes_words(curve.bytes_at[0]))
    page.page.keyboard.press("ArrowRight")
    assert f"(op 2 of {len(curve.bytes_at)}, forward" in page.page.inner_text("#moment-words")
    page.page.click("#to-peak")
    assert "the peak" in page.page.inner_text("#moment-words")
    page.page.select_option("#axis", "op")


def test_decisions_filter_and_sort(show: Any) -> None:
    page, plan = show("compiled"), small()
    assert len(page.rows("decisions")) == len(plan.decisions)
    page.page.fill("#text", "layers.1 addmm")
    wanted = [d for d in plan.decisions if d.site.fqn.startswith("layers.1.")]
    products = sorted(str(d.site) for d in wanted if "addmm" in d.site.op)
    assert sorted(row[0] for row in page.rows("decisions")) == products != []
    page.page.fill("#text", "")
    page.page.select_option("#fate", label="recomputed")
    again = plan.with_fate("recomputed")
    assert len(page.rows("decisions")) == len(again) > 0
    page.page.select_option("#layer", label="layers.2")
    inside = [d for d in again if d.region == "layers.2"]
    assert {row[0] for row in page.rows("decisions")} == {str(d.site) for d in inside}
    assert page.page.inner_text("#count").startswith(f"{len(inside)} of {len(plan.decisions)} ops")
    page.page.select_option("#layer", "")
    page.page.select_option("#fate", "")
    page.page.click("#decisions th:has-text('cost') button")
    dearest = max(plan.decisions, key=lambda d: d.time_s * d.times)
    first = page.rows("decisions")[0]
    assert first[2] == "recomputed" and first[5].split()[0] == str(dearest.times)
    page.page.fill("#text", "no op has this name")
    assert page.rows("decisions") == []
    page.page.fill("#text", "")


def test_each_graph_of_a_step_is_shown(show: Any) -> None:
    page = show("cut")
    before = page.page.inner_text("#moment-words")
    page.page.select_option("#graph", label="graph 1")
    assert page.page.inner_text("#moment-words") != before
    assert {row[0].partition(":")[0] for row in page.rows("decisions")} == {"graph 0", "graph 1"}


def test_a_loaded_plan_says_what_is_missing(show: Any) -> None:
    page = show("loaded")
    assert NO_CONTENTS in page.page.inner_text("#memory-note")
    assert not page.page.is_visible("#alive")
    page.hover(small().timeline.peak_index)


def test_names_stay_text(show: Any) -> None:
    page = show("names")
    assert any(NAME in row[-1] for row in page.rows("decisions"))
    assert page.page.locator("img").count() == 0


@pytest.mark.parametrize("name", ["compiled", "moved"])
def test_nothing_is_wider_than_the_window(show: Any, name: str) -> None:
    page = show(name).page
    out = """(width) => [...document.querySelectorAll("body *")].filter((one) =>
        !one.closest("svg") && one.getBoundingClientRect().right > width + 1).length"""
    colours = """() => { const style = getComputedStyle(document.body);
        return [style.color, style.backgroundColor]; }"""
    for width, scheme in ((400, "light"), (400, "dark"), (1200, "dark"), (1200, "light")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        drawn = "document.querySelector('#memory-plot .main-svg').getBoundingClientRect().width"
        page.wait_for_function(f"{drawn} <= innerWidth && {drawn} > 0.85 * innerWidth")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(out, width) == 0
        light = [sum(map(int, c.strip("rgb()").split(","))) > 384 for c in page.evaluate(colours)]
        assert light == ([False, True] if scheme == "light" else [True, False])
