"""Reads a page the way a browser would, as far as the tests ask: its texts, its references, its elements."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

REFERENCES = ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background", "formaction", "ping")
VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})


class Page(HTMLParser):
    """`elements` holds (tag, attributes); `text` what is visible; `references` every address."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def references(self) -> list[str]:
        found = [attributes[name] for _, attributes in self.elements for name in REFERENCES if name in attributes]
        return found + re.findall(r"url\(\s*['\"]?([^'\")]+)", self.source) + re.findall(r"@import[^;]*", self.source)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]
