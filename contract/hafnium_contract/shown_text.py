"""Text of others on a terminal: what would move the cursor, clear the screen or look like a line of ours is shown and not done."""

from __future__ import annotations


def one_line(text: str) -> str:
    r"""The text with each character that can't be printed as its escape (`\x1b`, `\n`, `\u202e`)."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def lines_of(text: str) -> str:
    """The same for text of ours that has lines."""
    return "\n".join(one_line(line) for line in text.split("\n"))
