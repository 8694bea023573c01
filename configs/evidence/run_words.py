"""The words after a study's config that name one of its runs."""

from collections.abc import Collection, Mapping
from typing import Any


def read_run_words(
    text: str, sizes: Collection[str], arms: Collection[str], defaults: Mapping[str, Any]
) -> tuple[str, str, dict[str, Any]]:
    """Read `SIZE/ARM,key=value,…`.

    Args:
      text: the words.
      sizes, arms: those of the study.
      defaults: values of all keys, whose types the given ones take.

    Returns:
      `(size, arm, values)`, with a value for every key.

    Raises:
      ValueError: another form, size, arm or key.
    """
    name, *pairs = text.split(",")
    size, _, arm = name.partition("/")
    options = {key: value for key, _, value in (pair.partition("=") for pair in pairs)}
    empty = [key for key, value in options.items() if not value]
    if size not in sizes or arm not in arms or set(options) - set(defaults) or empty:
        raise ValueError(
            f"{text}: expected the variant gpu, or SIZE/ARM,key=value,… with sizes "
            f"{', '.join(sizes)}, arms {', '.join(arms)} and keys {', '.join(defaults)}."
        )
    values = {}
    for key, value in {**defaults, **options}.items():
        try:
            values[key] = type(defaults[key])(value)
        except ValueError:
            kind = type(defaults[key]).__name__
            raise ValueError(f"{text}: {key} must be of type {kind}, not {value!r}.") from None
    return size, arm, values
