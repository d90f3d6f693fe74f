"""Numbers of bytes and parameters as people read them."""

__all__ = ["bytes_text", "count_text", "share_text"]


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
