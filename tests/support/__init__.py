"""Factories and small tools for tests. Not installed."""
