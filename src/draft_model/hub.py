"""What messages say of addresses: the Hugging Face Hub's, and none with a password in it."""

from __future__ import annotations

import re

_CREDENTIALS = re.compile(r"(?<=://)[^\s/?'\"]*@")


def hub_address() -> str:
    """Where HF_ENDPOINT says the Hub is, without user and password."""
    from huggingface_hub import constants

    return without_credentials(constants.ENDPOINT)


def without_credentials(text: str) -> str:
    """Takes `user:password@` out of every URI in a text, such as another library's error message."""
    return _CREDENTIALS.sub("", text)
