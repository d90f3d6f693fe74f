"""Checkpoints that say what they are: writing, naming, describing and reading them."""
