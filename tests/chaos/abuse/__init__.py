"""Senders of whatever hurts: fuzzers of what reads foreign bytes, and devices that mean ill."""
