"""Examples in docstrings run and print what they say; public functions say their types."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import ich_keras
import weights_convert

LEAST_EXAMPLES = 30  # public functions and classes that show how they are used


def _modules() -> list[str]:
    found = []
    for package in (ich_keras, weights_convert):
        found += [
            module.name
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
            if not module.ispkg
        ]
    return sorted(found)


def _public(module):
    """Yield the functions, classes and methods that a module offers under its own name."""
    for name, found in vars(module).items():
        if name.startswith("_") or getattr(found, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(found):
            yield name, found
        elif inspect.isclass(found):
            for attribute, member in vars(found).items():
                plain = getattr(member, "__func__", getattr(member, "fget", member))
                if not attribute.startswith("_") and inspect.isfunction(plain):
                    yield f"{name}.{attribute}", plain


@pytest.mark.parametrize("name", _modules())
def test_examples_print_what_they_say(name):
    module = importlib.import_module(name)
    outcome = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert outcome.failed == 0


@pytest.mark.parametrize("name", _modules())
def test_public_functions_say_their_types(name):
    lacking = []
    for place, function in _public(importlib.import_module(name)):
        parameters = inspect.signature(function).parameters
        names = [n for n in parameters if n not in ("self", "cls")]
        annotated = set(function.__annotations__)
        absent = [n for n in names if n not in annotated]
        if absent or "return" not in annotated:
            lacking.append(f"{place}({', '.join(absent)})")
    assert lacking == []


def test_the_most_used_functions_have_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    shown = {
        example.name
        for name in _modules()
        for example in finder.find(importlib.import_module(name))
        if example.examples
    }
    assert len(shown) >= LEAST_EXAMPLES
