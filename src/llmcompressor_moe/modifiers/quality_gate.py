"""Limits in a recipe: measure the model before and after, and keep apart what does not keep them."""

from __future__ import annotations

import contextlib
from typing import Any

from llmcompressor.core import State
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator

from llmcompressor_moe.evaluation.in_memory import BaseFigures, figures_of, recorded_figures
from llmcompressor_moe.evaluation.sources import evaluation_texts
from llmcompressor_moe.limits import AtMost, Limits, Share, broken_limits
from llmcompressor_moe.loading import load_tokenizer
from llmcompressor_moe.modifiers.base import MoEModifier, modifiers_after
from llmcompressor_moe.report import DropReport, ShownPath
from llmcompressor_moe.saving.save import keep_apart

__all__ = ["QualityGateModifier"]


class QualityGateModifier(MoEModifier):
    """Measures the model before the recipe and after it, on text of your choice; a model that breaks a limit is
    saved beside the output directory, as ``OUTPUT.rejected``, and saving ends with an error that names the limit.

    Stands at the end of a recipe. Takes at least one limit; see `limits.Limits` for them.

    Sample YAML::

        QualityGateModifier:
          max_perplexity_increase: 0.05
          min_routing_overlap: 0.8
          text: heldout.txt

    Lifecycle:
        - on_initialize: look at the text, measure the untouched model
        - on_finalize: complete the model like all modifiers of this package, measure it

    :param text: ``demo``, a ``.txt`` or ``.jsonl`` file, or a dataset; not what the recipe calibrates on
    :param max_tokens: tokens of it, at most
    :param length: tokens per window; None for 2048, or what the model has positions for
    :param stride: tokens that each further window predicts; None for half of ``length``
    :param batch_size: windows per forward pass
    """

    text: ShownPath
    max_tokens: int = Field(default=16384, ge=2)
    length: int | None = Field(default=None, ge=1)
    stride: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=1, ge=1)
    max_perplexity_increase: AtMost | None = None
    max_kl: AtMost | None = None
    min_top1_agreement: Share | None = None
    min_routing_overlap: Share | None = None
    max_replaced: Share | None = None

    _open: contextlib.ExitStack = PrivateAttr(default_factory=contextlib.ExitStack)
    _base: BaseFigures | None = PrivateAttr(default=None)

    @property
    def limits(self) -> Limits:
        """The limits that were given."""
        return Limits(**{name: getattr(self, name) for name in Limits.model_fields})

    @model_validator(mode="after")
    def _check_fields(self) -> QualityGateModifier:
        if not self.limits.any:
            raise ValueError(
                f"QualityGateModifier has no limit; give at least one of {', '.join(Limits.model_fields)}."
            )
        for name in ("report_path", "plan_path"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name)!r}: QualityGateModifier has no such field.")
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Measure the untouched model; see the class."""
        later = modifiers_after(self)
        if later:
            raise ValueError(
                f"QualityGateModifier judges what the whole recipe made; {type(later[0]).__name__} comes after "
                "it: put it at the end."
            )
        session = self._join_session(state)
        tokenizer = load_tokenizer(session.model.config._name_or_path)
        texts = evaluation_texts(self.text, tokenizer, self.max_tokens)
        self._base = self._open.enter_context(
            recorded_figures(
                session.model, tokenizer, texts, self.length, self.stride, batch_size=self.batch_size
            )
        )
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Complete the model and judge it."""
        super().on_finalize(state, **kwargs)
        with self._open:
            history = [r for r in getattr(state.model, "_trim_history", []) if isinstance(r, DropReport)]
            figures = figures_of(state.model, self._base, history)
        self._base = None
        broken = broken_limits(self.limits, figures)
        if broken:
            logger.error(f"Limits are broken: {'; '.join(map(str, broken))}.")
            keep_apart(state.model, broken)
        else:
            logger.info(f"All limits are kept: {figures}.")
        return True
