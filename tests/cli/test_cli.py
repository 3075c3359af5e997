"""The command line: what it prints, how it fails, and the demo from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from ckpt_pass import CkptPassError, measure_step, policies
from ckpt_pass.cli.commands import make_app
from ckpt_pass.cli.factory import FactoryError, build
from ckpt_pass.demo import results as demo_results
from ckpt_pass.demo import training, variants
from ckpt_pass.demo.model import Llama, ModelConfig, ModelSizeError
from ckpt_pass.drawing.memory import MemoryCurve, MissingExtraError, missing_extra, plot_memory

ROOT = Path(__file__).resolve().parents[2]
FACTORY = '''
"""A model of two layers."""
import dataclasses
import torch
from neighbour_of_the_factory import WIDTH

@dataclasses.dataclass
class Sizes:
    rows: "int" = 4

def tuple_of_inputs():
    layers = torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, 1)
    return torch.nn.Sequential(*layers), (torch.randn(Sizes().rows, WIDTH),)

def one_tensor():
    model, (x,) = tuple_of_inputs()
    return model, x

class Loss(torch.nn.Module):
    def forward(self, x):
        return x.square().mean()

def with_loss():
    model, (x,) = tuple_of_inputs()
    return torch.nn.Sequential(model, Loss()), x

def raises():
    raise LookupError("no weights here")

def leaves():
    raise SystemExit(3)

def wants(size):
    return size

def no_pair():
    return torch.nn.Linear(2, 2)

def no_model():
    return 1, torch.ones(2)

def list_of_inputs():
    return torch.nn.Linear(2, 2), [torch.ones(2)]

def fixed():
    return torch.nn.Linear(2, 2).requires_grad_(False), torch.ones(2)

number = 3
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(FACTORY)
    (tmp_path / "types.py").write_text(FACTORY)  # hides Python's own, if it comes first
    (tmp_path / "neighbour_of_the_factory.py").write_text("WIDTH = 8\n")
    (tmp_path / "broken.py").write_text("def make(:\n")
    (tmp_path / "needs.py").write_text("import a_module_that_nobody_has\n")
    return tmp_path


@pytest.fixture(autouse=True)
def _no_leftover_neighbours() -> None:
    """Each test has a folder of its own, and so a neighbour of its own."""
    sys.modules.pop("neighbour_of_the_factory", None)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(make_app(), [str(argument) for argument in arguments])


def run_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ckpt_pass", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


# --- explain and policies -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tuple_of_inputs", "one_tensor"])
def test_explain_lists_the_decisions(folder: Path, name: str) -> None:
    result = run("explain", f"{folder / 'model.py'}:{name}")
    assert result.exit_code == 0, result.stderr
    assert "policy       save-matmul-attention" in result.stdout
    gelu = next(line for line in result.stdout.splitlines() if "aten.gelu.default" in line)
    assert "recomputed" in gelu and gelu.startswith("1 ")


def test_explain_takes_a_policy_and_a_summary(folder: Path) -> None:
    result = run("explain", f"{folder / 'model.py'}:one_tensor", "--policy=save-nothing")
    short = run(
        "explain", f"{folder / 'model.py'}:one_tensor", "--policy=save-nothing", "--summary"
    )
    assert "policy       save-nothing" in short.stdout
    assert "PREFER_RECOMPUTE" not in short.stdout  # no line for each decision
    assert result.stdout.startswith(short.stdout.rstrip())


def test_a_file_named_like_a_module_of_python(folder: Path) -> None:
    before, path = sys.modules["types"], list(sys.path)
    assert run("explain", f"{folder / 'types.py'}:one_tensor").exit_code == 0
    assert sys.modules["types"] is before
    assert sys.path == path


def test_a_module_of_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "model.py").rename(folder / "a_module_with_a_factory.py")
    try:
        assert run("explain", "a_module_with_a_factory:one_tensor").exit_code == 0
    finally:
        sys.modules.pop("a_module_with_a_factory", None)


def test_policies_are_all_listed() -> None:
    result = run("policies")
    assert result.exit_code == 0
    listed = [line.split()[0] for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert listed == list(policies())
    assert "op_class=matmul" in result.stdout


# --- plan and sweep ------------------------------------------------------------------------------


def test_plan_prints_the_overview_and_draws_it(folder: Path) -> None:
    target, png = f"{folder / 'model.py'}:with_loss", folder / "plan.png"
    result = run("plan", target, "--budget=1.0", f"--png={png}")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("policy       open to the solver")
    assert "saved, most bytes first" in result.stdout and "▼" in result.stdout
    assert f"wrote {png}" in result.stdout.replace("\n", "")
    check_png(png)
    short = run("plan", target, "--policy=save-nothing")
    assert "policy       save-nothing" in short.stdout and "▼" not in short.stdout


def test_plan_writes_a_page_with_the_trade_off(folder: Path) -> None:
    target, page = f"{folder / 'model.py'}:with_loss", folder / "plan.html"
    result = run("plan", target, "--budget=1.0", f"--report={page}", "--curve=2")
    assert result.exit_code == 0, result.stdout + result.stderr
    assert f"wrote {page}" in result.stdout.replace("\n", "")
    text = page.read_text(encoding="utf-8")
    assert '["planned","nothing recomputed",' in text
    assert text.count('["planned","budget ') in (1, 2)  # budgets that are equal count once
    alone = run("plan", target, "--budget=1.0", "--curve=2")
    assert alone.exit_code == 2 and "got no --report" in alone.stderr.replace("\n", " ")


def test_a_plan_file_that_is_not_there(folder: Path) -> None:
    result = run("verify", f"{folder / 'model.py'}:with_loss", "--plan=nowhere.json")
    assert result.exit_code == 2 and "nowhere.json" in result.stderr.replace("\n", " ")


def test_sweep_shows_and_writes_every_point(folder: Path) -> None:
    target, png, rows = f"{folder / 'model.py'}:with_loss", folder / "a.png", folder / "a.json"
    options = ("--no-torch", "--rounds=1", "--budget=16", "--budget=1.0")
    result = run("sweep", target, *options, f"--png={png}", f"--json={rows}")
    assert result.exit_code == 0, result.stdout + result.stderr
    assert "infeasible: at least" in result.stdout and "no recomputation" in result.stdout
    check_png(png)
    written = json.loads(rows.read_text())
    assert written["rows"][0]["budget_bytes"] == 16
    assert [row["peak_bytes"] is None for row in written["rows"]] == [True, False]
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "--budget=6 GigaBytes"), "Got budget='6 GigaBytes'"),
        (("plan", "--budget=1"), "No plan fits a peak of 1 bytes"),
        (("sweep", "--budget=lots"), "Got budget='lots'"),
        (("sweep", "--inner=inducter"), "Did you mean 'inductor'?"),
    ],
)
def test_wrong_plans_and_sweeps(folder: Path, arguments: tuple[str, str], message: str) -> None:
    command, option = arguments
    result = run(command, f"{folder / 'model.py'}:with_loss", option)
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.stderr


def test_a_sweep_needs_a_loss(folder: Path) -> None:
    options = ("--no-torch", "--points=2")
    result = run("sweep", f"{folder / 'model.py'}:one_tensor", *options)
    assert result.exit_code == 1
    assert "expected one scalar tensor that requires grad" in result.stderr


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("model.py", "without a name after ':'"),
        ("model.py:", "without a name after ':'"),
        ("nowhere.py:make", "does not exist"),
        ("model.py:one_tenser", "Did you mean 'one_tensor'?"),
        ("model.py:number", "an object of type int and cannot be called"),
        ("model.py:wants", "missing a required argument: 'size'"),
        ("model.py:raises", "LookupError at"),
        ("model.py:raises", "no weights here"),
        ("model.py:leaves", "SystemExit"),
        ("model.py:no_pair", "returned an object of type Linear"),
        ("model.py:no_model", "type int as the model"),
        ("model.py:list_of_inputs", "type list of 1 as the inputs"),
        ("broken.py:make", "SyntaxError"),
        ("needs.py:make", "No module named 'a_module_that_nobody_has'"),
    ],
)
def test_wrong_factories(folder: Path, target: str, message: str) -> None:
    result = run("explain", f"{folder}/{target}")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


@pytest.mark.parametrize("module", ["no_such_package_at_all", "ckpt_pass.nowhere", "ckpt_pass.a.b"])
def test_wrong_modules(module: str) -> None:
    with pytest.raises(FactoryError, match=f"There is no module '{module}'"):
        build(f"{module}:make")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy=save-matmuls",), "Did you mean 'save-matmul'?"),
        ((), "no backward"),
    ],
)
def test_errors_of_the_library(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("explain", f"{folder / 'model.py'}:fixed", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.stderr


def test_a_process_of_its_own(folder: Path) -> None:
    good = run_process("explain", f"{folder.name}/types.py:one_tensor", cwd=folder.parent)
    assert good.returncode == 0 and "aten.gelu.default" in good.stdout
    bad = run_process("explain", f"{folder.name}/model.py:raises", cwd=folder.parent)
    assert bad.returncode == 2
    assert "no weights here" in bad.stderr and "Traceback" not in bad.stderr


def test_a_missing_extra_is_named() -> None:
    expected = pytest.raises(MissingExtraError, match=r"pip install 'ckpt_pass\[plot\]'")
    with expected, missing_extra("plot"):
        import a_module_that_nobody_has  # noqa: F401


# --- the demo -----------------------------------------------------------------------------------

TINY = ("--steps=2", "--layers=2", "--dim=16", "--length=16", "--batch=2", "--budget=0.8")


def check_png(path: Path) -> None:
    from matplotlib.image import imread

    pixels = imread(path)
    assert min(pixels.shape[:2]) > 300, path
    assert pixels[..., :3].std() > 0.01, path


def test_the_demo_runs_every_variant(tmp_path: Path) -> None:
    result = run("demo", "--inner=aot_eager", f"--out={tmp_path / 'plots'}", *TINY)
    assert result.exit_code == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    head = next(index for index, line in enumerate(lines) if "peak MB" in line)
    rows = [line for line in lines[head:] if line.startswith(4 * " ") and "." in line]
    names = [variant.name for variant in variants.variants("aot_eager", 0.8)]
    assert [row.strip().partition("  ")[0] for row in rows] == names
    assert [row.rstrip().endswith("bitwise the same") for row in rows] == [
        name != variants.PLAIN for name in names
    ]
    pictures = sorted((tmp_path / "plots").iterdir())
    assert len(pictures) == 10
    for picture in pictures:
        check_png(picture)
        assert picture.name in result.stdout


def test_the_demo_says_what_differs() -> None:
    variant = variants.variants("aot_eager", 0.8)[0]
    curve = MemoryCurve("x", ((0.0, 0), (1.0, 8)), 8, 0.5)
    measured = measure_step(lambda: torch.ones((), requires_grad=True) * 2, repeats=1)
    plain = demo_results.Result(variant, 1.0, measured, curve, 1.0)
    other = demo_results.Result(
        variants.variants("aot_eager", 0.8)[1], 1.0000001, measured, curve, 1.0
    )
    with pytest.raises(demo_results.LossDiffersError, match="full checkpointing"):
        demo_results.check_losses([plain, other])


def test_inductor_may_round_but_not_more() -> None:
    plain, ours, *_ = variants.variants("inductor", 0.8)[4:]
    measured = measure_step(lambda: torch.ones((), requires_grad=True) * 2, repeats=1)
    curve = MemoryCurve("x", ((0.0, 0),), 0, 0.0)
    base = demo_results.Result(plain, 1.0, measured, curve, 1.0)
    assert demo_results.is_same_loss(demo_results.Result(ours, 1.00001, measured, curve, 1.0), base)
    assert not demo_results.is_same_loss(
        demo_results.Result(ours, 1.001, measured, curve, 1.0), base
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--inner=inducter",), "Did you mean 'inductor'?"),
        (("--dim=20",), "expected a multiple of 8"),
    ],
)
def test_wrong_settings_of_the_demo(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run("demo", f"--out={tmp_path / 'plots'}", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "plots").exists()


def test_the_model_is_causal() -> None:
    model = Llama(ModelConfig(layers=2, dim=16, length=8))
    tokens = torch.randint(128, (1, 8))
    last = torch.full_like(tokens, -100)  # cross-entropy leaves these out
    last[0, 3] = 7
    changed = tokens.clone()
    changed[0, 4:] = (changed[0, 4:] + 1) % 128
    assert torch.equal(model(tokens, last), model(changed, last))
    changed[0, 0] = (changed[0, 0] + 1) % 128
    assert not torch.equal(model(tokens, last), model(changed, last))


def test_the_model_names_a_width_that_fits() -> None:
    with pytest.raises(ModelSizeError, match="16 for one"):
        ModelConfig(dim=20)
    assert issubclass(ModelSizeError, CkptPassError)


def test_a_plot_of_one_curve(tmp_path: Path) -> None:
    curve = MemoryCurve("one", ((0.0, 0), (0.001, 5_000_000), (0.002, 1_000_000)), 5_000_000, 0.001)
    assert (curve.peak_at_s, curve.at(0.0015), curve.at(0.0)) == (0.001, 5_000_000, 0)
    check_png(plot_memory(curve, tmp_path / "one.png"))


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_the_whole_demo(tmp_path: Path, inner: str) -> None:
    results = training.run_demo(training.DemoSettings(inner=inner, out=tmp_path))
    for kind in ("eager", f"compiled ({inner})"):
        ours = [r for r in results if r.variant.kind == kind]
        assert all(r.measured.peak_bytes < ours[0].measured.peak_bytes for r in ours[1:])
    assert len(list(tmp_path.iterdir())) == 10
