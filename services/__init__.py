"""The services, one package each. None imports another: all that passes is `shared.messages`."""
