"""The built-in vocabulary of bytes, in the form that llguidance takes."""

from __future__ import annotations


class ByteVocabulary:
    """One token a byte, and one that ends: ``workbench.serving.text.tokenizer.ByteTokenizer``."""

    bos_token_id = None
    eos_token_id = 256
    tokens = (*(bytes([i]) for i in range(256)), b"<|end|>")
    special_token_ids = (256,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())
