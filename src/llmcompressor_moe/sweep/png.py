"""Images with few colours as PNG, from the standard library alone.

A map of 100 layers by 256 experts is 25,600 cells: as an image it takes some kilobytes, as shapes some megabytes.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

__all__ = ["data_uri", "indexed_png"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_INDEXED = 3


def indexed_png(rows: Sequence[Sequence[int]], palette: Sequence[tuple[int, int, int, int]]) -> bytes:
    """An image of palette indices (https://www.w3.org/TR/png-3/, colour type 3).

    :param rows: [height][width] indices into the palette
    :param palette: red, green, blue, alpha, 0 to 255 each; at most 16 colours
    :raises ValueError: no pixel, rows of different lengths, an index without colour, or too many colours
    """
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("rows must be at least one, of the same length, and not empty.")
    if not 0 < len(palette) <= 16:
        raise ValueError(f"palette has {len(palette)} colours; give 1 to 16.")
    if not all(0 <= index < len(palette) for row in rows for index in row):
        raise ValueError(f"rows name a colour that the palette of {len(palette)} does not have.")
    depth = 1 if len(palette) <= 2 else 4
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), depth, _INDEXED, 0, 0, 0)
    # Each row starts with its filter: 0, none.
    pixels = b"".join(b"\0" + _packed(row, depth) for row in rows)
    return b"".join(
        (
            _SIGNATURE,
            _chunk(b"IHDR", header),
            _chunk(b"PLTE", bytes(part for colour in palette for part in colour[:3])),
            _chunk(b"tRNS", bytes(colour[3] for colour in palette)),
            _chunk(b"IDAT", zlib.compress(pixels, 9)),
            _chunk(b"IEND", b""),
        )
    )


def data_uri(png: bytes) -> str:
    """A PNG as an address that needs no file."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _packed(row: Sequence[int], depth: int) -> bytes:
    per_byte = 8 // depth
    packed = bytearray()
    for start in range(0, len(row), per_byte):
        value = 0
        for place, index in enumerate(row[start : start + per_byte]):
            value |= index << (8 - depth * (place + 1))
        packed.append(value)
    return bytes(packed)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
