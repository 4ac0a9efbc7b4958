"""From a torch checkpoint to a `.weights.h5` file and back, tensor by tensor."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ich_keras import __version__
from ich_keras.errors import DataError, UsageError
from ich_keras.files import atomic_path, require_absent
from ich_keras.labels import SIX, LabelSet, label_set
from ich_keras.models.presets import PRESETS, preset
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights import save_weights
from ich_keras.models.weights_file import SUFFIX, read_weights
from ich_keras.models.weights_lookup import converted_file
from weights_convert.checkpoint import Checkpoint, read_checkpoint
from weights_convert.mapping import COUNTER, MAPPING_VERSION, split_off
from weights_convert.parity import TOLERANCE, Parity, compare, sizes_of
from weights_convert.reference import reference, without_reference
from weights_convert.reshaping import rechannelled, require_out
from weights_convert.sources import HEADS, Source, source_named
from weights_convert.state import build, load_state, outputs_of, spec_of_file, state_of_file
from weights_convert.structure import Structure, fitting_presets, require_structure, structure_of

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Args:
        path: the `.weights.h5` file.
        parity: differences between torch and Keras, measured before the file was written.
        record: the facts stored in the file: origin, network, parity, changes.
        dropped: names of the checkpoint's tensors that were left out.
    """

    path: Path
    parity: Parity
    record: dict[str, Any]
    dropped: tuple[str, ...]


def _settle(source: str | None, preset_name: str | None) -> tuple[Source | None, str]:
    if source is not None and preset_name is None:
        found = source_named(source)
        return found, found.preset
    if preset_name is None or source is not None:
        raise UsageError(
            "expected either a source or a preset.",
            "Published weights need --source (see `weights-convert list`), your own need --preset"
            " (see `ich presets`).",
        )
    return None, preset_name


def _matched(
    checkpoint: Checkpoint, source: Source | None, preset_name: str, head: LabelSet | None
) -> tuple[ModelSpec, dict[str, np.ndarray], tuple[str, ...]]:
    """Return the network of a checkpoint, its tensors and the names of the tensors left out."""
    place = str(checkpoint.path)
    structure = structure_of(checkpoint.shapes, place)
    spec = preset(preset_name).with_any_size()
    channels = structure["channels"] if source is None else source.channels
    spec = replace(spec, input_shape=(*spec.input_shape[:-1], channels))
    require_structure(structure, spec, place, source.name if source else f"preset {preset_name}")
    heads = HEADS[structure["architecture"]]
    dropped = source.dropped if source else heads
    if head is not None:
        if structure["head"] != len(head):
            raise DataError(
                f"{place} has {'no head' if structure['head'] is None else structure['head']};"
                f" expected one of {len(head)} outputs to keep.",
                "Convert without --keep-head; training then starts with a new head. For labels"
                " other than the six: --labels A,B,C in the order of its outputs.",
            )
        dropped = tuple(prefix for prefix in dropped if prefix != heads[-1])
    tensors, left_out = split_off(checkpoint.tensors, dropped)
    return spec, tensors, tuple(left_out)


def checked(
    spec: ModelSpec,
    tensors: dict[str, np.ndarray],
    place: str,
    outputs: int | None,
    batch_size: int,
) -> tuple["keras.Model", Parity]:
    """Build a network twice, in Keras and in plain torch, from the same tensors, and compare.

    Args:
        spec: the network.
        tensors: torch's name -> array, the head included where there are outputs.
        place: the file, for errors.
        outputs: of the head; None without one.
        batch_size: of the compared inputs.

    Returns:
        (Keras model with the tensors, parity with plain torch).

    Raises:
        DataError: the tensors do not match one to one, the networks differ, or plain torch has no
            such network.
    """
    import torch

    if lacking := without_reference(spec):
        raise DataError(
            f"{place}: {lacking} has no counterpart in plain torch to be compared with.",
            "Nothing was written. `weights-convert selfcheck` shows which networks have one.",
        )
    model = build(spec, outputs)
    load_state(model, tensors, place)
    module = reference(spec, outputs)
    module.load_state_dict(
        {name: torch.from_numpy(array) for name, array in tensors.items()}
        # A checkpoint may lack the batch counters: no computation reads them.
        | {n: t for n, t in module.state_dict().items() if n.endswith(COUNTER)}
    )
    parity = compare(module, model, sizes_of(spec), spec.channels, batch_size)
    parity.require(TOLERANCE, place)
    return model, parity


def convert(
    checkpoint: Path | str,
    source: str | None = None,
    preset_name: str | None = None,
    out: Path | str | None = None,
    channels: int | None = None,
    keep_head: bool = False,
    prefix: str | None = None,
    labels: LabelSet | Sequence[str] | None = None,
) -> Conversion:
    """Convert a torch checkpoint into weights for `build_classifier` and `build_backbone`.

    The tensors and the network's variables must match one to one. The Keras network and a plain
    torch one must then agree on random inputs of several sizes. Otherwise no file is written.

    Args:
        checkpoint: a file, see `read_checkpoint`.
        source: the published weights that the file holds, a key of `SOURCES`.
        preset_name: for a checkpoint of your own, the network it belongs to.
        out: the file to write, ending in `.weights.h5`. None writes <source>.weights.h5 into the
            weights folder, where `weights=<source>` finds it.
        channels: new number of input channels; None keeps it.
        keep_head: keep the checkpoint's head, which must have the outputs of `labels`, in order.
        prefix: of the network, where the file holds several; see `read_checkpoint`.
        labels: of a head that is kept; None stands for RSNA's six (`ich_keras.LABELS`).

    Raises:
        UsageError: unknown names, or `out` exists.
        DataError: the file is refused, differs from the published one while `out` is None, or
            belongs to another network; or the two networks disagree.
    """
    known, preset_name = _settle(source, preset_name)
    if labels is not None and not keep_head:
        raise UsageError("labels are those of a head that is kept.", "Add --keep-head.")
    head = label_set(labels) if keep_head else None
    outputs = None if head is None else len(head)
    if out is not None:
        path = require_out(out)
    elif known is not None:
        path = require_out(converted_file(known.name))
    else:
        raise UsageError(
            "out is missing; only published weights have a default file name.",
            f"Give --out FILE{SUFFIX}.",
        )
    read = read_checkpoint(checkpoint, prefix)
    provenance = _provenance(read, known)
    if out is None and known is not None and provenance.get("is_published_file") is False:
        raise DataError(
            f"{read.path} has the SHA-256 {read.sha256[:16]}...; {known.name} was published with"
            f" {known.published_sha256}...: it is another file.",
            f"Fetch {known.url}; for weights of your own give --preset {preset_name} and"
            f" --out FILE{SUFFIX}.",
        )
    spec, tensors, left_out = _matched(read, known, preset_name, head)
    model, parity = checked(spec, tensors, str(read.path), outputs, batch_size=1)
    record = {
        **provenance,
        "mapping_version": MAPPING_VERSION,
        "written_by": f"ich_keras {__version__}",
        "preset": preset_name,
        "network": spec.to_dict(),
        "labels": list((head or SIX).names),
        "parity": parity.to_dict(),
        "dropped": list(left_out),
        "changes": [],
    }
    if channels is not None and channels != spec.channels:
        model, record = rechannelled(tensors, spec, record, channels, outputs)
    save_weights(model, path, record)
    return Conversion(path, parity, record, left_out)


def _provenance(read: Checkpoint, source: Source | None) -> dict[str, Any]:
    record: dict[str, Any] = {"file": read.path.name, "sha256": read.sha256}
    if read.prefix:
        record["prefix"] = read.prefix
    if source is None:
        return {**record, "source": "own checkpoint"}
    is_published = None
    if source.published_sha256:
        is_published = read.sha256.startswith(source.published_sha256)
    record |= {"published_sha256": source.published_sha256, "is_published_file": is_published}
    if is_published is False:
        # The right format, but other numbers: licence and citation are unknown.
        return {**record, "source": f"another file in the format of {source.name}"}
    return {
        **record,
        "source": source.name,
        "url": source.url,
        "licence": source.licence,
        "data_terms": source.data_terms,
        "citation": source.citation,
        "intensity": source.intensity,
        "original_input": source.original_input,
    }


def verify(
    checkpoint: Path | str,
    source: str | None = None,
    preset_name: str | None = None,
    prefix: str | None = None,
) -> Parity:
    """Compare torch and Keras on a checkpoint's weights, without writing anything.

    Args:
        checkpoint: a file.
        source: the published weights that it holds.
        preset_name: for a checkpoint of your own, its network.
        prefix: as in `convert`.

    Returns:
        The largest difference of each feature over several input sizes, in batches of three.

    Raises:
        UsageError, DataError: as `convert`.
    """
    known, preset_name = _settle(source, preset_name)
    read = read_checkpoint(checkpoint, prefix)
    spec, tensors, _ = _matched(read, known, preset_name, head=None)
    return checked(spec, tensors, str(read.path), outputs=None, batch_size=3)[1]


def verify_weights(weights: Path | str) -> Parity:
    """Compare torch and Keras on a `.weights.h5` file, without writing anything.

    Both are built as the file's record says, with its strides and dilations. Of a restrided file
    this says nothing about the network that its tensors were made for, which computes other
    numbers.

    Args:
        weights: a file that records its network.

    Returns:
        The largest difference of each feature over several input sizes, in batches of three.

    Raises:
        UsageError: no such file.
        DataError: the file is refused, records no network, or the networks differ.
    """
    file = read_weights(weights)
    spec, state = spec_of_file(file), state_of_file(file)
    return checked(spec, state, str(file.path), outputs_of(file), batch_size=3)[1]


def export(weights: Path | str, out: Path | str) -> Path:
    """Write weights as a torch state dict, bit for bit, and check it by reading it back.

    Args:
        weights: a `.weights.h5` file.
        out: a new file; `.pth` for torch, `.safetensors` for that format. torchvision's networks
            load it with `load_state_dict` (with `num_classes` as many as labels, or `strict=False`
            without head).

    Raises:
        UsageError: another suffix, or `out` exists.
        DataError: the weights are refused.
    """
    import torch

    out = require_absent(out)
    if out.suffix not in (".pth", ".pt", ".safetensors"):
        raise UsageError(f"out {str(out)!r}; expected a name ending in .pth, .pt or .safetensors.")
    file = read_weights(weights)
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name, array in state_of_file(file).items():
        state[name] = torch.from_numpy(np.array(array, order="C"))
        if name.endswith("running_var"):
            state[name.replace("running_var", COUNTER)] = torch.tensor(0)

    def require_equal(written: Path) -> None:
        again = read_checkpoint(written).tensors
        if any(not np.array_equal(again[n], a) for n, a in state_of_file(file).items()):
            raise DataError(f"{written} does not read back as it was written.", "Is the disk full?")

    with atomic_path(out, verify=require_equal) as temporary:
        if out.suffix == ".safetensors":
            from safetensors.torch import save

            # save_file would make the file readable for its owner only.
            temporary.write_bytes(save(state, metadata={"format": "pt"}))
        else:
            torch.save(state, temporary)
    return out


@dataclass(frozen=True)
class Inspection:
    """What `inspect` finds in a checkpoint.

    Args:
        read: the checkpoint.
        structure: see `structure_of`.
        presets: networks whose tensors have this structure. They may differ in strides and
            dilations, which tensors do not show.
        missing: tensors of the first of these networks that the checkpoint lacks.
        surplus: tensors of the checkpoint that this network lacks, heads included.
    """

    read: Checkpoint
    structure: Structure
    presets: tuple[str, ...]
    missing: tuple[str, ...]
    surplus: tuple[str, ...]


def inspect(checkpoint: Path | str, prefix: str | None = None) -> Inspection:
    """Read a checkpoint and find out which network it holds.

    Args:
        checkpoint: a file.
        prefix: as in `convert`.

    Raises:
        UsageError, DataError: as `read_checkpoint` and `structure_of`.
    """
    read = read_checkpoint(checkpoint, prefix)
    structure = structure_of(read.shapes, str(read.path))
    names = fitting_presets(structure)
    missing: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()
    if names:
        wanted = reference(PRESETS[names[0]].spec).state_dict()
        missing = tuple(n for n in wanted if n not in read.tensors and not n.endswith(COUNTER))
        surplus = tuple(n for n in read.tensors if n not in wanted)
    return Inspection(read, structure, names, missing, surplus)
