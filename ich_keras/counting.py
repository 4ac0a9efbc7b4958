"""Numbers of things in messages."""


def number_of(count: int, noun: str, plural: str | None = None) -> str:
    """Return a number and its noun, one or many.

    >>> number_of(1, "study", "studies"), number_of(1200, "label"), number_of(1, "series", "series")
    ('1 study', '1,200 labels', '1 series')
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
