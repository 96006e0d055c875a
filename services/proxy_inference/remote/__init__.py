"""A large model that lives behind an OpenAI-compatible server and tells log-probabilities.

What the server can do is found out by asking it. This package knows nothing of llama.cpp, of
generations or of requests: tokens go in; logits over the whole vocabulary, or a token, come out.
"""
