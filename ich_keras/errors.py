"""Exceptions and exit codes.

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


class IchError(Exception):
    """An error with a one-line message for the user and a hint on what to do.

    Args:
        message: what is wrong, with value and place, and what was expected.
        hint: what to do about it; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
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
    """The machine lacks something: a package, a device, disk space."""

    exit_code = EXIT_ENVIRONMENT


class LostProcess(EnvironmentProblem):
    """Another process of the same training ended; it says why, if it can."""


class DivergedError(IchError):
    """Training produced a loss or weights that are not finite."""

    exit_code = EXIT_DIVERGED


class StaleError(IchError):
    """A cache or state was made with other settings, is damaged, or is in use elsewhere."""

    exit_code = EXIT_STALE


class LostState(StaleError):
    """The state of an interrupted training is absent, damaged or of another network."""


class IchWarning(UserWarning):
    """Something that a user should know; the command line prints it as one line."""
