"""The table of budgets with Inductor: every model in fp32 and bf16, at five budgets each.

It takes hours. Each model runs in a process of its own, each row is written to a file of JSON lines
as soon as it is known, and another run goes on where the file ends:
``benchmarks/run.py inductor --all``. By itself: ``python -m benchmarks.inductor_table gpt2 float32
ROWS``.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from benchmarks.budgets import MODELS, Models, made
from benchmarks.common import InductorRow, Result, torch_threads
from benchmarks.inductor import PARTS, Model, bars_of, least_bytes
from tests.zoo import Built, modular, seeded

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("bfloat16", "float32")
#: Where the first call is timed, with cold caches; elsewhere kernels are kept.
COLD = 0.3


class Restored(nn.Module):
    """A U-Net that is to restore an image, and how far it is from it (``mse_loss``)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = modular.UNet(width)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.net.image(x), target)


def unet() -> Built:
    """A U-Net of 16 channels, two images of 64 by 64."""
    return Restored(16), (torch.randn(2, 3, 64, 64), torch.randn(2, 1, 64, 64))


def t5() -> Built:
    """T5, four blocks each side, whose position bias all blocks of a side share."""
    config = T5Config(
        vocab_size=512, d_model=128, d_kv=32, d_ff=256, num_layers=4, num_heads=4,
        **modular.SPECIAL,
    )  # fmt: skip
    ids = torch.randint(2, 512, (2, 128))
    return modular.Seq2Seq(T5ForConditionalGeneration(config)), (ids,)


#: The small ones first: a table that is cut off has them all.
ALL: Models = {
    **dict(reversed(MODELS.items())),
    "unet-mse": seeded(unet),
    "t5-4L": seeded(t5),
}


def run(rows: Path, models: Sequence[str] | None = None) -> Result:
    """Make what a file of rows lacks, and read all of it.

    Args:
        rows: the file; rows of another torch in it are left alone, and not counted.
        models: by name; all by default.
    """
    rows.parent.mkdir(parents=True, exist_ok=True)
    names = sorted(models or ALL, key=lambda name: name.endswith("L") and name[0] in "gl")
    for name, dtype in ((name, dtype) for name in names for dtype in DTYPES):
        command = [sys.executable, "-m", "benchmarks.inductor_table", name, dtype, str(rows)]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode:
            print(f"{name} {dtype} failed ({done.returncode})", flush=True)
    found = _known(rows)
    title = f"inductor: {sum(r.part is not None for r in found)} budgets (CPU)"
    return Result("inductor-table", title, tuple(found), bars_of(found))


def _known(rows: Path) -> list[InductorRow]:
    """The rows of this torch in a file."""
    if not rows.exists():
        return []
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    return [InductorRow(**line["row"]) for line in lines if line["torch"] == torch.__version__]


def _fill(name: str, dtype: str, rows: Path) -> None:
    """Measure the rows of one model that a file lacks."""
    known = {row.part for row in _known(rows) if (row.model, row.dtype) == (name, dtype)}
    if known >= {None, *PARTS}:
        return

    def add(row: InductorRow) -> None:
        row = dataclasses.replace(row, dtype=dtype)
        print(f"{name:10} {dtype:8} {row}".replace("InductorRow", ""), flush=True)
        if row.part in known:
            return
        line = {"torch": torch.__version__, "row": dataclasses.asdict(row)}
        with rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    make: Callable[[], Built] = lambda: made(ALL[name], getattr(torch, dtype))  # noqa: E731
    with torch_threads(1):
        _measure(name, make, add, known)


def _measure(
    name: str, make: Callable[[], Built], add: Callable[[InductorRow], None], known: set[Any]
) -> None:
    module, inputs = make()
    gradient_bytes = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    model = Model(name, module, inputs, gradient_bytes)
    if None not in known:
        for row in model.stock([1.0]):
            add(row)
    plain, least = model.plain_bytes(), least_bytes(module, inputs)
    for part in PARTS:
        if part in known:
            continue
        try:
            add(model.at(part, least + int(part * (plain - least)), cold=part == COLD))
        except RuntimeError as error:  # dynamo wraps a backend's errors
            print(f"{name} at {part}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    _fill(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
