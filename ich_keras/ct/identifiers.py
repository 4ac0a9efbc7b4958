"""Identifiers for volumes that have none of their own."""

import hashlib


def uid_of_content(digest: str, *kind: object) -> str:
    """Make a UID from a digest: the same for the same content, wherever it lies.

    Args:
        digest: of the content, hexadecimal.
        kind: what of it is named, such as "slice", 3.

    Source:
        DICOM PS3.5 B.2: 2.25 and a number of 128 bits.

    >>> uid_of_content("00", "series")[:5], uid_of_content("00", "study") == uid_of_content("00")
    ('2.25.', False)
    """
    text = "/".join([digest, *map(str, kind)])
    return f"2.25.{int(hashlib.sha256(text.encode()).hexdigest()[:32], 16)}"
