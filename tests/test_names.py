"""Unknown names of options and settings: the suggestion is the right one, or there is none."""

import re

import pytest
from click.testing import CliRunner

from ich_keras.cli import main
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.errors import UsageError
from ich_keras.synonyms import SYNONYMS, meant_by, question

# command, what a user of another tool types -> options that are named
TYPED = [
    ("train", "--lr", ["--learning-rate"]),
    ("train", "-lr", ["--learning-rate"]),
    ("train", "--lr=0.1", ["--learning-rate"]),
    ("train", "--learning_rate", ["--learning-rate"]),
    ("train", "--class-weights", ["--label-weight", "--positive-weight"]),
    ("train", "--class_weight", ["--label-weight", "--positive-weight"]),
    ("train", "--pos-weight", ["--positive-weight"]),
    ("train", "--bs", ["--batch-size"]),
    ("train", "-b", ["--batch-size"]),
    ("train", "--batch_size", ["--batch-size"]),
    ("train", "--gpu", ["--device", "--gpus"]),
    ("train", "--num-workers", ["--loader-workers", "--workers"]),
    ("train", "-j", ["--loader-workers", "--workers"]),
    ("train", "--num_epochs", ["--epochs"]),
    ("train", "--epoch", ["--epochs"]),
    ("train", "--model", ["--preset"]),
    ("train", "--arch", ["--preset"]),
    ("train", "--pretrained", ["--weights"]),
    ("train", "--checkpoint", ["--weights"]),
    ("train", "--img-size", ["--size"]),
    ("train", "--scheduler", ["--schedule"]),
    ("train", "--warmup", ["--warmup-steps"]),
    ("train", "--wd", ["--weight-decay"]),
    ("train", "--early-stopping", ["--patience"]),
    ("train", "--ema-decay", ["--ema"]),
    ("train", "--logdir", ["--tensorboard"]),
    ("train", "--extra-epochs", ["--more-epochs"]),
    ("train", "--gradient-accumulation-steps", ["--accumulate"]),
    ("train", "--data-dir", ["--cache", "--dicom"]),
    ("train", "--output_dir", ["--out"]),
    ("train", "-o", ["--out"]),
    ("train", "--amp", ["--precision"]),
    ("train", "--gamma", ["--focal-gamma"]),
    ("train", "--dry-run", ["--plan"]),
    ("train", "--sheduel", ["--schedule"]),
    ("train", "--schedul", ["--schedule"]),
    ("train", "--optimizer", []),
    ("train", "--verbose", []),
    ("train", "--dropout", []),
    ("predict", "--model", ["--run"]),
    ("predict", "--checkpoint", ["--run"]),
    ("predict", "--input", ["--dicom"]),
    ("predict", "--gpu", ["--device"]),
    ("predict", "--num-workers", ["--workers"]),
    ("predict", "--lr", []),
    ("cache", "--img-size", ["--size"]),
]


@pytest.mark.parametrize(("command", "typed", "named"), TYPED, ids=lambda value: str(value)[:30])
def test_unknown_options_lead_to_the_right_ones(command, typed, named):
    done = CliRunner().invoke(main, [command, typed, "1"])
    assert done.exit_code == 2
    line = done.output.splitlines()[-1]
    word = typed.partition("=")[0]
    assert line == f"Error: No such option {word!r}. {question(named)}".rstrip()


def test_every_synonym_leads_to_an_option():
    options = {
        option.lstrip("-")
        for command in main.commands.values()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    named = {ours for names in SYNONYMS.values() for ours in names}
    assert named <= options
    train = {o.lstrip("-") for p in main.commands["train"].params for o in p.opts}
    # Else the table would never be asked; `ich predict` has no --weights.
    assert set(SYNONYMS) & train == {"weights"}
    assert all(re.fullmatch(r"[a-z0-9-]+", word) for word in SYNONYMS)


def test_settings_in_python_and_json_lead_to_the_right_ones():
    known = RunConfig()
    assert known.with_settings({"epochs": 3, "size": 64, "preset": "resnet10_2d"}) == RunConfig(
        preset="resnet10_2d", data=DataConfig(size=64), fit=FitConfig(epochs=3)
    )
    for name, hint in (
        ("lr", "Did you mean 'learning_rate'?"),
        ("bs", "Did you mean 'batch_size'?"),
        ("num_workers", "Did you mean 'loader_workers'?"),
        ("epoch", "Did you mean 'epochs'?"),
        ("class_weights", "Did you mean 'label_weight' or 'positive_weight'?"),
        ("Epochs", "Did you mean 'epochs'?"),
    ):
        with pytest.raises(UsageError, match=f"there is no setting '{name}'") as caught:
            known.with_settings({name: 1})
        assert caught.value.hint == hint
    with pytest.raises(UsageError) as caught:
        known.with_settings({"colour": 1})
    assert caught.value.hint.startswith("Known: size, view, ")
    with pytest.raises(UsageError, match="there is no setting 'fit'"):
        known.with_settings({"fit": {}})
    with pytest.raises(UsageError, match=r"unknown key 'fit.lr'. Did you mean 'learning_rate'"):
        RunConfig.from_dict({"fit": {"lr": 0.1}})
    with pytest.raises(UsageError, match="fit.epochs is 'x'; expected int"):
        known.with_settings({"epochs": "x"})


def test_a_short_likeness_is_none():
    assert meant_by("lr", ["loss", "labels"]) == []
    assert meant_by("early", ["edge"]) == []
    assert meant_by("learning", ["learning-rate", "loss"]) == ["learning-rate"]
