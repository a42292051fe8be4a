"""What both salvages need of SQLite's file format: https://www.sqlite.org/fileformat2.html. Pure."""

from __future__ import annotations


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at` (sections "varint" and "b_tree_pages") and where it ends. Raises `IndexError`."""
    value = 0
    for i in range(8):
        byte = data[at + i]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + i + 1
    value = value << 8 | data[at + 8]
    return (value - 2**64 if value >= 2**63 else value), at + 9


def local_bytes(size: int, page_bytes: int) -> int:
    """How much of a payload of a table stands in the leaf page itself; the rest is on overflow pages."""
    most = page_bytes - 35
    if size <= most:
        return size
    least = (page_bytes - 12) * 32 // 255 - 23
    more = least + (size - least) % (page_bytes - 4)
    return more if more <= most else least
