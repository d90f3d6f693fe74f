"""Fixtures of more than one test of recovery."""

from __future__ import annotations

from pathlib import Path

import pytest
import recovery_cases as cases


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Student, teacher and text."""
    directory = tmp_path_factory.mktemp("models")
    base = cases.teacher(directory)
    return cases.student(directory, base), base, cases.text(directory)
