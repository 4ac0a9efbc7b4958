"""Weights files: exact round trips, files nobody vouches for, loading by name, finding by name."""

import hashlib
import itertools
import json
import shutil

import h5py
import keras
import numpy as np
import pytest

from ich_keras.errors import DataError, UsageError
from ich_keras.files import fingerprint
from ich_keras.labels import LABELS
from ich_keras.models.classifier import classifier, compile_classifier
from ich_keras.models.resnet import resnet
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights import LoadedWeights, load_weights, own_variables, save_weights
from ich_keras.models.weights_file import RECORD, SUFFIX, read_record, read_weights
from ich_keras.models.weights_lookup import find_weights, source_of, weights_folder

NARROW = ModelSpec((32, 32, 3), width=8)
PROVENANCE = {"source": "torchvision_resnet18", "licence": "BSD-3-Clause"}
NETWORK = {"network": json.loads(json.dumps(NARROW.to_dict()))}


def values_of(model) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(variable).copy() for variable in model.weights]


def randomise(model, seed: int):
    """Give statistics of fresh normalisation values of their own, which a swap would show."""
    random = np.random.default_rng(seed)
    for variable in model.weights:
        if "seed" not in variable.path:
            variable.assign(random.normal(size=variable.shape).astype("float32"))
    return model


def is_same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def place_of(file: h5py.File, layer: str) -> h5py.Group:
    """Return the group that holds a layer's variables."""
    found = []

    def visit(name, thing):
        if name.endswith("vars") and thing.attrs.get("name") == layer:
            found.append(thing)

    file.visititems(visit)
    return found[0]


def edit_record(file: h5py.File, change) -> None:
    record = json.loads(file.attrs[RECORD])
    change(record)
    file.attrs[RECORD] = json.dumps(record)


@pytest.fixture(scope="module")
def trained():
    return randomise(classifier(NARROW), seed=1)


@pytest.fixture(scope="module")
def good_file(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / f"good{SUFFIX}"
    save_weights(trained, path, {**PROVENANCE, **NETWORK})
    return path


@pytest.fixture(scope="module")
def target():
    return randomise(classifier(NARROW), seed=2)


@pytest.fixture(scope="module")
def backbone():
    return randomise(resnet(NARROW), seed=3)


@pytest.fixture
def edited(good_file, tmp_path):
    """Return a function that copies the good file, edits the copy and returns its path.

    Without checksums, as others and older versions write files: then the rest must find it.
    """

    def edit(change, has_checksums=False):
        path = tmp_path / f"edited{SUFFIX}"
        shutil.copy(good_file, path)
        with h5py.File(path, "r+") as file:
            if not has_checksums:
                edit_record(file, lambda record: record.pop("checksums"))
            change(file)
        return path

    return edit


# --- Round trip -----------------------------------------------------------------------------


def test_round_trip(trained, good_file):
    model = randomise(classifier(NARROW), seed=9)
    loaded = load_weights(model, good_file, NARROW, needs_head=True)
    assert is_same(values_of(model), values_of(trained))
    assert loaded.loaded == tuple(layer.name for layer in model.layers if own_variables(layer))
    assert loaded.fresh == loaded.ignored == ()
    assert loaded.record == {"labels": list(LABELS), **PROVENANCE, **NETWORK}
    assert read_record(good_file) == loaded.record
    assert list(good_file.parent.iterdir()) == [good_file]


def test_what_is_read_is_what_was_saved(trained, good_file):
    file = read_weights(str(good_file))
    assert file.spec == NARROW
    assert len(file.layers) == 41  # 20 convolutions, 20 normalisations, the head
    for name, arrays in file.layers.items():
        variables = own_variables(trained.get_layer(name))
        assert is_same(arrays, [keras.ops.convert_to_numpy(v) for v in variables])
        assert all(array.dtype == np.float32 for array in arrays)


def test_keras_reads_our_files_and_we_read_its(trained, good_file, tmp_path):
    model = randomise(classifier(NARROW), seed=10)
    model.load_weights(good_file)
    assert is_same(values_of(model), values_of(trained))
    trained.save_weights(tmp_path / f"keras{SUFFIX}")
    randomise(model, seed=11)
    loaded = load_weights(model, tmp_path / f"keras{SUFFIX}", NARROW)
    assert is_same(values_of(model), values_of(trained))
    assert loaded.record == read_record(tmp_path / f"keras{SUFFIX}") == {}


def test_the_optimizer_of_a_compiled_model_is_no_weight(target, tmp_path):
    model = randomise(compile_classifier(classifier(NARROW)), seed=4)
    model.optimizer.build(model.trainable_variables)
    model.save_weights(tmp_path / f"keras{SUFFIX}")
    save_weights(model, tmp_path / f"ours{SUFFIX}")
    with h5py.File(tmp_path / f"keras{SUFFIX}") as file:
        assert len(file["optimizer/vars"]) > 100
    with h5py.File(tmp_path / f"ours{SUFFIX}") as file:
        assert "optimizer" not in file
    for name in ("keras", "ours"):
        loaded = load_weights(randomise(target, seed=2), tmp_path / f"{name}{SUFFIX}")
        assert is_same(values_of(target), values_of(model))
        assert loaded.ignored == ()


@pytest.mark.parametrize("record", [{"loss": float("nan")}, {"a": {1}}, {"a": "x" * 2**16}])
def test_a_save_that_fails_leaves_the_old_file(trained, good_file, tmp_path, record):
    path = tmp_path / f"a{SUFFIX}"
    shutil.copy(good_file, path)
    with pytest.raises((ValueError, TypeError)):
        save_weights(trained, path, record)
    assert path.read_bytes() == good_file.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


# --- Damage that HDF5 does not see -----------------------------------------------------------


def offset_of(path, layer: str, number: int = 0) -> int:
    with h5py.File(path) as file:
        return place_of(file, layer)[str(number)].id.get_offset()


def test_every_layer_has_a_checksum_of_shapes_and_values(trained, good_file, tmp_path):
    with h5py.File(good_file) as file:
        checksums = json.loads(file.attrs[RECORD])["checksums"]
    by_hand = {}
    for layer in trained.layers:
        arrays = [keras.ops.convert_to_numpy(v) for v in own_variables(layer)]
        if arrays:
            shapes = str([tuple(array.shape) for array in arrays]).encode()
            content = b"".join(array.astype("<f4").tobytes() for array in arrays)
            by_hand[layer.name] = hashlib.sha256(shapes + content).hexdigest()[:32]
    assert checksums["layers"] == by_hand
    digest = fingerprint(by_hand)
    assert read_weights(good_file).digest == digest
    assert save_weights(trained, tmp_path / f"again{SUFFIX}", {"source": "elsewhere"}) == digest


def test_the_last_bit_of_a_weight_is_seen(good_file, target, tmp_path):
    path = tmp_path / f"bit{SUFFIX}"
    for layer, number in (("conv1", 0), ("bn1", 3), ("fc", 1)):
        raw = bytearray(good_file.read_bytes())
        raw[offset_of(good_file, layer, number)] ^= 1
        path.write_bytes(raw)
        before = values_of(target)
        for read in (read_weights, lambda path: load_weights(target, path, NARROW)):
            with pytest.raises(
                DataError,
                match=f"1 of 41 layers are not as they were saved.*; the first is {layer}",
            ):
                read(path)
        assert is_same(values_of(target), before)


def test_lost_blocks_are_seen(good_file, tmp_path):
    """4 KB of zeros, as a broken disk or an interrupted copy leaves them."""
    raw = good_file.read_bytes()
    path = tmp_path / f"blocks{SUFFIX}"
    found = []
    for start in range(0, len(raw), 9 * 4096):
        path.write_bytes(raw[:start] + bytes(len(raw[start : start + 4096])) + raw[start + 4096 :])
        with pytest.raises(DataError) as caught:
            read_weights(path)
        found.append("not as they were saved" in str(caught.value))
    assert 0.4 * len(found) < sum(found) < len(found)  # else HDF5's own structure is hurt


def test_layers_with_each_others_values_are_refused(edited):
    """Two layers of equal shapes, exchanged: all values are there, in the wrong place."""

    def exchange(file):
        one, other = (place_of(file, name) for name in ("layer1_0_bn1", "layer1_0_bn2"))
        one.attrs["name"], other.attrs["name"] = other.attrs["name"], one.attrs["name"]

    with pytest.raises(DataError, match="2 of 41 layers are not as they were saved"):
        read_weights(edited(exchange, has_checksums=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["labels"].reverse(),
        lambda record: record.update(source="elsewhere"),
        lambda record: record["network"].update(strides=[1, 1, 1, 1]),
        lambda record: record.pop("licence"),
        lambda record: record["checksums"].update(record="0" * 64),
        lambda record: record.update(checksums=5),
        lambda record: record["checksums"].update(layers=5),
    ],
)
def test_a_changed_record_is_refused(edited, change):
    path = edited(lambda file: edit_record(file, change), has_checksums=True)
    for read in (read_weights, read_record):
        with pytest.raises(DataError, match="its record does not match its checksum"):
            read(path)


def test_layers_without_checksum_and_checksums_without_layer(edited):
    def less(file):
        edit_record(file, lambda record: record["checksums"]["layers"].pop("conv1"))

    def more(file):
        edit_record(file, lambda record: record["checksums"]["layers"].update(conv9="0" * 32))

    with pytest.raises(DataError, match="1 of 40 layers .*; the first is conv1"):
        read_weights(edited(less, has_checksums=True))
    with pytest.raises(DataError, match="1 of 42 layers .*; the first is conv9"):
        read_weights(edited(more, has_checksums=True))


def test_files_without_checksums_load_and_say_so(trained, good_file, edited, target, tmp_path):
    trained.save_weights(tmp_path / f"keras{SUFFIX}")
    for path in (edited(lambda file: None), tmp_path / f"keras{SUFFIX}"):
        loaded = load_weights(target, path, NARROW)
        assert is_same(values_of(target), values_of(trained))
        assert loaded.digest is None
        assert "without checksums, so that damage would not be noticed" in str(loaded)
    loaded = load_weights(target, good_file, NARROW)
    assert loaded.digest == read_weights(good_file).digest
    assert "checksums" not in str(loaded)


# --- Files nobody vouches for ---------------------------------------------------------------


def replace(**settings):
    """Replace the first variable of bn1 by a data set made with these settings."""

    def change(file):
        group = place_of(file, "bn1")
        del group["0"]
        group.create_dataset("0", **settings)

    return change


def beside(file) -> str:
    """Write good numbers into another file; a link to them would work."""
    path = f"{file.filename}.other"
    with h5py.File(path, "w") as other:
        other["extra/gamma"] = np.ones(8, "float32")
    return path


def linked(file, link):
    group = place_of(file, "bn1")
    del group["0"]
    group["0"] = link


def external_link(file):
    linked(file, h5py.ExternalLink(beside(file), "/extra/gamma"))


def soft_link(file):
    linked(file, h5py.SoftLink(f"{place_of(file, 'bn1').name}/1"))


def dangling_link(file):
    linked(file, h5py.SoftLink("/nowhere"))


def external_link_to_a_group(file):
    file["layers/linked"] = h5py.ExternalLink(beside(file), "/extra")


def soft_link_to_a_group(file):
    file["layers/linked"] = h5py.SoftLink("/layers")


def virtual(file):
    layout = h5py.VirtualLayout((8,), "float32")
    layout[:] = h5py.VirtualSource(beside(file), "extra/gamma", (8,))
    group = place_of(file, "bn1")
    del group["0"]
    group.create_virtual_dataset("0", layout)


def external(file):
    raw = f"{file.filename}.raw"
    np.ones(8, "float32").tofile(raw)
    replace(shape=(8,), dtype="float32", external=[(raw, 0, 32)])(file)


def absent(file):
    del place_of(file, "bn1")["2"]


def not_a_data_set(file):
    group = place_of(file, "bn1")
    del group["1"]
    group.create_group("1")


def renamed(layer):
    def change(file):
        place_of(file, "bn1").attrs["name"] = layer

    return change


def nameless(file):
    del place_of(file, "bn1").attrs["name"]


def second_name(file):
    group = place_of(file, "bn1")
    del group["1"]
    group["1"] = group["0"]


def diamond(file):
    """Six groups with fifty names each for the next: 50 ** 5 ways to walk."""
    groups = [file.create_group(f"layers/diamond{n}") for n in range(6)]
    for above, below in itertools.pairwise(groups):
        for n in range(50):
            above[str(n)] = below


def in_itself(file):
    file["layers/again"] = file["layers"]


def nested(file):
    file.create_group("layers/" + "/".join("abcdefghi"))


def stray(file):
    file["layers/stray"] = np.ones(3)


BAD_CONTENTS = {
    "external link": (external_link, r"/vars/0 is absent or a link \(ExternalLink\); refused"),
    "soft link": (soft_link, r"/vars/0 is absent or a link \(SoftLink\); refused"),
    "dangling link": (dangling_link, r"/vars/0 is absent or a link \(SoftLink\); refused"),
    "external link to a group": (
        external_link_to_a_group,
        "/layers/linked is a ExternalLink; refused, because it reads from elsewhere",
    ),
    "soft link to a group": (
        soft_link_to_a_group,
        "/layers/linked is a SoftLink; refused, because it reads from elsewhere",
    ),
    "virtual": (virtual, "/vars/0 is a virtual or external data set, which reads other files"),
    "external": (external, "/vars/0 is a virtual or external data set, which reads other files"),
    "hard link to an array": (second_name, "/vars/1 is a second name of what was read"),
    "hard links to groups": (diamond, "is a second name of what was read before; refused"),
    "group in itself": (in_itself, "/layers/again is a second name of what was read before"),
    "4 TB without data": (
        replace(shape=(2**40,), dtype="float32", chunks=(2**20,)),
        "/vars/0 declares 4,398,046,511,104 bytes and holds 0; refused",
    ),
    "contiguous without data": (
        replace(shape=(2**40,), dtype="float32"),
        "/vars/0 declares 4,398,046,511,104 bytes and holds 0; refused",
    ),
    "few bytes without data": (
        replace(shape=(8,), dtype="float32"),
        "/vars/0 declares 32 bytes and holds 0; refused",
    ),
    "compressed zeros": (
        replace(data=np.zeros(2**20, "float32"), compression="gzip"),
        "/vars/0 is compressed; refused",
    ),
    "compressed chunk beyond its data set": (
        replace(data=np.ones(8, "float32"), maxshape=(None,), chunks=(2**20,), compression="gzip"),
        "/vars/0 is compressed; refused",
    ),
    "integers": (replace(data=np.ones(8, "int32")), "/vars/0 is int32; expected floats"),
    "booleans": (replace(data=np.ones(8, bool)), "/vars/0 is bool; expected floats"),
    "complex": (replace(data=np.ones(8, "complex64")), "/vars/0 is complex64; expected floats"),
    "text": (replace(data=np.full(8, b"a")), r"/vars/0 is \|S1; expected floats"),
    "references": (
        replace(shape=(8,), dtype=h5py.ref_dtype),
        "/vars/0 is object; expected floats",
    ),
    "no space": (replace(data=h5py.Empty("float32")), "is damaged"),
    "NaN": (
        replace(data=np.full(8, np.nan, "float32")),
        r"/vars/0 \(bn1\) holds values that are not finite",
    ),
    "infinity": (
        replace(data=np.array([1.0] * 7 + [-np.inf], "float32")),
        r"/vars/0 \(bn1\) holds values that are not finite",
    ),
    "float64 beyond float32": (
        replace(data=np.full(8, 1e300)),
        "/vars/0 is float64 and would be rounded",
    ),
    "float64 between float32": (
        replace(data=np.full(8, 0.1)),
        "/vars/0 is float64 and would be rounded",
    ),
    "a number is missing": (absent, r"/vars/2 is absent or a link"),
    "group for an array": (not_a_data_set, "/vars/1 is not a data set"),
    "array outside": (stray, "the data set /layers/stray lies outside a layer's `vars`"),
    "deep nesting": (nested, "groups nest deeper than 8; refused"),
    "duplicate names": (renamed("conv1"), "names no layer of its own"),
    "a number as name": (renamed(5), "names no layer of its own"),
    "names as name": (renamed(["bn1", "bn1"]), "names no layer of its own"),
    "no name": (nameless, "names no layer of its own .*Expected a file that Keras 3.15"),
}


@pytest.mark.parametrize(("change", "message"), BAD_CONTENTS.values(), ids=BAD_CONTENTS)
def test_bad_contents_are_refused_and_nothing_is_loaded(edited, target, change, message):
    path = edited(change)
    with pytest.raises(DataError, match=message) as caught:
        read_weights(path)
    assert str(caught.value).startswith(str(path))
    before = values_of(target)
    with pytest.raises(DataError, match=message):
        load_weights(target, path)
    assert is_same(values_of(target), before)


def test_plain_floats_of_other_kinds_are_read_exactly(edited, target):
    values = np.array([0.5, -1, 2.0**-14, 1024, -0.0, 3, 65504, 0])
    for dtype in ("<f2", ">f2", ">f4", "<f8", ">f8"):
        path = edited(replace(data=values.astype(dtype)))
        load_weights(target, path)
        gamma = keras.ops.convert_to_numpy(target.get_layer("bn1").gamma)
        assert gamma.tobytes() == values.astype("float32").tobytes()


BAD_RECORDS = {
    "not JSON": ("{", "its record is not JSON"),
    "empty": ("", "its record is not JSON"),
    "list": ("[1]", "its record is list; expected an object"),
    "null": ("null", "its record is NoneType; expected an object"),
    "too deep": ("[" * 60_000, "its record is not JSON"),
    "number": (5, "its record is not text; expected JSON"),
    "texts": (["{}", "{}"], "its record is not text; expected JSON"),
    "labels": ('{"labels": 6}', "labels of its record is 6; expected a list of texts"),
    "no labels": ('{"labels": null}', "labels of its record is null; expected a list of texts"),
    "numbers": ('{"labels": [1, 2]}', "labels of its record is .1, 2.; expected a list of texts"),
    "changes": ('{"changes": "inflated"}', "changes of its record is .inflated.; expected a list"),
    "network": ('{"network": [1]}', "network of its record is .1.; expected an object"),
    "recipe": ('{"recipe": "x"}', "recipe of its record is .x.; expected an object"),
    "intensity": ('{"intensity": []}', r"intensity of its record is \[\]; expected a text"),
    "licence": ('{"licence": 3}', "licence of its record is 3; expected a text"),
    "escape codes": (
        r'{"source": "\u001b[31m"}',
        r"source of its record is .*u001b.31m.; expected",
    ),
    "half a character": (r'{"source": "\ud800"}', r"source of its record is .*ud800.; expected"),
    "not a number": ('{"parity": NaN}', "its record is not JSON .*not JSON compliant"),
    "infinite": ('{"parity": [1e999]}', "its record is not JSON .*not JSON compliant"),
}


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_bad_records(edited, record, message):
    path = edited(lambda file: file.attrs.__setitem__(RECORD, record))
    for read in (read_weights, read_record):
        with pytest.raises(DataError, match=message):
            read(path)


@pytest.mark.parametrize(
    "network",
    [
        {},
        {"input_shape": 5},
        {"colour": "red"},
        {"input_shape": [32, 32, 3], "depth": 19},
        {"input_shape": [32, 32, 3], "strides": [1, 2, 2, {}]},
        {"input_shape": [32, 32, 3], "width": "8"},
    ],
)
def test_records_of_no_network(edited, target, network):
    path = edited(lambda file: file.attrs.__setitem__(RECORD, json.dumps({"network": network})))
    with pytest.raises(DataError, match="its record is damaged"):
        load_weights(target, path, NARROW)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99999])
def test_truncated_files(good_file, tmp_path, share):
    content = good_file.read_bytes()
    path = tmp_path / f"half{SUFFIX}"
    path.write_bytes(content[: int(share * len(content))])
    for read in (read_weights, read_record):
        with pytest.raises(DataError, match="is damaged: .*truncated"):
            read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an HDF5 file"),
        (b"<!DOCTYPE html><html>", "is not an HDF5 file"),
        (np.random.default_rng(0).bytes(10_000), "is not an HDF5 file"),
        (b"PK\x03\x04" + bytes(1000), "is not an HDF5 file"),
        (b"\x89HDF\r\n\x1a\n", "is damaged"),
        (b"\x89HDF\r\n\x1a\n" + np.random.default_rng(1).bytes(10_000), "is damaged"),
    ],
)
def test_other_files(tmp_path, content, message):
    path = tmp_path / f"other{SUFFIX}"
    path.write_bytes(content)
    for read in (read_weights, read_record):
        with pytest.raises(DataError, match=message):
            read(path)


def test_files_without_weights(tmp_path):
    path = tmp_path / f"empty{SUFFIX}"
    with h5py.File(path, "w") as file:
        file.create_group("layers/conv2d/vars")
    with pytest.raises(DataError, match="holds no weights"):
        read_weights(path)


@pytest.mark.parametrize("read", [read_weights, read_record])
def test_names_of_files(tmp_path, read):
    with pytest.raises(UsageError, match="does not exist"):
        read(tmp_path / f"none{SUFFIX}")
    (tmp_path / "weights.h5").touch()
    with pytest.raises(UsageError, match=r"expected a file ending in \.weights\.h5"):
        read(tmp_path / "weights.h5")
    (tmp_path / f"folder{SUFFIX}").mkdir()
    with pytest.raises(UsageError, match="is a folder; expected a weights file"):
        read(tmp_path / f"folder{SUFFIX}")


# --- Loading --------------------------------------------------------------------------------


def without(layer):
    def change(file):
        del file[place_of(file, layer).parent.name]

    return change


def with_more(file):
    group = file.create_group("layers/extra/vars")
    group.attrs["name"] = "extra"
    group["0"] = np.ones(3, "float32")


def fewer_variables(file):
    del place_of(file, "bn1")["3"]


MISFITS = {
    "missing layer": (
        without("layer1_0_conv1"),
        "missing in the file: layer1_0_conv1; not in the network: nothing",
    ),
    "surplus layer": (with_more, "missing in the file: nothing; not in the network: extra"),
    "renamed layer": (
        renamed("bn2"),
        "missing in the file: bn1; not in the network: bn2",
    ),
    "wrong shape": (
        replace(data=np.ones(7, "float32")),
        r"does not fit the network: bn1 has \[\(7,\), \(8,\), .* in the file, \[\(8,\)",
    ),
    "right number, wrong shape": (
        replace(data=np.ones((2, 4), "float32")),
        r"does not fit the network: bn1 has \[\(2, 4\)",
    ),
    "wrong number": (fewer_variables, r"does not fit the network: bn1 has .* in the file"),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_misfits_are_named_and_nothing_is_loaded(edited, target, change, message):
    path = edited(change)
    before = values_of(target)
    with pytest.raises(DataError, match=message):
        load_weights(target, path)
    assert is_same(values_of(target), before)


def test_backbone_into_classifier(backbone, target, tmp_path):
    save_weights(backbone, tmp_path / f"backbone{SUFFIX}", NETWORK)
    head = [keras.ops.convert_to_numpy(v).copy() for v in target.get_layer("fc").weights]
    loaded = load_weights(target, tmp_path / f"backbone{SUFFIX}", NARROW)
    assert loaded.fresh == ("fc",)
    assert loaded.ignored == ()
    assert "fc" not in loaded.loaded
    assert is_same([keras.ops.convert_to_numpy(v) for v in target.get_layer("fc").weights], head)
    assert is_same(
        values_of(keras.Model(target.input, target.get_layer("avgpool").output)),
        values_of(backbone),
    )


def test_needed_head(backbone, target, tmp_path):
    save_weights(backbone, tmp_path / f"backbone{SUFFIX}", NETWORK)
    before = values_of(target)
    with pytest.raises(DataError, match="missing in the file: fc; not in the network: nothing"):
        load_weights(target, tmp_path / f"backbone{SUFFIX}", NARROW, needs_head=True)
    assert is_same(values_of(target), before)


def test_classifier_into_backbone(trained, good_file):
    model = randomise(resnet(NARROW), seed=5)
    loaded = load_weights(model, good_file, NARROW)
    assert loaded.ignored == ("fc",)
    assert loaded.fresh == ()
    assert is_same(values_of(model), values_of(trained)[: len(model.weights)])


@pytest.mark.parametrize("labels", [LABELS[::-1], LABELS[:5], [], ["a"]])
def test_another_label_order(trained, backbone, target, tmp_path, labels):
    path = tmp_path / f"other{SUFFIX}"
    save_weights(trained, path, {**NETWORK, "labels": list(labels)})
    before = values_of(target)
    with pytest.raises(DataError, match="expected the order epidural, .*under wrong names"):
        load_weights(target, path, NARROW)
    assert is_same(values_of(target), before)
    without_head = resnet(NARROW)
    assert load_weights(without_head, path, NARROW).ignored == ("fc",)
    save_weights(backbone, path, {**NETWORK, "labels": list(labels)})
    assert load_weights(target, path, NARROW).fresh == ("fc",)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)},
            r"another network: strides \(\(1, 1\), \(2, 2\), \(1, 1\), \(1, 1\)\) \(file\),"
            r" \(\(1, 1\), \(2, 2\), \(2, 2\), \(2, 2\)\) \(network\); dilations",
        ),
        (
            {"stem_stride": 1},
            r"another network: stem_stride \(1, 1\) \(file\), \(2, 2\).* restride",
        ),
        ({"pool_kernel": None}, r"another network: pool_kernel None \(file\), \(3, 3\)"),
        ({"norm": "frozen", "dropout": 0.1, "input_shape": (64, None, 3)}, None),
    ],
)
def test_other_networks_of_equal_shapes(trained, target, tmp_path, other, message):
    path = tmp_path / f"other{SUFFIX}"
    spec = ModelSpec(**{**NARROW.to_dict(), **other})
    save_weights(trained, path, {"network": spec.to_dict()})
    before = values_of(randomise(target, seed=6))
    if message is not None:
        with pytest.raises(DataError, match=message):
            load_weights(target, path, NARROW)
        assert is_same(values_of(target), before)
    load_weights(target, path, NARROW if message is None else None)
    assert is_same(values_of(target), values_of(trained))


def test_another_number_of_channels(target, tmp_path):
    path = tmp_path / f"gray{SUFFIX}"
    gray = ModelSpec((32, 32, 1), width=8)
    save_weights(classifier(gray), path, {"network": gray.to_dict()})
    with pytest.raises(DataError, match=r"channels 1 \(file\), 3 \(network\)") as caught:
        load_weights(target, path, NARROW)
    assert caught.value.hint.startswith(
        f"weights-convert channels --weights {path} --channels 3 --out"
    )
    with pytest.raises(DataError, match="conv1 has .*so must the input channels"):
        load_weights(target, path)


def test_group_normalisation_takes_no_weights_of_batch_normalisation(good_file):
    spec = ModelSpec((32, 32, 3), width=8, norm="group")
    with pytest.raises(DataError, match=r"norm batch \(file\), group .* take norm 'frozen'"):
        load_weights(resnet(spec), good_file, spec)


def test_the_account_of_what_was_loaded(good_file, tmp_path):
    account = str(load_weights(resnet(NARROW), good_file))
    assert account == (
        f"40 layers from {good_file}; source torchvision_resnet18 (BSD-3-Clause); new: none;"
        " not used: fc"
    )
    record = {"source": "own checkpoint", "changes": ["inflated (mean)", 5], **NETWORK}
    loaded = LoadedWeights(tmp_path, ("conv1",), fresh=("fc",), record=record, digest="0" * 64)
    account = str(loaded)
    assert account == (
        f"1 layers from {tmp_path}; source own checkpoint (no licence recorded),"
        " changed: inflated (mean), 5; new: fc"
    )
    account = str(LoadedWeights(tmp_path, ("conv1",)))
    assert account == (
        f"1 layers from {tmp_path}; its network is not recorded: source unknown, strides and"
        " dilations not checked; without checksums, so that damage would not be noticed; new: none"
    )


# --- Finding --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of converted weights."""
    monkeypatch.setenv("ICH_KERAS_WEIGHTS", str(tmp_path / "converted"))
    (tmp_path / "converted").mkdir()
    return tmp_path / "converted"


@pytest.mark.parametrize(
    ("name", "preset_name", "source"),
    [
        ("imagenet", "resnet18_2d", "torchvision_resnet18"),
        ("imagenet", "resnet50_2d", "torchvision_resnet50"),
        ("imagenet", "resnet34_3d", "torchvision_resnet34"),
        ("imagenet", "densenet121_2d", "torchvision_densenet121"),
        ("imagenet", "seresnext50_2d", "timm_seresnext50_32x4d"),
        ("imagenet", "resnet18_3d_slab", "torchvision_resnet18"),
        ("kinetics", "r3d_18", "torchvision_r3d_18"),
        ("kinetics", "mc3_18", "torchvision_mc3_18"),
        ("kinetics", "r2plus1d_18", "torchvision_r2plus1d_18"),
        ("medicalnet", "resnet10_3d_medicalnet", "medicalnet_resnet10_23datasets"),
        ("medicalnet", "resnet18_2d_medicalnet", "medicalnet_resnet18_23datasets"),
        ("torchvision_resnet18", "resnet18_2d", "torchvision_resnet18"),
        ("anything", "resnet18_2d", "anything"),
    ],
)
def test_families(folder, name, preset_name, source):
    assert source_of(name, preset_name) == source


def test_of_several_releases_the_one_that_is_there(folder):
    (folder / f"medicalnet_resnet18{SUFFIX}").touch()
    found = find_weights("medicalnet", "resnet18_3d_medicalnet")
    assert found == folder / f"medicalnet_resnet18{SUFFIX}"
    (folder / f"medicalnet_resnet18_23datasets{SUFFIX}").touch()
    found = find_weights("medicalnet", "resnet18_3d_medicalnet")
    assert found == folder / f"medicalnet_resnet18_23datasets{SUFFIX}"


@pytest.mark.parametrize(
    ("name", "preset_name", "known"),
    [
        ("imagenet", "resnet10_2d", "none"),
        ("imagenet", "r3d_18", "torchvision_r3d_18"),
        ("imagenet", "resnet18_3d_medicalnet", "medicalnet_resnet18_23datasets"),
        ("kinetics", "resnet18_2d", "torchvision_resnet18"),
        ("kinetics", "resnet18_3d", "torchvision_resnet18"),
        ("kinetics", "densenet121_2d", "torchvision_densenet121"),
        ("medicalnet", "resnet18_2d", "torchvision_resnet18"),
    ],
)
def test_families_a_preset_lacks(folder, name, preset_name, known):
    message = f"there are no {name} weights for {preset_name}; known: {known}"
    with pytest.raises(UsageError, match=message):
        source_of(name, preset_name)
    with pytest.raises(UsageError, match=message):
        find_weights(name, preset_name)


@pytest.mark.parametrize(
    ("name", "preset_name", "source"),
    [
        ("imagenet", "resnet18_2d", "torchvision_resnet18"),
        ("torchvision_resnet18", "resnet18_2d", "torchvision_resnet18"),
        ("kinetics", "r3d_18", "torchvision_r3d_18"),
        ("medicalnet", "resnet18_3d_medicalnet", "medicalnet_resnet18_23datasets"),
        ("medicalnet_resnet18", "resnet18_3d_medicalnet", "medicalnet_resnet18"),
    ],
)
def test_converted_weights_are_found_by_name(folder, name, preset_name, source):
    with pytest.raises(UsageError, match=rf"{source}\.weights\.h5 does not exist") as caught:
        find_weights(name, preset_name)
    assert f"weights-convert convert --source {source} --checkpoint" in caught.value.hint
    path = folder / f"{source}{SUFFIX}"
    path.touch()
    assert find_weights(name, preset_name) == path


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("torchvision_resnet81", "Did you mean 'torchvision_resnet18'?"),
        ("imagenets", "Did you mean 'imagenet'?"),
        ("mine", "`weights-convert list` lists the sources."),
        ("", "`weights-convert list` lists the sources."),
        ("runs", f"For the weights of that run give runs/best{SUFFIX}."),
    ],
)
def test_unknown_names(folder, tmp_path, monkeypatch, name, hint):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"best{SUFFIX}").touch()
    monkeypatch.chdir(tmp_path)
    message = rf"weights '{name}'; expected a file ending in \.weights\.h5, or the name of a source"
    with pytest.raises(UsageError, match=message) as caught:
        find_weights(name, "resnet18_2d")
    assert caught.value.hint == hint


def test_a_name_of_ones_own(folder):
    (folder / f"mine{SUFFIX}").touch()
    assert find_weights("mine", "resnet18_2d") == folder / f"mine{SUFFIX}"


@pytest.mark.parametrize(
    ("name", "preset_name", "command"),
    [
        ("imagenet", "resnet18_3d", "inflate"),
        ("torchvision_resnet50", "resnet50_3d_slab", "inflate"),
        ("medicalnet", "resnet18_2d_medicalnet", "collapse"),
        ("medicalnet_resnet34", "resnet34_2d_medicalnet", "collapse"),
    ],
)
def test_weights_whose_shape_must_be_changed(folder, name, preset_name, command):
    source = folder / f"{source_of(name, preset_name)}{SUFFIX}"
    with pytest.raises(UsageError, match="with its shape changed on purpose") as caught:
        find_weights(name, preset_name)
    assert caught.value.hint.startswith("weights-convert convert --source")
    assert f"then weights-convert {command} --weights {source}" in caught.value.hint
    source.touch()
    with pytest.raises(UsageError, match="with its shape changed on purpose") as caught:
        find_weights(name, preset_name)
    expected = f"weights-convert {command} --weights {source} --preset {preset_name} --out"
    assert caught.value.hint.startswith(expected)
    changed = folder / f"changed{SUFFIX}"
    changed.touch()
    assert find_weights(changed, preset_name) == changed


def test_paths_are_taken_as_they_are(good_file, tmp_path, monkeypatch):
    assert find_weights(good_file, "resnet18_2d") == good_file
    monkeypatch.chdir(good_file.parent)
    assert find_weights(good_file.name, "resnet18_2d").samefile(good_file)
    with pytest.raises(UsageError, match=r"none\.weights\.h5 does not exist"):
        find_weights(f"none{SUFFIX}", "resnet18_2d")
    with pytest.raises(UsageError, match=r"a\.pth'; expected a file ending in \.weights\.h5"):
        find_weights(tmp_path / "a.pth", "resnet18_2d")


def test_where_converted_weights_lie(tmp_path, monkeypatch):
    monkeypatch.setenv("ICH_KERAS_WEIGHTS", str(tmp_path / "mine"))
    assert weights_folder() == tmp_path / "mine"
    monkeypatch.setenv("ICH_KERAS_WEIGHTS", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights_folder() == tmp_path / "ich_keras" / "weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights_folder() == tmp_path / ".cache" / "ich_keras" / "weights"
