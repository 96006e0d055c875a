"""The engine's child process and its async face. Knows no network, no rounds, no other device."""
