"""Checkpoints of other layouts to ours and back: one module per layout, one verifier for all."""

from .convert import LAYOUTS, Report, convert
from .verify import VerificationError


__all__ = ["LAYOUTS", "Report", "VerificationError", "convert"]
