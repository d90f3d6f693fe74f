"""Scores: pure functions from a Profile (or weights) to numbers, each naming its source. One registry per
kind of part.
"""

from llmcompressor_moe.criteria.experts import EXPERT_CRITERIA, ExpertCriterion, expert_criterion
from llmcompressor_moe.criteria.parts import METRICS, Metric, part_metric

__all__ = ["EXPERT_CRITERIA", "METRICS", "ExpertCriterion", "Metric", "expert_criterion", "part_metric"]
