"""The Hugging Face Hub's address, for messages."""

from __future__ import annotations


def hub_address() -> str:
    """Where HF_ENDPOINT says the Hub is; what may be a user and password stays out of messages."""
    from urllib.parse import urlsplit

    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
