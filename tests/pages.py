"""A page of HTML or a plot taken apart, for the tests that read one."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "wbr", "br", "img", "input"}


class Page(HTMLParser):
    """A page taken apart: its elements must close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.json = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th", "text"):
            self.texts.append(" ")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.json += data
        elif self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        """What a reader sees, in one line."""
        return " ".join("".join(self.texts).split())

    def count(self, tag: str, style: str = "") -> int:
        return sum(
            1
            for name, at in self.tags
            if name == tag and (not style or style in (at.get("class") or "").split())
        )


def drawn(svg: str) -> Page:
    """A plot taken apart, its coordinates checked."""
    assert not re.search(r"nan|inf|None", re.sub(r"<(title|text)\b.*?</\1>", "", svg), re.IGNORECASE)
    return Page(svg)
