"""A model by its folder, or by its name on the Hugging Face hub through the optional package
huggingface_hub."""

import difflib
import os
import re
from pathlib import Path

from support.system.bad_input import BadInput

CONFIG = ("config.json",)  # enough for --plan
SMALL = ("*.json", "tokenizer.model", "*.txt", "*.jinja")
FILES = (*SMALL, "*.safetensors")


def local_folder(name: str, files: tuple[str, ...] = FILES) -> str:
    """A folder as it is (~ expanded); org/name: the folder it was (or is now) downloaded to.

    Only `files` are fetched: by default config, safetensors and tokenizer. BadInput: a path that
    does not exist (and what is near it), or what to install for the hub."""
    path = Path(os.path.expanduser(name))
    if path.exists():
        return os.path.expanduser(name)
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    if not is_name or path.parent.is_dir():
        why = f" ({path.parent} is a folder here, so the hub is not asked)" if is_name else ""
        raise BadInput(f"model folder {name} does not exist{near_names(path)}{why}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise BadInput(
            f"{name} is not a folder; `pip install huggingface_hub` and it is fetched from the hub,"
            " or download its config, safetensors and tokenizer files into a folder yourself"
        ) from None
    try:
        return snapshot_download(name, allow_patterns=files)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(
            f"{name} is not a folder and could not be fetched from the hub: {reason}"
        ) from error


def near_names(path: Path) -> str:
    """For a path that does not exist: the folders with names most like its first missing part."""
    while not path.parent.is_dir():
        path = path.parent
    beside = {f.name.lower(): str(f) for f in path.parent.iterdir() if f.is_dir()}
    near = difflib.get_close_matches(path.name.lower(), beside)
    return f"; near it: {', '.join(beside[n] for n in near)}" if near else ""
