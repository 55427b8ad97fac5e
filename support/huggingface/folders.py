"""A model folder of Hugging Face's, read and written: what model.py takes from here, in one
place."""

import dataclasses
import json
from pathlib import Path

import torch
from torch import nn

from support.huggingface import checkpoint as checkpoint_files
from support.huggingface.config import config_to_json, read_config
from support.huggingface.tokenizer import load_tokenizer
from support.system import whole_files as atomic

__all__ = ["fill", "load_tokenizer", "read_config", "save"]


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
