"""What training won back, as a recovered checkpoint tells it."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = ["RECOVERY_FILE", "RecoveryCurve", "read_recovery"]

RECOVERY_FILE = "recovery.json"


class RecoveryCurve(BaseModel):
    """The held-out curve of a recovery, on its own text.

    :param tokens: trained on
    :param start_nll: nats per held-out token before
    :param end_nll: after
    :param teacher_nll: of the teacher; None without one
    :param gap_closed: (start - end) / (start - teacher); None without a teacher
    :param log: its looks at held-out text
    """

    model_config = ConfigDict(extra="ignore")

    class Look(BaseModel):
        """One of them."""

        model_config = ConfigDict(extra="ignore")

        tokens: int
        heldout_nll: float | None = None

    tokens: int
    start_nll: float
    end_nll: float
    teacher_nll: float | None
    gap_closed: float | None
    log: list[Look] = []


def read_recovery(checkpoint: str | Path) -> RecoveryCurve | None:
    """The recovery that made a checkpoint; None where it was not trained.

    :raises ValueError: the file is not a record of a recovery
    """
    path = Path(checkpoint) / RECOVERY_FILE
    if not path.is_file():
        return None
    try:
        found = RecoveryCurve.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValidationError, ValueError) as error:
        raise ValueError(
            f"{path} is not a record of a recovery ({error}); delete it, or recover the model again."
        ) from error
    return found.model_copy(update={"log": [look for look in found.log if look.heldout_nll is not None]})
