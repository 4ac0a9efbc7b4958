"""The command line as users meet it: help, the whole road, one clear line for every mistake."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
from click.testing import CliRunner

from ich_keras import input_changes
from ich_keras.cli import main, train_main
from ich_keras.cli.configuration import run_config
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.errors import EXIT_TERMINATED, UsageError
from ich_keras.models.presets import PRESETS, Preset
from ich_keras.models.spec import ModelSpec


def ich(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", [None, *sorted(main.commands)])
def test_every_help_answers(name):
    result = ich(*([name] if name else []), "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_an_interrupted_training_goes_on_by_command(phantom_cache_folder, tmp_path, monkeypatch):
    from ich_keras import fitting

    monkeypatch.setitem(PRESETS, "narrow", Preset(ModelSpec((32, 32, 3), width=8), "narrow"))
    run, save_state = tmp_path / "run", fitting.save_state

    def interrupted(*state):
        save_state(*state)
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "save_state", interrupted)
    train = ("train", "--cache", phantom_cache_folder, "--preset", "narrow", "--size", 32)
    stopped = ich(*train, "--epochs", 2, "--out", run)
    assert stopped.exit_code == 130
    assert stopped.output.endswith(f"To resume: ich-train --resume {run}\nInterrupted.\n")
    monkeypatch.setattr(fitting, "save_state", save_state)
    for wrong, message in [
        (("--epochs", 3, "--no-balance"), "--epochs, --balance given with --resume"),
        (("--plan",), "--plan given with --resume"),
        *(
            ((f"--{name}", value), f"--{name} given with --resume: the run's own configuration")
            for name, value in {
                **{"seed": 1, "preset": "resnet18_2d", "batch-size": 16, "learning-rate": 1e-3},
                **{"precision": "float32", "size": 48, "split": "patient", "weights": "imagenet"},
                **{"config": run / "config.json", "augment": "none", "max-rejects": 0.5},
            }.items()
        ),
        (("--cache", tmp_path / "none"), f"the cache {tmp_path / 'none'} does not exist"),
    ]:
        refused = ich("train", "--resume", run, *wrong)
        assert refused.exit_code == 2
        assert message in refused.output
    done = ich("train", "--resume", run)
    assert done.exit_code == 0, done.output
    assert "Resuming after epoch 1 of 2, torch, cpu, " in done.output
    assert f"Run folder: {run}" in done.output
    assert len(pd.read_csv(run / "history.csv")) == 2
    again = ich("train", "--resume", run, "--cache", tmp_path / "none")
    assert again.exit_code == 2 and "is finished" in again.output
    none = ich("train", "--resume", tmp_path / "typo")
    assert none.exit_code == 6 and "typo does not exist" in none.output


def test_ich_train_is_the_train_command():
    assert main.commands["train"] is train_main


def test_phantom_index_cache_train_evaluate_predict(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "narrow", Preset(ModelSpec((32, 32, 3), width=8), "narrow"))
    data, run = tmp_path / "data", tmp_path / "run"
    images, csv = data / "images", data / "stage_2_train.csv"
    one = ("--workers", 0)
    road = [
        ("phantom", "--out", data, "--series", 24, "--seed", 2, "--matrix", 64, *one),
        ("index", "--dicom", images, "--labels", csv, "--out", tmp_path / "index", *one),
        ("cache", "--index", tmp_path / "index", "--out", tmp_path / "cache", "--size", 32, *one),
        ("cache", "--out", tmp_path / "cache", "--verify"),
        (
            "train",
            "--cache",
            tmp_path / "cache",
            "--out",
            run,
            "--preset",
            "narrow",
            "--size",
            32,
            "--epochs",
            1,
            "--balance",
            *one,
        ),
        ("evaluate", "--run", run, "--cache", tmp_path / "cache", "--split", "valid"),
        ("predict", "--run", run, "--dicom", images, "--out", tmp_path / "out", *one),
    ]
    for arguments in road:
        result = ich(*arguments)
        assert result.exit_code == 0, (arguments, result.output, result.exception)
    assert "Run folder" in ich_train_output(road, tmp_path)
    predictions = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert len(predictions) == len(list(images.iterdir()))
    config = json.loads((run / "config.json").read_text())
    assert config["data"] == {
        "size": 32,
        "view": None,
        "slices": None,
        "edge": "air",
        "long_series": "spread",
        "tilted": "keep",
        "duplicate": "skip",
        "split": "patient",
        "balance": True,
        "augment": "fast",
        "reverse": False,
        "limit_series": None,
        "intensity": None,
        "loader_workers": 0,
        **dict.fromkeys(field.name for field in input_changes.names()),
        "skip_empty": False,
        "crop": None,
        "depth_mm": None,
    }


def ich_train_output(road, tmp_path):
    dicom = [*road[1][1:5]]
    result = ich(
        "train",
        *dicom,
        "--cache",
        tmp_path / "cache",
        "--out",
        tmp_path / "second",
        "--preset",
        "narrow",
        "--size",
        32,
        "--epochs",
        1,
        "--workers",
        0,
    )
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_the_plan_writes_nothing(phantom_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "narrow", Preset(ModelSpec((32, 32, 3), width=8), "narrow"))
    result = ich(
        "train",
        "--dicom",
        phantom_folder / "images",
        "--labels",
        phantom_folder / "stage_2_train.csv",
        "--out",
        tmp_path / "run",
        "--preset",
        "narrow",
        "--size",
        32,
        "--plan",
        "--workers",
        0,
    )
    assert result.exit_code == 0, (result.output, result.exception)
    assert "Nothing was written" in result.output
    assert "patients" in result.output
    assert "cache to build" in result.output
    assert list(tmp_path.iterdir()) == []


def mistakes(folder, tmp_path):
    images, csv = folder / "images", folder / "stage_2_train.csv"
    out = tmp_path / "run"
    full = tmp_path / "full"
    full.mkdir()
    (full / "a.txt").write_text("not a DICOM file")
    other = tmp_path / "other.csv"
    rows = [
        f"ID_0123456789_{n},0"
        for n in (
            "epidural",
            "intraparenchymal",
            "intraventricular",
            "subarachnoid",
            "subdural",
            "any",
        )
    ]
    other.write_text("\n".join(["ID,Label", *rows]) + "\n")
    swapped = tmp_path / "swapped.csv"
    swapped.write_text("Label,ID\n0,ID_0123456789_any\n")
    (tmp_path / "own.json").write_text("{}")
    data = ("--dicom", images, "--labels", csv, "--out", out)
    return {
        "nothing readable": (3, "no CT slice", "train", "--dicom", full, "--labels", csv),
        "no such folder": (2, "none", "train", "--dicom", tmp_path / "none", "--labels", csv),
        "labels of other images": (
            3,
            "match no image",
            "train",
            "--dicom",
            images,
            "--labels",
            other,
        ),
        "another header": (
            3,
            "no column identifies the rows",
            "train",
            "--dicom",
            images,
            "--labels",
            swapped,
        ),
        "no labels": (2, "--labels is missing", "train", "--dicom", images),
        "seed too large": (2, "seed is 5000000000", "train", *data, "--seed", 5000000000),
        "size too large": (2, "data.size is 100000", "train", *data, "--size", 100000),
        "no such config": (2, "none.json", "train", *data, "--config", tmp_path / "none.json"),
        "output exists": (2, "already exists", "train", *data[:4], "--out", full),
        "index exists": (2, "already exists", "index", "--dicom", images, "--out", full),
        "unknown preset": (
            2,
            "no preset is called 'resnet19'",
            "train",
            *data,
            "--preset",
            "resnet19",
        ),
        "negative batch": (2, "fit.batch_size is -3", "train", *data, "--batch-size", -3),
        "unknown split": (2, "split 'patients'", "train", *data, "--split", "patients"),
        "unknown device": (2, "device is 'tpu'", "train", *data, "--device", "tpu"),
        "unknown backend": (2, "backend is 'mxnet'", "train", *data, "--backend", "mxnet"),
        "other backend": (
            2,
            "already loaded",
            "train",
            *data,
            "--backend",
            "jax" if __import__("keras").config.backend() != "jax" else "torch",
        ),
        "options without data": (2, "--epochs given, but no data", "train", "--epochs", 1),
        "config without data": (
            2,
            "--config given, but no data",
            "train",
            "--config",
            tmp_path / "own.json",
        ),
        "download without data": (2, "--download given, but no data", "train", "--download"),
        "demo plan with data": (
            2,
            "--demo-plan given with data",
            "train",
            *data,
            "--demo-plan",
            "light",
        ),
        "unknown demo plan": (2, "demo plan 'x'; expected one of", "train", "--demo-plan", "x"),
        "plan of the demo": (2, "--plan needs --dicom or --cache", "train", "--plan"),
        "no cache": (2, "does not exist", "train", "--cache", tmp_path / "none"),
        "cache is none": (6, "manifest", "train", "--cache", full),
        "run is none": (
            6,
            "not a run folder",
            "predict",
            "--run",
            full,
            "--dicom",
            images,
            "--out",
            out,
        ),
        "index is none": (6, "", "cache", "--index", full, "--out", out),
        "weights by name": (
            2,
            "torchvision_resnet18.weights.h5 does not exist",
            "train",
            *data,
            "--weights",
            "imagenet",
        ),
    }


NAMES = (
    "nothing readable",
    "no such folder",
    "labels of other images",
    "another header",
    "no labels",
    "output exists",
    "seed too large",
    "size too large",
    "no such config",
    "index exists",
    "unknown preset",
    "negative batch",
    "unknown split",
    "unknown device",
    "unknown backend",
    "other backend",
    "options without data",
    "config without data",
    "download without data",
    "demo plan with data",
    "unknown demo plan",
    "plan of the demo",
    "no cache",
    "cache is none",
    "run is none",
    "index is none",
    "weights by name",
)


@pytest.mark.parametrize("name", NAMES)
def test_mistakes_are_one_clear_line_and_write_nothing(name, phantom_folder, tmp_path, monkeypatch):
    table = mistakes(phantom_folder, tmp_path)
    assert set(table) == set(NAMES)
    code, message, *arguments = table[name]
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    result = ich(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    line = next(line for line in result.output.splitlines() if line.startswith("Error: "))
    assert message in line
    assert "Traceback" not in result.output
    written = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    if name == "nothing readable":  # says why of every file
        rejects = next(path for path in written if path.is_file())
        assert [path for path in written if path.is_file()] == [rejects]
        assert rejects.name == "rejects.csv" and str(rejects.relative_to(tmp_path)) in result.output
        assert set(pd.read_csv(rejects)["code"]) == {"NOT_DICOM"}
    else:
        assert written == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe{}", ""),
        (b"[" * 100_000, ""),
        (b"[]", ""),
        (b"null", ""),
        (b'{"sede": 1}', "Did you mean 'seed'?"),
        (b'{"fit": {"epocs": 1}}', "Did you mean 'epochs'?"),
        (b'{"fit": 3}', "fit"),
        (b'{"seed": "1"}', "seed"),
        (b'{"seed": NaN}', "NaN is not a number"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"fit": {"batch_size": -3}}', "fit.batch_size is -3"),
        (b'{"fit": {"learning_rate": NaN}}', "NaN is not a number"),
        (b'{"fit": {"learning_rate": 1e999}}', "fit.learning_rate is inf"),
        (b'{"fit": {"batch_size": true}}', "fit.batch_size"),
        (b'{"data": {"size": 2.5}}', "data.size"),
        (b'{"preset": "resnet18_2D"}', "resnet18_2d"),
    ],
)
def test_a_config_file_that_cannot_be_is_a_usage_error(
    phantom_cache_folder, tmp_path, content, message
):
    path = tmp_path / "own.json"
    path.write_bytes(content)
    train = ["train", "--cache", phantom_cache_folder, "--out", tmp_path / "run"]
    result = ich(*train, "--config", path)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.output.count("Error: ") == 1 and "Traceback" not in result.output
    assert message in " ".join(result.output.split())
    assert len(result.output) < 1500
    assert list(tmp_path.iterdir()) == [path]


def test_doctor_looks_around(tmp_path):
    result = ich("doctor", "--folder", tmp_path)
    assert result.exit_code == 0, result.output
    for word in ("keras", "backend", "device", "decoder RLE Lossless", "free disk"):
        assert word in result.output


def test_doctor_fails_when_something_needed_is_absent(monkeypatch):
    from ich_keras import environment

    monkeypatch.setattr(environment, "versions", lambda: {"keras": None, "jax": None})
    result = ich("doctor")
    assert result.exit_code == 4
    assert "BAD  keras" in result.output


def test_presets_tells_what_networks_cost():
    result = ich("presets", "--preset", "resnet10_2d")
    assert result.exit_code == 0, result.output
    assert "| `resnet10_2d` | ResNet-10 on slices | 256x256x3 | 10 |" in result.output
    result = ich("presets", "--preset", "resnet11_2d")
    assert result.exit_code == 2
    assert "no preset is called 'resnet11_2d'" in result.output


def test_only_download_fetches(phantom_cache_folder, tmp_path, monkeypatch):
    from weights_convert import fetching

    asked = []
    monkeypatch.setenv("ICH_KERAS_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(fetching, "ensure_weights", lambda *arguments: asked.append(arguments[:2]))
    common = ("train", "--cache", phantom_cache_folder, "--out", tmp_path / "run", "--workers", 0)
    without = ich(*common, "--weights", "imagenet")
    assert without.exit_code == 2
    assert "torchvision_resnet18.weights.h5 does not exist" in without.output
    assert "--download" in without.output
    assert asked == []
    ich(*common, "--weights", "imagenet", "--download")  # the stand-in fetches nothing
    assert asked == [("imagenet", "resnet18_2d")]
    nothing = ich(*common, "--download")
    assert nothing.exit_code == 2
    assert "--weights is missing" in nothing.output
    assert not (tmp_path / "run").exists()


def test_another_view_takes_its_own_defaults_not_those_of_the_file(tmp_path):
    slab = RunConfig(
        preset="resnet18_3d_medicalnet",
        data=DataConfig(view="slab", slices=5, edge="repeat", intensity="wide", size=64),
        fit=FitConfig(batch_size=16, accumulate=1, epochs=3),
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(slab.to_dict()))
    nothing = {"view": None, "preset": None, "backend": None}

    same = run_config(path, nothing | {"epochs": 2})
    assert same == (replace(slab, fit=replace(slab.fit, epochs=2)), "")
    assert run_config(path, nothing | {"view": "slab"}) == (slab, "")
    whole, reset = run_config(path, nothing | {"view": "series"})
    assert reset == "--slices, --edge, --intensity, --batch-size, --accumulate"
    assert whole == replace(
        slab,
        data=DataConfig(view="series", size=64),
        fit=replace(slab.fit, batch_size=None, accumulate=None),
    )
    flat, reset = run_config(path, nothing | {"preset": "resnet18_2d", "edge": "air"})
    assert reset == "--view, --slices, --intensity, --batch-size, --accumulate"
    assert (flat.data, flat.fit) == (DataConfig(size=64), whole.fit)
    assert run_config(path, nothing | {"preset": "resnet18_3d"})[0].data == slab.data


@pytest.mark.parametrize(
    ("before", "after", "reset"),
    [
        ("resnet18_3d_slab", "resnet18_3d", "--slices, --batch-size"),
        ("resnet18_3d_slab", "resnet18_2d", "--slices, --batch-size"),
        ("resnet18_3d", "resnet18_3d_slab", "--slices, --batch-size"),
        ("resnet18_3d_slab", "resnet50_3d_slab", ""),
        ("resnet18_3d", "resnet18_3d_medicalnet", ""),
    ],
)
def test_another_preset_means_another_view_where_the_file_names_none(
    tmp_path, before, after, reset
):
    """The config.json of a run holds what was asked for: no view, unless `--view` was given."""
    content = RunConfig(
        preset=before, data=DataConfig(slices=9), fit=FitConfig(batch_size=16, epochs=3)
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content.to_dict()))
    config, told = run_config(path, {"view": None, "preset": after})
    assert told == reset
    kept = (9, 16) if reset == "" else (None, None)
    assert (config.data.slices, config.fit.batch_size, config.fit.epochs) == (*kept, 3)
    assert config.preset == after


def test_a_view_that_the_preset_means_already_resets_nothing(tmp_path):
    slab = RunConfig(preset="resnet18_3d_slab", data=DataConfig(slices=9, edge="repeat"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(slab.to_dict()))
    config, told = run_config(path, {"view": "slab", "preset": None})
    assert told == ""
    assert config == replace(slab, data=replace(slab.data, view="slab"))
    with pytest.raises(UsageError, match="no preset is called 'resnet18_4d'"):
        run_config(path, {"view": "series", "preset": "resnet18_4d"})


def test_a_termination_that_python_drops_is_sent_again():
    script = """
import os, signal, time
from ich_keras.terminal import catch_termination

class Loader:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

catch_termination()
loader = Loader()
del loader
print("went on", flush=True)
time.sleep(20)
print("to the end", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=15
    )
    assert done.returncode == EXIT_TERMINATED, done.stderr
    assert done.stdout.splitlines() == ["went on"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"),
    ],
)
def test_out_of_memory_is_one_line_with_a_way_out(error):
    from ich_keras.terminal import Command

    result = CliRunner().invoke(Command("train", callback=lambda: raise_(error)), [])
    assert result.exit_code == 4
    assert result.output.startswith("Error: out of memory.\nHint: Use a smaller --batch-size")
    other = CliRunner().invoke(Command("train", callback=lambda: raise_(RuntimeError("else"))), [])
    assert isinstance(other.exception, RuntimeError)


def raise_(error):
    raise error


def test_options_that_would_be_ignored_are_refused(tmp_path, phantom_cache_folder):
    cache = ("--cache", phantom_cache_folder, "--out", tmp_path / "run")
    for options in (["--any-body-part"], ["--max-rejects", "0.5"]):
        refused = ich("train", *cache, *options)
        assert refused.exit_code == 2
        assert f"{options[0]} given without --dicom." in refused.output
    verify = ("cache", "--out", phantom_cache_folder, "--verify")
    for options in (["--restart"], ["--size", 64], ["--index", tmp_path / "index"]):
        refused = ich(*verify, *options)
        assert refused.exit_code == 2
        assert f"{options[0]} given with --verify." in refused.output
    assert ich(*verify).exit_code == 0


def test_the_first_series_of_a_whole_cache_are_trained_on(phantom_folder, phantom_cache_folder):
    images, csv = phantom_folder / "images", phantom_folder / "stage_2_train.csv"
    planned = ich(
        *("train", "--dicom", images, "--labels", csv, "--cache", phantom_cache_folder),
        *("--limit-series", 12, "--plan", "--workers", 0),
    )
    assert planned.exit_code == 0, planned.output
    counts = re.findall(r"(?:train|valid|test) +\d+ patients, +(\d+) series", planned.output)
    assert sum(map(int, counts)) == 12


@pytest.mark.parametrize(
    ("name", "hint"),
    [("file/x", "A part of the path is a file"), ("x" * 300, "Choose a shorter name")],
)
def test_a_path_that_cannot_be_written_says_why(tmp_path, monkeypatch, name, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "dicom").mkdir()
    done = ich("index", "--dicom", "dicom", "--out", name)
    assert done.exit_code == 4 and hint in done.output


def test_verify_wants_a_file_or_folder():
    done = ich("verify", os.devnull)
    assert done.exit_code == 2 and "is a device or pipe; expected a file or folder" in done.output
