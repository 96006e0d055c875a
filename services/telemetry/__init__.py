"""Watches jobs, devices and services, and tells Prometheus and people; nothing depends on it.

Knows no engine and no adapter, and writes nothing to the broker.
"""
