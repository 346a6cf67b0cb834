"""Dynamic Memory Compression (arXiv 2403.09636) for Megatron: teach a language model to compress its key-value cache.

Imports nothing, so that ``import megatron.dmc`` costs nothing and needs no Megatron; import the subpackages by name.
"""

__version__ = "0.1.0"
