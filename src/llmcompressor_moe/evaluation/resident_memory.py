"""The memory that this process holds, as Linux counts it (proc(5)). Needs nothing but the standard library."""

from __future__ import annotations

from pathlib import Path

__all__ = ["forget_peak", "peak_resident_nbytes", "resident_nbytes"]

_PROCESS = Path("/proc/self")


def resident_nbytes() -> int | None:
    """Bytes in memory now, mapped files among them; None where the system does not tell."""
    return _status("VmRSS")


def peak_resident_nbytes() -> int | None:
    """The most bytes in memory since the process began or `forget_peak`; None where the system does not tell."""
    return _status("VmHWM")


def forget_peak() -> bool:
    """Start a new peak from what is in memory now; False where the system does not allow it."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
