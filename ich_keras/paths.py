"""Paths as people write them: on a command line, in a config file, in an environment variable."""

import os
from pathlib import Path

from ich_keras.errors import UsageError


def path_of(text: str, place: str) -> Path:
    """Turn what was written into a path; a leading `~` or `~user` is a home folder.

    A shell expands neither `--out=~/run` nor what stands in quotes, and a variable that is not set
    leaves an empty text, which Python would take for the current folder.

    Args:
        text: as written.
        place: where it was written, for the message: an option, a setting, a variable.

    Raises:
        UsageError: the text is empty or blank, holds a NUL, or names an unknown home folder.

    >>> path_of("data/images", "--dicom")
    PosixPath('data/images')
    >>> path_of(" ", "--dicom")
    Traceback (most recent call last):
        ...
    ich_keras.errors.UsageError: --dicom is ' '; expected a path. ...
    """
    if not text.strip():
        raise UsageError(
            f"{place} is {text!r}; expected a path.",
            "Is a variable of the shell not set? `.` is the current folder.",
        )
    if "\0" in text:
        raise UsageError(f"{place} is {text!r}; a path cannot contain a NUL character.")
    if not text.startswith("~"):
        return Path(text)
    expanded = os.path.expanduser(text)  # noqa: PTH111 (Path's gives no name to an unknown user)
    # An empty HOME would turn ~/run into /run.
    is_home = text == "~" or text[1:].startswith((os.sep, os.altsep or os.sep))
    is_lost = is_home and not os.path.isabs(os.environ.get("HOME", os.sep))  # noqa: PTH117
    if expanded.startswith("~") or is_lost:
        raise UsageError(
            f"{place} is {text!r}, and there is no home folder for {text.partition('/')[0]!r}.",
            f"Write the whole path; for a file of that name here, ./{text}.",
        )
    return Path(expanded)
