"""The serving side: an OpenAI-compatible HTTP server and what is built on the same requests. Imports no Megatron.

``protocol``, ``prompts``, ``answers`` and ``async_engine`` know nothing of HTTP; ``app`` and ``server`` are the web
server.
"""
