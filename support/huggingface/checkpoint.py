"""Hugging Face folders: safetensors (single or sharded), tokenizer files.

Tensors are streamed: at any time one source tensor is held beside the model that is being filled.
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.huggingface.config import read_json
from support.system.bad_input import BadInput

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "needle.json",
)

# ---- safetensors -------------------------------------------------------------------------------


def tensor_files(path: Path) -> dict[str, Path]:
    """tensor name -> file that holds it."""
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadInput(f"{path / INDEX} has no weight_map")
        for file in set(weight_map.values()):
            if not isinstance(file, str) or Path(file).name != file:
                raise BadInput(f"{path / INDEX} points outside the folder: {file!r}")
            if not (path / file).is_file():
                raise BadInput(f"{path / INDEX} names {file}, which is not in the folder")
        return {name: path / file for name, file in weight_map.items()}
    if (path / SINGLE).is_file():
        with open_safetensors(path / SINGLE) as file:
            return dict.fromkeys(file.keys(), path / SINGLE)
    if list(path.glob("pytorch_model*.bin")):
        raise BadInput(
            f"{path} holds pytorch_model.bin; only safetensors are read. Convert it:"
            " AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)"
        )
    raise BadInput(f"model folder {path} holds no {SINGLE} and no {INDEX}")


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise BadInput(f"{path} is damaged or no safetensors file: {error}") from error


def not_finite(value, name: str = "") -> Iterator[str]:
    """The names of the tensors in `value` (a tensor, or dicts and lists of them) that hold a NaN or
    an infinity.

    >>> list(not_finite({"a": torch.ones(2), "b": [torch.tensor([1.0, torch.nan])]}))
    ['b.0']
    """
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from not_finite(inner, f"{name}.{key}" if name else str(key))
    elif hasattr(value, "__tensor_flatten__"):  # a subclass, say 8-bit states: what it is made of
        for attribute in value.__tensor_flatten__()[0]:
            yield from not_finite(getattr(value, attribute), name)
    elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
        # NaN goes through both; unlike isfinite, no second tensor, and 20 times faster on a CPU
        low, high = torch.aminmax(value.float() if value.element_size() == 1 else value)
        if not (low.isfinite() and high.isfinite()):
            yield name


def finite(file, name: str, path: Path) -> torch.Tensor:
    """A tensor of an open safetensors file."""
    tensor = file.get_tensor(name)
    if any(not_finite(tensor, name)):
        raise BadInput(f"{path}: tensor {name} holds NaN or infinity: a failed training?")
    return tensor


def iter_tensors(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) one by one, file by file. ValueError for one that is not finite."""
    files = tensor_files(Path(path))
    for file_path in sorted(set(files.values())):
        with open_safetensors(file_path) as file:
            inside = set(file.keys())
            for name in sorted(n for n, f in files.items() if f == file_path):
                if name not in inside:
                    raise BadInput(f"{file_path} lacks tensor {name}, which the index promises")
                yield name, finite(file, name, file_path)


def iter_pairs(
    first: Path, second: Path
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """(name, (tensor of first, tensor of second)) for two folders with the same tensors."""
    files = tensor_files(first)
    for name, b in iter_tensors(second):
        if name not in files:
            raise BadInput(f"{first} lacks tensor {name}, which {second} has")
        with open_safetensors(files[name]) as file:
            a = finite(file, name, files[name])
        if a.shape != b.shape:
            raise BadInput(f"{name}: {tuple(a.shape)} in {first}, {tuple(b.shape)} in {second}")
        yield name, (a, b)


def read_tensors(
    path: str | Path,
    shapes: dict[str, torch.Size],
    dtype: torch.dtype,
    device: torch.device,
    tied: bool,
) -> dict[str, torch.Tensor]:
    """All tensors of `shapes`, cast and moved one by one, after a check of all names."""
    path = Path(path)
    files = tensor_files(path)
    missing = sorted(set(shapes) - set(files))
    # Older exports carry the angles, tied ones sometimes a copy of the head: both derived here.
    ignored = {
        n for n in files if n.endswith("rotary_emb.inv_freq") or (tied and n == "lm_head.weight")
    }
    extra = sorted(set(files) - set(shapes) - ignored)
    if missing or extra:
        raise BadInput(
            f"{path}: tensors do not fit config.json; missing {missing[:5] or 'none'},"
            f" extra {extra[:5] or 'none'}"
        )
    state = {}
    for name, tensor in iter_tensors(path):
        if name in ignored:
            continue
        if tensor.shape != shapes[name]:
            raise BadInput(
                f"{path}: tensor {name} has shape {tuple(tensor.shape)},"
                f" config.json says {tuple(shapes[name])}"
            )
        # subtle: get_tensor may be a view of the mapped file; a copy lets go of the mapping
        state[name] = tensor.to(device=device, dtype=dtype, copy=True)
    return state


def write_tensors(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """One file up to SHARD_BYTES, else shards and an index; holds one shard at a time."""
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total = used = 0

    def flush() -> None:
        file = folder / f"shard-{len(shards)}"
        file.touch()
        mode = file.stat().st_mode
        save_file(shard, file, metadata={"format": "pt"})
        # subtle: safetensors leaves its private temporary file (mode 0600) in place of ours
        file.chmod(mode)
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and used + size > SHARD_BYTES:
            flush()
            used = 0
        shard[name] = tensor.detach().to("cpu").contiguous()
        used, total = used + size, total + size
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)
