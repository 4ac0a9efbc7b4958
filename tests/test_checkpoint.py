"""Reading untrusted checkpoints: values are exact, and every refusal gives its reason."""

import functools
import hashlib
import io
import os
import pickle
import re
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict

import h5py
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes

from ich_keras.errors import DataError, IchError, UsageError
from weights_convert import checkpoint as module
from weights_convert import wrapping
from weights_convert.checkpoint import read_checkpoint

TORCH_FORMATS = ("zip", "legacy")
FORMATS = (*TORCH_FORMATS, "safetensors")
SAVE_INSTEAD = r"Save model\.state_dict\(\) instead"


def small_state() -> dict[str, torch.Tensor]:
    return {
        "conv1.weight": torch.arange(12.0).reshape(3, 2, 2) / 7,
        "bn1.bias": torch.tensor([1e-42, -0.0, 3e38]),
        "bn1.num_batches_tracked": torch.tensor(3),
    }


def to_bytes(content, kind: str) -> bytes:
    if kind == "safetensors":
        return safetensors_bytes(content, metadata={"format": "pt"})
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=kind == "zip")
    return stream.getvalue()


def rezipped(content: bytes, replaced=None, compression=zipfile.ZIP_STORED) -> bytes:
    """Write a zip anew; `replaced` maps the end of a member's name to its bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            found = [raw for end, raw in (replaced or {}).items() if name.endswith(end)]
            new.writestr(name, found[0] if found else old.read(name), compression)
    return stream.getvalue()


def zip_of(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"{}")
    return stream.getvalue()


def refused(path, content: bytes, match: str, error=DataError) -> str:
    """Write the file, require that it is refused for that reason; return what is said."""
    path.write_bytes(content)
    with pytest.raises(error, match=match) as caught:
        read_checkpoint(path)
    said = str(caught.value)
    assert said.startswith(str(path))
    assert said.isprintable()
    assert "weights_only" not in said  # torch's advice to switch its guard off
    assert caught.value.hint  # a way out
    assert len(said) < len(str(path)) + 500
    return said


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


# --- What is read ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_bit_by_bit_whatever_its_name(tmp_path, kind, name):
    content = to_bytes(small_state(), kind)
    (tmp_path / name).write_bytes(content)
    read = read_checkpoint(str(tmp_path / name))
    assert read.kind == kind
    assert read.path == tmp_path / name
    assert read.sha256 == hashlib.sha256(content).hexdigest()
    assert read.shapes == {"conv1.weight": (3, 2, 2), "bn1.bias": (3,)}
    assert read.ignored == ("bn1.num_batches_tracked",)
    for tensor_name, array in read.tensors.items():
        assert array.dtype == np.float32
        assert array.tobytes() == small_state()[tensor_name].numpy().tobytes()


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict"])
@pytest.mark.parametrize("kind", TORCH_FORMATS)
def test_medicalnets_way_of_saving(path, kind, wrapper):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        wrapper: OrderedDict((f"module.{n}", t) for n, t in small_state().items()),
        "optimizer": optimizer.state_dict(),
    }
    path.write_bytes(to_bytes(content, kind))
    read = read_checkpoint(path)
    assert read.kind == kind
    assert list(read.tensors) == ["conv1.weight", "bn1.bias"]
    assert read.ignored == ("epoch", "optimizer", "bn1.num_batches_tracked")
    np.testing.assert_array_equal(
        read.tensors["conv1.weight"], small_state()["conv1.weight"].numpy()
    )


@pytest.mark.parametrize("kind", TORCH_FORMATS)
def test_what_torch_itself_calls_a_state_dict(path, kind):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    for content in (network.state_dict(), dict(network.named_parameters())):
        path.write_bytes(to_bytes(content, kind))
        read = read_checkpoint(path)
        for name, parameter in network.named_parameters():
            np.testing.assert_array_equal(read.tensors[name], parameter.detach().numpy())


@pytest.mark.parametrize("kind", FORMATS)
def test_variances_are_not_negative(path, kind):
    state = {"bn1.running_mean": torch.tensor([-1.0]), "bn1.running_var": torch.tensor([0.0])}
    path.write_bytes(to_bytes(state, kind))
    assert len(read_checkpoint(path).tensors) == 2
    state["bn1.running_var"] -= 0.5
    message = r"bn1\.running_var is a variance and holds -0\.5; expected 0 or more"
    refused(path, to_bytes(state, kind), message)


def test_names_of_what_is_ignored_are_safe_to_print(path):
    content = {"state_dict": {"a": torch.ones(1)}, "\x1b[31m\n": 1, ("t",): 2, "x" * 9999: 3}
    path.write_bytes(to_bytes(content, "zip"))
    for name in read_checkpoint(path).ignored:
        assert name.isprintable()
        assert len(name) <= 100


@pytest.mark.parametrize("kind", FORMATS)
def test_float16_and_bfloat16_are_read_exactly(path, kind):
    bits = np.arange(2**16, dtype=np.uint16)
    half = bits.view(np.float16)
    half = half[np.isfinite(half)]
    brain = (bits.astype(np.uint32) << 16).view(np.float32)
    brain = brain[np.isfinite(brain)]
    state = {"half": torch.from_numpy(half), "brain": torch.from_numpy(brain).bfloat16()}
    path.write_bytes(to_bytes(state, kind))
    tensors = read_checkpoint(path).tensors
    np.testing.assert_array_equal(tensors["half"], half.astype(np.float32))
    assert tensors["brain"].tobytes() == brain.tobytes()


@pytest.mark.parametrize("kind", FORMATS)
def test_float64_is_read_when_nothing_is_rounded(path, kind):
    values = np.array([0.5, -1 / 1024, 2.0**-149, -(2.0**127), 16777216.0])
    path.write_bytes(to_bytes({"a": torch.from_numpy(values)}, kind))
    np.testing.assert_array_equal(read_checkpoint(path).tensors["a"], values)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("value", [0.1, 16777217.0, 1e300, 1e-300])
def test_float64_that_would_be_rounded(path, kind, value):
    state = {"a": torch.tensor([1.0, value], dtype=torch.float64)}
    refused(path, to_bytes(state, kind), "a is float64 and would be rounded")


# --- Files that run code --------------------------------------------------------------------


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'echo armed > "{self.marker}"',)


def tar_of(content: bytes, kind: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


ARMED = {
    "zip": lambda bomb: to_bytes({"conv1.weight": torch.ones(2), "bomb": bomb}, "zip"),
    "zip, alone": lambda bomb: to_bytes(bomb, "zip"),
    "legacy": lambda bomb: to_bytes({"conv1.weight": torch.ones(2), "bomb": bomb}, "legacy"),
    "legacy, in a wrapper": lambda bomb: to_bytes({"state_dict": {}, "x": bomb}, "legacy"),
    "pickle 2": lambda bomb: pickle.dumps(bomb, 2),
    "pickle 3": lambda bomb: pickle.dumps({"conv1.weight": bomb}, 3),
}
OPAQUE = {
    "pickle 0": (lambda bomb: pickle.dumps(bomb, 0), "is not a checkpoint: it begins with"),
    "pickle 4": (lambda bomb: pickle.dumps(bomb, 4), "cannot be read as weights"),
    "pickle 5": (lambda bomb: pickle.dumps(bomb, 5), "cannot be read as weights"),
    "ustar": (lambda bomb: tar_of(pickle.dumps(bomb, 2), tarfile.USTAR_FORMAT), "torch's tar"),
    "pax": (lambda bomb: tar_of(pickle.dumps(bomb, 2), tarfile.PAX_FORMAT), "torch's tar"),
    "gnu": (lambda bomb: tar_of(pickle.dumps(bomb, 2), tarfile.GNU_FORMAT), "torch's tar"),
}


def test_the_bomb_is_armed(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker"), 2))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("build", ARMED.values(), ids=ARMED)
def test_code_is_named_and_not_run(path, tmp_path, build):
    content = build(Bomb(tmp_path / "marker"))
    assert b"armed" in content
    refused(path, content, f"asks to run {os.system.__module__}.system.*nothing was run")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(("build", "message"), OPAQUE.values(), ids=OPAQUE)
def test_code_in_other_wrappings_is_not_run(path, tmp_path, build, message):
    refused(path, build(Bomb(tmp_path / "marker")), message)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", TORCH_FORMATS)
@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.nn.Linear(2, 3),
        lambda: torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)),
        lambda: torch.nn.DataParallel(torch.nn.Linear(2, 3)),
        lambda: {"epoch": 3, "model": torch.nn.Linear(2, 3)},
    ],
)
def test_whole_models_are_refused_with_a_way_out(path, kind, build):
    refused(path, to_bytes(build(), kind), rf"whole pickled model \(torch\.nn\..*{SAVE_INSTEAD}")


# --- Files that are something else, or half of it --------------------------------------------


PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452")


def hdf5_bytes() -> bytes:
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        file["a"] = np.ones(3)
    return stream.getvalue()


def npz_bytes() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.ones(3))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty.*fetch it again"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page.*in a browser"),
        (b"\r\n  <HTML lang='en'>", "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "begins with b'version '"),
        (b"weights\x1b[31m", "is not a checkpoint: it begins with b'weights"),
        (PNG, r"is not a checkpoint: it begins with b'\\x89PNG"),
        (b"\0" * 4096, r"is not a checkpoint: it begins with b'\\x00"),
        (b"\x80", "is damaged"),
        (b"\x80\x02}q\x00.", "is damaged"),
        (b"PK", "damaged zip archive"),
        (b"PK\x03\x04" + bytes(100), "damaged zip archive"),
        (hdf5_bytes(), "is an HDF5 file, not a torch checkpoint.*give it to --weights"),
        (zip_of("metadata.json", "config.json", "model.weights.h5"), r"is a \.keras file.*keras"),
        (
            zip_of("net/data.pkl", "net/constants.pkl", "net/code/__torch__.py", "net/version"),
            f"is a TorchScript program, not a state dict.*{SAVE_INSTEAD}",
        ),
        (zip_of("net/data.pkl", "net/code/__torch__/torch/nn.py"), "is a TorchScript program"),
        (zip_of("readme.txt"), r"zip archive without data\.pkl, not a torch checkpoint"),
        (npz_bytes(), r"zip archive without data\.pkl, not a torch checkpoint"),
    ],
)
def test_other_files_are_named(path, content, message):
    refused(path, content, message)


def test_folders_and_absent_files(tmp_path):
    with pytest.raises(UsageError, match="is a folder; expected a checkpoint file"):
        read_checkpoint(tmp_path)
    with pytest.raises(UsageError, match=r"none\.pth does not exist"):
        read_checkpoint(tmp_path / "none.pth")


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.9, 0.999])
@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_files(path, kind, share):
    state = {f"layer{n}.weight": torch.randn(32, 32) for n in range(4)}
    content = to_bytes(state, kind)
    refused(path, content[: int(share * len(content))], "is (a )?damaged")


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 10, 20, 50, 100, -2, -1])
@pytest.mark.parametrize("kind", FORMATS)
def test_files_cut_after_or_before_a_few_bytes(path, kind, length):
    refused(path, to_bytes(small_state(), kind)[:length], "is (a )?damaged|is not a checkpoint")


# --- Files that claim more than they hold ----------------------------------------------------


def test_compressed_archives(path):
    valid = to_bytes(small_state(), "zip")
    zeros = to_bytes({"a": torch.zeros(10**6)}, "zip")
    for content in (valid, zeros):
        packed = rezipped(content, compression=zipfile.ZIP_DEFLATED)
        refused(path, packed, "unpacks to more than its size; refused")
    path.write_bytes(rezipped(valid))
    assert len(read_checkpoint(path).tensors) == 2


def test_archives_whose_members_overlap(path):
    content = bytearray(to_bytes({"a": torch.ones(4)}, "zip"))
    at = content.rindex(b"archive/data/0") - 46
    assert content[at : at + 4] == b"PK\x01\x02"
    content[at + 20 : at + 28] = struct.pack("<II", 10**9, 10**9)
    refused(path, bytes(content), "unpacks to more than its size; refused")


def test_archives_of_a_later_zip_version(path):
    content = bytearray(to_bytes({"a": torch.ones(4)}, "zip"))
    content[content.rindex(b"PK\x01\x02") + 6] = 255
    refused(path, bytes(content), r"damaged zip archive: zip file version 25\.5")


@pytest.mark.parametrize("kind", FORMATS)
def test_storages_shorter_than_claimed(path, kind):
    content = to_bytes({"a": torch.zeros(200)}, kind)
    count = b"200" if kind == "safetensors" else b"K\xc8"
    more = b"900" if kind == "safetensors" else b"K\xfa"
    assert count in content
    if kind == "zip":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            pickled = archive.read("archive/data.pkl").replace(count, more)
        refused(path, rezipped(content, {"data.pkl": pickled}), "is damaged")
    else:
        refused(path, content.replace(count, more), "is (a )?damaged")


def test_storages_that_are_never_filled(path):
    """Without its list of storages a legacy file would give whatever lay in memory."""
    content = to_bytes({"a": torch.ones(200)}, "legacy")
    content = content.replace(b"K\xc8", b"J" + struct.pack("<i", 10**9))
    content = content[: content.rindex(b"\x80\x02]")] + pickle.dumps([], 2)
    refused(path, content, r"has 3\d\d bytes, its tensors claim 4,000,000,000; refused")


@pytest.mark.parametrize("kind", TORCH_FORMATS)
def test_many_names_for_one_storage(path, kind):
    tensor = torch.zeros(1000)
    content = to_bytes({f"a{n}": tensor for n in range(100)}, kind)
    refused(path, content, "its tensors claim 400,000; refused")


@pytest.mark.parametrize("kind", TORCH_FORMATS)
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: torch.ones(1).expand(10**9), "a claims 4,000,000,000 bytes .* holds 4; refused"),
        (lambda: torch.ones(5).as_strided((4, 2), (1, 1)), "a claims 32 bytes .* holds 20"),
        # Within its storage, but no tensor that anybody trained.
        (
            lambda: torch.ones(9)[:1].expand(9),
            "a claims 36 bytes and its storage holds 36; refused",
        ),
        (lambda: torch.ones(6)[::2][None].expand(2, 3), "a claims 24 bytes .* holds 24; refused"),
    ],
)
def test_tensors_that_claim_more_than_they_hold(path, kind, build, message):
    content = to_bytes({"a": build()}, kind)
    assert len(content) < 2000
    refused(path, content, message)


@pytest.mark.parametrize("kind", TORCH_FORMATS)
def test_views_of_one_storage_are_read(path, kind):
    """So are those of a flat buffer, of which FSDP and some exporters save slices."""
    flat = torch.arange(24.0)
    state = {"a": flat[:6].view(2, 3), "b": flat[6:18].view(3, 4), "c": flat[18:][::2]}
    path.write_bytes(to_bytes(state, kind))
    read = read_checkpoint(path)
    for name, tensor in state.items():
        np.testing.assert_array_equal(read.tensors[name], tensor.numpy())


@pytest.mark.parametrize("kind", TORCH_FORMATS)
def test_views_together_claim_no_more_than_the_file(path, kind):
    """Each view is as large as its storage allows; a thousand of them would be a bomb."""
    flat = torch.zeros(1001)
    state = {f"a{n}": flat[:1000] for n in range(1000)}
    content = to_bytes(state, kind)
    refused(path, content, "its tensors claim 4,000,000; refused")


@pytest.mark.parametrize("kind", TORCH_FORMATS)
def test_transposed_tensors_are_no_views(path, kind):
    values = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    path.write_bytes(to_bytes({"a": torch.from_numpy(values).T}, kind))
    np.testing.assert_array_equal(read_checkpoint(path).tensors["a"], values.T)


def test_limits(path, monkeypatch):
    content = to_bytes({f"a{n}": torch.ones(2) for n in range(4)}, "zip")
    monkeypatch.setattr(wrapping, "MAX_ENTRIES", 3)
    refused(path, content, "holds more than 3 entries")
    monkeypatch.undo()
    monkeypatch.setattr(module, "MAX_BYTES", 999)
    refused(path, content, r"has 2,\d\d\d bytes; expected at most 999")


# --- Tensors that are not plain numbers ------------------------------------------------------


def built(build):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build()


@pytest.mark.parametrize("kind", TORCH_FORMATS)
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), r"is not a dense tensor .*\(torch\.sparse_coo, cpu"),
        (lambda: torch.eye(3).to_sparse_csr(), r"is not a dense tensor .*\(torch\.sparse_csr, cpu"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            r"is not a dense tensor .*\(quantized\)",
        ),
        (
            lambda: torch.quantize_per_channel(
                torch.ones(3, 2), torch.ones(3), torch.zeros(3), 0, torch.qint8
            ),
            r"is not a dense tensor .*\(quantized\)",
        ),
        (lambda: torch.ones(3, device="meta"), r"is not a dense tensor .*\(torch\.strided, meta"),
        (lambda: torch.ones(3)._neg_view(), r"is not a dense tensor .*\(nested or negated\)"),
        (lambda: torch.ones(3).int(), r"is torch\.int32; expected float16"),
        (lambda: torch.ones(3).byte(), r"is torch\.uint8; expected float16"),
        (lambda: torch.ones(3) > 0, r"is torch\.bool; expected float16"),
        (lambda: torch.ones(3) + 1j, r"is torch\.complex64; expected float16"),
        (lambda: torch.ones((1,) * 6), "has 6 axes; expected at most 5"),
        (lambda: torch.tensor([1.0, np.nan]), "holds values that are not finite"),
        (lambda: torch.tensor([1.0, -np.inf]), "holds values that are not finite"),
        (lambda: torch.tensor([np.inf]).half(), "holds values that are not finite"),
        (lambda: torch.tensor([np.nan]).bfloat16(), "holds values that are not finite"),
        (lambda: torch.tensor([np.nan]).double(), "holds values that are not finite"),
        (lambda: 3, "is a int; expected a tensor"),
        (lambda: None, "is a NoneType; expected a tensor"),
        (lambda: "text", "is a str; expected a tensor"),
        (lambda: {"b": torch.ones(2)}, "is a dict; expected a tensor"),
        (lambda: [torch.ones(2)], "is a list; expected a tensor"),
    ],
)
def test_tensors_that_are_refused(path, kind, build, message):
    state = {"fine": torch.ones(2), "a": built(build)}
    refused(path, built(lambda: to_bytes(state, kind)), f": a {message}")


@pytest.mark.parametrize(
    ("kind", "build", "message"),
    [
        ("zip", lambda: torch.ones(3).to(torch.float8_e4m3fn), r"a is torch\.float8_e4m3fn"),
        ("safetensors", lambda: torch.ones(3).to(torch.float8_e5m2), r"a is torch\.float8_e5m2"),
        # torch writes this file and cannot read it itself.
        ("legacy", lambda: torch.ones(3).to(torch.float8_e4m3fn), "UntypedStorage|float8"),
        (
            "zip",
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "a is not a dense tensor",
        ),
        ("safetensors", lambda: torch.ones(3).int(), r"a is torch\.int32"),
        ("safetensors", lambda: torch.tensor([np.nan]), "a holds values that are not finite"),
    ],
)
def test_tensors_that_not_every_format_holds(path, kind, build, message):
    refused(path, built(lambda: to_bytes({"a": build()}, kind)), message)


# --- State dicts that are refused ------------------------------------------------------------


@pytest.mark.parametrize("kind", TORCH_FORMATS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], f"holds a list; expected a state dict.*{SAVE_INSTEAD}"),
        (torch.ones(2), "holds a Tensor; expected a state dict"),
        ("text", "holds a str; expected a state dict"),
        (None, "holds a NoneType; expected a state dict"),
        ({}, "holds no weights"),
        ({"state_dict": {}}, "holds no weights"),
        ({"bn1.num_batches_tracked": torch.tensor(1)}, "holds no weights"),
        ({"state_dict": [torch.ones(2)]}, "state_dict is a list; expected a tensor"),
        ({3: torch.ones(2)}, "<int> is not the name of a tensor"),
        ({None: torch.ones(2)}, "<NoneType> is not the name of a tensor"),
        ({("a", "b"): torch.ones(2)}, "<tuple> is not the name of a tensor"),
        ({"": torch.ones(2)}, "'' is not the name of a tensor"),
        ({"module.": torch.ones(2)}, r"'module\.' is not the name of a tensor"),
        ({"../a": torch.ones(2)}, r"'\.\./a' is not the name of a tensor"),
        ({"a b": torch.ones(2)}, "'a b' is not the name of a tensor"),
        ({"a\n": torch.ones(2)}, r"'a\\n' is not the name of a tensor"),
        ({"\x1b[31m": torch.ones(2)}, r"'\\x1b\[31m' is not the name of a tensor"),
        ({"größe": torch.ones(2)}, "'größe' is not the name of a tensor"),
        ({"a" * 10**6: torch.ones(2)}, "aaa is not the name of a tensor"),
        (
            {"module.a": torch.ones(2), "b": torch.ones(2)},
            r"some names begin with 'module\.' and some do not: b",
        ),
        (
            {"state_dict": {"module.a": torch.ones(2), "modula.a": torch.ones(2)}},
            r"some names begin with 'module\.' and some do not: modula\.a",
        ),
    ],
)
def test_contents_that_are_refused(path, kind, content, message):
    refused(path, to_bytes(content, kind), message)


@pytest.mark.parametrize("head", [b"", b"X\x0a\x00\x00\x00state_dict}X\x01\x00\x00\x00a]s"])
def test_names_nested_without_end(path, head):
    nested = b")" + b"\x85" * 10_000
    pickled = b"\x80\x02}(" + head + nested + b"K\x01u."
    content = rezipped(to_bytes({"a": torch.ones(2)}, "zip"), {"data.pkl": pickled})
    refused(path, content, "a is a list; expected a tensor" if head else "<tuple> is not the name")


# --- Any damage at all ----------------------------------------------------------------------


@functools.cache
def valid_bytes(kind: str) -> bytes:
    state = small_state()
    return to_bytes(state if kind == "safetensors" else {"state_dict": state, "epoch": 1}, kind)


def damaged(content: bytes, edits) -> bytes:
    raw = bytearray(content)
    for how, place, new in edits:
        at = place % (len(raw) + 1)
        if how == "cut":
            del raw[at:]
        elif how == "insert":
            raw[at:at] = new
        elif how == "remove":
            del raw[at : at + len(new)]
        else:
            raw[at : at + len(new)] = new[: len(raw) - at]
    return bytes(raw)


@pytest.fixture(scope="module")
def damaged_path(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged") / "weights"


@settings(max_examples=150)
@given(
    kind=st.sampled_from(FORMATS),
    edits=st.lists(
        st.tuples(
            st.sampled_from(["cut", "insert", "remove", "change", "change"]),
            st.integers(0, 5000),
            st.binary(min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=3,
    ),
)
@example(kind="zip", edits=[])
@example(kind="legacy", edits=[])
@example(kind="safetensors", edits=[])
def test_damage_is_refused_or_leaves_plain_numbers(damaged_path, kind, edits):
    content = damaged(valid_bytes(kind), edits)
    damaged_path.write_bytes(content)
    try:
        read = read_checkpoint(damaged_path)
    except IchError as error:
        assert edits
        assert re.search(re.escape(str(damaged_path)), str(error))
        assert str(error).isprintable()
        return
    whole = {name: tuple(t.shape) for name, t in small_state().items()}
    for name, array in read.tensors.items():
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
        assert array.shape == whole.get(name, array.shape)
    assert sum(array.nbytes for array in read.tensors.values()) <= len(content)


def test_one_changed_bit_of_a_tensor_is_seen(tmp_path):
    tensor = torch.arange(64, dtype=torch.float32)
    path = tmp_path / "a.pth"
    torch.save({"conv1.weight": tensor}, path)
    content = bytearray(path.read_bytes())
    place = bytes(content).index(tensor.numpy().tobytes()) + 10
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="does not match its checksum in the archive"):
        read_checkpoint(path)
