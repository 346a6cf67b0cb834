"""Quality and compression: of checkpoints, and of models under several cache policies; tables, plots, tasks, generated
text.
"""
