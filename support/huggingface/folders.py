"""A model folder of Hugging Face's, read and written: what model.py takes from here, in one
place."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from support.huggingface import checkpoint as checkpoint_files
from support.huggingface.config import config_to_json, read_config
from support.huggingface.tokenizer import load_tokenizer
from support.system import whole_files as atomic
from support.system.bad_input import BadInput

__all__ = ["fill", "load_tokenizer", "merge", "read_config", "save"]


def fill(
    model: nn.Module, path: str | Path, dtype: torch.dtype | None, device: torch.device
) -> nn.Module:
    """A Llama on the meta device -> the same with the folder's weights; see load_pretrained."""
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    tied = model.config.tie_word_embeddings
    state = checkpoint_files.read_tensors(path, shapes, dtype, device, tied)
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    return model


def save(model: nn.Module, path: str | Path, tokenizer_from: str | Path | None) -> None:
    """See save_pretrained."""
    config = config_to_json(dataclasses.asdict(model.config), model.dtype)
    with atomic.write_folder(path) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        checkpoint_files.write_tensors(folder, model.named_parameters())
        if tokenizer_from is not None:
            checkpoint_files.copy_tokenizer(tokenizer_from, folder)


def merge(
    original_dir: str | Path, tuned_dir: str | Path, out_dir: str | Path, average: Callable
) -> None:
    """See recipe.merge; average(original, tuned) gives one tensor of the result."""
    original_dir, tuned_dir = Path(original_dir), Path(tuned_dir)
    original, tuned = (read_config(d) for d in (original_dir, tuned_dir))
    for config in (original, tuned):
        config["model_type"] = config["raw"]["model_type"]
    for field in sorted(set(original) - {"raw", "rope_theta", "max_position_embeddings"}):
        if original[field] != tuned[field]:
            raise BadInput(f"cannot merge: {field} is {original[field]} and {tuned[field]}")
    pairs = checkpoint_files.iter_pairs(original_dir, tuned_dir)
    with atomic.write_folder(out_dir) as folder:
        (folder / "config.json").write_bytes((tuned_dir / "config.json").read_bytes())
        checkpoint_files.write_tensors(folder, ((name, average(*pair)) for name, pair in pairs))
        checkpoint_files.copy_tokenizer(tuned_dir, folder)
