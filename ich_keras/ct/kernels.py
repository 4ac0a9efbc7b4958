"""Which reconstruction kernels are sharp: made for bone or lung, too noisy for brain."""

import re

_WORDS = ("bone", "edge", "lung", "sharp", "ultra", "inner ear")
# Siemens: a letter or two and a number, from 10 (smooth) to 90 (sharp): H31s, Hr64h, B70f, J40s.
_SIEMENS = re.compile(r"[A-Z][a-z]?(\d\d)[a-z]*")
_SIEMENS_SHARP = 50
# Canon and Toshiba: FC01 to FC29 and FC40 to FC49, FC60 to FC69 are smooth.
_CANON = re.compile(r"FC(\d\d)")
_CANON_SHARP = (3, 5, 8)  # tens
_PHILIPS_SHARP = ("D", "E", "YC", "YD", "YE")


def is_sharp(kernel: str) -> bool | None:
    r"""Tell whether a kernel is sharp, by the names that makers use.

    Args:
        kernel: ConvolutionKernel (0018,1210) as in the series table; several values are joined by a
            backslash, of which the first counts.

    Returns:
        None where the name says nothing.

    >>> is_sharp("H31s"), is_sharp("Hr64h"), is_sharp("BONEPLUS"), is_sharp("FC21"), is_sharp("")
    (False, True, True, False, None)
    """
    name = kernel.split("\\")[0].strip()
    if not name:
        return None
    if any(word in name.lower() for word in _WORDS):
        return True
    if (found := _CANON.fullmatch(name)) is not None:
        return int(found[1]) // 10 in _CANON_SHARP
    if (found := _SIEMENS.fullmatch(name)) is not None:
        return int(found[1]) >= _SIEMENS_SHARP
    if name.upper() in _PHILIPS_SHARP:
        return True
    smooth = name.lower() in ("standard", "soft", "std", "brain", "a", "b", "ua", "ub", "uc")
    return False if smooth else None
