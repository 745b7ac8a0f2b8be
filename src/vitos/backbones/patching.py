"""Attributes that are replaced for the length of a `with` block, and put back in one place.

Nothing in the transformers library is subclassed or edited. Where a model must run differently for one pass (another
attention function, another output head), one of its attributes is replaced while the pass runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(owner: Any, name: str, value: object) -> Iterator[None]:
    """Set an attribute while the block runs, then restore it, also when the block raises.

    An attribute that the object itself did not have, such as a method of its class, is removed again instead of being
    set to the old value: the object is then exactly as it was. Not for two threads that share `owner`.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(attention="sdpa")
        >>> with patched(config, "attention", "watched"):
        ...     print(config.attention)
        watched
        >>> config.attention
        'sdpa'

    Args:
        owner: the object to change.
        name: name of the attribute, which must exist.
        value: its value within the block.

    Raises:
        AttributeError: if there is no such attribute; nothing has been changed then.
    """
    before, own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if name in vars(owner) and not own:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
