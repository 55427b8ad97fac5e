"""support/huggingface: checkpoint folders, memory while they are moved, models by name, older
readers."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_hf_llama, snapshot
from safetensors.torch import load_file, save_file
from smollm2 import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import recipe
import train
from model import Llama, LlamaConfig, load_pretrained, load_tokenizer, save_pretrained
from support.data.toy import TINY
from support.huggingface import checkpoint as checkpoint_files
from support.huggingface.hub import local_folder
from support.system.bad_input import BadInput

IDS = torch.arange(60)[None]

# ---- memory ------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, torch
sys.path.insert(0, ".")
import recipe
from model import load_pretrained, save_pretrained
from support.huggingface import checkpoint
checkpoint.SHARD_BYTES = 12_000_000
def anonymous():  # MB of memory that is not a mapped file
    line = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e6
task, source, out = sys.argv[1:]
model = load_pretrained(source) if task == "save" else None
torch.zeros(1)
before, peaks, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.0005):
        peaks.append(anonymous())
thread = threading.Thread(target=watch)
thread.start()
if task == "load":
    model = load_pretrained(source, dtype=torch.bfloat16)
elif task == "save":
    save_pretrained(model, out)
else:
    recipe.merge(source, source, out, 0.5)
done.set()
thread.join()
print(max(peaks) - before)
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """About 100 MB in fp32, in shards of up to 12 MB."""
    folder = tmp_path_factory.mktemp("sharded")
    sizes = {"vocab_size": 2000, "hidden_size": 512, "intermediate_size": 1024}
    model = make_hf_llama(**sizes, num_hidden_layers=10, num_attention_heads=8)
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
    before = os.umask(0o027)
    try:
        save_pretrained(load_pretrained(toy_dir), tmp_path / "saved", tokenizer_from=toy_dir)
        recipe.merge(toy_dir, tmp_path / "saved", tmp_path / "merged")
    finally:
        os.umask(before)
    for folder in (tmp_path / "saved", tmp_path / "merged"):
        modes = {p.name: oct(p.stat().st_mode & 0o777) for p in folder.iterdir()}
        assert "tokenizer.json" in modes and set(modes.values()) == {"0o640"}, modes
        assert (checkpoint_files.INDEX in modes) == (shard_bytes == 50_000)
        assert folder.stat().st_mode & 0o777 == 0o750


# ---- folders of every kind: the logits of transformers, or refused by name ---------------------

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read(path) -> dict:
    return json.loads(path.read_text())


def write(folder, name: str, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def edit(folder, changes: dict):
    """Fields of config.json; those that are ... are left out."""
    config = read(folder / "config.json") | changes
    write(folder, "config.json", {k: v for k, v in config.items() if v is not ...})


def store(folder, tensors: dict, name=SINGLE):
    save_file(tensors, folder / name, metadata={"format": "pt"})


def change(folder, changed):
    """changed(tensors): further tensors, or others of the same names."""
    tensors = load_file(folder / SINGLE)
    store(folder, tensors | changed(tensors))


def rename(folder, new_name):
    """new_name(name): where it is None, the tensor is left out."""
    renamed = ((new_name(name), tensor) for name, tensor in load_file(folder / SINGLE).items())
    store(folder, {name: tensor for name, tensor in renamed if name})


def cast(folder, dtype: torch.dtype):
    name = "model.layers.0.mlp.up_proj.weight"
    change(folder, lambda tensors: {name: tensors[name].to(dtype)})


def own_head(folder, factor: float):
    change(folder, lambda tensors: {HEAD: tensors[EMBEDDING] * factor})


def shards(folder, below="", twice=0, promised=()):
    """Two shards and an index; twice: the second has all tensors of the first, doubled."""
    tensors, weight_map = sorted(load_file(folder / SINGLE).items()), {}
    (folder / SINGLE).unlink()
    (folder / below).mkdir(parents=True, exist_ok=True)
    for i, part in enumerate((tensors[: 5 + 4 * twice], tensors[5:])):
        file = os.path.join(below, f"model-{i}.safetensors")
        store(folder, {name: tensor * (1 + i * twice) for name, tensor in part}, file)
        weight_map = dict.fromkeys([name for name, _ in part], file) | weight_map
    weight_map |= dict.fromkeys(promised, file)
    write(folder, INDEX, {"metadata": {}, "weight_map": weight_map})


def stale_index(folder, *leftover: str):
    """A single file and an index beside it, with shards of that index or without."""
    halves = {name: 0.5 * tensor for name, tensor in load_file(folder / SINGLE).items()}
    shards(folder)
    store(folder, halves)
    for file in set(folder.glob("model-*")) - {folder / name for name in leftover}:
        file.unlink()


def without_model(name: str) -> str:
    return name.removeprefix("model.")


L0 = "original_max_position_embeddings"
YARN, LINEAR = {"rope_type": "yarn", "factor": 4.0, L0: 64}, {"type": "linear", "factor": 4.0}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BARE = SCALED | {"rope_theta": 5e5}
LLAMA3, DEFAULT = BARE | {L0: 64}, {"rope_type": "default", "rope_theta": 5e4}
BESIDE = {"rope_parameters": DEFAULT, "rope_theta": 3e4}
TIED, NO_KV = {"tie_word_embeddings": True}, {"num_key_value_heads": ...}
QWEN2 = {"family": "qwen2", "hidden_size": 64, "num_attention_heads": 32}
MISTRAL = {"family": "mistral", "num_attention_heads": 8, "num_key_value_heads": 8}
ANGLES = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
OPENED = [  # the model's shape, what is done to its folder
    (TIED, own_head, 2.0),
    (TIED, own_head, 1.0),  # a copy of the embedding
    (TIED, rename, lambda name: HEAD if name == EMBEDDING else name),
    (TIED, rename, without_model),  # a base model
    ({}, rename, without_model),
    (TIED, shards, "", 0, [HEAD]),  # an index that promises the head
    ({}, edit, {"tie_word_embeddings": ...}),
    ({}, shards, "weights/a"),
    ({}, shards, "", 1),
    ({}, stale_index),
    ({}, stale_index, "model-0.safetensors", "model-1.safetensors"),
    ({}, change, lambda tensors: ANGLES),
    ({}, cast, torch.float64),
    ({}, edit, BESIDE | {"rope_scaling": LINEAR}),
    ({}, edit, BESIDE | {"rope_scaling": LLAMA3}),
    ({}, edit, BESIDE | {"rope_scaling": YARN}),
    ({}, edit, {"rope_scaling": DEFAULT, "rope_parameters": {"rope_type": "yarn"}}),
    ({}, edit, {"rope_parameters": YARN, L0: 32}),  # two old windows
    ({}, edit, {"rope_parameters": LLAMA3, L0: 32}),
    ({}, edit, {"rope_parameters": BARE, L0: 32}),
    ({}, edit, {"rope_parameters": BARE}),
    ({}, edit, {"rope_parameters": ..., "rope_theta": ...}),
    ({}, edit, {"rope_parameters": {"rope_type": "default"}, "rope_theta": 3e4}),
    ({}, edit, {"rope_scaling": {}}),
    ({}, edit, {"head_dim": None}),
    ({}, edit, {"partial_rotary_factor": None}),
    ({}, edit, {"torch_dtype": "float16", "dtype": None}),
    ({}, edit, {"sliding_window": 8}),  # which llama has not
    ({"num_key_value_heads": 4}, edit, NO_KV),
    (MISTRAL, edit, NO_KV),
    (MISTRAL, edit, {"sliding_window": None}),
    (QWEN2 | {"num_key_value_heads": 32}, edit, NO_KV),
    ({"family": "qwen2"}, edit, {"use_sliding_window": False, "sliding_window": 8}),
    ({"family": "qwen3", "head_dim": 128}, edit, {"head_dim": ...}),
]


@pytest.mark.parametrize("row", OPENED)
def test_a_folder_gives_the_logits_of_transformers(row, tmp_path):
    """So does what we write of it, and what we merge of both."""

    def theirs(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits

    shape, spoil, *arguments = row
    make_hf_llama(**shape).save_pretrained(tmp_path)
    spoil(tmp_path, *arguments)
    ours = load_pretrained(tmp_path)
    save_pretrained(ours, tmp_path / "again")
    recipe.merge(tmp_path, tmp_path / "again", tmp_path / "merged", 0.25)
    with torch.no_grad():
        expected = theirs(tmp_path)
        merged = load_pretrained(tmp_path / "merged")(IDS)
        for logits in (ours(IDS), theirs(tmp_path / "again"), merged):
            assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def only(folder, *names):
    """A folder with these files alone; new ones are empty."""
    for file in folder.iterdir():
        if file.name not in names:
            file.unlink()
    for name in names:
        (folder / name).touch()


def only_index(folder, content: dict):
    only(folder, "config.json")
    write(folder, INDEX, content)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
HALF, ROPE = {"partial_rotary_factor": 0.5}, "rope_parameters"
NUMBER, OUTSIDE = "must be a positive number", "points outside the folder"
REFUSED = [  # what the error says, what is done to the folder
    ("only safetensors are read.*save_pretrained", only, "config.json", "pytorch_model.bin"),
    ("m.gguf: GGUF is not read.*gguf_file", only, "m.gguf"),
    ("00.pth: the format of the model's makers", only, "config.json", "consolidated.00.pth"),
    ("an adapter of PEFT.*merge_and_unload", only, "adapter_config.json"),
    ("an adapter of PEFT", write, "adapter_config.json", {}),
    ("-1.safetensors: a model folder has", only, "config.json", "model-1.safetensors"),
    ("git-lfs pointer.*git lfs pull", write, SINGLE, POINTER),
    ("config.json is a git-lfs pointer", write, "config.json", POINTER),
    ("mlp.up_proj.weight holds I8: a quantised model", cast, torch.int8),
    ("holds F8_E4M3: a quantised model", cast, torch.float8_e4m3fn),
    (OUTSIDE, only_index, {"weight_map": {"a": "../../etc/passwd"}}),
    (OUTSIDE, only_index, {"weight_map": {"a": "/etc/passwd"}}),
    ("gone.safetensors, which is not in", only_index, {"weight_map": {"a": "gone.safetensors"}}),
    ("has no weight_map", only_index, {"weight_map": []}),
    ("has no weight_map", only_index, {}),
    ("missing .*lm_head", rename, lambda name: name if name != HEAD else None),
    (f"factor {NUMBER}", edit, {"rope_scaling": {"type": "yarn"}}),
    (f"factor {NUMBER}", edit, {ROPE: YARN | {"factor": "4"}}),
    (f"factor {NUMBER}", edit, {ROPE: YARN | {"factor": 0}}),
    (f"{L0} {NUMBER}", edit, {ROPE: YARN | {L0: None}}),
    (f"attention_factor {NUMBER}", edit, {ROPE: YARN | {"attention_factor": -1.0}}),
    (f"mscale {NUMBER}", edit, {ROPE: YARN | {"mscale": []}}),
    ("beta_fast of yarn must not be below", edit, {ROPE: YARN | {"beta_slow": 40}}),
    ("truncate must be true or false", edit, {ROPE: YARN | {"truncate": None}}),
    ("rope type 'dynamic'", edit, {"rope_scaling": {"type": "dynamic"}}),
    (r"must be an object, found \[4.0\]", edit, {"rope_scaling": [4.0]}),
    ("rope_theta must be above 1, found 1.0", edit, {ROPE: DEFAULT | {"rope_theta": 1}}),
    ("must hold a JSON object, found list", write, "config.json", []),
    ("rope type 'longrope'", edit, {ROPE: {"rope_type": "longrope"}}),
    ("full_attention", edit, {ROPE: {"full_attention": DEFAULT, "sliding_attention": DEFAULT}}),
    ("RoPE with a partial_rotary_factor", edit, {ROPE: DEFAULT | HALF}),
    ("partial_rotary_factor 0.5", edit, HALF),
    ("high_freq_factor must be above", edit, {ROPE: LLAMA3 | {"high_freq_factor": 0.5}}),
    ("attention_bias True", edit, {"attention_bias": True}),
    ("mlp_bias True", edit, {"mlp_bias": True}),
    ("hidden_act 'gelu'", edit, {"hidden_act": "gelu"}),
    ("is_causal False", edit, {"is_causal": False}),
    ("quantization_config .*gptq", edit, {"quantization_config": {"quant_method": "gptq"}}),
    ("transformers_weights", edit, {"transformers_weights": "a.safetensors"}),
    ("model_type None is not supported", edit, {"model_type": ...}),
    ("tie_word_embeddings must be true or false", edit, {"tie_word_embeddings": "false"}),
    ("num_attention_heads 4 is not a multiple of", edit, {"num_key_value_heads": 3}),
    ("head_dim must be even, found 7", edit, {"head_dim": 7}),
]


@pytest.mark.parametrize("row", REFUSED)
def test_a_folder_is_refused_with_what_it_is(row, tmp_path):
    make_hf_llama().save_pretrained(tmp_path)
    match, spoil, *arguments = row
    spoil(tmp_path, *arguments)
    with pytest.raises(BadInput, match=match):
        load_pretrained(tmp_path)


# ---- what is written ---------------------------------------------------------------------------

SHAPE = (331, 48, 80, 2, 4, 2, 12, 256)
BIAS, WINDOW = {"qkv_bias": True}, {"sliding_window": 80}
LLAMA3_CONFIG = {"rope_scaling": SCALED | {L0: 64}}
YARN_CONFIG = {"rope_scaling": YARN | {"mscale": 0.7, "truncate": False}}
CONFIGS = [{}, BIAS, {"qk_norm": True}, WINDOW, BIAS | WINDOW, LLAMA3_CONFIG, YARN_CONFIG]


@pytest.mark.parametrize("fields", CONFIGS)
def test_an_extended_config_without_a_folder_comes_back_as_it_was(fields, tmp_path):
    model = Llama(LlamaConfig(*SHAPE, **fields).with_rope(250_000.0, 1024))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        save_pretrained(model, tmp_path / "m")
        assert LlamaConfig.from_dir(tmp_path / "m") == model.config
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
        assert theirs.config.rope_parameters["rope_theta"] == 250_000.0
        assert (theirs(IDS).logits - model(IDS)).abs().max() < 1e-4


@pytest.mark.parametrize("how", ["save_pretrained", "merge"])
def test_no_file_of_a_result_speaks_of_the_old_window(how, toy_dir, tmp_path):
    old, long, out = (tmp_path / name for name in ("old", "long", "out"))
    shutil.copytree(toy_dir, old)
    code, eos = {"AutoConfig": "configuration_x.C"}, {"eos_token_id": ...}
    edit(old, {"max_length": 64, "seq_length": 64, "auto_map": code, "bos_token_id": None} | eos)
    write(old, "generation_config.json", {"max_length": 64, "max_new_tokens": 7})
    settings = read(old / "tokenizer_config.json") | {
        "model_max_length": 64,
        "tokenizer_class": "TokenizersBackend",
        "auto_map": {"AutoTokenizer": ["t.T", None]},
        "extra_special_tokens": ["<s>"],
    }
    write(old, "tokenizer_config.json", settings)
    cut = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
    write(old, "tokenizer.json", read(old / "tokenizer.json") | {"truncation": cut})
    model = load_pretrained(old)
    model.config = model.config.with_rope(250_000.0, 1024)
    if how == "merge":  # of a model that another program trained
        shutil.copytree(old, long)
        edit(long, {"max_position_embeddings": 1024})
        recipe.merge(old, long, out)
    else:
        save_pretrained(model, out, tokenizer_from=old)
    for file in out.glob("*.json"):
        said = read(file)
        assert "auto_map" not in said and "max_length" not in said, file
        assert said.get("seq_length", 1024) == said.get("model_max_length", 1024) == 1024, file
    assert read(out / "tokenizer.json") == read(old / "tokenizer.json") | {"truncation": None}
    assert read(out / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (0, 1)  # the tokenizer's
    assert theirs.generation_config.eos_token_id == 1
    assert theirs.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(out).model_max_length == 1024


def test_the_toy_ends_with_its_own_token():
    """transformers takes token 2 where config.json names none: there a quotation mark."""
    config, tokenizer = read(ROOT / TINY / "config.json"), load_tokenizer(ROOT / TINY)
    assert (config["eos_token_id"], config["bos_token_id"]) == (tokenizer.eos_id, tokenizer.bos_id)
    assert tokenizer.token_bytes(config["eos_token_id"]) == b"<|endoftext|>"


@pytest.mark.parametrize("name", ["notes.txt", "original/m.pth", ".gitattributes", "run.json"])
def test_a_folder_with_other_files_is_not_touched(name, toy_dir, tmp_path):
    folder, model = tmp_path / "m", load_pretrained(toy_dir)
    shutil.copytree(toy_dir, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    before = snapshot(folder)
    for write in (lambda: save_pretrained(model, folder), lambda: recipe.merge(*3 * [folder])):
        with pytest.raises(BadInput, match=f"holds {name.split('/')[0]}.*not replacing it"):
            write()
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


BOTH, DYNAMIC = BIAS | {"qk_norm": True}, {"rope_type": "dynamic", "factor": 2.0}
NOT_SAVED = [
    ("both qkv_bias and qk_norm", BOTH),
    ("qkv_bias True would be read back", BIAS | {"raw": {"model_type": "llama"}}),
    ("rope type 'dynamic'", {"rope_scaling": DYNAMIC}),
    (L0, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
    ("rope_scaling .*'x'", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "x": 1}}),
]


@pytest.mark.parametrize(("match", "fields"), NOT_SAVED)
def test_a_config_that_no_family_has_is_not_saved(match, fields, tmp_path):
    with pytest.raises(BadInput, match=match):
        save_pretrained(Llama(LlamaConfig(*SHAPE, **fields)), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_merge_compares_both_sets_of_tensors(tmp_path):
    for name, layers in (("three", 3), ("two", 2)):
        make_hf_llama(num_hidden_layers=layers).save_pretrained(tmp_path / name)
    edit(tmp_path / "three", {"num_hidden_layers": 2})
    for pair in (("three", "two"), ("two", "three")):
        with pytest.raises(BadInput, match=r"two lacks tensor model\.layers\.2\..*three has"):
            recipe.merge(*(tmp_path / name for name in pair), tmp_path / "out")
        assert not (tmp_path / "out").exists()


OLD_READER = """
import sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32).eval()
AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.arange(60)[None]).logits, sys.argv[2])
"""


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
    hf = make_hf_llama(family.rstrip("3"), vocab_size=400, sliding_window=None, **rope)
    hf.save_pretrained(tmp_path / "hf")
    ours = load_pretrained(tmp_path / "hf")
    ours.config = ours.config.with_rope(250_000.0, 1024)
    save_pretrained(ours, tmp_path / "ours", tokenizer_from=toy_dir)
    command = [sys.executable, "-c", OLD_READER, str(tmp_path / "ours"), str(tmp_path / "logits")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(target)})
    logits = torch.load(tmp_path / "logits", weights_only=True)
    with torch.no_grad():
        assert (logits - ours(IDS)).abs().max() < 1e-4


# ---- models by name ----------------------------------------------------------------------------


def test_a_name_is_found_in_the_local_hub_cache_offline(toy_dir, tmp_path, monkeypatch):
    cache = tmp_path / "models--someone--toy"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    shutil.copytree(toy_dir, cache / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert local_folder("someone/toy") == f"{cache}/snapshots/abc"
    with pytest.raises(BadInput, match="someone/other is not a folder and could not be fetched"):
        local_folder("someone/other")


def test_only_what_a_command_reads_is_fetched(toy_dir, tmp_path, monkeypatch, capsys):
    """--plan: config.json alone; recipe.py: no weights. A hub that holds the toy as someone/toy."""
    cache = tmp_path / "cache"

    def snapshot_download(name: str, allow_patterns) -> str:
        assert name == "someone/toy"
        left_out = {f.name for f in toy_dir.iterdir()}
        left_out -= {n for p in allow_patterns for n in fnmatch.filter(left_out, p)}
        shutil.copytree(toy_dir, cache, ignore=lambda *_: left_out)
        return str(cache)

    def fetched() -> set[str]:
        names = {file.name for file in cache.iterdir()}
        shutil.rmtree(cache)
        return names

    hub = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    flags = ["--model", "someone/toy", "--target_len", "2000"]
    train.main([*flags, "--plan", "H100"])
    assert "plan: " in capsys.readouterr().out and fetched() == {"config.json"}
    recipe.main([*flags, "--figure", str(tmp_path / "r.png")])
    assert {"config.json", "tokenizer.json"} <= (found := fetched())
    assert not any(name.endswith(".safetensors") for name in found)
    local_folder("someone/toy")
    assert "model.safetensors" in fetched()


NEAR = {  # a path that does not exist: the folder with a name most like it
    "models/smolm2": "models/smollm2",
    "models/SmolLM2-135M": "models/smollm2",
    "modle": "models",
    "./models/smolm2": "models/smollm2",
    "~/models/smolm2": "{home}/models/smollm2",
    "{home}/model/smollm2": "{home}/models",
    "models/smolm2/step/9": "models/smollm2",
    "models\\smollm2": "models",
    "a/b/c": None,
    ".cache/x": None,
    "/nowhere/x": None,
}


def test_a_path_typo_is_no_name_on_the_hub(monkeypatch, tmp_path):
    """Without the package a name on the hub ends in "pip install": a path must not get there."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    for folder in ("~/models/smollm2", f"{tmp_path}/models/smollm2"):
        assert local_folder(folder) == str(tmp_path / "models" / "smollm2")
    with pytest.raises(BadInput, match="pip install huggingface_hub"):
        local_folder("someone/toy")
    for name, near in NEAR.items():
        name, near = name.format(home=tmp_path), near and near.format(home=tmp_path)
        with pytest.raises(BadInput) as error:
            local_folder(name)
        says = str(error.value)
        assert says.startswith(f"model folder {name} does not exist"), says
        assert (f"; near it: {near}" in says) if near else ("near it" not in says), says
        asked = name.startswith("models/") and name.count("/") == 1
        assert ("models is a folder here, so the hub is not asked" in says) == asked
