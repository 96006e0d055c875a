"""Seeded schedules of failures over real processes, a real broker, real files and real sockets.

A seed draws the plan: who is killed at which write boundary, when, and what each link does. The
instants at which processes then run are the machine's own.
"""
