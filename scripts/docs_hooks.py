"""What `make docs` does to a page before it is rendered."""

from __future__ import annotations

import re

_OUT_OF_THE_SITE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links to source files lead out of the site, where there is nothing: their text stays."""
    return _OUT_OF_THE_SITE.sub(r"\1", markdown)
