"""Knows each device by its key: invites, enrols, revokes, and says who was refused.

Does not know what devices measure. It holds the keys that make identities; run one.
"""
