"""config.json of a Hugging Face folder, read with checks and written for every reader."""

import json
from pathlib import Path

import torch


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
