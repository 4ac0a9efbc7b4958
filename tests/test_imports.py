"""The import graph is a DAG of one-way streets; the contract lies in pyproject.toml."""

import shutil
import subprocess
import sys
from pathlib import Path


def test_one_way_streets():
    program = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert program, "import-linter is not installed: pip install '.[test]'"
    done = subprocess.run(
        [program, "--no-cache"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
