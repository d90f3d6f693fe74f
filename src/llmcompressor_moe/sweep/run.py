"""Visit every point of a grid, each once, whatever interrupts."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from llmcompressor_moe.checkpoint.atomic import check_can_write
from llmcompressor_moe.checkpoint.files import write_text
from llmcompressor_moe.checkpoint.fingerprint import fingerprint
from llmcompressor_moe.evaluation.latency import SpeedComparison
from llmcompressor_moe.evaluation.report import BaseEvaluation
from llmcompressor_moe.evaluation.run import (
    BaseRecord,
    EvaluationSettings,
    check_evaluation,
    evaluate_compressed,
    recorded,
)
from llmcompressor_moe.evaluation.speed import compare_speed
from llmcompressor_moe.evidence import Evidence
from llmcompressor_moe.evidence.gather import (
    CalibrationSettings,
    gather_evidence,
    load_evidence,
)
from llmcompressor_moe.quantization.schemes import Candidate
from llmcompressor_moe.report import shown_path
from llmcompressor_moe.sweep.choice import Choice, choose, require_possible
from llmcompressor_moe.sweep.fitting import fit_schemes
from llmcompressor_moe.sweep.grid import Grid, Point
from llmcompressor_moe.sweep.report import PointResult, SweepReport
from llmcompressor_moe.sweep.variant import make_variant

__all__ = ["SweepError", "SweepSettings", "run_sweep"]

REPORT = "sweep.json"
_TEMPORARY = "making-"


class SweepError(ValueError):
    """A sweep cannot go on where it stopped."""


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep looks at.

    :param dataset: calibration text, see `calibration_samples`
    :param num_samples: calibration samples
    :param sequence_length: tokens per sample
    :param kl_samples: samples on which each block and MoE layer is left out once
    :param evaluation: how points are measured
    :param keep: keep every point's checkpoint below the output directory
    """

    dataset: str = "demo"
    num_samples: int = 64
    sequence_length: int = 256
    kl_samples: int = 16
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    keep: bool = False


def run_sweep(
    model: str | Path,
    grid: Grid,
    output: str | Path,
    settings: SweepSettings | None = None,
    announce: Callable[[str], None] = lambda step: None,
) -> SweepReport:
    """Calibrate once, then make and measure every point; what is finished is not done again.

    Every point is written to ``points/`` as soon as it is done; the same call after a crash goes on from there and
    ends with the same report. More points may be added to the grid between calls.

    :param model: directory of the base model, unquantized
    :param output: directory for evidence, points and report
    :raises ValueError: something is wrong with the model, the grid or the data; found before the first point runs
    :raises SweepError: ``output`` holds a sweep of another model or with other settings
    """
    settings = settings or SweepSettings()
    output = Path(output)
    check_can_write(output)
    if Path(model).resolve() in {output.resolve(), *output.resolve().parents}:
        raise ValueError(f"output={str(output)!r} lies in the model {str(model)!r}; name another directory.")
    fitted = fit_schemes(model, grid)
    if fitted.remark is not None:
        announce(fitted.remark)
    grid, shape = fitted.grid, fitted.shape
    candidates = {candidate.name: candidate for candidate in fitted.candidates}
    require_possible(grid, shape)
    check_evaluation(settings.evaluation, model)
    _calibration(settings).check(model)
    _same_sweep(model, grid, settings, output)
    finished = {point: _finished(output, point) for point in grid.all_points()}
    base = output / "base.json"
    base_found = _read(BaseEvaluation, base) if base.exists() else None
    evidence = _evidence(model, list(candidates.values()), settings, output, announce)
    choices = {point: choose(evidence, grid, point, shape) for point in finished}
    for left_behind in output.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(left_behind, ignore_errors=True)
    missing = [point for point, result in finished.items() if result is None]
    if missing or base_found is None:
        with recorded(model, settings.evaluation, announce) as record:
            base_found = record.found
            write_text(base, base_found.model_dump_json(indent=1))
            for number, point in enumerate(missing, start=1):
                announce(f"Point {number} of {len(missing)}: {point}")
                result = _measure(model, record, point, choices[point], candidates, output, settings.keep)
                write_text(_result_path(output, point), result.model_dump_json(indent=1))
                finished[point] = result
    report = SweepReport(
        model=str(model),
        grid=grid,
        evidence=evidence,
        source=settings.evaluation.source,
        base=base_found,
        points=list(finished.values()),
    )
    write_text(output / REPORT, report.model_dump_json(indent=1) + "\n")
    return report


def _result_path(output: Path, point: Point) -> Path:
    return output / "points" / f"{point.name}.json"


def _finished(output: Path, point: Point) -> PointResult | None:
    path = _result_path(output, point)
    if not path.exists():
        return None
    result = _read(PointResult, path)
    if result.point != point:
        raise SweepError(
            f"{str(path)!r} holds the point {result.point}, not {point}: delete it and run again."
        )
    return result


def _read(cls: type[BaseModel], path: Path) -> Any:
    try:
        return cls.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        said = f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
        raise SweepError(
            f"{str(path)!r} is not what a sweep wrote: delete it and run again ({said})."
        ) from error


def _same_sweep(model: str | Path, grid: Grid, settings: SweepSettings, output: Path) -> None:
    """Refuse to mix points that were chosen or measured differently."""
    asked = {name: value for name, value in asdict(settings).items() if name not in ("keep", "evaluation")}
    evaluation = asdict(settings.evaluation) | {"limits": settings.evaluation.limits.model_dump()}
    said = {
        "model": fingerprint(model),
        **{f"grid.{name}": value for name, value in grid.model_dump(mode="json", exclude={"points"}).items()},
        **asked,
        **{f"evaluation.{name}": value for name, value in evaluation.items()},
        "text in dataset": _digest(settings.dataset),
        "text in evaluation.source": _digest(settings.evaluation.source),
    }
    said = json.loads(json.dumps({name: _said(value) for name, value in said.items()}, default=str))
    path = output / "settings.json"
    if not path.exists():
        found = [name for name in ("points", "base.json", "evidence.json") if (output / name).exists()]
        if found:
            raise SweepError(
                f"output {str(output)!r} holds {', '.join(found)}, but no settings.json that says of which sweep. "
                "Give another output, or delete them."
            )
        write_text(path, json.dumps(said, indent=1) + "\n")
        return
    before = _settings(path)
    differing = [name for name in said if said[name] != before.get(name)]
    if differing:
        raise SweepError(
            f"output {str(output)!r} holds a sweep of another model or with other settings: "
            f"{', '.join(differing)} differ. Give the same, or another output."
        )


def _said(value: Any) -> Any:
    """A setting as it is compared with; two absolute paths may end alike."""
    if not isinstance(value, str | Path) or not Path(value).is_absolute():
        return value
    return f"{shown_path(value)} ({hashlib.sha256(str(value).encode()).hexdigest()[:16]})"


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise SweepError(
            f"{str(path)!r} is not what a sweep wrote ({error}): give another output, or delete that directory."
        ) from error
    return found if isinstance(found, dict) else {}


def _digest(source: str) -> str | None:
    """Of a text file: one that was edited is another text under the same name."""
    path = Path(source)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _calibration(settings: SweepSettings) -> CalibrationSettings:
    return CalibrationSettings(
        dataset=settings.dataset,
        num_samples=settings.num_samples,
        sequence_length=settings.sequence_length,
        kl_samples=settings.kl_samples,
        dtype=settings.evaluation.dtype,
    )


def _evidence(
    model: str | Path,
    candidates: list[Candidate],
    settings: SweepSettings,
    output: Path,
    announce: Callable[[str], None],
) -> Evidence:
    path = output / "evidence.json"
    if path.exists():
        return load_evidence(path, model, candidates)
    announce("Calibrating")
    evidence = gather_evidence(model, candidates, _calibration(settings))
    write_text(path, evidence.model_dump_json(indent=1))
    return evidence


def _measure(
    model: str | Path,
    record: BaseRecord,
    point: Point,
    choice: Choice,
    candidates: Mapping[str, Candidate],
    output: Path,
    keep: bool,
) -> PointResult:
    if point == Point():
        size = record.found.cost.nbytes + record.found.cost.header_nbytes
        return PointResult(point=point, dropped=choice.dropped, schemes={}, size=size, found=None)
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=output) as folder:
        checkpoint = Path(folder) / point.name
        make_variant(model, choice.dropped, choice.schemes, candidates, checkpoint)
        found = evaluate_compressed(record, checkpoint)
        speed = _speed(model, checkpoint, record.settings)
        if keep:
            kept = output / "checkpoints" / point.name
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            checkpoint.rename(kept)
    # The directory is gone, and another run would name another.
    found.path = found.cost.path = point.name
    for compared in speed:
        compared.compressed.path = point.name
    size = found.cost.nbytes + found.cost.header_nbytes
    return PointResult(
        point=point, dropped=choice.dropped, schemes=choice.schemes, size=size, found=found, speed=speed
    )


def _speed(model: str | Path, checkpoint: Path, settings: EvaluationSettings) -> list[SpeedComparison]:
    if settings.speed is None:
        return []
    return compare_speed(
        model, [checkpoint], settings.speed, device=settings.device, vllm_python=settings.vllm_python
    )
