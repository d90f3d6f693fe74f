"""From a model's directory and calibration text to evidence, and to what the model allows to be chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from pydantic import ValidationError
from torch import nn

from llmcompressor_moe.calibration import calibration_samples
from llmcompressor_moe.check.expected import ExpectedModel, lay_out
from llmcompressor_moe.evidence.collect import collect_evidence
from llmcompressor_moe.evidence.data import Evidence
from llmcompressor_moe.inspection import inspect_model, read_config
from llmcompressor_moe.loading import load_model, load_tokenizer
from llmcompressor_moe.plan import ExpertRoom
from llmcompressor_moe.quantization.schemes import UNQUANTIZED, Candidate, why_not_divisible
from llmcompressor_moe.quantization.sizes import StoredSize, linear_size
from llmcompressor_moe.slimming import LinearShape
from llmcompressor_moe.surgery.session import TrimSession

__all__ = ["CalibrationSettings", "ModelShape", "gather_evidence", "load_evidence", "model_shape"]


@dataclass(frozen=True)
class CalibrationSettings:
    """What a calibration run looks at.

    :param dataset: calibration text, see `calibration_samples`
    :param num_samples: calibration samples
    :param sequence_length: tokens per sample
    :param kl_samples: samples on which each block and MoE layer is left out once
    :param dtype: of the model meanwhile; ``auto``: as its config says
    """

    dataset: str = "demo"
    num_samples: int = 64
    sequence_length: int = 256
    kl_samples: int = 16
    dtype: str = "auto"


@dataclass(frozen=True)
class ModelShape:
    """What choosing needs to know of a model beside evidence. Keys are block indices.

    :param rooms: MoE layer -> what it allows
    :param sizes: MoE layer -> size of each expert under each candidate; bits and weights alone are counted
    """

    model_type: str
    blocks: int
    rooms: Mapping[int, ExpertRoom]
    sizes: Mapping[int, Sequence[Mapping[str, StoredSize]]]


def model_shape(model: str | Path, candidates: Sequence[Candidate]) -> ModelShape:
    """Of a model that is not quantized, from its config alone.

    :param model: its directory
    :raises FileNotFoundError: there is no config.json
    :raises ValueError: the model cannot be built from it, is quantized already, or a candidate does not fit
    """
    inspection = inspect_model(model, schemes=())
    if inspection.quantization is not None:
        raise ValueError(f"model {str(model)!r} is quantized already; give the model that it was made from.")
    expected = lay_out(read_config(model))
    dtype = getattr(torch, inspection.dtype)
    layers = expected.moe_layers
    return ModelShape(
        model_type=inspection.model_type,
        blocks=inspection.blocks,
        rooms={
            index: ExpertRoom(moe.num_experts, moe.min_experts, moe.num_groups)
            for index, moe in layers.items()
        },
        sizes={
            index: [_sizes(_linears(expected, index, moe.num_experts), candidates, dtype, index)]
            * moe.num_experts
            for index, moe in layers.items()
        },
    )


def gather_evidence(
    model: str | Path, candidates: Sequence[Candidate], settings: CalibrationSettings
) -> Evidence:
    """Load a model and run it over calibration text.

    :param model: its directory
    :raises ValueError: something is wrong with the model or the text
    :raises FloatingPointError: activations are NaN or infinite
    """
    samples = calibration_samples(
        settings.dataset, load_tokenizer(model), settings.num_samples, settings.sequence_length
    )
    batches = [
        {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")} for row in samples
    ]
    session = TrimSession.begin(linearize_moe(load_model(model, "auto")))
    if settings.dtype != "auto":
        session.model.to(getattr(torch, settings.dtype))
    return collect_evidence(session, batches, candidates, kl_samples=settings.kl_samples)


def load_evidence(path: str | Path, shape: ModelShape) -> Evidence:
    """Read what `gather_evidence` found before.

    :param shape: of the model that it is to be used for
    :raises ValueError: the file cannot be read, is no evidence, or tells of another model or other schemes
    """
    try:
        evidence = Evidence.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"evidence {str(path)!r} cannot be read ({error}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"evidence {str(path)!r} is no evidence of a calibration run: "
            f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}."
        ) from error
    _require_same_model(path, evidence, shape)
    return evidence


def _require_same_model(path: str | Path, evidence: Evidence, shape: ModelShape) -> None:
    facts = {
        "model_type": (evidence.model_type, shape.model_type),
        "blocks": (evidence.blocks, shape.blocks),
        "experts per MoE layer": (
            {index: len(layer.routed_tokens) for index, layer in evidence.layers.items()},
            {index: room.num_experts for index, room in shape.rooms.items()},
        ),
    }
    for name, (found, wanted) in facts.items():
        if found != wanted:
            raise ValueError(
                f"evidence {str(path)!r} tells of another model: {name} is {found} there and {wanted} in the "
                "model. Give the evidence of this model, or none."
            )
    for index, experts in shape.sizes.items():
        tried = {UNQUANTIZED, *evidence.layers[index].errors}
        missing = [name for name in experts[0] if name not in tried]
        if missing:
            raise ValueError(
                f"evidence {str(path)!r} does not know the schemes {missing}; it has "
                f"{sorted(tried)}. Name those, or gather it anew."
            )


def _linears(expected: ExpectedModel, layer: int, experts: int) -> dict[LinearShape, int]:
    """The Linears of one expert of an MoE layer, as llm-compressor linearizes them."""
    counted = Counter(
        LinearShape(site.in_features, site.out_features, site.bias)
        for site in expected.sites.values()
        if site.kind == "expert" and site.layer == layer
    )
    counted.update(
        LinearShape(linear.shape[1], linear.shape[0], linear.bias)
        for linear in expected.linearized.values()
        if linear.native is None and linear.layer == layer
    )
    return {shape: count // experts for shape, count in counted.items()}


def _sizes(
    linears: Mapping[LinearShape, int], candidates: Iterable[Candidate], dtype: torch.dtype, layer: int
) -> dict[str, StoredSize]:
    found = {}
    for candidate in candidates:
        total = StoredSize()
        for shape, count in linears.items():
            reason = candidate.scheme and why_not_divisible(
                candidate.scheme, shape.out_features, shape.in_features
            )
            if reason:
                raise ValueError(
                    f"schemes: {candidate.name} does not fit the experts of block {layer}: {reason}."
                )
            size = linear_size("", nn.Linear(*shape, device="meta", dtype=dtype), candidate.scheme)
            total += StoredSize(bits=count * size.bits, weights=count * size.weights)
        found[candidate.name] = total
    return found
