"""Ministral 3: its checkpoints read, converted and written back."""
