"""LoRA: the baseline without noise."""

from flatkern.methods.base import Method


class LoRA(Method):
    """Plain training of whatever is trainable. Source: Hu et al., "LoRA", 2021."""
