"""Serving: an OpenAI-compatible HTTP server, and the batch runner on the same requests. Imports no Megatron.

``protocol``, ``prompts``, ``responses`` and ``async_engine`` know nothing of HTTP; ``app``, ``middleware`` and
``server`` are the web server.
"""
