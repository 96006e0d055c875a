"""The demo: eight devices on this machine tune a small model on text that is already here."""
