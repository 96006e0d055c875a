"""`seedwire export`: a job's adapter as files that other programs load.

Knows the log and the formats; it has no engine and needs no device.
"""
