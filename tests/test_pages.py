"""Pages: what stands in them cannot run, and nothing is fetched."""

import base64
import hashlib
import re

import pytest
from jinja2 import UndefinedError

from ich_keras.pages.document import render

HOSTILE = "<script>alert(1)</script>\"'\u202egpj"


def test_texts_are_escaped_and_the_policy_allows_no_script():
    page = render("base.html.j2", title=HOSTILE)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "script-src &#39;none&#39;" in page


def test_the_policy_allows_the_script_of_the_page_and_no_other(monkeypatch):
    texts = {"base.css": "", "own.js": "document.title = 'a < b';\n"}
    monkeypatch.setattr("ich_keras.pages.document.asset", texts.__getitem__)
    page = render("base.html.j2", script="own.js", title="")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert "a < b" in script
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in page


def test_a_template_without_its_values_is_an_error():
    with pytest.raises(UndefinedError, match="title"):
        render("base.html.j2")
