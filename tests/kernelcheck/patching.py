"""Replace attributes of an object for the length of a `with` block."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, **members: Any) -> Iterator[None]:
    """Set each attribute of `owner` named in `members`, and put the old ones back in the end, whatever happens."""
    saved = {name: getattr(owner, name) for name in members}
    for name, member in members.items():
        setattr(owner, name, member)
    try:
        yield
    finally:
        for name, member in saved.items():
            setattr(owner, name, member)
