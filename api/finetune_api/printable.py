"""Anybody's text as a line of a log or of a terminal: nothing in it ends the line or moves the cursor."""


def printable(text: str) -> str:
    """The text with an escape, as Python writes it, for each control character, line separator, mark of direction,
    surrogate and space other than U+0020."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def indented(text: str) -> str:
    """Lines that belong to the line before them, such as a stack: none of them can pass for a line of its own."""
    return "\n".join(f"    {printable(line)}" for line in text.split("\n"))
