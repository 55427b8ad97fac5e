"""support/: checkpoint folders, memory while they are moved, models by name, older readers."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_hf_llama
from safetensors.torch import load_file, save_file
from smollm2 import ROOT
from test_train import edit_config, snapshot

import recipe
import train
from model import Llama, LlamaConfig, load_pretrained, load_tokenizer, save_pretrained
from support.data.toy import TINY
from support.huggingface import checkpoint as checkpoint_files
from support.huggingface.hub import local_folder
from support.system.bad_input import BadInput

# ---- memory ------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
import torch
sys.path.insert(0, ".")
import recipe
from model import load_pretrained, save_pretrained
from support.huggingface import checkpoint as checkpoint_files
checkpoint_files.SHARD_BYTES = 12_000_000
task, source, out = sys.argv[1:]
def anonymous():  # MB of memory that is not a mapped file
    line = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e6
model = load_pretrained(source) if task == "save" else None
torch.zeros(1)
before, peak, done = anonymous(), 0.0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
if task == "load":
    model = load_pretrained(source, dtype=torch.bfloat16)
elif task == "save":
    save_pretrained(model, out)
else:
    recipe.merge(source, source, out, 0.5)
done = True
thread.join()
print(peak - before)
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """About 100 MB in fp32, in shards of up to 12 MB."""
    folder = tmp_path_factory.mktemp("sharded")
    model = make_hf_llama(
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=10,
        num_attention_heads=8,
    )
    model.save_pretrained(folder, max_shard_size="12MB")
    size = sum(p.numel() for p in model.parameters()) * 4 / 1e6
    assert 90 < size < 120 and len(list(folder.glob("*.safetensors"))) >= 9
    return folder, size


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("task", ["load", "save", "merge"])
def test_memory_stays_under_the_model_and_one_shard(task, sharded, tmp_path):
    """Loading to bf16 may hold the bf16 model and a shard; saving a shard (the model is there
    already); merging a shard of the result and one tensor of each source. 8 MB for the
    allocator."""
    folder, size = sharded
    command = [sys.executable, "-c", MEASURE, task, str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    allowed = {"load": size / 2 + 12, "save": 2 * 12, "merge": 3 * 12}[task] + 8
    assert float(done.stdout) < allowed < size + 12, (done.stdout, allowed)


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_is_read_and_cast(source, tmp_path):
    make_hf_llama().to(source).save_pretrained(tmp_path)
    for target in (torch.float32, torch.bfloat16):
        model = load_pretrained(tmp_path, dtype=target)
        expected = make_hf_llama().to(source).to(target).state_dict()
        for name, p in model.named_parameters():
            assert p.dtype == target and torch.equal(p, expected[name])


@pytest.mark.parametrize("shard_bytes", [50_000, 10**9])
def test_written_files_follow_the_umask(shard_bytes, toy_dir, tmp_path, monkeypatch):
    """Others in the group may read a model as any other file; safetensors alone writes 0600."""
    monkeypatch.setattr(checkpoint_files, "SHARD_BYTES", shard_bytes)
    model = load_pretrained(toy_dir)
    before = os.umask(0o027)
    try:
        save_pretrained(model, tmp_path / "saved", tokenizer_from=toy_dir)
        recipe.merge(toy_dir, tmp_path / "saved", tmp_path / "merged")
    finally:
        os.umask(before)
    for folder in (tmp_path / "saved", tmp_path / "merged"):
        modes = {p.name: oct(p.stat().st_mode & 0o777) for p in folder.iterdir()}
        assert "tokenizer.json" in modes and set(modes.values()) == {"0o640"}, modes
        assert (checkpoint_files.INDEX in modes) == (shard_bytes == 50_000)
        assert folder.stat().st_mode & 0o777 == 0o750


# ---- both spellings, for readers old and new ---------------------------------------------------

OLD_READER = """
import sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32).eval()
AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.arange(60)[None]).logits, sys.argv[2])
"""
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2"])
def test_an_older_transformers_reads_the_same_model(family, toy_dir, tmp_path, tmp_path_factory):
    """transformers 4.4x, in a folder of its own before everything else on the path."""
    target = tmp_path_factory.getbasetemp() / "transformers4"
    if not target.exists():
        packages = ["transformers==4.46.3", "tokenizers==0.20.3", "huggingface_hub==0.36.0"]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
        subprocess.run([*pip, *packages], check=True)
    rope = {"rope_parameters": LLAMA3} if family == "llama3" else {}
    kind = "llama" if family == "llama3" else family
    hf = make_hf_llama(kind, vocab_size=400, sliding_window=None, **rope)
    hf.save_pretrained(tmp_path / "hf")
    ours = load_pretrained(tmp_path / "hf")
    ours.config = ours.config.with_rope(250_000.0, 1024)
    save_pretrained(ours, tmp_path / "ours", tokenizer_from=toy_dir)
    command = [sys.executable, "-c", OLD_READER, str(tmp_path / "ours"), str(tmp_path / "logits")]
    env = os.environ | {"PYTHONPATH": str(target)}
    subprocess.run(command, check=True, env=env)
    logits = torch.load(tmp_path / "logits", weights_only=True)
    with torch.no_grad():
        assert (logits - ours(torch.arange(60)[None])).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_todays_transformers_reads_the_same_model(family, toy_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rope = {"rope_parameters": LLAMA3} if family == "llama" else {}
    hf = make_hf_llama(family, vocab_size=400, sliding_window=None, **rope)
    hf.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text('{"max_new_tokens": 7}')
    shutil.copy(toy_dir / "tokenizer.json", tmp_path / "hf")
    ours = load_pretrained(tmp_path / "hf")
    ours.config = ours.config.with_rope(250_000.0, 1024)
    save_pretrained(ours, tmp_path / "ours", tokenizer_from=tmp_path / "hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert again.config.model_type == family and again.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("Ada").input_ids
    assert again.config.rope_parameters["rope_theta"] == 250_000.0
    with torch.no_grad():
        ids = torch.arange(60)[None]
        assert (again(ids).logits - ours(ids)).abs().max() < 1e-4


# ---- folders of every kind: transformers' logits, or refused by name ------------------------


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def store(folder, tensors: dict, name="model.safetensors"):
    save_file(tensors, folder / name, metadata={"format": "pt"})


def rename(folder, change):
    """Tensors under other names; None: left out."""
    renamed = ((change(name), tensor) for name, tensor in tensors_of(folder).items())
    store(folder, {name: tensor for name, tensor in renamed if name})


def shards(folder, below="", twice=False, promised=()):
    """Two shards and an index in place of the single file."""
    tensors, weight_map = sorted(tensors_of(folder).items()), {}
    (folder / "model.safetensors").unlink()
    (folder / below).mkdir(parents=True, exist_ok=True)
    for i, part in enumerate((tensors[: 5 if not twice else 9], tensors[5:])):
        file = os.path.join(below, f"model-{i}.safetensors")
        store(folder, {k: t * (1 + i * twice) for k, t in part}, file)
        weight_map |= {k: file for k, _ in part if k not in weight_map}
    weight_map |= dict.fromkeys(promised, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def own_head(folder, factor: float = 2.0):
    tensors = tensors_of(folder)
    store(folder, tensors | {HEAD: tensors[EMBEDDING] * factor})


def cast(folder, dtype: torch.dtype):
    name = "model.layers.0.mlp.up_proj.weight"
    store(folder, tensors_of(folder) | {name: tensors_of(folder)[name].to(dtype)})


def without(folder, *names):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: raw[k] for k in raw.keys() - set(names)}))


def stale_index(folder, keep_shards: bool):
    tensors = tensors_of(folder)
    shards(folder)
    store(folder, {name: 0.5 * tensor for name, tensor in tensors.items()})
    for file in () if keep_shards else folder.glob("model-*"):
        file.unlink()


def angles_stored(folder):
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    store(folder, tensors_of(folder) | angles)


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = {"tie_word_embeddings": True}
LINEAR, DEFAULT = {"type": "linear", "factor": 4.0}, {"rope_type": "default", "rope_theta": 5e4}
LLAMA3_SCALING = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
BARE_LLAMA3 = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
NO_KV = {"num_attention_heads": 8, "num_key_value_heads": 8}
HEAD_32 = {"num_attention_heads": 32, "num_key_value_heads": 32}


def edited(**changes) -> tuple:
    """A row of OPENED that only changes config.json."""
    return "llama", {}, lambda folder: edit_config(folder, **changes)


OPENED = {  # family, its shape, what is done to the folder
    "tied, a head of its own": ("llama", TIED, own_head),
    "tied, a copy of the embedding": ("llama", TIED, lambda f: own_head(f, 1.0)),
    "tied, only the head": (
        "llama",
        TIED,
        lambda f: rename(f, lambda n: HEAD if n == EMBEDDING else n),
    ),
    "tied, an index that promises the head": ("llama", TIED, lambda f: shards(f, promised=[HEAD])),
    "tied, a base model": ("llama", TIED, lambda f: rename(f, lambda n: n.removeprefix("model."))),
    "untied, names of a base model": (
        "llama",
        {},
        lambda f: rename(f, lambda n: n.removeprefix("model.")),
    ),
    "tied or not is not said": ("llama", {}, lambda f: without(f, "tie_word_embeddings")),
    "shards in a sub-folder": ("llama", {}, lambda f: shards(f, below="weights/a")),
    "a tensor in two shards": ("llama", {}, lambda f: shards(f, twice=True)),
    "a stale index and its shards": ("llama", {}, lambda f: stale_index(f, True)),
    "a stale index without its shards": ("llama", {}, lambda f: stale_index(f, False)),
    "stored angles": ("llama", {}, angles_stored),
    "float64": ("llama", {}, lambda f: cast(f, torch.float64)),
    "linear beside default": edited(rope_scaling=LINEAR, rope_parameters=DEFAULT, rope_theta=3e4),
    "llama3 beside default": edited(rope_scaling=LLAMA3, rope_parameters=DEFAULT),
    "default beside yarn": edited(rope_scaling=DEFAULT, rope_parameters={"rope_type": "yarn"}),
    "yarn beside default": edited(rope_scaling=YARN, rope_parameters=DEFAULT, rope_theta=3e4),
    "yarn, two old windows": edited(rope_parameters=YARN, original_max_position_embeddings=32),
    "llama3 for the whole window": edited(rope_parameters=BARE_LLAMA3),
    "llama3, the old window beside it": edited(
        rope_parameters=BARE_LLAMA3, original_max_position_embeddings=32
    ),
    "llama3, two old windows": edited(rope_parameters=LLAMA3, original_max_position_embeddings=32),
    "no theta": ("llama", {}, lambda f: without(f, "rope_parameters", "rope_theta")),
    "theta beside RoPE without one": edited(
        rope_parameters={"rope_type": "default"}, rope_theta=3e4
    ),
    "empty rope_scaling": edited(rope_scaling={}),
    "head_dim null": edited(head_dim=None),
    "llama without kv heads": (
        "llama",
        {"num_key_value_heads": 4},
        lambda f: without(f, "num_key_value_heads"),
    ),
    "mistral without kv heads": ("mistral", NO_KV, lambda f: without(f, "num_key_value_heads")),
    "qwen2 without kv heads": (
        "qwen2",
        HEAD_32 | {"hidden_size": 64},
        lambda f: without(f, "num_key_value_heads"),
    ),
    "qwen3 without head_dim": ("qwen3", {"head_dim": 128}, lambda f: without(f, "head_dim")),
    "qwen2 without a switched off window": (
        "qwen2",
        {},
        lambda f: edit_config(f, use_sliding_window=False, sliding_window=8),
    ),
    "torch_dtype": edited(torch_dtype="float16", dtype=None),
    "a llama with mistral's window": edited(sliding_window=8),
    "mistral without a window": ("mistral", {}, lambda f: edit_config(f, sliding_window=None)),
    "partial_rotary_factor null": edited(partial_rotary_factor=None),
}


@pytest.mark.parametrize("case", OPENED)
def test_a_folder_gives_the_logits_of_transformers(case, tmp_path):
    from transformers import AutoModelForCausalLM

    family, shape, change = OPENED[case]
    make_hf_llama(family, **shape).save_pretrained(tmp_path)
    change(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours, ids = load_pretrained(tmp_path), torch.arange(60)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids) - expected).abs().max() < 1e-5 * expected.abs().max()
        save_pretrained(ours, tmp_path / "again")  # and what we write is the same model
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
        assert (again(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()
        recipe.merge(tmp_path, tmp_path / "again", tmp_path / "merged", 0.25)
        merged = load_pretrained(tmp_path / "merged")
        assert (merged(ids) - expected).abs().max() < 1e-5 * expected.abs().max()


def only(folder, *names):
    """A folder with these files alone; new ones are empty."""
    for file in folder.iterdir():
        if file.name not in names:
            file.unlink()
    for name in names:
        (folder / name).touch()


def pointer(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def write_index(folder, content: dict):
    only(folder, "config.json")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def adapter_beside(folder):
    (folder / "adapter_config.json").write_text("{}")


LAYERS = {"full_attention": DEFAULT, "sliding_attention": DEFAULT}
PTH = ("config.json", "consolidated.00.pth")
REFUSED = {
    "pickle": (
        lambda f: only(f, "config.json", "pytorch_model.bin"),
        "only safetensors are read.*save_pretrained",
    ),
    "GGUF": (lambda f: only(f, "m.gguf"), "m.gguf: GGUF is not read.*gguf_file"),
    "original": (lambda f: only(f, *PTH), "consolidated.00.pth: the format of the model's makers"),
    "adapter": (lambda f: only(f, "adapter_config.json"), "an adapter of PEFT.*merge_and_unload"),
    "adapter in a model's folder": (adapter_beside, "an adapter of PEFT"),
    "other names": (
        lambda f: only(f, "config.json", "model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors: the weights must be in",
    ),
    "a pointer": (lambda f: pointer(f, "model.safetensors"), "git-lfs pointer.*git lfs pull"),
    "config a pointer": (lambda f: pointer(f, "config.json"), "config.json is a git-lfs pointer"),
    "int8": (lambda f: cast(f, torch.int8), "mlp.up_proj.weight holds I8: a quantised model"),
    "fp8": (lambda f: cast(f, torch.float8_e4m3fn), "holds F8_E4M3: a quantised model"),
    "index outside": (
        lambda f: write_index(f, {"weight_map": {"a": "../../etc/passwd"}}),
        "points outside the folder",
    ),
    "index to the root": (
        lambda f: write_index(f, {"weight_map": {"a": "/etc/passwd"}}),
        "points outside the folder",
    ),
    "index without a shard": (
        lambda f: write_index(f, {"weight_map": {"a": "missing.safetensors"}}),
        "missing.safetensors, which is not in the folder",
    ),
    "weight_map a list": (lambda f: write_index(f, {"weight_map": []}), "has no weight_map"),
    "no weight_map": (lambda f: write_index(f, {}), "has no weight_map"),
    "no head": (lambda f: rename(f, lambda n: n if n != HEAD else None), "missing .*lm_head"),
    **{
        f"yarn, {why}": (lambda f, rope=rope: edit_config(f, rope_scaling=YARN | rope), why)
        for rope, why in (
            ({"factor": "4"}, "factor must be a positive number"),
            ({"factor": 0}, "factor must be a positive number"),
            ({"original_max_position_embeddings": None}, "original_max_position_embeddings must"),
            ({"attention_factor": -1.0}, "attention_factor must be a positive number"),
            ({"mscale": []}, "mscale must be a positive number"),
            ({"beta_slow": 40}, "beta_fast of yarn must not be below beta_slow"),
            ({"truncate": None}, "truncate must be true or false"),
        )
    },
    "yarn without a factor": (
        lambda f: edit_config(f, rope_scaling={"type": "yarn"}),
        "factor must be a positive number",
    ),
    "dynamic": (lambda f: edit_config(f, rope_scaling={"type": "dynamic"}), "rope type 'dynamic'"),
    "longrope": (lambda f: edit_config(f, rope_parameters={"rope_type": "longrope"}), "'longrope'"),
    "layer types": (lambda f: edit_config(f, rope_parameters=LAYERS), "full_attention"),
    "half rotated": (
        lambda f: edit_config(f, rope_parameters=DEFAULT | {"partial_rotary_factor": 0.5}),
        "partial_rotary_factor",
    ),
    "half rotated, beside RoPE": (
        lambda f: edit_config(f, partial_rotary_factor=0.5),
        "partial_rotary_factor 0.5",
    ),
    "high below low": (
        lambda f: edit_config(f, rope_parameters=LLAMA3 | {"high_freq_factor": 0.5}),
        "high_freq_factor must be above",
    ),
    "bias": (lambda f: edit_config(f, attention_bias=True), "attention_bias True"),
    "MLP bias": (lambda f: edit_config(f, mlp_bias=True), "mlp_bias True"),
    "gelu": (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act 'gelu'"),
    "both ways": (lambda f: edit_config(f, is_causal=False), "is_causal False"),
    "quantised": (
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}),
        "quantization_config .*gptq",
    ),
    "other file": (
        lambda f: edit_config(f, transformers_weights="a.safetensors"),
        "transformers_weights",
    ),
    "no family": (lambda f: without(f, "model_type"), "model_type None is not supported"),
    "tied by a word": (
        lambda f: edit_config(f, tie_word_embeddings="false"),
        "tie_word_embeddings must be true or false",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_is_refused_with_what_it_is(case, tmp_path):
    make_hf_llama().save_pretrained(tmp_path)
    change, match = REFUSED[case]
    change(tmp_path)
    with pytest.raises(BadInput, match=match):
        load_pretrained(tmp_path)


# ---- what is written -----------------------------------------------------------------------


def read(path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize("how", ["save_pretrained", "merge"])
def test_no_file_of_a_result_speaks_of_the_old_window(how, toy_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    old, long, out = (tmp_path / name for name in ("old", "long", "out"))
    shutil.copytree(toy_dir, old)
    code = {"AutoConfig": "configuration_x.C"}
    edit_config(old, max_length=64, seq_length=64, auto_map=code, bos_token_id=None)
    without(old, "eos_token_id")
    generation = {"max_length": 64, "max_new_tokens": 7}
    (old / "generation_config.json").write_text(json.dumps(generation))
    settings = {
        "model_max_length": 64,
        "tokenizer_class": "TokenizersBackend",
        "auto_map": {"AutoTokenizer": ["t.T", None]},
        "extra_special_tokens": ["<s>"],
    }
    settings = read(old / "tokenizer_config.json") | settings
    (old / "tokenizer_config.json").write_text(json.dumps(settings))
    cut = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
    tokenizer = read(old / "tokenizer.json") | {"truncation": cut}
    (old / "tokenizer.json").write_text(json.dumps(tokenizer))

    model = load_pretrained(old)
    model.config = model.config.with_rope(250_000.0, 1024)
    if how == "merge":  # of a model that another program trained
        save_pretrained(model, long)
        config = read(old / "config.json") | {"max_position_embeddings": 1024}
        for file in old.iterdir():
            shutil.copy(file, long)
        (long / "config.json").write_text(json.dumps(config))
        recipe.merge(old, long, out)
    else:
        save_pretrained(model, out, tokenizer_from=old)
    for file in out.glob("*.json"):
        said = read(file)
        assert "auto_map" not in said and "max_length" not in said, file
        assert said.get("seq_length", 1024) == said.get("model_max_length", 1024) == 1024, file
    assert read(out / "tokenizer.json") == tokenizer | {"truncation": None}
    assert read(out / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (0, 1)  # the tokenizer's
    assert theirs.generation_config.eos_token_id == 1
    assert theirs.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(out).model_max_length == 1024


def test_the_toy_ends_with_its_own_token(tmp_path):
    """transformers takes token 2 where config.json names none: there a quotation mark."""
    config, tokenizer = read(ROOT / TINY / "config.json"), load_tokenizer(ROOT / TINY)
    assert (config["eos_token_id"], config["bos_token_id"]) == (tokenizer.eos_id, tokenizer.bos_id)
    assert tokenizer.token_bytes(config["eos_token_id"]) == b"<|endoftext|>"


FOREIGN = ("notes.txt", "original/weights.pth", ".gitattributes", "run.json")


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("how", ["save_pretrained", "merge"])
def test_a_folder_with_other_files_is_not_touched(how, name, toy_dir, tmp_path):
    folder, model = tmp_path / "m", load_pretrained(toy_dir)
    shutil.copytree(toy_dir, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    before = snapshot(folder)
    with pytest.raises(BadInput, match=f"holds {name.split('/')[0]}.*not replacing it"):
        if how == "merge":
            recipe.merge(toy_dir, toy_dir, folder)
        else:
            save_pretrained(model, folder)
    assert snapshot(folder) == before


def test_a_save_without_a_tokenizer_keeps_the_one_that_is_there(toy_dir, tmp_path):
    shutil.copytree(toy_dir, tmp_path / "m")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    model = load_pretrained(toy_dir)
    model.config = model.config.with_rope(250_000.0, 1024)
    save_pretrained(model, tmp_path / "link")
    assert load_tokenizer(tmp_path / "m") == load_tokenizer(toy_dir)
    assert load_pretrained(tmp_path / "m").config == model.config
    assert (tmp_path / "link").is_symlink() and len(list(tmp_path.iterdir())) == 2


SHAPE = (331, 48, 80, 2, 4, 2, 12, 256)


@pytest.mark.parametrize(
    "fields",
    [{}, {"qkv_bias": True}, {"qk_norm": True}, {"sliding_window": 80}]
    + [{"qkv_bias": True, "sliding_window": 80}, {"rope_scaling": LLAMA3_SCALING}]
    + [{"rope_scaling": YARN | {"mscale": 0.7, "truncate": False}}],
    ids=str,
)
def test_a_config_without_a_folder_comes_back_as_it_was(fields, tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = Llama(LlamaConfig(*SHAPE, **fields)), torch.arange(60)[None]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        save_pretrained(model, tmp_path / "m")
        assert LlamaConfig.from_dir(tmp_path / "m") == model.config
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"qkv_bias": True, "qk_norm": True}, "both qkv_bias and qk_norm"),
        ({"qkv_bias": True, "raw": {"model_type": "llama"}}, "qkv_bias True would be read back"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "x": 1}}, "rope_scaling .*'x'"),
    ],
)
def test_a_config_that_no_family_has_is_not_saved(fields, match, tmp_path):
    with pytest.raises(BadInput, match=match):
        save_pretrained(Llama(LlamaConfig(*SHAPE, **fields)), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_merge_compares_both_sets_of_tensors(tmp_path):
    for name, layers in (("three", 3), ("two", 2)):
        make_hf_llama(num_hidden_layers=layers).save_pretrained(tmp_path / name)
    edit_config(tmp_path / "three", num_hidden_layers=2)
    for pair in (("three", "two"), ("two", "three")):
        with pytest.raises(BadInput, match=r"two lacks tensor model\.layers\.2\..*three has"):
            recipe.merge(*(tmp_path / name for name in pair), tmp_path / "out")
        assert not (tmp_path / "out").exists()


# ---- models by name ----------------------------------------------------------------------------


def test_a_name_is_found_in_the_local_hub_cache_offline(toy_dir, tmp_path):
    cache = tmp_path / "models--someone--toy"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    shutil.copytree(toy_dir, cache / "snapshots" / "abc")
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    code = "import sys; sys.path.insert(0, '.'); import recipe; recipe.main(sys.argv[1:])"
    flags = f"--target_len 2000 --figure {tmp_path / 'r.png'} --model someone/"
    for name, expected in (("toy", 0), ("other", 2)):
        command = [sys.executable, "-c", code, *f"{flags}{name}".split()]
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, cwd=ROOT, check=False
        )
        assert done.returncode == expected, done.stderr
    assert "someone/other is not a folder and could not be fetched from the hub" in done.stderr


def test_a_name_without_the_package_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        local_folder("someone/toy")
    assert local_folder(str(tmp_path)) == str(tmp_path)


def test_only_what_a_command_reads_is_fetched(toy_dir, tmp_path, monkeypatch, capsys):
    """--plan: config.json alone; recipe.py: no weights. A hub that holds the toy as someone/toy."""

    def snapshot_download(name: str, allow_patterns) -> str:
        assert name == "someone/toy"
        cache.mkdir()
        for file in toy_dir.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)

    def fetched() -> set[str]:
        names = {file.name for file in cache.iterdir()}
        shutil.rmtree(cache)
        return names

    cache, hub = tmp_path / "cache", SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    flags = ["--model", "someone/toy", "--target_len", "2000"]
    train.main([*flags, "--plan", "H100"])
    assert "plan: " in capsys.readouterr().out
    assert fetched() == {"config.json"}
    recipe.main([*flags, "--figure", str(tmp_path / "r.png")])
    assert {"config.json", "tokenizer.json"} <= (found := fetched())
    assert not any(name.endswith(".safetensors") for name in found)
    local_folder("someone/toy")
    assert "model.safetensors" in fetched()


def test_a_path_typo_is_no_name_on_the_hub(monkeypatch, tmp_path):
    """Without the package a name on the hub ends in "pip install": a path must not get there."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    assert local_folder("~/models/smollm2") == str(tmp_path / "models" / "smollm2")
    for name, near in {
        "models/smolm2": "models/smollm2",
        "models/SmolLM2-135M": "models/smollm2",
        "modle": "models",
        "./models/smolm2": "models/smollm2",
        "~/models/smolm2": f"{tmp_path}/models/smollm2",
        f"{tmp_path}/model/smollm2": f"{tmp_path}/models",
        "models/smolm2/step/9": "models/smollm2",
        "models\\smollm2": "models",
        "a/b/c": None,
        ".cache/x": None,
        "/nowhere/x": None,
    }.items():
        with pytest.raises(ValueError) as error:
            local_folder(name)
        says = str(error.value)
        assert says.startswith(f"model folder {name} does not exist"), says
        assert (f"; near it: {near}" in says) if near else ("near it" not in says), says
        assert ("models is a folder here, so the hub is not asked" in says) == (
            name.count("/") == 1 and name[0] == "m"
        )
