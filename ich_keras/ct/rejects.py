"""Why a file cannot be used as a slice: codes, explanations, hints, and the table of rejects.

A reject carries its code, detail and hint all the way to `rejects.csv` and to the lines that a
command prints.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ich_keras.ct.tables import REJECT_COLUMNS, csv_text, make_table, shown_paths
from ich_keras.errors import DataError, UsageError
from ich_keras.files import atomic_write

REJECTS_FILE = "rejects.csv"
LEAVE_OUT = "Nothing to do: only acquired CT slices are used."
LEAVE_OR_ASK = (
    "Nothing to do: only acquired CT slices are used. If it is a slice of a head all the same, add"
    " --any-image-type."
)
COPY_AGAIN = "Copy or download the file again."
EXPORT_AGAIN = "Export the series again from where it came from, or leave the file out."
FRAMES = "Name one, ich_keras.ct.sources.Frame(path, number), or index it: index_folder(path)."
SINGLE_FRAME = "Convert it to single-frame CT images first."
NIFTI = "pip install 'ich_keras[nifti]'"
CODECS = "pip install 'ich_keras[codecs]'"


# The largest share of lost slices that a command takes without being told to.
MAX_REJECTS = 0.2
# Files called so were meant to be DICOM files.
_DICOM_SUFFIXES = (".dcm", ".dicom", ".dic", ".ima")


class Explanation(NamedTuple):
    """What a reject code means.

    Args:
        meaning: in words.
        hint: what to do, for when the reader gives no better one.
        is_loss: whether the file should have been a slice, so that data are lost without it; not
            so for other kinds of files and images, copies, and what an option leaves out.
    """

    meaning: str
    hint: str
    is_loss: bool = True


REJECT_CODES = {
    "NOT_DICOM": Explanation(
        "not a DICOM file (no preamble with 'DICM')",
        "Nothing to do if it is not a CT slice. If it is one, copy or export it again.",
        is_loss=False,  # but see `lost`
    ),
    "UNREADABLE": Explanation(
        "the operating system could not read the file",
        "Check that it exists and that you may read it.",
    ),
    "TRUNCATED": Explanation("the file ends too early", COPY_AGAIN),
    "ZERO_TAIL": Explanation("the end of the pixel data is filled with zeros", COPY_AGAIN),
    "MISSING_TAG": Explanation("a tag that a CT slice must have is absent or empty", EXPORT_AGAIN),
    "BAD_VALUE": Explanation("a tag holds a value that cannot be right", EXPORT_AGAIN),
    "BAD_RESCALE": Explanation("rescale slope or intercept is absent or unusable", EXPORT_AGAIN),
    "UNSUPPORTED_PIXELS": Explanation(
        "not single-channel 16-bit MONOCHROME2 integer pixels", EXPORT_AGAIN
    ),
    "NOT_CT": Explanation(
        "another modality, a secondary capture, a mask, or an object that is not an image",
        LEAVE_OUT,
        is_loss=False,
    ),
    "NOT_ORIGINAL": Explanation(
        "an image computed from others, or a page of text, not an acquired slice",
        LEAVE_OR_ASK,
        is_loss=False,
    ),
    "MULTIFRAME": Explanation("several slices in one file, where one is expected", SINGLE_FRAME),
    "BAD_NIFTI": Explanation(
        "a NIfTI file that is not one readable volume with a known place in space",
        "Write it again as a 3-D volume in HU, with its affine in mm.",
    ),
    "TOO_LARGE": Explanation("the header claims more pixels than a CT can have", EXPORT_AGAIN),
    "NO_DECODER": Explanation("no decoder for this transfer syntax is installed", CODECS),
    "DECODE_ERROR": Explanation("the compressed pixel data could not be decoded", COPY_AGAIN),
    "DECODER_CRASH": Explanation("the decoder of the compressed pixels crashed", COPY_AGAIN),
    "TIMEOUT": Explanation("the decoder of the compressed pixels took too long", COPY_AGAIN),
    "IMPLAUSIBLE_HU": Explanation(
        "values that cannot be Hounsfield units: air or tissue is not where it must be",
        "Compare RescaleSlope and RescaleIntercept with the original, and export the series again.",
    ),
    "DUPLICATE_UID": Explanation(
        "a copy of another file: the same SOPInstanceUID, header and pixels",
        "Nothing to do: the first file by path is used.",
        is_loss=False,
    ),
    "CHANGED": Explanation("the file is not the one that was indexed", "Index the folder again."),
    "UID_CONFLICT": Explanation(
        "the SOPInstanceUID is also that of a file with other content; neither is used",
        "Remove the file that is wrong, or give it a SOPInstanceUID of its own.",
    ),
    "BAD_ARCHIVE": Explanation(
        "an archive that cannot be read, or not to its end",
        "Copy or download it again. If it is of another kind than zip and tar, unpack it.",
    ),
    "BAD_MEMBER": Explanation(
        "a member of an archive that cannot be read", "Unpack the archive and look at this file."
    ),
    "NESTED_ARCHIVE": Explanation(
        "an archive within an archive; it is not read", "Unpack the outer archive."
    ),
    "HIDDEN": Explanation(
        "a hidden file or folder: its name begins with a dot; it is not read",
        "Nothing to do if it holds no CT slices. If it does, rename it.",
        is_loss=False,
    ),
    "LOCALIZER": Explanation("a localizer (scout) image", LEAVE_OUT, is_loss=False),
    "NOT_AXIAL": Explanation(
        "a coronal, sagittal or oblique series",
        "Nothing to do: only axial series are used.",
        is_loss=False,
    ),
    "NOT_HEAD": Explanation(
        "a slice of another part of the body than the head",
        "Nothing to do: only heads are used. If it is one, add --any-body-part.",
        is_loss=False,
    ),
    "DUPLICATE": Explanation(
        "a slice of a series with two slices at one place, which this run skips",
        "Use a run that was trained with --duplicate keep, or a run on slices.",
        is_loss=False,
    ),
    "TILTED": Explanation(
        "a slice of a tilted series, which this run skips",
        "Use a run that was trained with --tilted keep or deshear, or a run on slices.",
        is_loss=False,
    ),
}


class RejectedFile(DataError):
    """A file that cannot be used as a CT slice.

    Args:
        code: a key of `REJECT_CODES`.
        detail: the tag and value at fault, and what was expected.
        hint: what to do; "" takes that of the code.
        series_instance_uid: of the series that the file belongs to; "" where it is not known.
    """

    def __init__(
        self, code: str, detail: str, hint: str = "", series_instance_uid: str = ""
    ) -> None:
        if code not in REJECT_CODES:
            raise KeyError(f"unknown reject code {code!r}; known: {', '.join(REJECT_CODES)}")
        super().__init__(f"{code}: {detail}", hint or REJECT_CODES[code].hint)
        self.code = code
        self.detail = detail
        self.series_instance_uid = series_instance_uid

    def __reduce__(self) -> tuple:
        # The default pickles Exception.args, which holds the joined message: worker processes
        # would fail to hand the exception back.
        return (RejectedFile, (self.code, self.detail, self.hint, self.series_instance_uid))


class RefusedFolder(DataError):
    """A folder is refused for the files in it.

    Args:
        message, hint: as in `DataError`.
        rejects: the table of the files and why they were refused (`reject_table`).
    """

    def __init__(self, message: str, hint: str, rejects: pd.DataFrame) -> None:
        super().__init__(message, hint)
        self.rejects = rejects


class NothingUsable(RefusedFolder):
    """Nothing in a folder is usable."""


class TooManyRejects(RefusedFolder):
    """More files of a folder were refused than is taken for granted."""


class Reject(NamedTuple):
    """One file that cannot be used."""

    path: str
    code: str
    detail: str
    hint: str = ""
    series_instance_uid: str = ""

    @classmethod
    def of(cls, path: str, error: RejectedFile) -> "Reject":
        """Return the reject of a file that raised an error."""
        return cls(path, error.code, error.detail, error.hint, error.series_instance_uid)


def reject_table(rejects: Iterable[Reject]) -> pd.DataFrame:
    """Make the table of rejects, sorted by path.

    Returns:
        Text columns: path, code, detail, explanation, hint and series_instance_uid
        (REJECT_COLUMNS); the last is "" where the file did not tell.

    >>> found = [Reject("b.dcm", "TRUNCATED", "cut"), Reject("a.txt", "NOT_DICOM", "")]
    >>> table = reject_table(found)
    >>> table[["path", "code", "hint"]].values.tolist()
    [['a.txt', 'NOT_DICOM', 'Nothing to do if it is not a CT slice. ...'],
     ['b.dcm', 'TRUNCATED', 'Copy or download the file again.']]
    """
    rows = [
        (
            reject.path,
            reject.code,
            reject.detail,
            REJECT_CODES[reject.code].meaning,
            reject.hint or REJECT_CODES[reject.code].hint,
            reject.series_instance_uid,
        )
        for reject in sorted(rejects)
    ]
    return make_table(rows, REJECT_COLUMNS)


def explained(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of rejects with all current columns; older ones lack the last ones."""
    if "hint" not in table:
        rows = table[["path", "code", "detail"]].itertuples(index=False, name=None)
        return reject_table(Reject(*row) for row in rows)
    return table.reindex(columns=list(REJECT_COLUMNS), fill_value="").astype(REJECT_COLUMNS)


def joined(table: pd.DataFrame, rejects: Iterable[Reject]) -> pd.DataFrame:
    """Return a table of rejects with more added, sorted by path."""
    more = reject_table(rejects)
    if more.empty:
        return table
    return pd.concat([explained(table), more]).sort_values("path").reset_index(drop=True)


def lost_slices(table: pd.DataFrame) -> dict[str, int]:
    """Count the rejects of each series that would have been slices of it.

    Returns:
        SeriesInstanceUID -> number. Images of another kind and copies do not count.

    >>> codes = ("TRUNCATED", "NOT_ORIGINAL")
    >>> lost_slices(reject_table(Reject(code, code, "", "", "1.2") for code in codes))
    {'1.2': 1}
    """
    pairs = zip(table["series_instance_uid"], table["code"], strict=True)
    return dict(Counter(uid for uid, code in pairs if uid and REJECT_CODES[code].is_loss))


def counts(table: pd.DataFrame) -> str:
    """Count rejects by code, the most common first.

    >>> counts(reject_table([Reject("a", "NOT_CT", ""), Reject("b", "NOT_CT", "")]))
    'NOT_CT 2'
    """
    return ", ".join(f"{code} {number:,}" for code, number in _by_code(table))


def _by_code(table: pd.DataFrame) -> list[tuple[str, int]]:
    """Count rejects by code, the most common first; equally common ones by name."""
    found = Counter(table["code"].tolist())
    return sorted(found.items(), key=lambda item: (-item[1], item[0]))


def summary(table: pd.DataFrame) -> list[str]:
    """Say in a few lines why files were not used.

    Each code comes with its number and meaning; the most common one also with the first file's
    detail and the hint.

    >>> for line in summary(reject_table([Reject("a.dcm", "MISSING_TAG", "Rows is absent")])):
    ...     print(line)
    1 reject: MISSING_TAG, a tag that a CT slice must have is absent or empty
      first: a.dcm: Rows is absent
      what to do: Export the series again from where it came from, or leave the file out.
    """
    lines = []
    for place, (code, number) in enumerate(_by_code(table)):
        noun = "reject" if number == 1 else "rejects"
        lines.append(f"{number:,} {noun}: {code}, {REJECT_CODES[code].meaning}")
        if place == 0:
            first = table[table["code"] == code].iloc[0]
            lines.append(f"  first: {first['path']}: {first['detail']}")
            lines.append(f"  what to do: {first['hint']}")
    return lines


def nothing_usable(message: str, table: pd.DataFrame, hint: str = "") -> NothingUsable:
    """Make the error for a folder in which nothing is usable.

    Args:
        message: what was searched, without a full stop.
        table: of rejects; may be empty.
        hint: what to do when there are no rejects.
    """
    if table.empty:
        return NothingUsable(f"{message}.", hint, table)
    code, _ = _by_code(table)[0]
    first = table[table["code"] == code].iloc[0]
    return NothingUsable(
        f"{message} ({counts(table)}); {first['path']}: {first['detail']}.", first["hint"], table
    )


def lost(table: pd.DataFrame) -> pd.Series:
    """Tell for each reject whether data are lost without the file; see `Explanation.is_loss`.

    A file named like a DICOM file that is not one counts as lost: an empty `1.dcm` is a slice that
    was not copied. The shadow files of macOS (`._1.dcm`) are none.

    Returns:
        bool, by row of the table.

    >>> found = [Reject("a.dcm", "NOT_DICOM", ""), Reject("a.txt", "NOT_DICOM", "")]
    >>> lost(reject_table(found)).tolist()
    [True, False]
    """
    names = [path.replace("\\", "/").rpartition("/")[2].lower() for path in table["path"]]
    is_meant = [name.endswith(_DICOM_SUFFIXES) and not name.startswith(".") for name in names]
    is_loss = table["code"].map(lambda code: REJECT_CODES[code].is_loss).astype(bool)
    return is_loss | ((table["code"] == "NOT_DICOM") & pd.Series(is_meant, table.index, bool))


def require_share(max_rejects: float) -> None:
    """Refuse a limit that is not a share; NaN would never be exceeded.

    Raises:
        UsageError: it is not from 0 to 1.
    """
    if not 0 <= max_rejects <= 1:
        raise UsageError(
            f"max_rejects is {max_rejects}; expected a share from 0 to 1.",
            f"The default is {MAX_REJECTS}; 1 takes any number of rejects.",
        )


def require_few_rejects(slices: pd.DataFrame, rejects: pd.DataFrame, max_rejects: float) -> None:
    """Refuse data of which too large a share is lost.

    The share is that of the lost files (`lost`) among them and the slices that can be used.

    Args:
        slices: the table of slices; those that became rejects since do not count.
        rejects: the table of rejects.
        max_rejects: the largest share, 0 to 1.

    Raises:
        TooManyRejects: naming the share, the codes, the first file and what to do.
        UsageError: `max_rejects` is not a share.
    """
    require_share(max_rejects)
    missing = rejects[lost(rejects)]
    used = len(slices) - int(shown_paths(slices).isin(rejects["path"]).sum())
    share = len(missing) / max(1, len(missing) + used)
    if used == 0 or share <= max_rejects:  # without any slice another error says so
        return
    code, _ = _by_code(missing)[0]
    first = missing[missing["code"] == code].iloc[0]
    raise TooManyRejects(
        f"{len(missing):,} of {len(missing) + used:,} files that should be slices were refused"
        f" ({share:.0%}; at most {max_rejects:.0%} expected): {counts(missing)}; {first['path']}:"
        f" {first['detail']}.",
        f"{first['hint']} To go on without them: --max-rejects {math.ceil(share * 100) / 100:g}.",
        rejects,
    )


@contextlib.contextmanager
def rejects_kept(folder: Path | None) -> Iterator[None]:
    """When a block refuses a folder, write its rejects to a folder and say so in the hint.

    Args:
        folder: receives rejects.csv; created when absent. None writes nothing. The next try
            replaces what is left there: see `ich_keras.ct.leftovers`.
    """
    try:
        yield
    except RefusedFolder as error:
        if folder is None or error.rejects.empty:
            raise
        path = folder / REJECTS_FILE
        atomic_write(path, csv_text(error.rejects))
        hint = f"{error.hint} Every file and its reason: {path}"
        raise type(error)(error.message, hint, error.rejects) from error
