"""Refuses rows with images: training on their text alone would go unnoticed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ("image", "images")


def refuse_images(row: Mapping[str, Any]) -> None:
    """Refuses a row with something in a column of images; an empty one is a row of text.

    Raises:
        ValueError: with the column's name.
    """
    for name in COLUMNS:
        value = row.get(name)
        if value is not None and not (isinstance(value, (list, tuple, str)) and not len(value)):
            raise ValueError(
                f"the row has something in its column {name!r}: only text is trained here, with any model. Leave out "
                f"the rows with images, or the column (data.remove_columns({name!r})) where the text stands by itself"
            )
