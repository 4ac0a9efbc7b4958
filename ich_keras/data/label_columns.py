"""What the columns of other people's label tables mean."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ich_keras.data.csv_rows import excerpt
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import ANY, LABELS, SIX, SUBTYPES, LabelSet, label_set

# Names of columns that say what a row is of, without case, spaces and signs; finest first.
KEY_NAMES = {
    "sop_instance_uid": ("sopinstanceuid", "sopuid", "imageuid"),
    "path": ("path", "file", "filepath", "filename"),
    "series_instance_uid": ("seriesinstanceuid", "seriesuid"),
    "study_instance_uid": ("studyinstanceuid", "studyuid"),
    "patient_id": ("patientid", "patient", "patientnumber"),
}
# Other people's names of RSNA's labels.
ALIASES = {
    "any": ANY,
    "anyhemorrhage": ANY,
    "anyhaemorrhage": ANY,
    "hemorrhage": ANY,
    "haemorrhage": ANY,
    "ich": ANY,  # intracranial, as CQ500; a table whose ICH is intracerebral needs a map
    "epidural": "epidural",
    "edh": "epidural",
    "intraparenchymal": "intraparenchymal",
    "iph": "intraparenchymal",
    "intraventricular": "intraventricular",
    "ivh": "intraventricular",
    "subarachnoid": "subarachnoid",
    "sah": "subarachnoid",
    "subdural": "subdural",
    "sdh": "subdural",
    "nohemorrhage": f"!{ANY}",
    "nohaemorrhage": f"!{ANY}",
    "healthy": f"!{ANY}",
}
# Columns of the known tables that are no labels of a bleed.
IGNORED = ("slicenumber", "fractureyesno", "split", "numslices", "age", "sex", "note", "notes")

_EXAMPLE = "For instance: --label-map 'ICH=any,IPH=intraparenchymal,Normal=!any'."


@dataclass(frozen=True)
class Columns:
    """What the columns of a table mean.

    Args:
        key: what identifies a row: a key of `KEY_NAMES`.
        key_column: its place.
        labels: the labels, in the order of a network's outputs.
        columns: label -> the place of its column; not for a label that is derived.
        negated: labels whose column says the opposite.
        opposites: label -> the place of a second column, which says the opposite.
        owners: key of a coarser level -> the place of its column; the files must agree with it.
        ignored: names of columns that are not used.
    """

    key: str
    key_column: int
    labels: LabelSet
    columns: Mapping[str, int]
    negated: frozenset[str]
    opposites: Mapping[str, int]
    owners: Mapping[str, int]
    ignored: tuple[str, ...]


def plain(name: str) -> str:
    """Return a name without case, spaces and signs.

    >>> plain("SOP Instance_UID"), plain("No_Hemorrhage")
    ('sopinstanceuid', 'nohemorrhage')
    """
    return re.sub(r"[^a-z0-9]", "", name.lower())


def parse_label_map(text: str) -> dict[str, str]:
    """Read "ICH=any, IPH=intraparenchymal, Normal=!any": column of the table = label.

    Raises:
        UsageError: it cannot be read, or two columns give one label.

    >>> parse_label_map("ICH=any, Normal=!any2")
    {'ICH': 'any', 'Normal': '!any2'}
    """
    if not text.strip():
        raise UsageError(
            "--label-map is empty; expected COLUMN=LABEL,... or a JSON file.", _EXAMPLE
        )
    pairs = []
    for part in text.split(","):
        column, equals, label = part.partition("=")
        if not equals:
            raise UsageError(
                f"--label-map {excerpt(text)}: {excerpt(part.strip())} is not COLUMN=LABEL.",
                _EXAMPLE,
            )
        pairs.append((column, label))
    return check_label_map(pairs, excerpt(text))


def check_label_map(pairs: Iterable[tuple[str, str]], source: str) -> dict[str, str]:
    """Return column -> label, without spaces around them.

    Args:
        pairs: column and label; a column may have any sign in its name.
        source: what the user gave, for messages.

    Raises:
        UsageError: no pair, an empty name, a column twice, or two columns that give one label.
    """
    found: dict[str, str] = {}
    for column, label in ((column.strip(), label.strip()) for column, label in pairs):
        if not column or not label.removeprefix("!"):
            shown = excerpt(f"{column}={label}")
            raise UsageError(f"--label-map {source}: {shown} is not COLUMN=LABEL.", _EXAMPLE)
        if column in found:
            raise UsageError(f"--label-map names the column {excerpt(column)} twice.")
        found[column] = label
    names = [label.removeprefix("!") for label in found.values()]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--label-map gives the label {excerpt(name)} to two columns.")
    if not found:
        raise UsageError(f"--label-map {source} names no column.", _EXAMPLE)
    return found


def find_columns(
    header: Sequence[str], label_map: Mapping[str, str] | None, exclusive: bool, source: str
) -> Columns:
    """Find out what the columns of a table mean.

    Args:
        header: the names of the columns.
        label_map: column -> label ("!label" for the opposite); columns that it does not name are
            not used. None knows RSNA's labels and their abbreviations, and no others.
        exclusive: exactly one label is 1 in every row.
        source: the file, for messages.

    Raises:
        DataError: a column is missing, occurs twice, or is unknown.
    """
    names = [name.strip() for name in header]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{source}: the header has {excerpt(name)} twice.", "Rename one.")
    meant: dict[int, str] = {}
    unknown: list[str] = []
    key, key_column = _find_key(names, label_map, source)
    if label_map is not None:
        for column in label_map:
            if column not in names:
                shown = ", ".join(excerpt(name) for name in names[:12])
                raise DataError(
                    f"{source} has no column {excerpt(column)}, which --label-map names.",
                    f"Its columns: {shown}.",
                )
        meant = {names.index(column): label for column, label in label_map.items()}
    else:
        for place, name in enumerate(names):
            if place == key_column:
                continue
            label = ALIASES.get(plain(name))
            if label is not None:
                meant[place] = label
            elif plain(name) not in IGNORED and plain(name) not in _ALL_KEYS:
                unknown.append(name)
    if unknown:
        raise DataError(
            f"{source}: unknown column(s) {', '.join(excerpt(name) for name in unknown[:5])}"
            f"{' and more' if len(unknown) > 5 else ''}.",
            "Name the columns to use: --label-map 'COLUMN=LABEL,COLUMN=LABEL'.",
        )
    return _columns(names, key, key_column, meant, exclusive, source)


def _find_key(
    names: list[str], label_map: Mapping[str, str] | None, source: str
) -> tuple[str, int]:
    for key, known in KEY_NAMES.items():
        places = [n for n, name in enumerate(names) if plain(name) in known]
        places = [n for n in places if label_map is None or names[n] not in label_map]
        if len(places) > 1:
            raise DataError(
                f"{source}: both {excerpt(names[places[0]])} and {excerpt(names[places[1]])} seem"
                " to identify the rows.",
                "Remove one of them.",
            )
        if places:
            return key, places[0]
    raise DataError(
        f"{source}: no column identifies the rows.",
        "Expected one of SOPInstanceUID, SeriesInstanceUID, StudyInstanceUID, PatientID or path.",
    )


def _columns(
    names: list[str],
    key: str,
    key_column: int,
    meant: dict[int, str],
    exclusive: bool,
    source: str,
) -> Columns:
    of_label: dict[str, int] = {}
    opposites: dict[str, int] = {}
    for place, label in meant.items():
        name = label.removeprefix("!")
        if name in of_label and label.startswith("!"):
            opposites[name] = place  # "any" itself is there, too
            continue
        if name in of_label and not meant[of_label[name]].startswith("!"):
            raise DataError(
                f"{source}: {excerpt(names[of_label[name]])} and {excerpt(names[place])} both mean"
                f" {name}.",
                "Choose with --label-map.",
            )
        if name in of_label:
            opposites[name] = of_label[name]
        of_label[name] = place
    if not of_label:
        raise DataError(
            f"{source}: no column holds a label that is known.",
            "Name the columns to use: --label-map 'COLUMN=LABEL,COLUMN=LABEL'.",
        )
    found = list(of_label)
    if exclusive:
        require_exclusive(found, source)
    derived = set(found) == set(SUBTYPES) and not exclusive
    if set(found) <= set(LABELS):
        found = [name for name in LABELS if name in of_label or (derived and name == ANY)]
    labels = SIX if tuple(found) == LABELS and not exclusive else label_set(found, exclusive)
    owners = _owners(names, key, {*meant, key_column})
    used = {*of_label.values(), *opposites.values(), *owners.values(), key_column}
    return Columns(
        key=key,
        key_column=key_column,
        labels=labels,
        columns=of_label,
        negated=frozenset(name for name, n in of_label.items() if meant[n].startswith("!")),
        opposites=opposites,
        owners=owners,
        ignored=tuple(name for n, name in enumerate(names) if n not in used),
    )


def _owners(names: list[str], key: str, taken: set[int]) -> dict[str, int]:
    """Return the columns that say what else the rows are of.

    Not the patient: tables call patients by other names than the files, which hides who they are.
    """
    coarser = list(KEY_NAMES)[list(KEY_NAMES).index(key) + 1 :]
    places = {
        level: [n for n, name in enumerate(names) if plain(name) in KEY_NAMES[level]]
        for level in coarser
        if level in _UIDS
    }
    return {
        level: found[0]
        for level, found in places.items()
        if len(found) == 1 and found[0] not in taken
    }


def require_exclusive(labels: Sequence[str], source: Path | str) -> None:
    """Refuse labels of which more or fewer than one can be 1, before their rows are read.

    Raises:
        UsageError: one label alone, or `any` beside a subtype.
    """
    if len(labels) < 2:
        raise UsageError(
            f"--exclusive: {source} gives one label, {labels[0]}; exclusive labels are two or more,"
            " of which exactly one is 1 in every row.",
            "Leave --exclusive out, or name more columns with --label-map.",
        )
    if ANY in labels and set(SUBTYPES) & set(labels):
        raise UsageError(
            f"--exclusive: the labels of {source} ({', '.join(labels)}) are not exclusive: {ANY} is"
            " 1 wherever a subtype is, and an image may have several subtypes.",
            "Leave --exclusive out.",
        )


_UIDS = ("series_instance_uid", "study_instance_uid")
_ALL_KEYS = {name for known in KEY_NAMES.values() for name in known}
