"""The scripts of the page on many ranks, run by torchrun as it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "use" / "many-ranks.md"
PREAMBLE, *SCRIPTS = re.findall(r"```python no-run\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_a_script_runs(number: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PREAMBLE + SCRIPTS[number])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*command, "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
