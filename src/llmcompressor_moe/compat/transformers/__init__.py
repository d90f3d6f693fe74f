"""transformers: layers that differ, names in checkpoints, how models are built and trained."""

__all__ = ["HOLDS_FOR"]

HOLDS_FOR = "transformers>=5.17,<6"
