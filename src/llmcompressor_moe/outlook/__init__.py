"""What drops and bits will cost, from one calibration run, before anything is cut."""

from llmcompressor_moe.outlook.calibration import Calibration, bundled_calibration
from llmcompressor_moe.outlook.coverage import Coverage, coverage
from llmcompressor_moe.outlook.damage import Damage, first_order_damage
from llmcompressor_moe.outlook.predict import LossForecast, predict_loss
from llmcompressor_moe.outlook.report import Outlook, PointForecast, SafeUpTo, outlook

__all__ = [
    "Calibration",
    "Coverage",
    "Damage",
    "LossForecast",
    "Outlook",
    "PointForecast",
    "SafeUpTo",
    "bundled_calibration",
    "coverage",
    "first_order_damage",
    "outlook",
    "predict_loss",
]
