"""Options that decide which other options exist; they are read before tyro's."""

from collections.abc import Sequence


def take(args: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """The values of an option, and the other arguments.

    Raises:
        ValueError: the option has no value.
    """
    values, rest = [], []
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name != flag:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("-"):
            raise ValueError(f"{flag} needs a value: {flag} NAME")
        values.append(value)
    return values, rest
