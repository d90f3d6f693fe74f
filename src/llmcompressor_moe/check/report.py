"""What a check found, as data that can be printed, stored as JSON, or raised."""

from enum import Enum

from pydantic import BaseModel, Field

# Errors of checkpoints that only transformers can run, which a user may want for research.
RESEARCH_CODES = (
    "linear-mixed-schemes",
    "moe-family",
    "moe-mixed-group-size",
    "moe-mixed-schemes",
    "moe-partly-quantized",
)


class Severity(str, Enum):
    """How bad a finding is.

    error: some reader fails on the checkpoint or serves it wrong. warning: it can be served, but not in
    every way or not by everyone. note: worth knowing.
    """

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Finding(BaseModel):
    """One finding about one subject: a tensor, a layer, a file or a config field."""

    severity: Severity
    code: str
    subject: str
    message: str
    way_out: str = ""

    def __str__(self) -> str:
        text = f"{self.severity.value} {self.code} [{self.subject}]: {self.message}"
        return f"{text} -> {self.way_out}" if self.way_out else text


class CheckReport(BaseModel):
    """All findings about a checkpoint directory.

    `experts` maps the index of each MoE layer to its expert count as the config resolves it (0: the MoE
    was dropped); it is empty when the model could not be laid out.
    """

    path: str
    model_type: str | None = None
    tensors: int = 0
    nbytes: int = 0
    experts: dict[int, int] = Field(default_factory=dict)
    findings: list[Finding] = Field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """Findings that make the checkpoint illegal to serve."""
        return [finding for finding in self.findings if finding.severity is Severity.ERROR]

    @property
    def ok(self) -> bool:
        """Whether the checkpoint is legal to serve: no errors; warnings and notes may be there."""
        return not self.errors

    def raise_if_errors(self, *, research: bool = False) -> "CheckReport":
        """Return self, so that calls chain.

        `research` passes over experts of one layer in different schemes: transformers runs them, vLLM cannot.

        Raises:
            IllegalCheckpointError: at least one finding is an error.
        """
        tolerated = RESEARCH_CODES if research else ()
        if any(finding.code not in tolerated for finding in self.errors):
            raise IllegalCheckpointError(self)
        return self


class IllegalCheckpointError(ValueError):
    """A checkpoint that no reader should be given; `report` holds every finding."""

    def __init__(self, report: CheckReport):
        self.report = report
        shown = report.errors[:8]
        lines = [f"{report.path} is not legal to serve, {len(report.errors)} error(s):"]
        lines += [f"  {finding}" for finding in shown]
        if len(report.errors) > len(shown):
            lines.append(f"  and {len(report.errors) - len(shown)} more")
        super().__init__("\n".join(lines))


class Findings:
    """Collects findings while the rules run."""

    def __init__(self) -> None:
        self.all: list[Finding] = []

    def error(self, code: str, subject: object, message: str, way_out: str = "") -> None:
        """Add an error."""
        self._add(Severity.ERROR, code, subject, message, way_out)

    def warning(self, code: str, subject: object, message: str, way_out: str = "") -> None:
        """Add a warning."""
        self._add(Severity.WARNING, code, subject, message, way_out)

    def note(self, code: str, subject: object, message: str, way_out: str = "") -> None:
        """Add a note."""
        self._add(Severity.NOTE, code, subject, message, way_out)

    def _add(self, severity: Severity, code: str, subject: object, message: str, way_out: str) -> None:
        self.all.append(
            Finding(
                severity=severity,
                code=code,
                subject=_printable(str(subject)),
                message=_printable(message),
                way_out=_printable(way_out),
            )
        )


def _printable(text: str, limit: int = 600) -> str:
    # names come from the checkpoint: they may be endless, or hold escapes that steer a terminal
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:limit])
    return shown if len(text) <= limit else f"{shown}..."
