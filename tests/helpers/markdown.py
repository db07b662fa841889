"""Links, anchors and runnable blocks of the project's Markdown pages."""

import re
from pathlib import Path

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?)$", re.MULTILINE)
RUNNABLE = re.compile(r"^<!-- run -->\n```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def read_links(text: str) -> list[str]:
    """Return the targets of links and images, outside of code."""
    return LINK.findall(re.sub(r"`[^`\n]*`", "", FENCE.sub("", text)))


def read_anchors(text: str) -> set[str]:
    """Return the anchors that a code host gives the headings: lower case, `-` for a space, no punctuation."""
    titles = (re.sub(r"[`*]|\]\([^)]*\)|\[", "", title).lower() for title in HEADING.findall(FENCE.sub("", text)))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def is_external(link: str) -> bool:
    return re.match(r"[a-z]+:", link) is not None


def find_broken_links(page: Path) -> list[str]:
    """Return the links of a page to files or headings that do not exist."""
    return [link for link in read_links(page.read_text()) if not is_external(link) and not _exists(page, link)]


def _exists(page: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    return target.exists() and (not anchor or anchor in read_anchors(target.read_text()))
