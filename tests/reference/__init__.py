"""Outputs of the authors' implementation, and what writes checkpoints in their layout."""

from pathlib import Path


REFERENCE = Path(__file__).parent
