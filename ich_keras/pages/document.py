"""One HTML file with everything inside: template, style, script, data."""

import base64
import hashlib
import re
import unicodedata
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

# Controls, signs that turn the direction of a text around or have no width, halves of characters
# (bytes of a file's name that are no UTF-8), and what separates lines.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_MINUS = re.compile(r"(?<![\w.])-(?=[\d.])")
_LONGEST = 200  # characters of a text from a file


def visible(text: str) -> str:
    """Return a text in which every character can be seen: others are written as in Python.

    >>> visible("scan\\u202egpj.exe\\0")
    'scan\\\\u202egpj.exe\\\\x00'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        one.encode("unicode_escape").decode("ascii")
        if unicodedata.category(one) in _UNSEEN and one != "\n"
        else one
        for one in text
    )


def short(text: str, longest: int = _LONGEST) -> str:
    """Return a text from a file for a page; the middle of a long one is left out.

    >>> short("a" * 10, longest=5)
    'aa…aa'
    """
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[head + 1 - longest :]}"


def true_minus(text: str) -> str:
    """Return a text with a minus sign for each hyphen before a number.

    >>> true_minus("-0.5 to +0.1, 2020-01, 1e-05, a-1")
    '\u22120.5 to +0.1, 2020-01, 1e-05, a-1'
    """
    return _MINUS.sub("\u2212", text)


@cache
def templates() -> Environment:
    """Return the environment of `templates/`: escapes every value, and refuses unknown ones.

    What a text holds is seen (`visible`); the filter `short` cuts texts from files.
    """
    environment = Environment(
        loader=PackageLoader("ich_keras.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_seen,
    )
    environment.filters["short"] = short
    return environment


def _seen(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def asset(name: str) -> str:
    """Return the text of a style or script of `templates/`."""
    return (files("ich_keras.pages") / "templates" / name).read_text(encoding="utf-8")


def render(template: str, *, styles: tuple[str, ...] = (), script: str = "", **values: Any) -> str:
    """Return a page.

    Its Content-Security-Policy lets no address be loaded and no script run but `script`: text from
    a DICOM header or a file name cannot become code, even where a template forgot to escape it.

    Args:
        template: a file of `templates/` that extends base.html.j2.
        styles: files of `templates/`, after base.css.
        script: a file of `templates/`; "" for a page without one.
        values: what the template names. Texts are escaped.
    """
    source = asset(script) if script else ""
    return (
        templates()
        .get_template(template)
        .render(
            policy=_policy(source),
            style=Markup("\n".join(asset(name) for name in ("base.css", *styles))),
            script=Markup(source),
            **values,
        )
    )


def _policy(script: str) -> str:
    scripts = "'none'"
    if script:
        # The browser hashes what stands between the tags, newlines included.
        digest = hashlib.sha256(f"\n{script}\n".encode()).digest()
        scripts = f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline';"
        " img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
