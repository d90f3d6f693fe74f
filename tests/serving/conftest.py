"""Makes the plugin importable where it is not installed: its vLLM-free parts are tested without vLLM."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "serving" / "src"))
