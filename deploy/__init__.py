"""How Seedwire is put to work; nothing here is imported by the system itself."""
