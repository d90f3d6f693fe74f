"""Statistics of a model on calibration data: numbers only, one forward pass."""

from llmcompressor_moe.profile.collect import collect_profile
from llmcompressor_moe.profile.data import ExpertProfile, Profile, Statistic
from llmcompressor_moe.profile.divergence import divergence_without

__all__ = ["ExpertProfile", "Profile", "Statistic", "collect_profile", "divergence_without"]
