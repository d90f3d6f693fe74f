"""From a Mixture of Experts to a dense model of its sibling architecture, which recovery then distils."""

from llmcompressor_moe.recovery.dense.comparison import Curve, brief_training, random_start
from llmcompressor_moe.recovery.dense.convert import DENSE_FILE, METHODS, DenseSummary, to_dense
from llmcompressor_moe.recovery.dense.siblings import NoSiblingError, sibling_of

__all__ = [
    "DENSE_FILE",
    "METHODS",
    "Curve",
    "DenseSummary",
    "NoSiblingError",
    "brief_training",
    "random_start",
    "sibling_of",
    "to_dense",
]
