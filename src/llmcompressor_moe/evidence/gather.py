"""From a model's directory and calibration text to evidence, and to what the model allows to be chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import nn

from llmcompressor_moe.calibration import calibration_samples
from llmcompressor_moe.check.expected import ExpectedModel, lay_out
from llmcompressor_moe.check.weights import require_weights
from llmcompressor_moe.checkpoint.fingerprint import fingerprint
from llmcompressor_moe.checkpoint.opened import open_model
from llmcompressor_moe.evaluation.windows import position_limit, vocabulary_size
from llmcompressor_moe.evidence.collect import collect_evidence, require_two
from llmcompressor_moe.evidence.data import Evidence
from llmcompressor_moe.inspection import inspect_model, read_config
from llmcompressor_moe.loading import DTYPES, load_tokenizer
from llmcompressor_moe.plan import ExpertRoom
from llmcompressor_moe.quantization.schemes import Candidate, fitting_group_size, why_not_divisible
from llmcompressor_moe.quantization.sizes import StoredSize, linear_size
from llmcompressor_moe.slimming import LinearShape
from llmcompressor_moe.surgery.session import TrimSession

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "CalibrationSettings",
    "ModelShape",
    "SchemeDoesNotFitError",
    "gather_evidence",
    "load_evidence",
    "model_shape",
]


class SchemeDoesNotFitError(ValueError):
    """A candidate's groups or blocks do not divide the experts' weights.

    :ivar group_size: one that fits all experts of the model, None where only channel-wise scales do
    """

    def __init__(self, message: str, group_size: int | None) -> None:
        super().__init__(message)
        self.group_size = group_size


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

    def check(self, model: str | Path) -> Dataset:
        """Find what is wrong before any weights are read.

        :return: the samples
        :raises ValueError: a field, the text, the tokenizer, or the weight files
        """
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: choose one of {', '.join(DTYPES)}.")
        for name in ("num_samples", "sequence_length", "kl_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1.")
        require_weights(model)
        config = read_config(model).parsed
        limit = position_limit(config)
        if limit is not None and self.sequence_length > limit:
            raise ValueError(
                f"sequence_length={self.sequence_length}: the model has {limit} positions "
                "(max_position_embeddings); give at most that."
            )
        samples = calibration_samples(
            self.dataset, load_tokenizer(model), self.num_samples, self.sequence_length
        )
        require_two(len(samples))
        vocabulary, highest = vocabulary_size(config), max(map(max, samples["input_ids"]))
        if vocabulary is not None and highest >= vocabulary:
            raise ValueError(
                f"dataset {self.dataset!r}: token id {highest} is not in the model's vocabulary of {vocabulary}; "
                "use the model's own tokenizer."
            )
        return samples


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
    :raises ValueError: the model cannot be built from it, or is quantized already
    :raises SchemeDoesNotFitError: a candidate does not fit
    """
    inspection = inspect_model(model, schemes=())
    if inspection.quantization is not None:
        raise ValueError(f"model {str(model)!r} is quantized already; give the model that it was made from.")
    expected = lay_out(read_config(model))
    dtype = getattr(torch, inspection.dtype)
    layers = expected.moe_layers
    linears = {index: _linears(expected, index, moe.num_experts) for index, moe in layers.items()}
    _require_fitting(linears, candidates)
    return ModelShape(
        model_type=inspection.model_type,
        blocks=inspection.blocks,
        rooms={
            index: ExpertRoom(moe.num_experts, moe.min_experts, moe.num_groups)
            for index, moe in layers.items()
        },
        sizes={
            index: [_sizes(linears[index], candidates, dtype)] * moe.num_experts
            for index, moe in layers.items()
        },
    )


def gather_evidence(
    model: str | Path, candidates: Sequence[Candidate], settings: CalibrationSettings
) -> Evidence:
    """Open a model and run it over calibration text, block by block.

    :param model: its directory
    :raises ValueError: something is wrong with the model or the text
    :raises FloatingPointError: activations are NaN or infinite
    """
    samples = settings.check(model)
    batches = [
        {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")} for row in samples
    ]
    session = TrimSession.begin(open_model(model, dtype=settings.dtype))
    found = collect_evidence(session, batches, candidates, kl_samples=settings.kl_samples)
    return found.model_copy(update={"fingerprint": fingerprint(model)})


def load_evidence(path: str | Path, model: str | Path, candidates: Sequence[Candidate]) -> Evidence:
    """Read what `gather_evidence` found before.

    :param model: directory of the model that it is to be used for
    :param candidates: schemes that it is to know
    :raises ValueError: the file cannot be read, is no evidence, or tells of another model or other schemes
    """
    try:
        evidence = Evidence.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"evidence {str(path)!r} cannot be read ({error}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"evidence {str(path)!r} is not evidence of a calibration run: "
            f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}. "
            "Gather it again."
        ) from error
    _require_same_model(path, evidence, model)
    for candidate in candidates:
        if candidate.name not in evidence.schemes:
            raise ValueError(
                f"evidence {str(path)!r} does not know the scheme {candidate.name}; it has "
                f"{', '.join(evidence.schemes) or 'none'}. Name those, or gather it again."
            )
        tried = evidence.schemes[candidate.name]
        if tried != candidate.written:
            raise ValueError(
                f"evidence {str(path)!r} tried another scheme by the name of {candidate.name} (weights: "
                f"{_weights(tried)}; asked for: {_weights(candidate.written)}). Give the same group_size, or "
                "gather it again."
            )
    return evidence


def _weights(scheme: Mapping[str, Any] | None) -> str:
    weights = (scheme or {}).get("weights") or {}
    return ", ".join(f"{name}={weights[name]}" for name in ("num_bits", "group_size") if name in weights)


def _require_same_model(path: str | Path, evidence: Evidence, model: str | Path) -> None:
    inspection = inspect_model(model, schemes=())
    facts = {
        "model_type": (evidence.model_type, inspection.model_type),
        "blocks": (evidence.blocks, inspection.blocks),
        "experts per MoE layer": (
            {index: len(layer.routed_tokens) for index, layer in evidence.layers.items()},
            {layer.index: layer.experts for layer in inspection.moe_layers},
        ),
        # Last, as it says least of what differs.
        "the fingerprint of its config and weights": (evidence.fingerprint, fingerprint(model)),
    }
    for name, (found, wanted) in facts.items():
        if found != wanted:
            raise ValueError(
                f"evidence {str(path)!r} tells of another model: {name} is {found} there and {wanted} in "
                f"{str(model)!r}. Give the evidence of this model, or none, to gather it."
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


def _require_fitting(
    linears: Mapping[int, Mapping[LinearShape, int]], candidates: Iterable[Candidate]
) -> None:
    """Refuse candidates that do not fit the Linears of some layer's experts."""
    inputs = {shape.in_features for shapes in linears.values() for shape in shapes}
    for candidate in candidates:
        for layer, shapes in linears.items():
            for shape in shapes:
                reason = candidate.scheme and why_not_divisible(
                    candidate.scheme, shape.out_features, shape.in_features, inputs
                )
                if reason:
                    raise SchemeDoesNotFitError(
                        f"schemes: {candidate.name} does not fit the experts of block {layer}: {reason}.",
                        fitting_group_size(inputs),
                    )


def _sizes(
    linears: Mapping[LinearShape, int], candidates: Iterable[Candidate], dtype: torch.dtype
) -> dict[str, StoredSize]:
    found = {}
    for candidate in candidates:
        total = StoredSize()
        for shape, count in linears.items():
            size = linear_size("", nn.Linear(*shape, device="meta", dtype=dtype), candidate.scheme)
            total += StoredSize(bits=count * size.bits, weights=count * size.weights)
        found[candidate.name] = total
    return found
