"""Hooks of mkdocs: the pages are read in the repository as well, where they link to files that are no pages."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[(?P<text>[^\]]+)\]\((?:\.\./)+(?P<path>[^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write a link that leaves docs/ as text with the path of the file in the repository.

    >>> on_page_markdown("see [the study](../studies/real/README.md#x), [data](data.md)")
    'see the study (`studies/real/README.md`), [data](data.md)'
    """
    return _OUTSIDE.sub(lambda found: f"{found['text']} (`{found['path']}`)", markdown)
