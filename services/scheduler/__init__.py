"""Owns the devices: answers each request for work, and calls devices when a round wants them.

Knows no adapter, no engine and no numbers of a model. It learns what rounds want from the log, and
what devices were worth from DETAIL; it writes to no stream.
"""
