"""The list of known faults names code and tests that exist (`put_back.py` puts them back)."""

import ast
import functools

import pytest
from put_back import ROOT, Fault, read_faults

FAULTS = read_faults(ROOT / "tests" / "faults.toml")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.number} {fault.what}")
def test_a_known_fault_can_be_put_back(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.new != fault.old
    for test in fault.tests:
        path, _, rest = test.partition("::")
        assert rest.split("[")[0] in functions_in(path), test


@functools.cache
def functions_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
