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

import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from pydantic import BaseModel, ConfigDict, ValidationError

from llmcompressor_moe.calibration import calibration_samples
from llmcompressor_moe.checkpoint.atomic import check_can_write
from llmcompressor_moe.checkpoint.files import write_text
from llmcompressor_moe.evaluation.report import BaseEvaluation
from llmcompressor_moe.evaluation.run import BaseRecord, EvaluationSettings, evaluate_compressed, recorded
from llmcompressor_moe.evidence import Evidence, collect_evidence
from llmcompressor_moe.inspection import inspect_model
from llmcompressor_moe.loading import load_model, load_tokenizer
from llmcompressor_moe.plan import ExpertRoom
from llmcompressor_moe.quantization.planner import Planner, QuantSettings
from llmcompressor_moe.quantization.schemes import Candidate, resolve_schemes
from llmcompressor_moe.quantization.sizes import StoredSize
from llmcompressor_moe.surgery.session import TrimSession
from llmcompressor_moe.sweep.choice import Drops, choose_drops, choose_precision
from llmcompressor_moe.sweep.grid import Grid, Point
from llmcompressor_moe.sweep.report import PointResult, SweepReport
from llmcompressor_moe.sweep.variant import make_variant

__all__ = ["SweepError", "SweepSettings", "run_sweep"]

REPORT = "sweep.json"


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


class _Choice(BaseModel):
    """Everything that is decided before the first point runs."""

    model_config = ConfigDict(extra="forbid")

    dropped: Drops
    schemes: dict[int, str]


@dataclass(frozen=True)
class _Model:
    """What choosing needs to know of the base.

    :param rooms: MoE layer -> what it allows
    :param sizes: MoE layer -> size of each expert under each candidate, in the dtype it is stored in
    """

    rooms: Mapping[int, ExpertRoom]
    sizes: Mapping[int, list[dict[str, StoredSize]]]


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
    if inspect_model(model, schemes=()).quantization is not None:
        raise ValueError(f"model {str(model)!r} is quantized already; sweep the model that it was made from.")
    _same_sweep(model, grid, settings, output)
    candidates = {c.name: c for c in resolve_schemes(grid.schemes, grid.group_size, "schemes")}
    evidence, known = _evidence(model, list(candidates.values()), settings, output, announce)
    choices = {point: _choose(evidence, grid, point, known) for point in grid.all_points()}
    missing = [point for point in choices if not _result_path(output, point).exists()]
    base = output / "base.json"
    if missing or not base.exists():
        with recorded(model, settings.evaluation, announce) as record:
            write_text(base, record.found.model_dump_json(indent=1))
            for number, point in enumerate(missing, start=1):
                announce(f"Point {number} of {len(missing)}: {point}")
                result = _measure(model, record, point, choices[point], candidates, output, settings.keep)
                write_text(_result_path(output, point), result.model_dump_json(indent=1))
    report = SweepReport(
        model=str(model),
        grid=grid,
        evidence=evidence,
        source=settings.evaluation.source,
        base=BaseEvaluation.model_validate_json(base.read_text()),
        points=[_read(PointResult, _result_path(output, point)) for point in choices],
    )
    write_text(output / REPORT, report.model_dump_json(indent=1) + "\n")
    return report


def _result_path(output: Path, point: Point) -> Path:
    return output / "points" / f"{point.name}.json"


def _read(cls: type[BaseModel], path: Path) -> Any:
    try:
        return cls.model_validate_json(path.read_text())
    except ValidationError as error:
        raise SweepError(
            f"{str(path)!r} is not what a sweep wrote: delete it and run again ({error})."
        ) from error


def _same_sweep(model: str | Path, grid: Grid, settings: SweepSettings, output: Path) -> None:
    """Refuse to mix points that were chosen or measured differently."""
    asked = {name: value for name, value in asdict(settings).items() if name not in ("keep", "evaluation")}
    evaluation = asdict(settings.evaluation) | {"limits": settings.evaluation.limits.model_dump()}
    said = {
        "model": _fingerprint(model),
        **{f"grid.{name}": value for name, value in grid.model_dump(mode="json", exclude={"points"}).items()},
        **asked,
        **{f"evaluation.{name}": value for name, value in evaluation.items()},
    }
    said = json.loads(json.dumps(said, default=str))
    path = output / "settings.json"
    if not path.exists():
        write_text(path, json.dumps(said, indent=1) + "\n")
        return
    before = json.loads(path.read_text())
    differing = [name for name in said if said[name] != before.get(name)]
    if differing:
        raise SweepError(
            f"output {str(output)!r} holds a sweep of another model or with other settings: "
            f"{', '.join(differing)} differ. Give the same, or another output."
        )


def _fingerprint(model: str | Path) -> str:
    """Of the config and of the names and sizes of the weight files."""
    files = sorted(Path(model).glob("*.safetensors"))
    text = (Path(model) / "config.json").read_text() + str([(f.name, f.stat().st_size) for f in files])
    return hashlib.sha256(text.encode()).hexdigest()


def _evidence(
    model: str | Path,
    candidates: list[Candidate],
    settings: SweepSettings,
    output: Path,
    announce: Callable[[str], None],
) -> tuple[Evidence, _Model]:
    path = output / "evidence.json"
    session = TrimSession.begin(linearize_moe(load_model(model, "auto")))
    known = _look_at(session, candidates)
    if path.exists():
        return _read(Evidence, path), known
    announce("Calibrating")
    samples = calibration_samples(
        settings.dataset, load_tokenizer(model), settings.num_samples, settings.sequence_length
    )
    batches = [
        {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")} for row in samples
    ]
    dtype = settings.evaluation.dtype
    if dtype != "auto":
        session.model.to(getattr(torch, dtype))
    evidence = collect_evidence(session, batches, candidates, kl_samples=settings.kl_samples)
    write_text(path, evidence.model_dump_json(indent=1))
    return evidence, known


def _look_at(session: TrimSession, candidates: list[Candidate]) -> _Model:
    planner = Planner(
        session,
        QuantSettings(
            candidates=candidates,
            attention=None,
            dense=None,
            target_bits=None,
            target_size=None,
            per_expert=False,
            ignore=["lm_head"],
            sensitivity="output_error",
            sample_tokens=1,
            seed=0,
        ),
    )
    rooms = {
        index: ExpertRoom(moe.num_experts, moe.min_experts, moe.num_groups)
        for index, moe in session.topology.moe_layers.items()
    }
    return _Model(rooms, planner.sizes())


def _choose(evidence: Evidence, grid: Grid, point: Point, known: _Model) -> _Choice:
    drops = choose_drops(evidence, grid, point, known.rooms)
    if point.bits is None:
        return _Choice(dropped=drops, schemes={})
    kept = {
        layer: [e for e in range(room.num_experts) if e not in drops.experts.get(layer, ())]
        for layer, room in known.rooms.items()
        if layer not in drops.blocks and layer not in drops.layers
    }
    sizes = {layer: [known.sizes[layer][e] for e in experts] for layer, experts in kept.items()}
    try:
        return _Choice(dropped=drops, schemes=choose_precision(evidence, sizes, kept, point.bits))
    except ValueError as error:
        raise ValueError(f"{point}: {error}") from error


def _measure(
    model: str | Path,
    record: BaseRecord,
    point: Point,
    choice: _Choice,
    candidates: Mapping[str, Candidate],
    output: Path,
    keep: bool,
) -> PointResult:
    if point == Point():
        size = record.found.cost.nbytes + record.found.cost.header_nbytes
        return PointResult(point=point, dropped=choice.dropped, schemes={}, size=size, found=None)
    with tempfile.TemporaryDirectory(prefix="sweep-", dir=output) as folder:
        checkpoint = Path(folder) / point.name
        make_variant(model, choice.dropped, choice.schemes, candidates, checkpoint)
        found = evaluate_compressed(record, checkpoint)
        if keep:
            kept = output / "checkpoints" / point.name
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            checkpoint.rename(kept)
    found.path = point.name
    size = found.cost.nbytes + found.cost.header_nbytes
    return PointResult(point=point, dropped=choice.dropped, schemes=choice.schemes, size=size, found=found)
