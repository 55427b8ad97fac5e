"""Read, write and merge Hugging Face model folders: all that model.py and recipe.py need of this
room."""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from support.huggingface import checkpoint
from support.huggingface import config as config_files
from support.huggingface.config import read_json
from support.system.bad_input import BadInput
from support.system.whole_files import write_folder

EDITED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
TOKENIZER_FILES = (
    *EDITED,
    *("tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "chat_template.json", "needle.json"),
)
# What a save may replace. A folder that holds anything else is not touched.
OURS = ("config.json", "model*.safetensors", checkpoint.INDEX, *TOKENIZER_FILES)
# What extension changes in a config: a merged model has it from the tuned one.
OF_THE_TUNED = {"raw", "rope_theta", "rope_scaling", "max_position_embeddings"}
# Other names for the window in the small files; some engines take the smallest of all of them.
WINDOWS = """model_max_length tokenizer_model_max_length max_len max_seq_len max_seq_length
    max_sequence_length seq_len seq_length n_ctx n_positions""".split()

# ---- reading -----------------------------------------------------------------------------------


def read_config(path: str | Path) -> dict:
    """The fields of LlamaConfig. BadInput names what cannot be honoured."""
    fields = config_files.read_config(path)
    if fields["tie_word_embeddings"] and checkpoint.has_own_head(Path(path)):
        fields["tie_word_embeddings"] = False
    return fields


def load_weights(
    model: nn.Module, path: str | Path, dtype: torch.dtype | None, device: torch.device
) -> nn.Module:
    """A Llama on the meta device -> the same with the folder's weights, cast and moved one by one
    after a check of all names; see load_pretrained."""
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = checkpoint.find_tensors(Path(path), model.config.tie_word_embeddings)
    missing, extra = (sorted(a.keys() - b.keys()) for a, b in ((shapes, found), (found, shapes)))
    if missing or extra:
        raise BadInput(
            f"{path}: tensors do not fit config.json; missing {missing[:5] or 'none'},"
            f" extra {extra[:5] or 'none'}"
        )
    state = {}
    for name, tensor in checkpoint.iter_tensors(found):
        if (shape := tuple(tensor.shape)) != shapes[name]:
            differs = f"has shape {shape}, config.json says {shapes[name]}"
            raise BadInput(f"{path}: tensor {name} {differs}")
        # subtle: the tensor may be a view of the mapped file; a copy releases the mapping
        state[name] = tensor.to(device=device, dtype=dtype, copy=True)
    model.load_state_dict(state, assign=True, strict=False)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model["embed_tokens"].weight
    return model


# ---- writing -----------------------------------------------------------------------------------


def save(model: nn.Module, path: str | Path, tokenizer_from: str | Path | None) -> None:
    """See save_pretrained."""
    config = config_files.config_to_json(
        dataclasses.asdict(model.config), model.lm_head.weight.dtype
    )
    write(path, config, model.named_parameters(), tokenizer_from)


def check_saveable(config, dtype: torch.dtype, tokenizer_from: str | Path) -> None:
    """Raises, before a model is trained, what would be raised when it is saved: all files but the
    weights are written to a temporary folder."""
    content = config_files.config_to_json(dataclasses.asdict(config), dtype)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "model", content, [], tokenizer_from)


def merge(
    original_dir: str | Path, tuned_dir: str | Path, out_dir: str | Path, average: Callable
) -> None:
    """See recipe.merge; average(original, tuned) gives one tensor of the result."""
    original_dir, tuned_dir = Path(original_dir), Path(tuned_dir)
    original, tuned = (read_config(d) for d in (original_dir, tuned_dir))
    for config in (original, tuned):
        config["model_type"] = config["raw"]["model_type"]
    for field in sorted(set(original) - OF_THE_TUNED):
        if original[field] != tuned[field]:
            raise BadInput(f"cannot merge: {field} is {original[field]} and {tuned[field]}")
    tied = tuned["tie_word_embeddings"]
    found, found_tuned = (checkpoint.find_tensors(d, tied) for d in (original_dir, tuned_dir))
    for name in sorted(found.keys() ^ found_tuned.keys()):
        dirs = (original_dir, tuned_dir)
        has, lacks = dirs if name in found else reversed(dirs)
        raise BadInput(f"{lacks} lacks tensor {name}, which {has} has")

    def averages() -> Iterator[tuple[str, torch.Tensor]]:
        for name, b in checkpoint.iter_tensors(found_tuned):
            a = checkpoint.read_tensor(found, name)
            if a.shape != b.shape:
                shapes = f"{tuple(a.shape)} in {original_dir}, {tuple(b.shape)} in {tuned_dir}"
                raise BadInput(f"cannot merge: {name} is {shapes}")
            yield name, average(a, b)

    write(out_dir, tuned["raw"] | {"tie_word_embeddings": tied}, averages(), tuned_dir)


def write(
    path: str | Path,
    config: dict,
    tensors: Iterable[tuple[str, torch.Tensor]],
    tokenizer_from: str | Path | None,
) -> None:
    """A model folder from the content of its config.json, its tensors and the tokenizer files of
    another folder (None: those that `path` has already). BadInput if `path` holds other files."""
    source = Path(tokenizer_from or path)
    config = without_old_limits(config, config["max_position_embeddings"])
    for name, token_id in special_ids(source).items():  # if the config names none
        if config.get(name) is None:
            config[name] = token_id
    with write_folder(path, replaces=OURS) as folder:
        write_json(folder / "config.json", config)
        checkpoint.write_tensors(folder, tensors)
        for name in TOKENIZER_FILES:
            if not (source / name).is_file():
                continue
            shutil.copyfile(source / name, folder / name)
            if name in EDITED:
                before = read_json(folder / name)
                if (after := edited(name, before, config)) != before:
                    write_json(folder / name, after)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def edited(name: str, content: dict, config: dict) -> dict:
    """One of the EDITED files as it belongs beside this config.json."""
    window = config["max_position_embeddings"]
    if name == "tokenizer.json":
        cuts = (content.get("truncation") or {}).get("max_length", window) < window
        return content | {"truncation": None} if cuts else content
    out = without_old_limits(content, window)
    if name == "generation_config.json":  # transformers asks only this file if it exists
        ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id")}
        return out | {k: v for k, v in ids.items() if v is not None and out.get(k) is None}
    if "auto_map" in content or content.get("tokenizer_class") == "TokenizersBackend":
        out["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 and 5 know it
    if isinstance(out.get("extra_special_tokens"), list):  # transformers 4 takes a dict there
        out["additional_special_tokens"] = out.pop("extra_special_tokens")
    return out


def without_old_limits(settings: dict, window: int) -> dict:
    """The settings with no length below the window, and no link to code that is not copied."""
    out = {k: v for k, v in settings.items() if k not in ("max_length", "auto_map")}
    short = [k for k in WINDOWS if isinstance(out.get(k), int | float) and out[k] < window]
    return out | dict.fromkeys(short, window)


def special_ids(source: Path) -> dict[str, int | None]:
    """Ids of the tokens that tokenizer_config.json names as begin and end; None where it names
    none. Nothing for a folder without these files."""
    files = (source / "tokenizer_config.json", source / "tokenizer.json")
    if not all(file.is_file() for file in files):
        return {}
    settings, tokenizer = (read_json(file) for file in files)
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}

    def id_of(token) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        return added.get(content) if isinstance(content, str) else None

    return {f"{which}_token_id": id_of(settings.get(f"{which}_token")) for which in ("bos", "eos")}
