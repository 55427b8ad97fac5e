"""config.json of a Hugging Face folder, read with checks and written for every reader."""

import json
from pathlib import Path

import torch

from support.system.bad_input import BadInput


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


# What each supported family fixes in its code rather than in its config.json. Every other field
# is read.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4096},  # the value where config.json is silent
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


LIMITS = {"num_hidden_layers": 1000, "max_position_embeddings": 2**31}  # others 2**24: see below


def positive(raw: dict, name: str, kind: type | tuple = int) -> float:
    """A field that must be a positive number, and one that a model can have: a config.json of a few
    bytes must not make us lay out 10^9 layers."""
    value, limit = raw.get(name), LIMITS.get(name, 2**24) if kind is int else 1e15
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value <= limit:
        noun = "integer" if kind is int else "number"
        shown = repr(value)[:50]
        raise BadInput(
            f"config.json: {name} must be a positive {noun} up to {limit:,}, found {shown}"
        )
    return value


def read_config(path: str | Path) -> dict:
    """config.json -> the fields of LlamaConfig. ValueError names what cannot be honoured."""
    path = Path(path)
    if not path.is_dir():
        raise BadInput(
            f"model folder {path} does not exist (--model wants a folder with config.json)"
        )
    if not (path / "config.json").is_file():
        raise BadInput(f"model folder {path} holds no config.json")
    raw = read_json(path / "config.json")
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise BadInput(
            f"config.json: model_type {family!r} is not supported ({', '.join(FAMILIES)} are)"
        )
    for name, expected in {"hidden_act": "silu", "partial_rotary_factor": 1.0}.items():
        if raw.get(name, expected) != expected:
            raise BadInput(
                f"config.json: {name} {raw[name]!r} is not supported (only {expected!r})"
            )
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        if raw.get(name):
            raise BadInput(f"config.json: {name} {raw[name]!r} is not supported")
    theta, scaling = read_rope(raw)
    return {
        "vocab_size": positive(raw, "vocab_size"),
        "hidden_size": positive(raw, "hidden_size"),
        "intermediate_size": positive(raw, "intermediate_size"),
        "num_hidden_layers": positive(raw, "num_hidden_layers"),
        **read_heads(raw),
        "max_position_embeddings": positive(raw, "max_position_embeddings"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rms_norm_eps": float(positive({"rms_norm_eps": 1e-6} | raw, "rms_norm_eps", (int, float))),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "qkv_bias": bool(FAMILIES[family].get("qkv_bias")),
        "qk_norm": bool(FAMILIES[family].get("qk_norm")),
        "sliding_window": read_sliding_window(raw, family),
        "raw": raw,
    }


def read_window(path: str | Path) -> int | None:
    """The window of a model folder in tokens; None where no config.json says (a tokenizer only)."""
    config = Path(path) / "config.json"
    window = read_json(config).get("max_position_embeddings") if config.is_file() else None
    return window if isinstance(window, int) else None


def read_rope(raw: dict) -> tuple[float, dict | None]:
    """RoPE base and scaling (None: default), from either spelling: rope_theta + rope_scaling, or
    rope_parameters (transformers 5)."""
    rope = {"rope_theta": 10_000.0} | {k: raw[k] for k in ["rope_theta"] if raw.get(k) is not None}
    for spelling in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(spelling) or {}, dict):
            raise BadInput(f"config.json: {spelling} must be an object, found {raw[spelling]!r}")
        rope |= raw.get(spelling) or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise BadInput(
            f"config.json: rope type {kind!r} is not supported ({', '.join(ROPE_FIELDS)} are)"
        )
    theta = float(positive(rope, "rope_theta", (int, float)))
    if theta <= 1:
        raise BadInput(f"config.json: rope_theta must be above 1, found {theta}")
    if kind == "default":
        return theta, None
    fields = {name: positive(rope, name, (int, float)) for name in ROPE_FIELDS[kind]}
    return theta, {"rope_type": kind, **fields}


def read_heads(raw: dict) -> dict:
    heads, width = positive(raw, "num_attention_heads"), positive(raw, "hidden_size")
    given = {k: v for k, v in raw.items() if v is not None}
    kv_heads = positive({"num_key_value_heads": heads} | given, "num_key_value_heads")
    if heads % kv_heads:
        raise BadInput(
            f"config.json: num_attention_heads {heads} is no multiple of"
            f" num_key_value_heads {kv_heads}"
        )
    head_dim = positive({"head_dim": width // heads} | given, "head_dim")
    if heads * head_dim > 2**24:
        raise BadInput(f"config.json: {heads} heads of {head_dim} are too wide to be meant")
    if head_dim % 2 or ("head_dim" not in given and width % heads):
        raise BadInput(
            f"config.json: head_dim must be even and hidden_size {width} a multiple of"
            f" num_attention_heads {heads} where it is not given, found {head_dim}"
        )
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


def read_sliding_window(raw: dict, family: str) -> int | None:
    """Longest input that sees itself whole, None for no limit. (Longer inputs are refused.)"""
    if family.startswith("qwen") and not raw.get("use_sliding_window"):
        return None
    default = FAMILIES[family].get("sliding_window")
    window = raw.get("sliding_window", default) if family != "llama" else None
    return None if window is None else positive({"sliding_window": window}, "sliding_window")


def config_to_json(fields: dict, dtype: torch.dtype) -> dict:
    """The inverse: every field of the file that was read, ours on top, RoPE in both spellings.

    subtle: readers older than transformers 5 know only rope_theta and fall back to 10,000 without
    it; newer ones write rope_parameters. A file that holds one of them is read wrongly by
    somebody."""
    ours = {
        "raw",
        "qkv_bias",
        "qk_norm",
        "sliding_window",
        "rope_scaling",
    }  # not HF's, or raw has it
    out = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    out |= fields["raw"] | {name: value for name, value in fields.items() if name not in ours}
    scaling = fields["rope_scaling"]
    out["rope_scaling"] = scaling
    out["rope_parameters"] = (scaling or {"rope_type": "default"}) | {
        "rope_theta": out["rope_theta"]
    }
    out["dtype"] = out["torch_dtype"] = str(dtype).removeprefix("torch.")
    return out


def check_extendable(config, target_len: int, rope_base: float | None) -> None:
    """ValueError where a longer window would not be seen, or its RoPE base cannot be computed."""
    if config.sliding_window is not None and config.sliding_window < target_len:
        raise BadInput(
            f"config.json: sliding_window {config.sliding_window} is shorter than --target_len"
            f" {target_len}: attention would never see the window this run is to reach"
        )
    if rope_base is None and config.rope_scaling is not None:
        raise BadInput(
            f"this checkpoint scales its RoPE already ({config.rope_scaling['rope_type']}), and the"
            " paper's formula for the base assumes that it does not: give --rope_base; the"
            f" scaling stays, its base now is {config.rope_theta:g}"
        )
