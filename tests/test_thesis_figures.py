"""The figures of heads in 3D: shapes that are known, seen from known sides."""

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from experiments import thesis_figures
from experiments.__main__ import main
from experiments.thesis_figures import VIEWS, surface
from ich_keras.errors import UsageError


def ball(shape, spacing, centre, radius):
    """A ball of 1000 in air, around a point in mm: float32 (slices, rows, columns)."""
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) * spacing
    distance = np.linalg.norm(places - np.asarray(centre), axis=-1)
    return np.clip((radius - distance + 0.5) * 1000, -1000, 1000).astype(np.float32)


@pytest.mark.parametrize("view", VIEWS)
def test_a_ball_is_round_and_lit_from_above(view):
    spacing = (4.0, 1.0, 2.0)
    volume = ball((30, 120, 60), spacing, (60, 60, 60), 40)
    picture = surface(volume, spacing, *VIEWS[view])
    rows, columns = np.nonzero(picture)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    # 80 mm in steps of 1.25 mm, enlarged by a half.
    assert height == pytest.approx(96, abs=6) and width == pytest.approx(96, abs=6)
    upper, lower = np.array_split(picture[rows.min() : rows.max()].astype(float), 2)
    assert upper.mean() > 1.2 * lower.mean()
    assert picture[0].max() == 0 and picture[picture.shape[0] // 2].max() > 150


@pytest.mark.parametrize(
    ("view", "seen"),
    [  # where the nose, the left ear and the vertex come to lie: (up, right), -1 to 1
        ("from the front", {"left": (0, 1), "top": (1, 0)}),
        ("from the left", {"front": (0, -1), "top": (1, 0)}),
        ("from above", {"front": (-1, 0), "left": (0, 1)}),
    ],
)
def test_each_side_is_where_it_belongs(view, seen):
    spacing, middle = (2.0, 2.0, 2.0), np.array((60, 60, 60))
    towards = {"front": (0, -1, 0), "left": (0, 0, 1), "top": (1, 0, 0)}
    for name, (up, right) in seen.items():
        bump = middle + 40 * np.array(towards[name])
        head = ball((60, 60, 60), spacing, middle, 30)
        both = np.maximum(head, ball((60, 60, 60), spacing, bump, 8))
        turn, lift = VIEWS[view]
        turn = 0 if view == "from above" else turn
        picture = surface(both, spacing, turn, lift)
        rows, columns = np.nonzero(picture)
        # The bump draws the outline out to its side: the heavy ball lies on the other one.
        middle_of_box = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
        if up:
            assert (rows.mean() - middle_of_box[0]) * up > 2, name
        if right:
            assert (columns.mean() - middle_of_box[1]) * right < -2, name


def test_nothing_above_the_threshold_is_refused():
    with pytest.raises(UsageError, match="nothing is above 400"):
        surface(np.zeros((4, 8, 8), np.float32), (1, 1, 1), 0, 0)


def test_the_figures_are_written_and_marked(tmp_path, monkeypatch):
    written = []
    real = thesis_figures.png
    monkeypatch.setattr(
        thesis_figures,
        "png",
        lambda image, words=(): written.append([w.text for w in words]) or real(image, words),
    )
    result = CliRunner().invoke(main, ["figures", "--out", str(tmp_path / "out"), "--seed", "3"])
    assert result.exit_code == 0, result.output
    names = ["thesis-6-2.png", "thesis-6-3.png", "thesis-6-4.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert all(any("synthetic" in text for text in texts) for texts in written)
    skin, bone = (cv2.imread(str(tmp_path / "out" / name), 0)[48:] for name in names[1:])
    # Stored values count from air: the surface is the skin, which hides more than the bone does.
    assert (skin > 0).mean() > 1.03 * (bone > 0).mean()
    assert all((tmp_path / "out" / name).stat().st_size < 400_000 for name in names)
