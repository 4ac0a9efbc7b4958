"""A split that everybody can make again."""

import hashlib

import pandas as pd
import pytest
from click.testing import CliRunner

from experiments.__main__ import main
from experiments.published_splits import part_of, split_text, write_split
from ich_keras.data.split import make_split
from ich_keras.errors import DataError, UsageError


def test_the_parts_are_what_they_were():
    """Others have made lists with them: these may never change."""
    names = [f"ID_{number:08x}" for number in range(2000)]
    digest = hashlib.sha256(split_text(names).encode()).hexdigest()
    assert digest == "8603fdff0dc5ddf288f1b0e43715d5b8c6ce6971702635067d623fef5e8851cb"
    shares = pd.Series(map(part_of, names)).value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.7, abs=0.03)
    assert shares["valid"] == pytest.approx(0.15, abs=0.025)


def test_order_and_repetition_do_not_matter():
    assert split_text(["b", "a", "b"]) == split_text(["a", "b"])


def test_the_list_of_an_index_splits_its_patients(phantom_cache, tmp_path):
    # So many patients that each part has some.
    slices = phantom_cache.slices.assign(patient_id="P" + phantom_cache.slices["series_uid"])
    table = tmp_path / "slices.csv"
    slices.to_csv(table, index=False)
    command = ["published-split", "--table", str(table), "--out", str(tmp_path / "split.csv")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    content = (tmp_path / "split.csv").read_bytes()
    assert done.output.split()[0] == hashlib.sha256(content).hexdigest()
    split = make_split(tmp_path / "split.csv", slices, 0)
    for part in ("train", "valid", "test"):
        rows = split.indices(slices, part)
        patients = slices["patient_id"].iloc[rows].unique()
        assert {part_of(patient) for patient in patients} == {part}


def test_bad_tables_are_refused(tmp_path):
    for text, message in (
        ("a,b\n1,2\n", "expected one of patient_id"),
        ("patient_id\n", "has no rows"),
        ("patient_id,b\n,2\n", "line 2: no PatientID"),
    ):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            write_split(tmp_path / "t.csv", tmp_path / "out.csv")
    (tmp_path / "out.csv").touch()
    with pytest.raises(UsageError, match="already exists"):
        write_split(tmp_path / "t.csv", tmp_path / "out.csv")
