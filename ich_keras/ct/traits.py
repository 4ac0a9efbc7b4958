"""What headers say of scanner, patient and contrast medium: groups to break results down by.

These tags hold free text, which may be anything and may name people. What is kept of them is one of
a few words, or the name of a scanner: a known maker, and the plain signs of a short model name. An
age is kept as a band, never as a number.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from ich_keras.ct.data_set import CONTRAST_AGENTS, DataSet
from ich_keras.ct.elements import TAGS, Element, decimal, note_of

YES, NO = "yes", "no"
SEXES = ("F", "M", "O")
# Lowest age in years of each band. From 80 on there is one: so old a person may be known by it.
AGE_GROUPS = {"under 18": 0, "18 to 39": 18, "40 to 59": 40, "60 to 79": 60, "80 and over": 80}
OTHER_MAKER = "OTHER MAKER"
MAX_SCANNER_CHARACTERS = 40
MAX_THICKNESS_MM = 100.0

# The first word of a maker's name, and what it is called here.
_MAKERS = {
    **{
        word: word
        for word in (
            *("SIEMENS", "GE", "PHILIPS", "TOSHIBA", "CANON", "HITACHI", "FUJIFILM", "NEUSOFT"),
            *("SAMSUNG", "NEUROLOGICA", "SHIMADZU", "PICKER", "MARCONI", "ELSCINT", "IMATRON"),
            *("MINFOUND", "ACCURAY", "STRYKER", "MEDTRONIC", "SINOVISION", "ANKE", "XORAN"),
        )
    },
    "GEMS": "GE",
    "UIH": "UNITED IMAGING",
    "UNITED": "UNITED IMAGING",
    "FUJI": "FUJIFILM",
}
# What no name of a scanner holds: the sign between parts of a person's name, addresses, numbers of
# patients or devices, dates.
_NOT_A_SCANNER = re.compile(r"[\^@,=<>]|\d{5,}")
_AGE = re.compile(r"(\d{1,3})([DWMY])", re.ASCII)
_PER_YEAR = {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}
_OLDEST = 130

# Of an agent that was not given, on its own or at the beginning. Nonionic agents are given.
_NOT_GIVEN = re.compile(
    r"(NO|NON(?! ?IONI)|NOT|NONE|NIL|WITHOUT|W O|WO|OHNE|KEIN\w*|SANS|SIN|SENZA|NATIVE?|UNENHANCED"
    r"|FALSE|NONCONTRAST|NONENHANCED|N|0+)( .*)?"
)
# Nothing is known, or the medium is not in the vessels of the head.
_SAYS_NOTHING = re.compile(r"|N A|NA|UNKNOWN|UNBEKANNT|OTHER|ORAL|PO|P O|RECTAL|ORAL RECTAL")
_MEDIUM = r"(CONTRAST\w*|CON|CM|KM|PDC|MDC|IV)"
_WITHOUT = re.compile(
    rf"\b(NO|NON|WITHOUT|W O|WO|PRE|OHNE|SANS|SIN|SENZA) (IV )?{_MEDIUM}\b"
    r"|\b(NCCT|NECT|NCHCT|PRECON\w*|NONCON\w*|NONENHANCED|UNENHANCED|NATIV|NATIVE)\b"
)
_WITH = re.compile(
    rf"\b(W|WITH|MIT|AVEC|CON|POST|NACH) (IV )?{_MEDIUM}\b"
    r"|\b(CTA|CECT|ANGIO\w*|VENOGRA\w*|POSTCON\w*)\b|\+ ?(C|KM|CM|CONTRAST)\b|\bC\+"
)
# A study or a series of both kinds: the description does not say which this one is.
_BOTH = re.compile(
    r"\b(W|WITH|POST) (AND |N |OR )?(WO|W O|WITHOUT|PRE)\b"
    r"|\b(WO|W O|WITHOUT|PRE) (AND |N |OR )?(W|WITH|POST)\b|\bPHASES?\b"
)
_NAMES = ("ContrastBolusAgent", "ContrastBolusRoute", "ContrastBolusIngredient")
_AMOUNTS = ("ContrastBolusVolume", "ContrastBolusTotalDose", "ContrastFlowRate")
# How many different values are remembered: a folder holds few, in many files.
_DIFFERENT = 256


class Traits(NamedTuple):
    """What a header says; "" is unknown.

    Args:
        scanner: maker and model, in capitals.
        age_group: a key of AGE_GROUPS.
        sex: one of SEXES.
        contrast: YES, NO, or "" where no tag says anything.
    """

    scanner: str = ""
    age_group: str = ""
    sex: str = ""
    contrast: str = ""


NO_TRAITS = Traits()


def traits_of(data_set: DataSet) -> Traits:
    """Read the traits of a slice from its tags; no value of them is a fault.

    Source:
        DICOM PS3.3 C.7.5.1 (equipment), C.7.2.2 (patient study), C.7.6.4 and C.7.6.4b (contrast).
    """
    elements = data_set.elements
    return Traits(
        scanner_of(note_of(elements, "Manufacturer"), note_of(elements, "ManufacturerModelName")),
        age_group_of(note_of(elements, "PatientAge")),
        sex_of(note_of(elements, "PatientSex")),
        _contrast(data_set),
    )


@lru_cache(_DIFFERENT)
def scanner_of(maker: str, model: str) -> str:
    """Return a scanner's name as a group: "GE LIGHTSPEED VCT".

    Args:
        maker: Manufacturer (0008,0070). Of a maker that is not known here nothing is kept, and
            neither is the model: what stands there may be anything.
        model: ManufacturerModelName (0008,1090).

    >>> scanner_of("GE MEDICAL SYSTEMS", "LightSpeed  VCT"), scanner_of("TOSHIBA_MEC", "Aquilion")
    ('GE LIGHTSPEED VCT', 'TOSHIBA AQUILION')
    >>> scanner_of("Doe^John", "x"), scanner_of("", "Aquilion"), scanner_of("SIEMENS", "Doe^John")
    ('OTHER MAKER', '', 'SIEMENS')
    """
    words = plain_text(maker).upper().split()
    if not words:
        return OTHER_MAKER if maker.strip() else ""
    known = _MAKERS.get(words[0])
    if known is None or _NOT_A_SCANNER.search(maker):
        return OTHER_MAKER
    name = "" if _NOT_A_SCANNER.search(model) else plain_text(model).upper()
    return f"{known} {name}"[:MAX_SCANNER_CHARACTERS].strip()


def plain_text(text: str) -> str:
    """Return a text with its letters of ASCII, digits and a few signs; others become spaces.

    >>> plain_text(" Definition_AS+ <b>|`")
    'Definition AS+ b'
    """
    return " ".join(re.sub(r"[^A-Za-z0-9+./-]+", " ", text).split())


@lru_cache(_DIFFERENT)
def age_group_of(age: str) -> str:
    """Return the band of PatientAge (0010,1010), an AS of PS3.5 6.2; "" for anything else.

    Zero years, which some programs write for an unknown age, are unknown; an infant has months.

    >>> [age_group_of(age) for age in ("017Y", "018Y", "79Y", "093Y", "008M", "001D")]
    ['under 18', '18 to 39', '60 to 79', '80 and over', 'under 18', 'under 18']
    >>> [age_group_of(age) for age in ("", "45", "000Y", "999Y", "-04Y", "045Y\\\\046Y")]
    ['', '', '', '', '', '']
    """
    found = _AGE.fullmatch(age.strip().upper())
    if found is None:
        return ""
    years = int(found[1]) / _PER_YEAR[found[2]]
    if years > _OLDEST or (found[2] == "Y" and years == 0):
        return ""
    return [group for group, lowest in AGE_GROUPS.items() if years >= lowest][-1]


def sex_of(sex: str) -> str:
    """Return PatientSex (0010,0040) if it is one of SEXES, else "".

    >>> [sex_of(sex) for sex in ("F", "m ", "Male", "X", "")]
    ['F', 'M', '', '', '']
    """
    found = sex.strip().upper()
    return found if found in SEXES else ""


def thickness_mm(text: str) -> float:
    """Return SliceThickness (0018,0050), nominal, mm; NaN where it says nothing usable.

    >>> thickness_mm("5.0"), thickness_mm("0"), thickness_mm("five")
    (5.0, nan, nan)
    """
    value = decimal(text)
    return value if value is not None and 0 < value <= MAX_THICKNESS_MM else math.nan


@lru_cache(_DIFFERENT)
def described_contrast(description: str) -> str:
    """Return what the words of a series say of contrast medium: YES, NO or "".

    >>> [described_contrast(text) for text in ("HEAD W/O CONTRAST", "Kopf nativ", "NCCT 5mm")]
    ['no', 'no', 'no']
    >>> [described_contrast(text) for text in ("CTA Head", "Post-contrast", "HEAD +C", "mit KM")]
    ['yes', 'yes', 'yes', 'yes']
    >>> [described_contrast(text) for text in ("HEAD W/WO CONTRAST", "Contrast?", "Brain 5.0")]
    ['', '', '']
    """
    text = " ".join(re.sub(r"[^A-Z0-9+]+", " ", description.upper()).split())
    if _BOTH.search(text):
        return ""
    if _WITHOUT.search(text):
        return NO
    return YES if _WITH.search(text) else ""


def most_said(values: Iterable[str]) -> str:
    """Return what most slices of a series say; of equally many, the first in order.

    Slices that say nothing do not count.

    >>> most_said(["M", "", "F", "M", "", ""]), most_said(["M", "F"]), most_said(["", ""])
    ('M', 'F', '')
    """
    counts = Counter(value for value in values if value)
    return min(counts, key=lambda value: (-counts[value], value)) if counts else ""


def usual_thickness_mm(texts: Iterable[str]) -> float:
    """Return the thickness that most slices of a series have; of equally many, the smallest.

    >>> usual_thickness_mm(["5", "2.5", "5.0", ""]), usual_thickness_mm(["5", "2.5"])
    (5.0, 2.5)
    """
    counts = Counter(mm for mm in map(thickness_mm, texts) if not math.isnan(mm))
    return min(counts, key=lambda mm: (-counts[mm], mm)) if counts else math.nan


def series_traits(slices: Iterable[tuple[str, ...]]) -> Traits:
    """Return the traits of a series.

    Scanner, age group and sex are those that most slices name (`most_said`). There was contrast
    medium where any slice says so: it stays in the vessels.

    Args:
        slices: the traits of each; empty ones say nothing.
    """
    found = [Traits(*one) for one in slices]
    contrast = {one.contrast for one in found}
    return Traits(
        most_said(one.scanner for one in found),
        most_said(one.age_group for one in found),
        most_said(one.sex for one in found),
        next((word for word in (YES, NO) if word in contrast), ""),
    )


def _contrast(data_set: DataSet) -> str:
    """Say whether there was contrast medium: yes before no, where tags contradict each other."""
    elements = data_set.elements
    said = [_of_name(note_of(elements, keyword)) for keyword in _NAMES]
    said += [_of_amounts(elements, keyword) for keyword in _AMOUNTS]
    # Of an enhanced CT a frame says itself whether it was made with the agents that are listed.
    is_told_by_frame = data_set.is_enhanced and TAGS["ContrastBolusAgent"] in elements
    if CONTRAST_AGENTS in data_set.sequences and not is_told_by_frame:
        said.append(YES if data_set.sequences[CONTRAST_AGENTS].length else "")
    said.append(described_contrast(note_of(elements, "SeriesDescription")))
    return next((word for word in (YES, NO) if word in said), "")


@lru_cache(_DIFFERENT)
def _of_name(text: str) -> str:
    """Judge an agent, a route or an ingredient."""
    name = " ".join(re.sub(r"[^A-Z0-9]+", " ", text.upper()).split())
    if _SAYS_NOTHING.fullmatch(name):
        return ""
    return NO if _NOT_GIVEN.fullmatch(name) else YES


def _of_amounts(elements: dict[int, Element], keyword: str) -> str:
    """Judge a volume, a dose or flow rates: that nothing was given says little."""
    amounts = map(decimal, note_of(elements, keyword).split("\\"))
    return YES if any(amount is not None and amount > 0 for amount in amounts) else ""
