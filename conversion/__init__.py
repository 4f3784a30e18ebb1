"""Checkpoints of other layouts -> ours."""
