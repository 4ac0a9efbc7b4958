"""Batches: the same for any number of workers, in every epoch, through `fit` and after a resume."""

import sys
import threading
import types

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from ich_keras.data.augment import Augmentation, make_augmentation
from ich_keras.data.batches import (
    CTDataset,
    series_batches,
    slab_batches,
    slice_batches,
)
from ich_keras.data.epochs import EpochPlan, epoch_plan
from ich_keras.data.inputs import slice_input, slice_windows
from ich_keras.data.intensity import intensity_of, normalise
from ich_keras.data.loader import CTLoader
from ich_keras.data.seeds import sample_seed
from ich_keras.data.sources import Sources
from ich_keras.data.views import View, make_samples
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import ANY, LABELS


def passes(loader, count):
    return [[(x.numpy(), y.numpy()) for x, y in loader] for _ in range(count)]


def assert_same(one, other):
    assert len(one) == len(other)
    for batches, others in zip(one, other, strict=True):
        assert len(batches) == len(others)
        for (x, y), (other_x, other_y) in zip(batches, others, strict=True):
            np.testing.assert_array_equal(x, other_x)
            np.testing.assert_array_equal(y, other_y)


def test_batches_are_the_cached_slices_in_order(phantom_cache):
    batches = passes(slice_batches(phantom_cache, batch_size=7), 1)[0]
    inputs = np.concatenate([x for x, _ in batches])
    labels = np.concatenate([y for _, y in batches])
    number = len(phantom_cache.slices)
    np.testing.assert_array_equal(inputs, slice_input(phantom_cache.slices_hu(np.arange(number))))
    np.testing.assert_array_equal(labels, phantom_cache.slices[list(LABELS)].to_numpy(np.float32))
    assert inputs.dtype == labels.dtype == np.float32


# torch warns of more workers than cores; the batches must be the same even then.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("augment", ["fast", "thesis"])
def test_any_number_of_workers_gives_the_same_batches(phantom_cache, augment):
    settings = {"batch_size": 8, "seed": 5, "balance": True, "augment": augment}
    indices = np.arange(40)
    expected = passes(slice_batches(phantom_cache, indices, **settings), 3)
    assert not np.array_equal(expected[0][0][0], expected[1][0][0])
    for workers in (1, 2):
        loader = slice_batches(phantom_cache, indices, workers=workers, **settings)
        assert_same(passes(loader, 3), expected)


class _ThreadsOfOpenCV(Dataset):
    """Gives, for any batch, how many threads OpenCV uses in the process that is asked."""

    def __getitem__(self, wanted):
        return cv2.getNumThreads()


def test_workers_do_not_multiply_threads():
    plan = EpochPlan(np.arange(3), np.zeros(3, bool), batch_size=1)
    assert list(CTLoader(_ThreadsOfOpenCV(), plan, workers=1)) == [1, 1, 1]


@pytest.mark.parametrize("augment", ["fast", "thesis"])
def test_a_resumed_training_sees_what_an_uninterrupted_one_saw(phantom_cache, augment):
    settings = {"batch_size": 8, "seed": 5, "augment": augment}
    expected = passes(slice_batches(phantom_cache, np.arange(24), **settings), 3)
    resumed = slice_batches(phantom_cache, np.arange(24), **settings)
    resumed.epoch = 2
    assert_same(passes(resumed, 1), expected[2:])


@pytest.mark.parametrize("workers", [0, 1])
def test_fit_gets_every_epoch_once_however_often_it_asks(phantom_cache, workers):
    import keras

    loader = slice_batches(
        phantom_cache, np.arange(20), batch_size=8, seed=3, augment="thesis", workers=workers
    )
    expected = passes(slice_batches(phantom_cache, np.arange(20), 8, seed=3, augment="thesis"), 3)
    # The network hands the mean of its input through, and the loss is that mean.
    inputs = keras.Input((48, 48, 3))
    mean = keras.layers.Dense(
        1, use_bias=False, kernel_initializer=keras.initializers.Constant(1 / (48 * 48 * 3))
    )
    model = keras.Model(inputs, mean(keras.layers.Flatten()(inputs)))
    model.compile(keras.optimizers.SGD(0.0), lambda truth, mean: keras.ops.mean(mean, axis=-1))
    history = model.fit(
        loader, epochs=3, shuffle=False, validation_data=loader_of(phantom_cache), verbose=0
    )
    means = [np.mean([x.mean() for x, _ in batches]) for batches in expected]
    assert len(set(np.round(means, 3))) == 3
    np.testing.assert_allclose(history.history["loss"], means, atol=1e-5)


def loader_of(cache):
    return slice_batches(cache, np.arange(4), batch_size=4)


def test_balanced_epochs_hold_one_negative_per_positive(phantom_cache):
    loader = slice_batches(phantom_cache, batch_size=4, seed=1, balance=True)
    positive = phantom_cache.slices[ANY].to_numpy() == 1
    fewer = min(positive.sum(), (~positive).sum())
    epochs = [np.concatenate(loader.plan.batches(epoch)) for epoch in range(2)]
    for rows in epochs:
        assert len(set(rows)) == len(rows) == 2 * fewer // 4 * 4
        assert abs(positive[rows].mean() - 0.5) <= 4 / len(rows)
    assert set(epochs[0]) != set(epochs[1])


@settings(max_examples=50)
@given(
    st.integers(1, 60), st.integers(1, 20), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1)
)
def test_every_epoch_is_a_permutation(number, batch_size, shuffled, drop_last, seed):
    indices = np.arange(100, 100 + number)
    plan = EpochPlan(
        indices, np.zeros(number, bool), batch_size, seed if shuffled else None, drop_last=drop_last
    )
    batches = plan.batches(0)
    rows = np.concatenate(batches)
    assert len(batches) == plan.num_batches >= 1
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(indices)
    dropped = number % batch_size if drop_last and number > batch_size else 0
    assert len(rows) == number - dropped


def test_seeds_differ_by_seed_epoch_and_index():
    keys = [(s, e, i) for s in range(3) for e in range(3) for i in range(20)]
    assert len({sample_seed(*key) for key in keys}) == len(keys)


def test_augmentation_stays_a_window_and_depends_on_the_seed_alone():
    windows = np.random.default_rng(0).random((32, 32, 3), np.float32)
    augment, other = make_augmentation(), make_augmentation()
    other(windows, 99)
    changed = 0
    for seed in range(12):
        one, two = augment(windows.copy(), seed), other(windows.copy(), seed)
        np.testing.assert_array_equal(one, two)
        assert one.dtype == np.float32
        assert one.shape == windows.shape
        assert one.min() >= 0
        assert one.max() <= 1
        changed += not np.array_equal(one, windows)
    assert changed > 6


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((8, 8, 3), np.int16), np.full((8, 8, 3), 40, np.float32)],
    ids=["int16 HU", "float HU"],
)
def test_augmentation_refuses_hounsfield_units(wrong):
    with pytest.raises(ValueError, match=r"expected windows, float32 in 0\.\.1"):
        make_augmentation()(wrong, 0)


def test_the_steps_of_an_augmentation_are_independent(monkeypatch):
    from ich_keras.data import augment as module

    image = np.random.default_rng(0).random((24, 24, 3)).astype(np.float32)
    turned = {
        (across, down): image[:: -1 if down else 1, :: -1 if across else 1]
        for across in (False, True)
        for down in (False, True)
    }

    def drawn(seeds=400):
        change = make_augmentation()
        return [change(image, seed) for seed in range(seeds)]

    monkeypatch.setattr(module, "BRIGHTNESS_PROBABILITY", 0.0)
    found = drawn()
    counts = [sum(np.array_equal(one, flipped) for one in found) for flipped in turned.values()]
    # Each of the four ways to flip comes without a movement in one image of eight: 50 of 400.
    assert all(30 <= count <= 70 for count in counts), counts
    # Moved, and nothing else of the geometry tied to it: the others are about half.
    assert 160 <= len(found) - sum(counts) <= 240

    monkeypatch.setattr(module, "BRIGHTNESS_PROBABILITY", 1.0)
    monkeypatch.setattr(module, "AFFINE_PROBABILITY", 0.0)
    monkeypatch.setattr(module, "FLIP_PROBABILITY", 0.0)
    means = np.array([one.mean() for one in drawn(200)]) - image.mean()
    assert (means > 0.02).sum() > 40
    assert (means < -0.02).sum() > 40


def test_flips_are_left_right_only():
    windows = np.random.default_rng(0).random((16, 16, 3), np.float32)
    flip = make_augmentation("flip")
    seen = {flip(windows.copy(), seed).tobytes() for seed in range(12)}
    assert seen == {windows.tobytes(), windows[:, ::-1].tobytes()}
    with pytest.raises(UsageError, match="expected one of fast, thesis, flip"):
        make_augmentation("rotate")


def test_what_has_no_label_is_not_trained_on(phantom_cache):
    slices = phantom_cache.slices.copy()
    slices.loc[3:9, list(LABELS)] = -1
    samples = make_samples(slices, phantom_cache.series, View())
    plan = epoch_plan(samples, seed=0)
    assert sorted(plan.indices) == [i for i in range(len(slices)) if not 3 <= i <= 9]
    with pytest.raises(DataError, match="2 of 5 slices to train on have no label"):
        epoch_plan(samples, np.array([1, 2, 3, 4, 10]), seed=0)
    # In order, as for prediction, all of them come; their labels are no numbers.
    assert len(epoch_plan(samples).indices) == len(slices)
    _, labels = CTDataset(phantom_cache.pixels, samples, 24)[0, np.array([2, 3])]
    assert np.isfinite(labels[0]).all() and np.isnan(labels[1]).all()


def test_what_cannot_be_batched_is_refused(phantom_cache):
    with pytest.raises(DataError, match="no slices to make batches of: `indices` is empty"):
        slice_batches(phantom_cache, np.array([], int))
    negative = np.flatnonzero(phantom_cache.slices[ANY].to_numpy() == 0)
    with pytest.raises(DataError, match="0 of .* slices are positive; balancing needs both"):
        slice_batches(phantom_cache, negative, seed=0, balance=True)
    with pytest.raises(UsageError, match="give a seed"):
        slice_batches(phantom_cache, augment="thesis")
    for bad, message in (
        ({"augment": "big"}, "augmentation 'big'; expected one of fast, thesis, flip"),
        ({"batch_size": 0}, "batch_size is 0; expected a whole number of at least 1"),
        ({"batch_size": 2.5}, r"batch_size is 2\.5; expected a whole number"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
        ({"size": 0}, "size is 0; expected 8 to 4096 pixels"),
        ({"indices": [-1, 3]}, "indices of slices are int64 from -1 to 3; expected whole"),
        ({"indices": [0, 10**6]}, "from 0 to 1000000; expected whole numbers from 0 to"),
        ({"indices": [0.5]}, "indices of slices are float64"),
    ):
        with pytest.raises(UsageError, match=message):
            slice_batches(phantom_cache, **bad)


def brighten(images, seed):
    """An augmentation of a user's own: all of a sample brighter or darker by one amount."""
    images += np.float32(np.random.default_rng(seed).uniform(-0.2, 0.2))  # in place, as it may
    return np.clip(images, 0, 1, out=images)


def shift(inputs, seed):
    return inputs + np.float32(np.random.default_rng(seed).normal())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("make", "augment", "workers"),
    [
        (slice_batches, brighten, 0),
        (slice_batches, brighten, 2),
        (slab_batches, brighten, 0),
        (series_batches, shift, 0),
        (series_batches, shift, 1),
    ],
)
def test_a_function_of_ones_own_changes_each_sample(phantom_cache, make, augment, workers):
    is_after, is_slice = augment is shift, make is slice_batches
    sizes = {} if is_slice else {"num_slices": 5}
    indices, size = np.arange(9), 24
    plain = make(phantom_cache, indices, 4, size=size, seed=3, **sizes)
    given = Augmentation(augment, after_normalisation=True) if is_after else augment
    settings = {"size": size, "seed": 3, "augment": given, "workers": workers, **sizes}
    found = passes(make(phantom_cache, indices, 4, **settings), 2)
    intensity = intensity_of("windows" if is_slice else "wide")
    for epoch, batches in enumerate(found):
        for rows, (inputs, _) in zip(plain.plan.batches(epoch), batches, strict=True):
            samples = CTDataset(phantom_cache.pixels, plain.dataset._samples, size)
            hu = samples._hu(Sources.of(samples._samples, rows))
            expected = slice_windows(hu[:, 0] if is_slice else hu, size, intensity.windows)
            if is_after:
                expected = intensity.normalise(expected, True)
            for place, row in enumerate(rows):
                expected[place] = augment(expected[place], sample_seed(3, epoch, int(row)))
            if not is_after:
                expected = normalise(expected, intensity.normalisation)
            np.testing.assert_array_equal(inputs, expected)
    assert not np.array_equal(found[0][0][0], found[1][0][0])


def test_own_volumes_are_turned_upside_down_too(phantom_cache):
    def unchanged(images, seed):
        return images

    settings = {"num_slices": 3, "seed": 0, "indices": np.arange(12), "size": 16}
    plain = slab_batches(phantom_cache, **settings)
    turned = slab_batches(phantom_cache, augment=unchanged, reverse=True, **settings)
    ((before, _),), ((after, _),) = passes(plain, 1)[0], passes(turned, 1)[0]
    is_same = [np.array_equal(*pair) for pair in zip(before, after, strict=True)]
    is_turned = [np.array_equal(x[::-1], y) for x, y in zip(before, after, strict=True)]
    assert all(np.logical_or(is_same, is_turned))
    assert 0 < sum(is_turned) < 12


@pytest.mark.parametrize(
    ("function", "is_after", "message"),
    [
        (
            lambda x, seed: x[1:],
            False,
            r"returned float32 \(23, 24, 3\); expected float32 \(24, 24",
        ),
        (
            lambda x, seed: x.astype(float),
            False,
            r"returned float64 \(24, 24, 3\); expected float32",
        ),
        (lambda x, seed: None, False, "returned NoneType; expected float32"),
        (lambda x, seed: x + np.nan, True, r"returned values that are not finite; .*\), finite\."),
        (
            lambda x, seed: x * 0 + 1.5,
            False,
            r"returned values from 1\.5 to 1\.5; .* in 0\.\.1 \(windows",
        ),
        (lambda x, seed: x - 1000, False, "returned values from -1000 to "),
    ],
)
def test_what_a_function_of_ones_own_returns_is_checked(phantom_cache, function, is_after, message):
    loader = slice_batches(
        phantom_cache,
        np.arange(4),
        batch_size=4,
        size=24,
        seed=0,
        augment=Augmentation(function, after_normalisation=is_after),
    )
    with pytest.raises(UsageError, match=f"augmentation <lambda> {message}"):
        next(iter(loader))
    # Normalised inputs may have any range.
    if "values from" in message:
        augment = Augmentation(function, after_normalisation=True)
        next(iter(slice_batches(phantom_cache, np.arange(4), seed=0, augment=augment)))


def test_a_wrong_function_is_told_from_a_worker_too(phantom_cache):
    loader = slice_batches(
        phantom_cache, np.arange(4), batch_size=4, seed=0, augment=not_float, workers=1
    )
    with pytest.raises(UsageError, match="augmentation not_float returned float64"):
        next(iter(loader))


def not_float(windows, seed):
    return windows * np.float64(1)


class _Stateful:
    """Holds what cannot be sent to another process."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, windows, seed):
        return windows


def test_a_function_that_cannot_be_sent_to_workers_is_refused(phantom_cache, monkeypatch):
    for function, name in ((lambda x, seed: x, "<lambda>"), (_Stateful(), "_Stateful")):
        message = rf"augmentation .*{name} cannot be sent to worker processes: .*top level"
        with pytest.raises(UsageError, match=message):
            slice_batches(phantom_cache, seed=0, augment=function, workers=1)
        slice_batches(phantom_cache, seed=0, augment=function)
    monkeypatch.setattr(brighten, "__module__", "__main__")
    monkeypatch.setattr("sys.modules", {**sys.modules, "__main__": types.ModuleType("__main__")})
    sys.modules["__main__"].brighten = brighten
    with pytest.raises(UsageError, match="defined in an interactive session or a notebook"):
        slice_batches(phantom_cache, seed=0, augment=brighten, workers=1)


def test_what_is_not_an_augmentation_is_refused(phantom_cache):
    for wrong in (3, Augmentation("thesis")):
        with pytest.raises(UsageError, match="is not a function; expected `function"):
            slice_batches(phantom_cache, seed=0, augment=wrong)
    with pytest.raises(UsageError, match="too many positional.*expected `function.images, seed"):
        slice_batches(phantom_cache, seed=0, augment=lambda images: images)
    with pytest.raises(UsageError, match="draws at random: give a seed"):
        slice_batches(phantom_cache, augment=brighten)


def test_memory_is_used_again_only_when_nobody_holds_it():
    import gc

    import torch

    from ich_keras.data.memory import _free, recycled

    _free.clear()
    shape = (3, 5, 7)

    def address_of(array):
        return array.__array_interface__["data"][0]

    first = recycled(shape, np.float32)
    assert first.shape == shape and first.dtype == np.float32 and first.flags.writeable
    first[...] = 1
    place = address_of(first)
    # A view of a view, and a tensor of another: what `default_convert` and a slab leave behind.
    view, tensor = first[1:, ::2][0], torch.as_tensor(first[:2])
    del first
    gc.collect()
    assert address_of(recycled(shape, np.float32)) != place
    del view
    gc.collect()
    others = [recycled(shape, np.float32) for _ in range(4)]
    assert place not in map(address_of, others)
    for other in others:
        other[...] = 2
    assert (tensor == 1).all()
    del tensor, other, others
    gc.collect()
    assert len(_free) <= 3
    _free.clear()
    again = recycled(shape, np.float32)
    place = address_of(again)
    del again
    assert address_of(recycled(shape, np.float32)) == place
    # Not for what is much smaller: a large block would be held for it.
    assert address_of(recycled((1,), np.float32)) != place


def test_batches_that_are_kept_stay_what_they_were(phantom_cache):
    settings = {"indices": np.arange(20), "batch_size": 4, "seed": 1, "augment": "fast"}
    kept = [x for x, _ in slice_batches(phantom_cache, **settings)]
    for x, (again, _) in zip(kept, slice_batches(phantom_cache, **settings), strict=True):
        np.testing.assert_array_equal(x, again)
