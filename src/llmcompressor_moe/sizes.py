"""Numbers of bytes and parameters as people read them."""

import re
from fractions import Fraction

__all__ = ["bytes_text", "count_text", "parse_bytes", "share_text"]

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY = {"K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


def parse_bytes(value: int | str, field: str) -> int:
    """A number of bytes, or a text such as ``20GiB`` or ``18.5 GB``.

    :param field: the field's name, for messages
    :raises ValueError: it is neither, or not positive
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(value), re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise ValueError(
            f"{field}={value!r} is not a size; write a number of bytes or a text such as '20GiB'."
        )
    units = _BINARY if match[3] else _UNITS
    nbytes = int(Fraction(match[1]) * units[match[2].upper()])
    if nbytes < 1:
        raise ValueError(f"{field}={value!r} must be at least one byte.")
    return nbytes


def bytes_text(nbytes: float) -> str:
    """A number of bytes with a binary unit: ``7.8 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.3g} {unit}" if abs(nbytes) < 100 else f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TiB"


def count_text(count: float) -> str:
    """A number of parameters with a decimal unit: ``46.7 B``."""
    for unit in ("", " K", " M"):
        if abs(count) < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} B" if count < 100 else f"{count:.0f} B"


def share_text(share: float) -> str:
    """A share as percent: ``12.5 %``."""
    return f"{100 * share:.1f} %"
