"""The daemon on a device: private data, a spool of updates, and an engine in a child process.

Knows no service, no numpy and no llama.cpp: arrays and models live in the child.
"""
