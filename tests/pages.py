"""What a browser makes of a report, for the tests of all reports."""

from __future__ import annotations

import base64
import re
from contextlib import AbstractContextManager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

from matplotlib.figure import Figure

HOSTILE = "</td></pre><script>alert('$x_{$')</script>\U0001f600&amp;"

VOID = ("meta", "img")

DRAW = Figure.savefig


def draw_nothing() -> AbstractContextManager[Any]:
    """Figures are made, but written as an empty image: drawing one takes four times as long as preparing tiny data."""
    return mock.patch.object(Figure, "savefig", lambda _, file, **__: file.write(b"<svg/>"))


def draw() -> AbstractContextManager[Any]:
    """Figures are drawn, for the tests of reports."""
    return mock.patch.object(Figure, "savefig", DRAW)


class Page(HTMLParser):
    """Elements in order, text by table cell, decoded images, and whether all that was opened was closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.captions: list[str] = []
        self.spreads: list[list[float]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.addresses += [value or "" for name, value in attributes if name == "src"]
        self.links += [value or "" for name, value in attributes if name == "href"]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.headings.append("")
        if tag == "figcaption":
            self.captions.append("")
        if ("class", "spread") in attributes:
            (middle, _), (low, high), (least, greatest) = re.findall(
                r"([\d.]+)% ([\d.]+)%,", dict(attributes)["style"] or ""
            )
            self.spreads.append([float(least), float(low), float(middle) + 0.5, float(high), float(greatest)])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        for tag, texts in (("h2", self.headings), ("figcaption", self.captions)):
            if tag in self._open:
                texts[-1] += data
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data

    def row(self, first: str, place: int = -1) -> list[str]:
        """The cells after the first of the only row that begins so, or of one of several."""
        rows = [row for row in self.rows if row and row[0] == first]
        assert place >= 0 or len(rows) == 1
        return rows[place][1:]

    @property
    def words(self) -> list[list[str]]:
        """The words of each image, which must be well-formed, in the order in which they are drawn."""
        return [image_words(address) for address in self.addresses]


def image_words(address: str) -> list[str]:
    """The words of a ``data:`` address of an SVG image, which must be well-formed."""
    image = ElementTree.fromstring(base64.b64decode(address.partition("base64,")[2]))
    return ["".join(text.itertext()).strip() for text in image.iter("{http://www.w3.org/2000/svg}text")]


def check_self_contained(page: Page) -> None:
    """One file without a script that loads nothing; links lead to files beside it; every figure has a caption."""
    assert "script" not in page.elements
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert not any(re.match(r"[a-z]+:|//", link) for link in page.links)
    assert not re.search(r"@import|url\(", page.source)
    assert len(page.captions) == len(page.addresses) == len(page.words)
    assert all(len(caption) > 50 for caption in page.captions)
