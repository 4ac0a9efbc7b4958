"""`ich show`: pixels that a training sees, the same for the same seed, and no name in a picture."""

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from ich_keras import cache_pictures
from ich_keras.cache_pictures import Shown, inputs_of, inputs_picture, montage_picture
from ich_keras.cli import main
from ich_keras.ct.window import BRAIN
from ich_keras.data.batches import view_batches
from ich_keras.data.inputs import slice_windows
from ich_keras.data.intensity import INTENSITIES
from ich_keras.data.views import AIR, View
from ich_keras.errors import UsageError
from ich_keras.pages.pictures import Word, grey, picture_uri, png


def read_png(content):
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)


@pytest.mark.parametrize("augment", ["fast", "thesis", "flip"])
def test_slices_are_those_of_a_training(phantom_cache, augment):
    found = inputs_of(phantom_cache, Shown(augment=augment, seed=5, epoch=2))
    np.testing.assert_array_equal(
        found.before[:, 0], slice_windows(phantom_cache.slices_hu(found.numbers))
    )
    # What a training with this seed sees of these samples in its third epoch.
    loader = view_batches(phantom_cache, View(), found.numbers, 6, seed=5, augment=augment)
    intensity = INTENSITIES["windows"]
    inputs, _ = loader.dataset[2, found.numbers]
    np.testing.assert_allclose(intensity.normalise(found.after[:, 0], False), inputs, atol=2e-6)
    assert (found.before != found.after).any(axis=(1, 2, 3, 4)).sum() >= 2


@pytest.mark.parametrize(("kind", "count"), [("slab", 5), ("series", 12)])
def test_volumes_are_whole(phantom_cache, kind, count):
    view = View(kind, count)
    found = inputs_of(phantom_cache, Shown(view, size=32, count=3))
    assert found.before.shape == found.after.shape == (3, count, 32, 32, 1)
    rows = phantom_cache.samples(view).rows[found.numbers]
    assert (found.before[rows == AIR] == 0).all()
    place = np.argwhere(rows != AIR)[0]
    hu = phantom_cache.slices_hu([rows[tuple(place)]])
    expected = slice_windows(hu, 32, found.windows)[0]
    np.testing.assert_allclose(found.before[tuple(place)], expected, atol=1e-6)


def test_half_of_the_samples_are_positive_and_of_different_series(phantom_cache):
    found = inputs_of(phantom_cache, Shown(count=8, augment=None))
    table = phantom_cache.slices.iloc[found.numbers]
    assert found.after is None
    assert table["any"].sum() == 4
    assert table["series_uid"].nunique() >= 7
    other = inputs_of(phantom_cache, Shown(count=8, augment=None, seed=1))
    assert set(other.numbers) != set(found.numbers)


def test_the_same_seed_draws_the_same_picture(phantom_cache):
    first, second = (inputs_picture(phantom_cache, Shown(count=2)) for _ in range(2))
    assert first == second != inputs_picture(phantom_cache, Shown(count=2, seed=1))
    assert b"matplotlib" not in first and b"tEXt" not in first


def test_the_picture_holds_the_pixels(phantom_cache):
    shown = Shown(count=2, augment=None)
    image = read_png(inputs_picture(phantom_cache, shown))
    found = inputs_of(phantom_cache, shown)
    tile, gap = cache_pictures.TILE, 4
    for row in range(2):
        for column in range(3):
            expected = grey(found.before[row, 0, ..., column], tile)
            top, left = 44 + row * (tile + gap), 172 + column * (tile + gap)
            np.testing.assert_array_equal(image[top : top + tile, left : left + tile], expected)


def test_a_montage_holds_every_slice(phantom_cache):
    image = read_png(montage_picture(phantom_cache, 3))
    uid = phantom_cache.series_uids[2]
    hu = phantom_cache.series_hu(uid)
    tile = cache_pictures.TILE
    columns = image.shape[1] // (tile + 4)
    for number, one in enumerate(hu):
        top, left = 44 + number // columns * (tile + 32), number % columns * (tile + 4)
        part = image[top : top + tile, left : left + tile]
        np.testing.assert_array_equal(part, grey(BRAIN(one), tile))


def test_no_identifier_is_written(phantom_cache, monkeypatch):
    written = []

    def kept(image, words=()):
        written.extend(word.text for word in words)
        return b""

    monkeypatch.setattr(cache_pictures, "png", kept)
    inputs_picture(phantom_cache, Shown(count=20))
    montage_picture(phantom_cache, 1)
    text = "\n".join(written)
    assert "synthetic" in text and "subdural" in text
    for column in ("patient_id", "sop_instance_uid", "series_instance_uid", "container"):
        assert not any(str(value) in text for value in phantom_cache.slices[column].unique())


def test_the_commands(phantom_cache_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = str(phantom_cache_folder)
    for arguments, name in (
        ([], "inputs.png"),
        (["--series", "2"], "series-2.png"),
        (["--view", "slab", "--count", "2", "--out", "slab.png"], "slab.png"),
        (["--augment", "none", "--intensity", "wide", "--out", "wide.png"], "wide.png"),
    ):
        result = CliRunner().invoke(main, ["show", cache, *arguments])
        assert result.exit_code == 0, result.output
        assert result.output == f"Picture: {name}\n"
        assert read_png((tmp_path / name).read_bytes()).std() > 10
    for arguments, message in (
        ([], "inputs.png already exists"),
        (["--out", "a.jpg"], "a.jpg: the picture is a PNG; expected a name that ends in .png"),
        (["--series", "99", "--out", "a.png"], "series 99; expected 1 to 24"),
        (["--count", "0", "--out", "a.png"], "count is 0; expected 1 to 50"),
        (["--epoch", "0", "--out", "a.png"], "epoch is -1; expected 0 to"),
        (["--size", "64", "--out", "a.png"], "size is 64; expected 8 to 48"),
        (["--view", "cube", "--out", "a.png"], "view 'cube'"),
        (["--augment", "fats", "--out", "a.png"], "fats"),
    ):
        result = CliRunner().invoke(main, ["show", cache, *arguments])
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("count", [5, 11])
def test_the_labelled_slice_of_a_slab_is_marked(phantom_cache, monkeypatch, count):
    written = []
    monkeypatch.setattr(cache_pictures, "png", lambda image, words=(): written.extend(words) or b"")
    shown = Shown(View("slab", count), count=1)
    inputs_picture(phantom_cache, shown)
    texts = [word.text.splitlines()[0] for word in written]
    marked = texts.index("labelled slice")
    assert all(text.endswith(" below") for text in texts[:marked])
    assert all(text.endswith(" above") for text in texts[marked + 1 : 2 * marked + 1])
    assert marked == min(count, 7) // 2
    (word,) = [word for word in written if "before augmentation" in word.text]
    assert word.text.startswith("series ")


def test_a_view_that_skips_all_is_refused(phantom_cache, monkeypatch):
    skipping = View("slab", 3, tilted="skip")
    series = phantom_cache.series.assign(verdict="tilted")
    monkeypatch.setattr(phantom_cache, "series", series)
    with pytest.raises(UsageError, match="the view skips every series"):
        inputs_of(phantom_cache, Shown(skipping))


def test_pictures_keep_their_pixels():
    image = np.random.default_rng(0).integers(0, 256, (37, 53), np.uint8)
    np.testing.assert_array_equal(read_png(png(image)), image)
    coloured = np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)
    found = cv2.imdecode(np.frombuffer(png(coloured), np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(found[..., ::-1], coloured)
    with_words = read_png(png(np.zeros((40, 90), np.uint8), [Word("$x^2$ <a>", 4, 4)]))
    assert with_words.max() > 200 and with_words[30:].max() == 0
    assert picture_uri(image).startswith("data:image/jpeg;base64,")
    assert grey(np.array([[-1.0, 0.5, 2.0]])).tolist() == [[0, 128, 255]]
