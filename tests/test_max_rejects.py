"""How many files may be refused before a command fails, and which of them count."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from ich_keras import workflow
from ich_keras.cli import main
from ich_keras.cli.options import share_of_rejects
from ich_keras.config import DataConfig, RunConfig
from ich_keras.ct.leftovers import remove_rejects, require_absent_or_rejects
from ich_keras.ct.rejects import (
    MAX_REJECTS,
    REJECT_CODES,
    Reject,
    TooManyRejects,
    lost,
    reject_table,
    require_few_rejects,
)
from ich_keras.ct.tables import csv_text
from ich_keras.data.cache.cache import CTCache
from ich_keras.errors import UsageError
from ich_keras.workflow import make_cache, prepare_index, prepare_training


def ich(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def images(phantom_folder, tmp_path):
    """Ten slices of the phantoms, of one series and the next."""
    folder = tmp_path / "images"
    folder.mkdir()
    index = prepare_index(phantom_folder / "images")
    for path in index.slices["container"].head(10):
        shutil.copy(path, folder)
    return folder


def harm(images, number, header=True):
    """Cut slices off: in the header, as an index sees it, or within the pixels."""
    for path in sorted(images.glob("*.dcm"))[:number]:
        path.write_bytes(path.read_bytes()[: 200 if header else -2000])


def test_which_codes_are_lost_data():
    codes = {code for code, explained in REJECT_CODES.items() if not explained.is_loss}
    assert {"NOT_CT", "NOT_ORIGINAL", "LOCALIZER", "NOT_AXIAL", "TILTED", "NOT_DICOM"} <= codes
    for code in ("TRUNCATED", "ZERO_TAIL", "DECODE_ERROR", "MISSING_TAG", "NO_DECODER"):
        assert REJECT_CODES[code].is_loss


@pytest.mark.parametrize(
    ("path", "code", "is_lost"),
    [
        ("a/1.dcm", "TRUNCATED", True),
        ("a/readme.txt", "NOT_DICOM", False),
        ("a/1", "NOT_DICOM", False),
        ("a/DICOMDIR", "NOT_CT", False),
        ("a/1.dcm", "NOT_CT", False),
        # An empty file with a slice's name, and what macOS puts beside one.
        ("a/1.dcm", "NOT_DICOM", True),
        ("a/1.DCM", "NOT_DICOM", True),
        ("a.dcm/1.IMA", "NOT_DICOM", True),
        ("a/._1.dcm", "NOT_DICOM", False),
        ("a.dcm/notes", "NOT_DICOM", False),
        ("a/1.dcm", "DUPLICATE_UID", False),
        ("a/1.dcm", "UNREADABLE", True),
    ],
)
def test_which_files_are_lost_data(path, code, is_lost):
    assert lost(reject_table([Reject(path, code, "")])).tolist() == [is_lost]


def table_of(used):
    return pd.DataFrame({"container": [f"{number}.dcm" for number in range(used)]})


def rejected(number, code="TRUNCATED"):
    return reject_table([Reject(f"bad{n}.dcm", code, f"cut {n}") for n in range(number)])


@pytest.mark.parametrize(
    ("used", "refused", "most", "is_refused"),
    [
        (8, 2, 0.2, False),  # exactly the share
        (8, 3, 0.2, True),
        (100, 1, 0.0, True),
        (100, 0, 0.0, False),
        (1, 99, 1.0, False),
        (1, 99, 0.98, True),
        (0, 5, 0.0, False),  # nothing usable: another error
    ],
)
def test_the_share_is_of_what_should_have_been_slices(used, refused, most, is_refused):
    # However many other files there are.
    more = [Reject(f"{n}.txt", "NOT_DICOM", "") for n in range(50)]
    table = pd.concat([rejected(refused), reject_table(more)], ignore_index=True)
    if not is_refused:
        require_few_rejects(table_of(used), table, most)
        return
    with pytest.raises(TooManyRejects) as caught:
        require_few_rejects(table_of(used), table, most)
    assert len(caught.value.rejects) == len(table)


def test_the_error_is_the_summary_and_the_way_out():
    table = pd.concat([rejected(4), rejected(1, "ZERO_TAIL")], ignore_index=True)
    with pytest.raises(TooManyRejects) as caught:
        require_few_rejects(table_of(7), table, 0.2)
    assert caught.value.message == (
        "5 of 12 files that should be slices were refused (42%; at most 20% expected): TRUNCATED 4,"
        " ZERO_TAIL 1; bad0.dcm: cut 0."
    )
    assert caught.value.hint == (
        "Copy or download the file again. To go on without them: --max-rejects 0.42."
    )
    require_few_rejects(table_of(7), table, 0.42)
    assert caught.value.exit_code == 3


def test_slices_that_became_rejects_are_counted_once():
    table = reject_table([Reject(f"{n}.dcm", "DECODE_ERROR", "") for n in range(2)])
    require_few_rejects(table_of(10), table, 0.2)
    with pytest.raises(TooManyRejects, match="2 of 10 files"):
        require_few_rejects(table_of(10), table, 0.19)


@pytest.mark.parametrize("value", [-0.1, 1.5, np.nan, np.inf])
def test_what_is_no_share_is_refused(value, images):
    with pytest.raises(UsageError, match=f"max_rejects is {value}; expected a share from 0 to 1"):
        prepare_index(images, max_rejects=value)
    refused = ich(
        "index", "--dicom", images, "--out", images.parent / "out", "--max-rejects", value
    )
    assert refused.exit_code == 2
    assert "rejects" in refused.output
    assert not (images.parent / "out").exists()


def test_the_index_fails_and_goes_on_when_told_to(images, tmp_path):
    (images / "readme.txt").write_text("not a slice")
    harm(images, 3)
    out = tmp_path / "index"
    words = ("index", "--dicom", images, "--out", out, "--workers", 0)
    refused = ich(*words)
    assert refused.exit_code == 3
    assert "3 of 10 files that should be slices were refused (30%" in refused.output
    assert f"Every file and its reason: {out / 'rejects.csv'}" in refused.output
    assert [path.name for path in out.iterdir()] == ["rejects.csv"]
    assert len(pd.read_csv(out / "rejects.csv")) == 4
    done = ich(*words, "--max-rejects", 0.3)
    assert done.exit_code == 0, done.output
    assert len(pd.read_csv(out / "rejects.csv")) == 4
    # The cache asks again: its share is that of both.
    cached = ("cache", "--index", out, "--out", tmp_path / "cache", "--size", 32, "--workers", 0)
    refused = ich(*cached)
    assert refused.exit_code == 3 and "(30%" in refused.output
    assert not (tmp_path / "cache").exists()
    assert ich(*cached, "--max-rejects", 0.3).exit_code == 0


def test_the_cache_fails_before_it_gets_its_name_and_goes_on_when_told_to(images, tmp_path):
    index = prepare_index(images)
    harm(images, 4, header=False)
    out = tmp_path / "cache"
    with pytest.raises(TooManyRejects, match=r"4 of 10 files.*\(40%") as caught:
        make_cache(index, out, size=32)
    partial = Path(f"{out}.partial")
    assert f"Every file and its reason: {partial / 'rejects.csv'}" in caught.value.hint
    assert len(pd.read_csv(partial / "rejects.csv")) == 4
    assert not out.exists()
    shards = [path.stat().st_mtime_ns for path in partial.glob("shard-*.h5")]
    cache = make_cache(index, out, size=32, max_rejects=0.4)
    # Nothing is read a second time.
    assert [path.stat().st_mtime_ns for path in out.glob("shard-*.h5")] == shards
    assert (len(cache.slices), len(cache.rejects)) == (6, 4)
    assert len(CTCache.open(out).rejects) == 4


def test_training_asks_before_it_caches(images, phantom_folder, tmp_path):
    harm(images, 3)
    labels, config = phantom_folder / "stage_2_train.csv", RunConfig(data=DataConfig(size=32))
    with pytest.raises(TooManyRejects, match="3 of 10 files"):
        prepare_training(config, tmp_path / "run", images, labels)
    words = ("train", "--dicom", images, "--labels", labels, "--out", tmp_path / "run2")
    refused = ich(*words, "--workers", 0)
    assert refused.exit_code == 3
    assert "3 of 10 files that should be slices were refused" in refused.output
    for words in (("train", "--max-rejects", 0.5), ("train", "--resume", "x", "--max-rejects", 1)):
        refused = ich(*words)
        assert refused.exit_code == 2 and "--max-rejects given" in refused.output


def test_training_takes_the_folder_that_it_refused_before(
    images, phantom_folder, phantom_cache_folder, tmp_path, monkeypatch
):
    harm(images, 3)
    config, out = RunConfig(data=DataConfig(size=32)), tmp_path / "run"
    with pytest.raises(TooManyRejects):
        prepare_training(config, out, images, phantom_folder / "stage_2_train.csv")
    assert [path.name for path in out.iterdir()] == ["rejects.csv"]
    preparation = prepare_training(config, out, cache_dir=phantom_cache_folder)
    assert [path.name for path in out.iterdir()] == ["rejects.csv"]  # as yet nothing is written
    begun = []
    monkeypatch.setattr(workflow, "train", lambda config, cache, out, *_, **__: begun.append(out))
    preparation.train()
    assert begun == [out] and not any(out.iterdir())


def test_only_tables_of_rejects_are_taken_for_leftovers(tmp_path):
    table = csv_text(rejected(1))
    for number, (content, others, is_left) in enumerate(
        [
            (table, [], True),
            ("path,code,detail\na,NOT_CT,\n", [], True),  # of an older version
            (table, [".partial-17-rejects.csv"], True),
            (table, ["mine.txt"], False),
            (table, [".partial-17-mine.csv"], False),
            ("path,reason\n", [], False),
            ("", [], False),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "rejects.csv").write_text(content)
        for name in others:
            (folder / name).write_text("")
        if is_left:
            assert require_absent_or_rejects(folder) == folder
            remove_rejects(folder)
            assert not any(folder.iterdir())
            continue
        for refuse in (require_absent_or_rejects, remove_rejects):
            with pytest.raises(UsageError, match="already exists; nothing is overwritten"):
                refuse(folder)
        assert len(list(folder.iterdir())) == 1 + len(others)
    remove_rejects(tmp_path / "none")
    assert require_absent_or_rejects(tmp_path / "none") == tmp_path / "none"


def test_every_command_has_the_same_default():
    assert share_of_rejects(None) == MAX_REJECTS == 0.2
    assert share_of_rejects(0.0) == 0.0
    for name in ("index", "cache", "predict", "train"):
        options = {p.opts[0]: p for p in main.commands[name].params}
        assert f"default {MAX_REJECTS}" in options["--max-rejects"].help
