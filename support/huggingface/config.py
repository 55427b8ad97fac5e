"""config.json of a Hugging Face folder, read with checks and written for every reader."""

import json
from pathlib import Path

import torch

from support.system.bad_input import BadInput, not_utf8

# What transformers' code fixes for each family (qkv_bias, qk_norm), and its defaults for fields
# that config.json leaves out. Every other field is read.
FAMILIES = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"qkv_bias": True, "num_key_value_heads": 32},
    "qwen3": {"qk_norm": True, "num_key_value_heads": 32, "head_dim": 128},
}
# Fields that must have this value if they are given: nothing else is implemented.
FIXED = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "is_causal": True}
FIXED |= {"attention_bias": False, "mlp_bias": False}
# Fields that appear only in folders that do not hold the plain weights of one model.
UNKNOWN = ("quantization_config", "compression_config", "transformers_weights", "per_layer_config")
L0 = "original_max_position_embeddings"  # of RoPE: the window before it was scaled
ROPE_FIELDS = {  # RoPE type -> the fields of its formula that must be given
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", L0),
    "yarn": ("factor", L0),
}
YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
CONVERT = "Convert it: AutoModelForCausalLM.from_pretrained(DIR{}).save_pretrained(DIR)"
# Formats that are not supported, by the name of a file: what the format is, and what to do.
OTHER_FORMATS = {
    "run.json": "a run whose result is not complete; to go on: python train.py --resume --out DIR",
    "adapter_config.json": "an adapter of PEFT, which only changes another model: merge it into"
    " that model (merge_and_unload) and save the result",
    "pytorch_model*.bin": "only safetensors are read. " + CONVERT.format(""),
    "*.gguf": "GGUF is not read. " + CONVERT.format(", gguf_file=NAME"),
    "consolidated*": "the format of the model's makers is not read; the same model is published"
    " as a Hugging Face folder, too",
    "*.safetensors": "a model folder has a config.json, and its weights in model.safetensors, or in"
    " files that model.safetensors.index.json names",
}
NUMBER, LARGEST = (int, float), 1e15

# ---- reading -----------------------------------------------------------------------------------


def parse_json(data: bytes, where: Path | str):
    """The value of JSON in UTF-8. BadInput names `where` (a file, a line of one) it is from."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is not valid JSON: {error}") from error


def read_json(path: Path) -> dict:
    """The JSON object of a file. BadInput names the file and what it holds instead."""
    check_no_pointer(path)
    value = parse_json(path.read_bytes(), path)
    if not isinstance(value, dict):
        raise BadInput(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def check_no_pointer(path: Path) -> None:
    """BadInput for the few lines of text that git leaves in place of a large file."""
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise BadInput(f"{path} is a git-lfs pointer, not the file: run `git lfs pull` there")


def not_a_model(path: Path, lacks: str) -> BadInput:
    """The error for a folder without the file `lacks`: says what the folder is instead."""
    for pattern, meaning in OTHER_FORMATS.items():
        if found := sorted(path.glob(pattern)):
            return BadInput(f"model folder {path} holds no {lacks}, but {found[0].name}: {meaning}")
    return BadInput(f"model folder {path} holds no {lacks}")


def positive(raw: dict, name: str, default=None, kind: type | tuple = int) -> float:
    """A field that must be a positive number of a plausible size: a config.json of a few bytes must
    not make us build 10^9 layers."""
    value = raw.get(name, default)
    largest = {"num_hidden_layers": 1000, "max_position_embeddings": 2**31}.get(name, 2**24)
    limit, noun = (largest, "integer") if kind is int else (LARGEST, "number")
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value <= limit:
        says = f"must be a positive {noun} up to {limit:,}, found {repr(value)[:50]}"
        raise BadInput(f"config.json: {name} {says}")
    return value


def flag(raw: dict, name: str) -> bool:
    """A field that is true or false; false where it is not given."""
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise BadInput(f"config.json: {name} must be true or false, found {value!r}")
    return value


def read_config(path: str | Path) -> dict:
    """config.json -> the fields of LlamaConfig. BadInput names what cannot be honoured."""
    path = Path(path)
    if not path.is_dir():
        kind = "is a file" if path.is_file() else "does not exist"
        raise BadInput(f"model folder {path} {kind} (a folder with a config.json is needed)")
    if not (path / "config.json").is_file():
        raise not_a_model(path, "config.json")
    if (path / "adapter_config.json").is_file():
        raise not_a_model(path, "model alone")
    return fields_of(read_json(path / "config.json"))


def fields_of(raw: dict) -> dict:
    """The content of config.json -> the fields of LlamaConfig."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        families = ", ".join(FAMILIES)
        raise BadInput(f"config.json: model_type {family!r} is not supported ({families} are)")
    for name, expected in FIXED.items():
        if raw.get(name) not in (None, expected):
            only = f"(only {expected!r})"
            raise BadInput(f"config.json: {name} {raw[name]!r} is not supported {only}")
    for name in UNKNOWN:
        if raw.get(name):
            raise BadInput(f"config.json: {name} {raw[name]!r} is not supported")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    theta, scaling = read_rope(raw)
    return {
        **{name: positive(raw, name) for name in (*sizes, "max_position_embeddings")},
        **read_heads(raw, FAMILIES[family]),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rms_norm_eps": float(positive(raw, "rms_norm_eps", 1e-6, NUMBER)),
        "tie_word_embeddings": flag(raw, "tie_word_embeddings"),
        "qkv_bias": "qkv_bias" in FAMILIES[family],
        "qk_norm": "qk_norm" in FAMILIES[family],
        "sliding_window": read_sliding_window(raw, family),
        "raw": raw,
    }


def read_window(path: str | Path) -> int | None:
    """The window of a model folder in tokens; None where no config.json says (a tokenizer only)."""
    config = Path(path) / "config.json"
    window = read_json(config).get("max_position_embeddings") if config.is_file() else None
    return window if isinstance(window, int) else None


def read_rope(raw: dict) -> tuple[float, dict | None]:
    """RoPE's theta and scaling (None: default), from rope_theta + rope_scaling or from
    rope_parameters (transformers 5). Of a file with both, transformers takes rope_scaling alone."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise BadInput(f"config.json: RoPE's parameters must be an object, found {given!r}")
    rope = {"rope_theta": raw.get("rope_theta", 10_000.0)} | given
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        types = ", ".join(ROPE_FIELDS)
        raise BadInput(f"config.json: rope type {kind!r} is not supported ({types} are)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise BadInput("config.json: RoPE with a partial_rotary_factor is not supported")
    if layer_types := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise BadInput(f"config.json: RoPE of its own for each of {layer_types} is not supported")
    theta = float(positive(rope, "rope_theta", kind=NUMBER))
    if theta <= 1:
        raise BadInput(f"config.json: rope_theta must be above 1, found {theta}")
    if kind == "default":
        return theta, None
    # config.json's own value goes before RoPE's
    rope[L0] = raw.get(L0, rope.get(L0, raw.get("max_position_embeddings")))
    if kind == "yarn" and rope.get("factor", 0) is None:  # null, as for transformers
        rope["factor"] = positive(raw, "max_position_embeddings") / positive(rope, L0, kind=NUMBER)
    fields = {name: positive(rope, name, kind=NUMBER) for name in ROPE_FIELDS[kind]}
    if kind == "llama3" and fields["high_freq_factor"] <= fields["low_freq_factor"]:
        raise BadInput("config.json: high_freq_factor must be above low_freq_factor")
    return theta, {"rope_type": kind, **fields} | (yarn_options(rope) if kind == "yarn" else {})


def yarn_options(rope: dict) -> dict:
    """The fields of yarn that are given and need not be; yarn.py has the defaults of the rest."""
    given = [name for name in YARN_OPTIONS if rope.get(name) is not None]
    options = {name: positive(rope, name, kind=NUMBER) for name in given}
    if options.get("beta_fast", 32) < options.get("beta_slow", 1):
        raise BadInput("config.json: beta_fast of yarn must not be below beta_slow")
    return options | ({"truncate": flag(rope, "truncate")} if "truncate" in rope else {})


def read_heads(raw: dict, defaults: dict) -> dict:
    """Numbers of heads and the width of one. defaults: the family's, for fields not given."""
    heads, width = positive(raw, "num_attention_heads"), positive(raw, "hidden_size")
    # null means the derived value, a missing field means the family's default
    given = {name: value for name, value in (defaults | raw).items() if value is not None}
    kv_heads = positive(given, "num_key_value_heads", heads)
    head_dim = positive(given, "head_dim", width // heads)
    positive({"heads * head_dim": heads * head_dim}, "heads * head_dim")
    if heads % kv_heads:
        raise BadInput(
            f"config.json: num_attention_heads {heads} is not a multiple of"
            f" num_key_value_heads {kv_heads}"
        )
    if head_dim % 2 or ("head_dim" not in given and width % heads):
        raise BadInput(
            f"config.json: head_dim must be even, found {head_dim}, and hidden_size {width} a"
            f" multiple of num_attention_heads {heads} where head_dim is not given"
        )
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}


def read_sliding_window(raw: dict, family: str) -> int | None:
    """Longest input that sees itself whole, None for no limit. (Longer inputs are refused.)"""
    if family == "llama" or (family.startswith("qwen") and not flag(raw, "use_sliding_window")):
        return None
    window = raw.get("sliding_window", 4096)  # the default of these families
    return None if window is None else positive({"sliding_window": window}, "sliding_window")


def check_extendable(config, target_len: int, rope: str, rope_base: float | None) -> None:
    """Raises BadInput if the model could not see a longer window, or the new theta cannot be
    computed."""
    if config.sliding_window is not None and config.sliding_window < target_len:
        raise BadInput(
            f"config.json: sliding_window {config.sliding_window} is shorter than --target_len"
            f" {target_len}: attention would never see the window this run is to reach"
        )
    if config.rope_scaling is not None and (rope == "yarn" or rope_base is None):
        raise BadInput(
            f"this checkpoint scales its RoPE already ({config.rope_scaling['rope_type']}), which"
            " --rope yarn would replace and the paper's formula for theta leaves out: give"
            f" --rope_base (theta now is {config.rope_theta:g}) with --rope ntk; the scaling stays"
        )


# ---- writing -----------------------------------------------------------------------------------


def yarn_scaling(old_len: int, new_len: int) -> dict:
    """RoPE's scaling that takes a window of old_len tokens to new_len with yarn.

    >>> yarn_scaling(8192, 32768)
    {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 8192}
    """
    return {"rope_type": "yarn", "factor": new_len / old_len, L0: old_len}


def config_to_json(fields: dict, dtype: torch.dtype) -> dict:
    """The inverse of fields_of: every field of the file that was read, ours on top, RoPE in both
    spellings. BadInput for a model that no supported family can express.

    subtle: readers older than transformers 5 know only rope_theta and fall back to 10,000 without
    it; newer ones write rope_parameters. A file with only one of the two is misread by some
    reader."""
    raw = fields["raw"]
    family = raw.get("model_type") or family_of(fields)
    out = {"architectures": [f"{family.capitalize()}ForCausalLM"], "model_type": family}
    if fields["sliding_window"] is not None:  # layers below max_window_layers see everything
        out |= {"use_sliding_window": True, "max_window_layers": 0}
        out["sliding_window"] = fields["sliding_window"]
    out |= {"hidden_act": "silu"} | raw
    not_in_json = ("raw", "qkv_bias", "qk_norm", "sliding_window")  # known from the family or raw
    out |= {name: value for name, value in fields.items() if name not in not_in_json}
    out.pop(L0, None)  # of the file that was read; the scaling has it
    out["rope_parameters"] = {
        **(fields["rope_scaling"] or {"rope_type": "default"}),
        "rope_theta": fields["rope_theta"],
    }
    out["dtype"] = out["torch_dtype"] = str(dtype).removeprefix("torch.")
    again = fields_of(out)
    for name in fields.keys() - {"raw"}:
        if again[name] != fields[name]:
            raise BadInput(
                f"not saved: {name} {fields[name]!r} would be read back as {again[name]!r} from a"
                f" config.json of model_type {family}"
            )
    return out


def family_of(fields: dict) -> str:
    """The first model_type that can express a LlamaConfig which was not read from a folder."""
    for family, fixed in FAMILIES.items():
        windows = family != "llama" or fields["sliding_window"] is None
        if windows and all(fields[name] == (name in fixed) for name in ("qkv_bias", "qk_norm")):
            return family
    raise BadInput("not saved: no supported model_type has both qkv_bias and qk_norm")
