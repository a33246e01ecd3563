"""Text and the tokens that it is made of; here each byte is a token."""

import numpy as np


class ByteText:
    """UTF-8 bytes as tokens, and back."""

    vocab = 256  # of a larger vocabulary the rest stands for no text

    @staticmethod
    def tokens_of(text: bytes) -> np.ndarray:
        """The tokens of a text, int32."""
        return np.frombuffer(text, np.uint8).astype(np.int32)

    @staticmethod
    def bytes_of(token: int) -> bytes:
        """What a token stands for."""
        return bytes([token])
