"""Quality and compression of checkpoints: tables, plots, and text generated from the compressed cache."""
