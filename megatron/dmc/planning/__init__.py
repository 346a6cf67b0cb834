"""Planning of a run before any GPU is taken: estimates by formula, and layouts that work and fit. Needs no torch."""
