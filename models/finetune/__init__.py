"""Finetuning of Ministral 3: data, trainer, checkpoints and metrics, over one process or many."""
