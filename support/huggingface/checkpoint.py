"""The weights of Hugging Face folders: safetensors, single or sharded.

Tensors are streamed: at any time one source tensor is held beside the model that is being filled.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.huggingface.config import check_no_pointer, not_a_model, read_json
from support.system.bad_input import BadInput

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them; others are quantised

Found = dict[str, tuple[Path, str]]  # our name of a tensor -> its file and its name there

# ---- finding -----------------------------------------------------------------------------------


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, in the order in which transformers reads them; empty if
    there are none. A single file is preferred to an index."""
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if not (path / INDEX).is_file():
        return []
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{path / INDEX} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or file.startswith("/") or ".." in PurePosixPath(file).parts:
            raise BadInput(f"{path / INDEX} points outside the folder: {file!r}")
    return [path / file for file in sorted(set(weight_map.values()))]


def find_tensors(path: Path, tied: bool) -> Found:
    """The tensors of a folder under the names of our Llama. If two files hold a tensor, the last
    one counts. RoPE frequencies, which older exports carry, are left out. tied: the head is the
    embedding; the folder may hold either of them or both."""
    files = weight_files(path)
    if not files:
        raise not_a_model(path, f"{SINGLE} and no {INDEX}")
    found = {}
    for file in files:
        if not file.is_file():
            raise BadInput(f"{path / INDEX} names {file.name}, which is not in the folder")
        with open_safetensors(file) as opened:
            keys = opened.keys()
            for key in keys:
                if key.endswith("rotary_emb.inv_freq"):
                    continue
                if (kind := opened.get_slice(key).get_dtype()) not in FLOATS:
                    raise BadInput(
                        f"{file}: tensor {key} holds {kind}: a quantised model, which is not read;"
                        " take the folder of the model it was made from"
                    )
                found[our_name(key)] = (file, key)
    if tied and (head := found.pop(HEAD, None)):
        found.setdefault(EMBEDDING, head)
    return found


def our_name(name: str) -> str:
    """A base model is saved without the "model." in front.

    >>> our_name("layers.0.mlp.up_proj.weight"), our_name("lm_head.weight")
    ('model.layers.0.mlp.up_proj.weight', 'lm_head.weight')
    """
    bare = name.startswith(("embed_tokens.", "layers.", "norm."))
    return f"model.{name}" if bare else name


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator:
    """Raises BadInput, naming the file, if the library finds it damaged."""
    check_no_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise BadInput(f"{path} is damaged or no safetensors file: {error}") from error


# ---- reading -----------------------------------------------------------------------------------


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
    elif hasattr(value, "__tensor_flatten__"):  # a subclass such as 8-bit states: its parts
        for attribute in value.__tensor_flatten__()[0]:
            yield from not_finite(getattr(value, attribute), name)
    elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
        # NaN shows in both ends. isfinite would make a second tensor and take 20 times as long
        low, high = torch.aminmax(value.float() if value.element_size() == 1 else value)
        if not (low.isfinite() and high.isfinite()):
            yield name


def iter_tensors(found: Found) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) one by one, file by file. BadInput for one that is not finite."""
    for path in sorted({path for path, _ in found.values()}):
        with open_safetensors(path) as file:
            for name in sorted(n for n, (p, _) in found.items() if p == path):
                _, key = found[name]
                tensor = file.get_tensor(key)
                if any(not_finite(tensor, key)):
                    raise BadInput(
                        f"{path}: tensor {key} holds NaN or infinity: a failed training?"
                    )
                yield name, tensor


def read_tensor(found: Found, name: str) -> torch.Tensor:
    return dict(iter_tensors({name: found[name]}))[name]


def has_own_head(path: Path) -> bool:
    """Does the folder hold a head that is not its embedding? Then transformers leaves them untied,
    whatever config.json says."""
    files = weight_files(path)
    if not files or not all(file.is_file() for file in files):  # --plan downloads config.json only
        return False
    found = find_tensors(path, tied=False)
    if HEAD not in found or EMBEDDING not in found:
        return False
    head, embedding = (read_tensor(found, name) for name in (HEAD, EMBEDDING))
    return head.shape != embedding.shape or not bool((head == embedding).all())


# ---- writing -----------------------------------------------------------------------------------


def write_tensors(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """One file up to SHARD_BYTES, else shards and an index; holds one shard at a time."""
    names: list[list[str]] = []  # of the tensors in each shard
    shard: dict[str, torch.Tensor] = {}
    total = 0

    def finish_shard() -> None:
        write_shard(folder / f"shard-{len(names)}", shard)
        names.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in (tensor, *shard.values())) > SHARD_BYTES:
            finish_shard()
        shard[name] = tensor.detach().to("cpu").contiguous()
        total += tensor.nbytes
    finish_shard()
    if len(names) == 1:
        (folder / "shard-0").rename(folder / SINGLE)
        return
    weight_map = {}
    for i, in_shard in enumerate(names):
        file = f"model-{i + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(in_shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_shard(file: Path, shard: dict[str, torch.Tensor]) -> None:
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(shard, file, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{file} could not be written: {error}") from error
    # subtle: safetensors replaces our file by its private temporary file (mode 0600)
    file.chmod(mode)
