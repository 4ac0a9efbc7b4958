"""The one road from DICOM files to a run: what is used again, what is refused."""

import pytest
from tiny_dicom import tiny_file

from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.ct.rejects import NothingUsable
from ich_keras.ct.series import SeriesIndex
from ich_keras.data.cache.cache import CTCache
from ich_keras.errors import StaleError, UsageError
from ich_keras.labels import LABELS
from ich_keras.planning import plan_lines
from ich_keras.workflow import (
    cache_beside,
    cache_dicom,
    make_cache,
    prepare_index,
    prepare_training,
)

TINY = RunConfig(
    preset="resnet10_2d", data=DataConfig(size=32), fit=FitConfig(epochs=1), device="cpu"
)


def test_the_first_half_of_the_road_is_its_parts(phantom_folder, tmp_path):
    images, labels = phantom_folder / "images", phantom_folder / "stage_2_train.csv"
    told = []
    cache = cache_dicom(
        images,
        labels,
        tmp_path / "cache",
        32,
        index_dir=tmp_path / "index",
        tell=told.append,
    )
    assert cache.size == 32 and set(LABELS) <= set(cache.slices)
    assert len(told) == 3
    parts = make_cache(prepare_index(images, labels), tmp_path / "parts", 32)
    assert cache.fingerprint == parts.fingerprint
    assert len(SeriesIndex.load(tmp_path / "index").series) == 24
    with pytest.raises(UsageError, match="already exists"):
        cache_dicom(images, labels, tmp_path / "cache", 32)


def test_a_preparation_writes_nothing_and_knows_what_there_is_to_do(
    phantom_folder, phantom_cache_folder, tmp_path
):
    data = {
        "dicom": phantom_folder / "images",
        "labels": phantom_folder / "stage_2_train.csv",
    }
    new = prepare_training(TINY, tmp_path / "run", **data)
    assert new.cache is None and new.index is not None
    assert new.cache_dir == cache_beside(tmp_path / "run") == tmp_path / "run-cache"
    assert new.cache_bytes == len(new.index.slices) * 32 * 32 * 2
    assert [line.split()[0] for line in plan_lines(new.plan, new.recipe)] == [
        "train",
        "valid",
        "test",
        "1",
    ]
    assert list(tmp_path.iterdir()) == []

    old = prepare_training(TINY, tmp_path / "run", **data, cache_dir=phantom_cache_folder)
    assert isinstance(old.cache, CTCache) and old.cache_bytes == 0
    assert old.config.data.size == 32
    own = prepare_training(
        TINY, tmp_path / "run", cache_dir=phantom_cache_folder, takes_cache_size=True
    )
    assert own.config.data.size == 48
    assert own.plan.num_slices == new.plan.num_slices


def test_what_does_not_fit_is_refused(phantom_folder, phantom_cache_folder, tmp_path):
    images, labels = phantom_folder / "images", phantom_folder / "stage_2_train.csv"
    with pytest.raises(UsageError, match="--labels is missing"):
        prepare_training(TINY, tmp_path / "run", images)
    with pytest.raises(UsageError, match="the cache .* does not exist"):
        prepare_training(TINY, tmp_path / "run", cache_dir=tmp_path / "none")
    others = tmp_path / "others"
    others.mkdir()
    for path in sorted(images.iterdir())[:60]:
        (others / path.name).hardlink_to(path)
    with pytest.raises(StaleError):
        prepare_training(TINY, tmp_path / "run", others, labels, phantom_cache_folder)


def test_a_folder_without_heads_says_so(tmp_path):
    """An export of another part of the body: the way out is named, not that data are few."""
    for number in range(4):
        content = tiny_file(
            SOPInstanceUID=f"1.2.{number}",
            BodyPartExamined="ABDOMEN",
            ImagePositionPatient=[-125, -125, 5 * number],
        )
        (tmp_path / f"{number}.dcm").write_bytes(content)
    labels = tmp_path / "labels.csv"
    rows = [f"1.2.{number}_{label},0" for number in range(4) for label in LABELS]
    labels.write_text("\n".join(["ID,Label", *rows]))
    with pytest.raises(NothingUsable, match=r"can be trained on .NOT_HEAD 4.") as caught:
        prepare_index(tmp_path, labels)
    assert "--any-body-part" in caught.value.hint
    assert len(prepare_index(tmp_path, labels, any_body_part=True).usable().slices) == 4
