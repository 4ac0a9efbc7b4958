"""Exceptions, exit codes and reject codes.

Every error a user can meet is an `IchError`: one line that says what is wrong (with value and
place) and what was expected, then a hint that says what to do. The command line prints both and
exits with `exit_code`.
"""

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_ENVIRONMENT = 4
EXIT_DIVERGED = 5
EXIT_STALE = 6
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

# Why a file cannot be used as a slice. One row per code: what the user reads in rejects.csv.
REJECT_CODES = {
    "NOT_DICOM": "not a DICOM file (no preamble with 'DICM')",
    "UNREADABLE": "the operating system could not read the file",
    "TRUNCATED": "the file ends before the pixel data does",
    "ZERO_TAIL": "the second half of the pixel data is filled with zeros",
    "MISSING_TAG": "a tag that a CT slice must have is absent or empty",
    "BAD_VALUE": "a tag holds a value that cannot be right",
    "BAD_RESCALE": "rescale slope or intercept is absent or unusable",
    "UNSUPPORTED_PIXELS": "not single-channel 16-bit MONOCHROME2 integer pixels",
    "NOT_CT": "another modality, a secondary capture, or an object that is not an image",
    "NOT_ORIGINAL": "an image reformatted from others, not an acquired slice",
    "MULTIFRAME": "an enhanced multi-frame object; only single slices are read",
    "TOO_LARGE": "the header claims more pixels than a CT slice can have",
    "NO_DECODER": "no decoder for this transfer syntax is installed",
    "DECODE_ERROR": "the compressed pixel data could not be decoded",
    "DUPLICATE_UID": "the same SOPInstanceUID was already seen in another file",
    "LOCALIZER": "a localizer (scout) image",
    "NOT_AXIAL": "a coronal, sagittal or oblique series",
    "TILTED": "a slice of a tilted series, and the run takes none",
}


class IchError(Exception):
    """An error with a one-line message for the user and a hint what to do.

    Args:
        message: what is wrong, with value and place, and what was expected.
        hint: what to do about it; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class UsageError(IchError):
    """An argument or option cannot be used as given."""

    exit_code = EXIT_USAGE


class DataError(IchError):
    """The data (DICOM files, labels, a split) are refused."""

    exit_code = EXIT_DATA


class EnvironmentProblem(IchError):
    """Something outside the data is missing: a package, a device, disk space."""

    exit_code = EXIT_ENVIRONMENT


class DivergedError(IchError):
    """Training produced a loss or weights that are not finite."""

    exit_code = EXIT_DIVERGED


class StaleError(IchError):
    """A cache or state was made with other settings, is damaged, or is in use elsewhere."""

    exit_code = EXIT_STALE


class LostState(StaleError):
    """What an interrupted training left is damaged, or of another network: it starts anew."""


class RejectedFile(DataError):
    """A file that cannot be used as a CT slice.

    Args:
        code: a key of `REJECT_CODES`.
        detail: the tag and value at fault, and what was expected.
        hint: what to do.
    """

    def __init__(self, code: str, detail: str, hint: str = ""):
        if code not in REJECT_CODES:
            raise KeyError(f"unknown reject code {code!r}; known: {', '.join(REJECT_CODES)}")
        super().__init__(f"{code}: {detail}", hint)
        self.code = code
        self.detail = detail

    def __reduce__(self):
        # The default pickles Exception.args, which holds the joined message: worker processes
        # would fail to hand the exception back.
        return (RejectedFile, (self.code, self.detail, self.hint))
