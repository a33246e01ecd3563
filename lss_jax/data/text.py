"""Text and its tokens; here each byte is a token."""

import numpy as np


class ByteText:
    """Converts text (UTF-8 bytes) to tokens, and tokens to bytes."""

    vocab = 256  # further tokens of a model's vocabulary stand for no text

    @staticmethod
    def tokens_of(text: bytes) -> np.ndarray:
        """The tokens of a text, int32."""
        return np.frombuffer(text, np.uint8).astype(np.int32)

    @staticmethod
    def bytes_of(token: int) -> bytes:
        """The bytes that a token stands for."""
        return bytes([token])
