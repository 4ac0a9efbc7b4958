"""What a run remembers of a user's augmentation, so that another one cannot resume it."""

import functools

import numpy as np
import pytest

from ich_keras.data.augment import Augmentation, augmentation_name


def brighten(images, seed):
    return np.clip(images + 0.1, 0, 1)


class Brighter:
    """An augmentation with a setting, and with a counter that must not count."""

    def __init__(self, by):
        self.by = by
        self._calls = 0

    def __call__(self, images, seed):
        self._calls += 1
        return np.clip(images + self.by, 0, 1)

    def halved(self, images, seed):
        return images * self.by


def scaled(factor, images, seed):
    return images * factor


def scaled_by(factor):
    seen = []

    def change(images, seed):
        seen.append(seed)
        return images * factor

    return change


first_lambda, second_lambda = (
    lambda images, seed: images,
    lambda images, seed: images * 0.5,
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (functools.partial(scaled, 0.1), functools.partial(scaled, 0.2)),
        (functools.partial(scaled, factor=[0.1]), functools.partial(scaled, factor=[0.2])),
        (functools.partial(scaled, 0.1), functools.partial(brighten, 0.1)),
        (functools.partial(scaled, np.ones(2000)), functools.partial(scaled, np.eye(2000)[0])),
        (functools.partial(scaled, "a" * 999 + "b"), functools.partial(scaled, "a" * 999 + "c")),
        (Brighter(0.1), Brighter(0.2)),
        (Brighter(0.1).halved, Brighter(0.2).halved),
        (Brighter(0.1), Brighter(0.1).halved),
        (scaled_by(0.1), scaled_by(0.2)),
        (first_lambda, second_lambda),
        (brighten, Augmentation(brighten, after_normalisation=True)),
    ],
)
def test_other_settings_make_another_augmentation(one, other):
    names = augmentation_name(one), augmentation_name(other)
    assert names[0] != names[1]
    assert all(" at 0x" not in name and len(name) < 400 for name in names)


def test_an_augmentation_keeps_its_name_when_it_was_used():
    assert augmentation_name(brighten) == f"{__name__}.brighten"
    assert augmentation_name(Augmentation(brighten)) == f"{__name__}.brighten"
    for make in (lambda: Brighter(0.5), lambda: scaled_by(0.5)):
        used = make()
        before = augmentation_name(used)
        used(np.ones((1, 1, 1), np.float32), 0)
        assert augmentation_name(used) == augmentation_name(make()) == before
    assert augmentation_name(Brighter(0.5)) == f"{__name__}.Brighter(by=0.5)"
    assert augmentation_name(scaled_by(0.5)).endswith("change(factor=0.5)")
