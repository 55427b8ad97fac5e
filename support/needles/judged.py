"""Who is judged: can models be compared, and is it the same checkpoint as last time?"""

import hashlib
from pathlib import Path

from support.huggingface.tokenizer import load_tokenizer
from support.system.bad_input import BadInput


def check_models(configs: dict, longest: int) -> None:
    """configs: folder -> LlamaConfig, the model to judge last. ValueError if one cannot take the
    longest prompt, or the prompts of the last one's tokenizer."""
    own = load_tokenizer(list(configs)[-1])
    for folder, config in configs.items():
        if config.sliding_window is not None and config.sliding_window < longest:
            raise BadInput(
                f"{folder}: sliding_window {config.sliding_window} is shorter than"
                f" --lengths {longest}"
            )
        if own.vocab_size > config.vocab_size or own != load_tokenizer(folder):
            raise BadInput(
                f"{folder}: its tokenizer or vocabulary is not that of --model {list(configs)[-1]}"
            )


def fingerprint(folder: str | Path) -> str:
    """Tells one checkpoint from another at the same path: a hash over config.json and parts of
    the weights."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")) + [Path(folder) / "config.json"]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as stream:
            for begin in range(0, size, max(1, size // 64)):
                stream.seek(begin)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:12]
