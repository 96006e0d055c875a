"""Seeded schedules of failures over the real services and the real device code, in virtual time.

A run is a function of its seed: no wall clock, no unseeded chance, no order of hashes.
"""
