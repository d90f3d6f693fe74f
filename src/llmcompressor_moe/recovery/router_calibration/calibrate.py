"""The whole of it: record the untouched model, fit the compressed one, judge, keep what helps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from loguru import logger

from llmcompressor_moe.progress import progress
from llmcompressor_moe.recovery.router_calibration.fitting import (
    common_steps,
    fit_layer,
    fit_outputs,
    layer_error,
)
from llmcompressor_moe.recovery.router_calibration.outputs import (
    OutputRecord,
    mean_divergence,
    record_outputs,
)
from llmcompressor_moe.recovery.router_calibration.recording import (
    LayerRecord,
    layer_recorders,
    record_layers,
)
from llmcompressor_moe.recovery.router_calibration.report import CalibratedLayer
from llmcompressor_moe.recovery.router_calibration.trainables import LayerParameters, trainable_layer
from llmcompressor_moe.surgery.session import TrimSession

__all__ = ["Calibrated", "CalibrationSettings", "Recording", "calibrate", "record"]

_HELD_OUT_TOKENS = 4096


@dataclass(frozen=True)
class CalibrationSettings:
    """What is fitted, and how.

    :param by_layer: fit each MoE layer's output for itself; otherwise the model's output
    :param judge_outputs: whether the model's output can be looked at (it is not offloaded)
    :param parts: see `trainables.PARTS`
    :param steps: of gradient descent
    :param learning_rate: relative to each tensor's root mean square
    :param layer_tokens: tokens that a layer is fitted on
    :param gradient_checkpointing: compute blocks again in the backward pass, to save memory
    """

    by_layer: bool
    judge_outputs: bool
    parts: tuple[str, ...]
    steps: int
    learning_rate: float
    layer_tokens: int
    gradient_checkpointing: bool


@dataclass
class Recording:
    """The untouched model on batches to fit on and on held-out batches.

    :param apart: whether the two differ (False: there was only one batch)
    :param wanted: block index -> what its MoE layer gave on the batches to fit on; empty unless fitted by layer
    :param held_wanted: the same on the held-out batches
    """

    settings: CalibrationSettings
    batches: Sequence[dict[str, Any]]
    held: Sequence[dict[str, Any]]
    apart: bool
    wanted: dict[int, LayerRecord]
    held_wanted: dict[int, LayerRecord]
    outputs: OutputRecord | None
    held_outputs: OutputRecord | None


@dataclass(frozen=True)
class Calibrated:
    """What came of it; the fields are those of `report.RouterCalibrationReport`."""

    objective: str
    layers: dict[int, CalibratedLayer]
    divergence_before: float | None
    divergence_after: float | None
    held_out: bool

    @property
    def kept(self) -> bool:
        """Whether anything is changed at all."""
        return any(layer.kept for layer in self.layers.values())


def record(
    session: TrimSession,
    settings: CalibrationSettings,
    batches: Sequence[dict[str, Any]],
    held: Sequence[dict[str, Any]],
    apart: bool,
) -> Recording:
    """Run the untouched model once over all batches."""
    model, topology, layers = session.model, session.topology_now(), session.layers
    held_outputs = None
    if settings.judge_outputs:
        watching = layer_recorders(model, topology, layers, len(held), _HELD_OUT_TOKENS)
        held_outputs = record_outputs(model, held, watching.values())
        held_wanted = {index: recorder.record() for index, recorder in watching.items()}
    else:
        held_wanted = record_layers(model, topology, layers, held, _HELD_OUT_TOKENS)
    return Recording(
        settings,
        batches,
        held,
        apart,
        wanted=record_layers(model, topology, layers, batches, settings.layer_tokens)
        if settings.by_layer
        else {},
        held_wanted=held_wanted,
        outputs=None if settings.by_layer else record_outputs(model, batches),
        held_outputs=held_outputs,
    )


def calibrate(session: TrimSession, recording: Recording) -> Calibrated:
    """Fit the compressed model, judge it on the held-out batches, keep what helps."""
    return _Calibration(session, recording).run()


class _Calibration:
    """One run over a compressed model."""

    def __init__(self, session: TrimSession, recording: Recording) -> None:
        self._model = session.model
        self._recording = recording
        self._settings = recording.settings
        self._topology = session.running_topology()
        self._blocks = {block.index: block for block in self._topology.blocks if block.moe is not None}
        self._held, self._divergence_before = self._look()
        self._parameters = {
            index: trainable_layer(self._model, block.moe, self._held[index].norm, self._settings.parts)
            for index, block in self._blocks.items()
        }

    def run(self) -> Calibrated:
        """See `calibrate`."""
        settings = self._settings
        self._warn_of_missing_parts()
        errors, divergence = self._errors(), self._divergence_before
        if settings.by_layer:
            self._fit_layers()
        elif self._blocks:
            steps = common_steps(settings.steps, len(self._recording.batches))
            fit_outputs(
                self._model,
                self._topology,
                self._parameters,
                self._recording.outputs,
                steps,
                settings.learning_rate,
                settings.gradient_checkpointing,
            )
        self._each(LayerParameters.store, self._blocks)
        errors_after = self._errors()
        # Fitted to the model's output, a layer may well move away from what it gave alone.
        kept = {
            index for index in self._blocks if not settings.by_layer or errors_after[index] < errors[index]
        }
        self._each(LayerParameters.restore, self._blocks.keys() - kept)
        divergence_after = self._divergence()
        if divergence is not None and not divergence_after < divergence:
            self._each(LayerParameters.restore, kept)
            kept, divergence_after = set(), divergence
        self._each(LayerParameters.fold, kept)
        layers = {
            index: CalibratedLayer(
                error_before=errors[index],
                error_after=errors_after[index],
                kept=index in kept,
                factors=self._parameters[index].kept_factors if index in kept else [],
            )
            for index in self._blocks
        }
        return Calibrated(
            objective="layer" if settings.by_layer else "output",
            layers=layers,
            divergence_before=divergence,
            divergence_after=divergence_after,
            held_out=self._recording.apart,
        )

    def _look(self) -> tuple[dict[int, LayerRecord], float | None]:
        """What MoE layers receive on the held-out batches, and the divergence there, before anything is fitted."""
        outputs = self._recording.held_outputs
        if outputs is None:
            return self._received(self._recording.held, _HELD_OUT_TOKENS), None
        watching = layer_recorders(
            self._model, self._topology, list(self._blocks), len(outputs.batches), _HELD_OUT_TOKENS
        )
        divergence = mean_divergence(self._model, outputs, watching.values())
        return {index: recorder.record() for index, recorder in watching.items()}, divergence

    def _received(self, batches: Sequence[dict[str, Any]], tokens: int) -> dict[int, LayerRecord]:
        """What the MoE layers that are left receive now."""
        return record_layers(self._model, self._topology, list(self._blocks), batches, tokens, quantized=True)

    def _fit_layers(self) -> None:
        settings = self._settings
        received = self._received(self._recording.batches, settings.layer_tokens)
        with progress(len(self._blocks), "Calibrating routers", passes=1) as advance:
            for index, block in self._blocks.items():
                wanted = self._recording.wanted[index].outputs
                steps = common_steps(settings.steps, len(wanted))
                fit_layer(
                    self._model,
                    block,
                    self._parameters[index],
                    received[index],
                    wanted,
                    steps,
                    settings.learning_rate,
                )
                advance(1)

    def _errors(self) -> dict[int, float]:
        return {
            index: layer_error(
                self._model,
                block,
                self._parameters[index],
                self._held[index],
                self._recording.held_wanted[index].outputs,
            )
            for index, block in self._blocks.items()
        }

    def _divergence(self) -> float | None:
        if self._recording.held_outputs is None:
            return None
        with contextlib.ExitStack() as stack:
            for layer in self._parameters.values():
                stack.enter_context(layer.active())
            return mean_divergence(self._model, self._recording.held_outputs)

    def _each(self, action: Callable[[LayerParameters], None], layers: Iterable[int]) -> None:
        for index in layers:
            action(self._parameters[index])

    def _warn_of_missing_parts(self) -> None:
        without = {
            "norms": [index for index in self._blocks if self._held[index].norm is None],
            "scales": [index for index, layer in self._parameters.items() if layer.factors is None],
        }
        for part, layers in without.items():
            if layers and part in self._settings.parts:
                why = (
                    "no norm hands its output to the MoE layer as it is"
                    if part == "norms"
                    else "the scheme of the experts has no scale that a factor could go into"
                )
                logger.warning(
                    f"RouterCalibrationModifier: {part} of blocks {layers} stay as they are: {why}."
                )
