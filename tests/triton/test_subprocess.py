"""The interpreted tests always run: in this process, or in one of their own if Triton was imported too early."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_interpreted_tests_run(in_process: bool) -> None:
    if in_process:
        return
    files = sorted(map(str, Path(__file__).parent.glob("test_interpret*.py")))
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
