"""A model by its name on the Hugging Face hub, through the optional package huggingface_hub."""

import re
from pathlib import Path

FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja")


def local_folder(name: str) -> str:
    """A folder as it is; org/name: the folder it was (or is now) downloaded to.

    Only config, safetensors and tokenizer files are fetched. ValueError says what to install."""
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{name} is no folder; `pip install huggingface_hub` lets us fetch it from the hub,"
            " or download its config, safetensors and tokenizer files into a folder yourself"
        ) from None
    try:
        return snapshot_download(name, allow_patterns=FILES)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name} is no folder and could not be fetched from the hub: {reason}"
        ) from error
