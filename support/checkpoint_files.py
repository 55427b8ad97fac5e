"""Hugging Face folders: config.json, safetensors (single or sharded), tokenizer files, atomic
writing.

Tensors are streamed: at any time one source tensor is held beside the model that is being filled.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

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

# ---- config.json -------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def read_config(path: str | Path) -> dict:
    """config.json -> the fields of LlamaConfig. ValueError names what is missing or cannot be
    honoured."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"model folder {path} does not exist (--model wants a folder with config.json)"
        )
    if not (path / "config.json").is_file():
        raise ValueError(f"model folder {path} holds no config.json")
    raw = read_json(path / "config.json")

    def need(name: str) -> int:
        value = raw.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config.json: {name} must be a positive integer, found {value!r}")
        return value

    if raw.get("model_type") != "llama":
        raise ValueError(
            f"config.json: model_type {raw.get('model_type')!r} is not supported (only 'llama')"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"config.json: hidden_act {raw['hidden_act']!r} is not supported (only 'silu')"
        )
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        if raw.get(name):
            raise ValueError(f"config.json: {name} {raw[name]!r} is not supported")
    # Two spellings of RoPE: rope_theta + rope_scaling, and (transformers 5) rope_parameters.
    rope = {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_scaling") or {})}
    rope |= raw.get("rope_parameters") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type != "default":
        raise ValueError(f"config.json: rope type {rope_type!r} is not supported (only 'default')")
    theta = rope["rope_theta"] if rope["rope_theta"] is not None else 10_000.0
    if not isinstance(theta, (int, float)) or theta <= 1:
        raise ValueError(f"config.json: rope_theta must be a number above 1, found {theta!r}")
    heads, width = need("num_attention_heads"), need("hidden_size")
    kv_heads = need("num_key_value_heads") if raw.get("num_key_value_heads") is not None else heads
    if heads % kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads {heads} is no multiple of"
            f" num_key_value_heads {kv_heads}"
        )
    if raw.get("head_dim") is None and width % heads:
        raise ValueError(
            f"config.json: hidden_size {width} is no multiple of num_attention_heads {heads}"
            " and head_dim is not given"
        )
    head_dim = need("head_dim") if raw.get("head_dim") is not None else width // heads
    if head_dim % 2:
        raise ValueError(f"config.json: head_dim {head_dim} must be even, RoPE turns pairs")
    return {
        "vocab_size": need("vocab_size"),
        "hidden_size": width,
        "intermediate_size": need("intermediate_size"),
        "num_hidden_layers": need("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": need("max_position_embeddings"),
        "rope_theta": float(theta),
        "rms_norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "raw": raw,
    }


def config_to_json(fields: dict, dtype: torch.dtype) -> dict:
    """The inverse: every field of the file that was read, ours on top, RoPE in both spellings.

    subtle: readers older than transformers 5 know only rope_theta and fall back to 10,000 without
    it; newer ones write rope_parameters. A file that holds one of them is read wrongly by
    somebody."""
    out = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    out |= fields["raw"] | {name: value for name, value in fields.items() if name != "raw"}
    out["rope_scaling"] = None
    out["rope_parameters"] = {"rope_type": "default", "rope_theta": fields["rope_theta"]}
    out["dtype"] = out["torch_dtype"] = str(dtype).removeprefix("torch.")
    return out


# ---- safetensors -------------------------------------------------------------------------------


def tensor_files(path: Path) -> dict[str, Path]:
    """tensor name -> file that holds it."""
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{path / INDEX} has no weight_map")
        for file in set(weight_map.values()):
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{path / INDEX} points outside the folder: {file!r}")
            if not (path / file).is_file():
                raise ValueError(f"{path / INDEX} names {file}, which is not in the folder")
        return {name: path / file for name, file in weight_map.items()}
    if (path / SINGLE).is_file():
        with open_safetensors(path / SINGLE) as file:
            return dict.fromkeys(file.keys(), path / SINGLE)
    if list(path.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{path} holds pytorch_model.bin; only safetensors are read. Convert it:"
            " AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)"
        )
    raise ValueError(f"model folder {path} holds no {SINGLE} and no {INDEX}")


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def iter_tensors(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) one by one, file by file."""
    files = tensor_files(Path(path))
    for file_path in sorted(set(files.values())):
        with open_safetensors(file_path) as file:
            inside = set(file.keys())
            for name in sorted(n for n, f in files.items() if f == file_path):
                if name not in inside:
                    raise ValueError(f"{file_path} lacks tensor {name}, which the index promises")
                yield name, file.get_tensor(name)


def iter_pairs(
    first: Path, second: Path
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """(name, (tensor of first, tensor of second)) for two folders with the same tensors."""
    files = tensor_files(first)
    for name, b in iter_tensors(second):
        if name not in files:
            raise ValueError(f"{first} lacks tensor {name}, which {second} has")
        with open_safetensors(files[name]) as file:
            a = file.get_tensor(name)
        if a.shape != b.shape:
            raise ValueError(
                f"tensor {name}: {tuple(a.shape)} in {first}, {tuple(b.shape)} in {second}"
            )
        yield name, (a, b)


def read_tensors(
    path: str | Path,
    shapes: dict[str, torch.Size],
    dtype: torch.dtype,
    device: torch.device,
    tied: bool,
) -> dict[str, torch.Tensor]:
    """All tensors of `shapes`, cast and moved one by one; names and shapes are checked before any
    is read."""
    path = Path(path)
    files = tensor_files(path)
    missing = sorted(set(shapes) - set(files))
    # Older exports carry the angles as tensors, tied ones sometimes a copy of the head: both are
    # derived here.
    ignored = {
        n for n in files if n.endswith("rotary_emb.inv_freq") or (tied and n == "lm_head.weight")
    }
    extra = sorted(set(files) - set(shapes) - ignored)
    if missing or extra:
        raise ValueError(
            f"{path}: tensors do not fit config.json; missing {missing[:5] or 'none'},"
            f" extra {extra[:5] or 'none'}"
        )
    state = {}
    for name, tensor in iter_tensors(path):
        if name in ignored:
            continue
        if tensor.shape != shapes[name]:
            raise ValueError(
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
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
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


# ---- atomic folders ----------------------------------------------------------------------------


@contextlib.contextmanager
def write_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; if the body succeeds, it takes the place of `path`."""
    path = Path(path)
    beside, old = path.with_name(path.name + ".writing"), path.with_name(path.name + ".old")
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if path.exists():
        os.replace(path, old)
    os.replace(beside, path)
    shutil.rmtree(old, ignore_errors=True)
