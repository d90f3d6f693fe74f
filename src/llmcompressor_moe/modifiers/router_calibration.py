"""Adjust routers to what compression left of their model."""

from __future__ import annotations

from typing import Any, Literal

import torch
from compressed_tensors.offload import get_execution_device
from llmcompressor.core import Event, State
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from llmcompressor_moe.compat.compressed_tensors import is_offloaded
from llmcompressor_moe.modifiers.base import MoEModifier, modifiers_before
from llmcompressor_moe.profile.splitting import split_held_out
from llmcompressor_moe.recovery.router_calibration.calibrate import (
    CalibrationSettings,
    Recording,
    calibrate,
    record,
)
from llmcompressor_moe.recovery.router_calibration.report import RouterCalibrationReport
from llmcompressor_moe.recovery.router_calibration.trainables import PARTS

__all__ = ["RouterCalibrationModifier"]


class RouterCalibrationModifier(MoEModifier):
    """After drops or quantization, adjusts the routers (and FFN norms, and one factor per expert) so that the
    model says again what it said before, with a few steps of gradient descent on the calibration data.

    Stands behind the modifiers whose damage it mends. What it changes is kept only where it helps on batches that
    it was not fitted on.

    Sample YAML::

        ExpertDropModifier:
          drop_ratio: 0.5
        RouterCalibrationModifier:
          objective: output
          parts: [router, norms]

    Lifecycle:
        - on_initialize: record what the untouched model gives
        - on_calibration_end: fit, compare on held-out batches, keep what helps
        - on_finalize: complete the model like all modifiers of this package

    :param objective: ``output``: the model's next-token distribution (the KL from the untouched model's, through
        the whole model); ``layer``: each MoE layer's output for itself, which works on offloaded models;
        ``auto``: output, or layer where the model is offloaded
    :param parts: what may move: ``router``, ``norms`` (the norm before each MoE layer), ``scales`` (a factor on
        each expert's output, put into its weights)
    :param share: share of the calibration batches that is fitted on; a step on a batch costs about three
        forward passes (output)
    :param steps: steps of gradient descent, at most; the batches are divided among them
    :param learning_rate: of Adam, relative to the root mean square of each tensor; falls to zero
    :param layer_tokens: tokens that each MoE layer is fitted on (``layer``)
    :param gradient_checkpointing: compute each block again in the backward pass instead of keeping what it leaves
        for it, for about one forward pass more (``output``; the result is the same); None: on accelerators
    """

    # Its passes are its own and run routed experts only.
    requires_calibration_data: bool = False

    objective: Literal["auto", "output", "layer"] = "auto"
    parts: list[str] = Field(default_factory=lambda: ["router", "norms"])
    share: float = Field(default=0.5, gt=0, le=1)
    steps: int = Field(default=20, ge=1)
    learning_rate: float = Field(default=0.08, gt=0, lt=1)
    layer_tokens: int = Field(default=4096, ge=1)
    gradient_checkpointing: bool | None = None

    _recording: Recording | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_fields(self) -> RouterCalibrationModifier:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ValueError(f"parts={self.parts} must name some of {', '.join(PARTS)}.")
        if self.plan_path is not None:
            raise ValueError(
                f"plan_path={self.plan_path!r}: RouterCalibrationModifier cannot repeat a fit without data."
            )
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Look at the untouched model; see the class."""
        if not modifiers_before(self):
            raise ValueError(
                "RouterCalibrationModifier mends what modifiers before it did, and there are none: put it "
                "after the drops or the quantization of the recipe."
            )
        session = self._join_session(state)
        batches = list(self._require_data(state, "leave RouterCalibrationModifier out"))
        offloaded = is_offloaded(session.model)
        if self.objective == "output" and offloaded:
            raise ValueError(
                "objective='output' runs the whole model forwards and backwards, and this one is offloaded: use "
                "objective='layer', or load the model on its device."
            )
        inline = [index for index, moe in session.topology.moe_layers.items() if moe.inline or not moe.router]
        if inline:
            raise ValueError(
                f"RouterCalibrationModifier: blocks {inline} of this {session.topology.model_type!r} model have "
                "no router module in an MoE layer of its own; leave the modifier out."
            )
        fit, held, apart = split_held_out(batches)
        by_layer = self.objective == "layer" or (self.objective == "auto" and offloaded)
        settings = CalibrationSettings(
            by_layer=by_layer,
            judge_outputs=not offloaded,
            parts=tuple(self.parts),
            steps=self.steps,
            learning_rate=self.learning_rate,
            layer_tokens=self.layer_tokens,
            gradient_checkpointing=self._checkpoints(session.model),
        )
        count = max(1, round(self.share * len(fit)))
        # At equal distances: neighbours may be of one document.
        chosen = [fit[index * len(fit) // count] for index in range(count)]
        self._recording = record(session, settings, chosen, held, apart)
        return True

    def _checkpoints(self, model: nn.Module) -> bool:
        if self.gradient_checkpointing is not None:
            return self.gradient_checkpointing
        # Of an offloaded model upstream gives the device as it was named.
        return torch.device(get_execution_device(model)).type != "cpu"

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Fit and judge; see the class."""
        found = calibrate(self._session, self._recording)
        rows = [batch["input_ids"] for batch in self._recording.batches]
        self._recording = None
        report = RouterCalibrationReport(
            **{
                **self._report_heading(None),
                "calibration": {
                    "tokens": sum(row.numel() for row in rows),
                    "samples": sum(map(len, rows)),
                },
            },
            **{name: getattr(found, name) for name in RouterCalibrationReport.own_fields()},
        )
        self._publish(report)
        logger.info(report.describe())
