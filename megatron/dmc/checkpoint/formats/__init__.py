"""Formats of weights, one module each: :mod:`registry` lists them, :mod:`base` has their interface."""
