"""Owns jobs, rounds and the adapter; the only writer of the log. Integers in, integers out.

Knows no engine, no torch and no text. It learns of devices only by their updates.
"""
