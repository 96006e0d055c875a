"""Serves the fleet's model: an OpenAI-compatible server over the base model and its adapter.

Follows the log, swaps to each published version without dropping or mixing an answer, rolls back.
"""
