"""Reading a recipe back from JSON, strictly: nothing is guessed, nothing ignored."""

import dataclasses
import typing
from typing import Any

from ich_keras.config import kinds_of
from ich_keras.data.intensity import Intensity
from ich_keras.data.views import View, with_absent_choices
from ich_keras.errors import StaleError, UsageError
from ich_keras.labels import LabelSet
from ich_keras.models.spec import ModelSpec

# In the metadata of a field that older versions did not write: what its absence means.
WHERE_ABSENT = "where_absent"


def read_strictly(cls: Any, content: object, place: str, source: str) -> Any:
    """Build a dataclass from JSON: exactly its fields, each of its type.

    Args:
        cls: the dataclass.
        content: an object, as JSON gives it.
        place: the dotted name of the object within the recipe, for messages; "" for all of it.
        source: where it was read from, for messages.

    Raises:
        StaleError: names the field that is absent, unknown or of another kind.
    """
    hint = "The recipe is damaged or from another version: train the run again."
    name = place or "it"
    if not isinstance(content, dict):
        raise StaleError(f"{source}: {name} is {content!r}; expected an object.", hint)
    if cls in (ModelSpec, Intensity, LabelSet):
        try:
            return cls.from_dict(content)
        except UsageError as error:
            raise StaleError(f"{source}: {place}: {error.message}", hint) from error
    content = with_absent_choices(content) if cls is View else content
    fields = [field for field in dataclasses.fields(cls) if WHERE_ABSENT in field.metadata]
    content = {field.name: field.metadata[WHERE_ABSENT] for field in fields} | content
    hints = typing.get_type_hints(cls)
    lacking, unknown = sorted(set(hints) - set(content)), sorted(set(content) - set(hints))
    if lacking or unknown:
        problems = [f"lacks {', '.join(lacking)}"] if lacking else []
        problems += [f"holds unknown {', '.join(unknown)}"] if unknown else []
        raise StaleError(f"{source}: {name} {' and '.join(problems)}.", hint)
    values = {}
    for key, expected in hints.items():
        inner = f"{place}.{key}".lstrip(".")
        if dataclasses.is_dataclass(expected):
            values[key] = read_strictly(expected, content[key], inner, source)
            continue
        options, names = kinds_of(expected)
        value = content[key]
        inner_class = next((kind for kind in options if dataclasses.is_dataclass(kind)), None)
        if inner_class is not None and value is not None:
            values[key] = read_strictly(inner_class, value, inner, source)
            continue
        if float in options and type(value) is int:
            value = float(value)
        if type(value) not in options:
            raise StaleError(f"{source}: {inner} is {value!r}; expected {names}.", hint)
        values[key] = value
    try:
        return cls(**values)
    except UsageError as error:
        raise StaleError(f"{source}: {place}: {error.message}", hint) from error
