"""Who may come in to the broker, and what for: keys, claims, roles, tickets and where they lie.

Knows nothing of connections. Only `keys` imports nkeys, only `certificate` cryptography; a device's
daemon needs neither until it signs.
"""
