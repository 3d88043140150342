"""Ministral 3: the parallel model and its checkpoints."""
