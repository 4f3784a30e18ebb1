"""Convert checkpoints of other layouts to ours and back, and verify the result."""

from .convert import LAYOUTS, Report, convert
from .verify import VerificationError


__all__ = ["LAYOUTS", "Report", "VerificationError", "convert"]
