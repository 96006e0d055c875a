"""What every process must agree on: messages, subjects, the log, the numbers, the engine.

Knows no service and no edge client.
"""
