"""What an image says it is: an acquired slice, a localizer, a head or another part of the body.

Source:
    Image Type (0008,0008): DICOM PS3.3 C.7.6.1.1.2 and C.8.2.1.1.1, for computed contrasts
    C.8.16.1.4 and C.8.15.3 (multi-energy), and what vendors write. Body Part Examined (0018,0015):
    PS3.16 annex L, and what hospitals write.
"""

import re
from functools import lru_cache

# Words (letters and digits between other signs) of Image Type that mark what was computed from
# other images, or drawn. Wherever they stand: not every writer says DERIVED.
_COMPUTED = frozenset(
    (
        # reformatted, projected, rendered
        *(
            "MPR",
            "MPVR",
            "CPR",
            "REFORMATTED",
            "REFORMAT",
            "RESAMPLED",
            "CSAPARALLEL",
            "PROJECTION",
        ),
        *(
            "MIP",
            "MINIP",
            "MNIP",
            "MAXIP",
            "MAXIMUM",
            "MINIMUM",
            "AIP",
            "AVGIP",
            "TMIP",
            "PJN",
            "DRR",
            "VR",
            "VRT",
            "SSD",
        ),
        *("RENDERED", "RENDERING", "3D", "TERARECON", "STITCHING", "FUSION", "FUSED", "MOSAIC"),
        # pages and pictures of a screen
        *("SCREEN", "SCREENSAVE", "SCREENSHOT", "SCREENCAPTURE", "SNAPSHOT", "CAPTURE", "CAPTURED"),
        *(
            "PROT",
            "PROTOCOL",
            "POSDISP",
            "REPORT",
            "RESULT",
            "RESULTS",
            "SUMMARY",
            "GRAPH",
            "CHART",
        ),
        *("FILMING", "FILM", "DISPLAY", "VXTL", "OVERLAY", "ANNOTATION", "PRESENTATION"),
        # maps: perfusion, multi-energy, arithmetic between images
        *("CBF", "CBV", "MTT", "TTP", "TMAX", "TTD", "TTS", "IRF", "PBV", "PBF"),
        *("RCBF", "RCBV", "RMTT", "FMTT", "KTRANS", "PERMEABILITY", "PENUMBRA", "MISMATCH", "VPCT"),
        *("MAP", "MAPS", "COLORMAP", "SUBTRACTION", "SUBTRACTED", "MASK", "MASKED", "DIFFERENCE"),
        *(
            "DIVISION",
            "MULTIPLICATION",
            "STDDEV",
            "SEGMENTATION",
            "IODINE",
            "VNC",
            "ZEFF",
            "CALCIUM",
        ),
        *("MATSPECIFIC", "MATFRACTIONAL", "MATREMOVED", "MATMODIFIED", "MATVALUEBASED"),
        *("EFFATOMICNUM", "ELECTRONDENSITY"),
    )
)
# Values as a whole, without spaces and signs, for words that mean something only together.
_COMPUTED_VALUES = re.compile(
    r"DOSE.*|.*DOSE(INFO|REPORT|PAGE|SHEET|SCREEN|SUMMARY|RECORD)|M(IN|AX|EAN)IP|VOLUMERENDER\w*"
    r"|MAT(SPECIFIC|FRACTIONAL|REMOVED|MODIFIED|VALUEBASED)|EFFATOMICNUM|ELECTRONDENSITY"
    r"|STD(DEVIATION|DEV)|PATIENTPROTOCOL"
)
# Also the third value of acquired slices that watch the contrast medium.
_PERFUSION = "PERFUSION"
_SCOUTS = frozenset(
    ("LOCALIZER", "LOCALISER", "SCOUT", "SCOUTVIEW", "TOPOGRAM", "SURVIEW", "SCANOGRAM", "SCANO")
)

# Parts of the head, which may stand in a longer word or beside another part (HEADNECK).
_HEAD = re.compile(
    r"HEAD|BRAIN|SKULL|CRANI|CRANE|CEREB|NEURO|FACE|FACIAL|ORBIT|SINUS|MAXILL|MANDIB|TEMPORAL"
    r"|PETROUS|MASTOID|KOPF|SCH(AE|A|Ä)DEL|HIRN|GEHIRN|T(E|Ê)TE|CABE(Z|C|Ç)A|TESTA|ENCEF|ENCEPH"
    r"|WHOLEBODY|TRAUMA"
)
# Other parts by a piece of their name, and short names as whole words.
_ELSEWHERE = re.compile(
    r"ABDOM|ADDOM|BAUCH|PELVI|PELVE|BECKEN|BASSIN|CHEST|THORA|TORA(C|X|K)|BRUST|LUNG|PULMO"
    r"|HEART|CARDI|CORONAR|AORT|BREAST|MAMMA|NECK|HALS|CUELLO|LARYN|PHARYN|THYRO|TRACHEA|ESOPHAG"
    r"|SPIN(E|AL)|CSPIN|VERTEBRA|WIRBEL|LUMBA|SACR|COCCY|RACHIS|RACHIDE|COLUMNA"
    r"|LIVER|HEPAT|KIDNEY|RENAL|ADRENAL|PANCREA|SPLEEN|STOMACH|COLON|BOWEL|RECTUM|BLADDER|URET"
    r"|PROSTAT|UTERUS|OVAR|TEST(IS|ES)|SHOULDER|CLAVIC|SCAPUL|STERN|HUMER|ELBOW|FOREARM|WRIST"
    r"|FINGER|THUMB|FEMUR|FEMOR|KNEE|TIBIA|FIBULA|ANKLE|FOOT|FEET|EXTREM|THIGH|PATELLA|CALCAN"
)
_ELSEWHERE_WORDS = frozenset(
    (
        *(
            "ABD",
            "CAP",
            "HIP",
            "HIPS",
            "LEG",
            "LEGS",
            "ARM",
            "ARMS",
            "HAND",
            "HANDS",
            "RIB",
            "RIBS",
        ),
        *("TOE", "TOES", "CALF", "BACK", "ULNA", "RADIUS", "COU", "COLLO"),
    )
)


# How many different values are remembered: a folder holds few, in many files.
_DIFFERENT = 256


def values_of(image_type: str) -> list[str]:
    """Return the values of Image Type, in capitals.

    >>> values_of("derived \\\\PRIMARY\\\\AXIAL")
    ['DERIVED', 'PRIMARY', 'AXIAL']
    """
    return [part.strip().upper() for part in image_type.split("\\")]


@lru_cache(_DIFFERENT)
def is_acquired(image_type: str) -> bool:
    """Return whether Image Type is compatible with an acquired slice.

    All its values count. Absent or unknown ones pass, and so do slices that were compressed,
    filtered or corrected for tilt (DERIVED PRIMARY AXIAL). A secondary image passes only where it
    does not say that it is anything but axial.

    >>> is_acquired("DERIVED\\\\PRIMARY\\\\AXIAL"), is_acquired(""), is_acquired("ORIGINAL")
    (True, True, True)
    >>> is_acquired("ORIGINAL\\\\PRIMARY\\\\AXIAL\\\\CSA MPR")
    False
    """
    values = values_of(image_type)
    words = _words(values)
    if not _COMPUTED.isdisjoint(words):
        return False
    if any(_COMPUTED_VALUES.fullmatch(_joined(value)) for value in values):
        return False
    flavour = values[2] if len(values) > 2 else ""
    if _PERFUSION in words and values[:3] != ["ORIGINAL", "PRIMARY", "AXIAL"]:
        return False
    is_secondary = "SECONDARY" in values[:2]
    return not is_secondary or flavour in ("", "AXIAL") or is_localizer(image_type)


@lru_cache(_DIFFERENT)
def is_localizer(image_type: str) -> bool:
    """Return whether Image Type says that an image is a scout view.

    >>> is_localizer("ORIGINAL\\\\PRIMARY\\\\LOCALIZER\\\\CT_SOM5 TOP")
    True
    """
    return not _SCOUTS.isdisjoint(_words(values_of(image_type)))


@lru_cache(_DIFFERENT)
def is_elsewhere(body_part: str) -> bool:
    """Return whether Body Part Examined names a part of the body that is not of the head.

    Absent and unknown names pass, and so does whatever names the head, too.

    >>> [is_elsewhere(part) for part in ("ABDOMEN", "NECK", "C-SPINE", "Thorax")]
    [True, True, True, True]
    >>> [is_elsewhere(part) for part in ("HEAD", "HEADNECK", "", "OTHER")]
    [False, False, False, False]
    """
    name = body_part.upper()
    joined = _joined(name)
    if _HEAD.search(joined):
        return False
    return bool(_ELSEWHERE.search(joined)) or not _ELSEWHERE_WORDS.isdisjoint(_words([name]))


def _words(values: list[str]) -> set[str]:
    """Return the words of some values: letters and digits between other signs."""
    return {word for value in values for word in re.findall(r"[^\W_]+", value)}


def _joined(value: str) -> str:
    return re.sub(r"[\W_]+", "", value)
