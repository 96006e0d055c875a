"""A model's tokens as bytes: its tokenizer, backwards."""

import ctypes
from typing import Any

from shared.engine.llama import Vocabulary
from shared.engine.native import native


class Detokenizer(Vocabulary):
    """A tokenizer that also goes back."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._model = model
        self._pieces: dict[int, bytes] = {}
        vocabulary, tokens = self._vocabulary, range(self.size)
        self.ends = frozenset(
            token for token in tokens if native.llama_vocab_is_eog(vocabulary, token)
        )

    def bytes_of(self, token: int) -> bytes:
        """What the token adds to a text; nothing, for a control token."""
        if token not in self._pieces:
            room = 64
            while True:
                buffer = ctypes.create_string_buffer(room)
                size = native.llama_token_to_piece(self._vocabulary, token, buffer, room, 0, False)
                if size >= 0:
                    break
                room = -size
            self._pieces[token] = buffer.raw[:size]
        return self._pieces[token]

    def shown(self, token: int) -> str:
        """The token for who reads log-probabilities; what is no text alone is spelled in bytes."""
        data = self.bytes_of(token)
        if not data:
            return self.spelling(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
