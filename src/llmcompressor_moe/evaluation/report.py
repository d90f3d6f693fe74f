"""What an evaluation found, model by model."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from llmcompressor_moe.evaluation.agreement import Agreement
from llmcompressor_moe.evaluation.communication import CommunicationComparison
from llmcompressor_moe.evaluation.cost import ModelCost
from llmcompressor_moe.evaluation.latency import SpeedComparison
from llmcompressor_moe.evaluation.recovered import RecoveryCurve
from llmcompressor_moe.evaluation.routing import RoutingComparison
from llmcompressor_moe.evaluation.tasks import TaskScore
from llmcompressor_moe.evaluation.text import TextQuality
from llmcompressor_moe.limits import BrokenLimit, Limits
from llmcompressor_moe.report import ShownPath

__all__ = ["BaseEvaluation", "CompressedEvaluation", "Evaluation"]


class BaseEvaluation(BaseModel):
    """The model that others are compared with.

    :param path: its directory
    :param cost: what it takes to store and run
    :param tasks: scores of lm-eval, where tasks were asked for
    """

    model_config = ConfigDict(extra="forbid")

    path: ShownPath
    text: TextQuality
    cost: ModelCost
    tasks: list[TaskScore] = []


class CompressedEvaluation(BaseEvaluation):
    """A model made from the base.

    :param agreement: how much it says the same as the base, token by token
    :param routing: what its routers choose against the base's
    :param communication: what expert parallelism moves, per number of ranks that was asked for
    :param recovery: what training won back, where it was trained
    :param broken_limits: limits that it does not keep
    """

    agreement: Agreement
    routing: RoutingComparison
    communication: list[CommunicationComparison] = []
    recovery: RecoveryCurve | None = None
    broken_limits: list[BrokenLimit] = []


class Evaluation(BaseModel):
    """A base model and models made from it, on the same text.

    :param source: where the text came from
    :param limits: what compressed models had to keep
    :param speed: every compressed model beside the base, by engine, where speed was asked for
    :param speed_errors: engine -> why it could not be measured there
    """

    model_config = ConfigDict(extra="forbid")

    source: ShownPath
    base: BaseEvaluation
    compressed: list[CompressedEvaluation]
    limits: Limits = Limits()
    speed: list[SpeedComparison] = []
    speed_errors: dict[str, str] = {}

    @property
    def ok(self) -> bool:
        """Whether every model keeps all limits."""
        return not any(model.broken_limits for model in self.compressed)
