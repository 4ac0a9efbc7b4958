"""The notebook: its cells run from the first to the last and end in a picture."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

NOTEBOOK = Path(__file__).parents[1] / "experiments" / "tour.ipynb"


def sources(kind):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def test_it_is_committed_without_outputs_and_says_what_it_is():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len(sources("code")) == 10
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
    (head,) = sources("markdown")
    assert "not for clinical use" in head
    assert "synthetic" in head


@pytest.mark.slow
def test_the_cells_end_in_a_heat_map_over_a_slice(tmp_path):
    script = "import matplotlib\nmatplotlib.use('Agg')\n" + "\n".join(sources("code"))
    script += "\nprint('AUROC', metrics['auroc']['any'])\nprint('HIGHEST', heat.max())"
    script = f"if __name__ == '__main__':\n{indented(script)}"
    (tmp_path / "tour.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "tour.py"], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("AU", "HI")))
    assert float(said["AUROC"]) > 0.6, "the network learns something"
    assert float(said["HIGHEST"]) == pytest.approx(1, abs=1e-6)
    picture = cv2.imread(str(tmp_path / "tour" / "heat-map.png"))
    assert picture.shape == (480, 960, 3)
    # In colour: the heat map is there.
    assert (picture.max(axis=-1) - picture.min(axis=-1)).max() > 60


def indented(text):
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())
