"""Measure quality and compression, of checkpoints and of models under several cache policies: tasks, tables, plots."""
