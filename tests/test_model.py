"""model.py against transformers, tokenizers, float64 and slow loops."""

import dataclasses
import importlib.util
import itertools
import json
import math
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_hf_llama
from smollm2 import ROOT
from tokenizers import Tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig as LlamaConfigOfTransformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import model as model_py
import recipe as recipe_py
from model import (
    KVCache,
    Llama,
    LlamaConfig,
    attention,
    generate,
    inverse_frequencies,
    linear_cross_entropy,
    load_pretrained,
    load_tokenizer,
    prefill,
    rotary_angles,
    rotate,
    save_pretrained,
)
from support.data.sources import standard_library_topics
from support.huggingface import yarn
from support.memory import activations
from support.memory.activations import LayerInputsOnHost, set_levers

SMALL = LlamaConfig(50, 16, 16, 1, 2, 2, 8, 64)
MODEL, WINDOWED = Llama(SMALL), Llama(dataclasses.replace(SMALL, sliding_window=50))
NONE, IDS = torch.zeros(0, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)

# ---- transformers as the oracle ----------------------------------------------------------------


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}


def with_yarn(**fields) -> dict:
    """Changes of the small model: a head wide enough for pairs of all three kinds."""
    rope = {k: v for k, v in (YARN | fields).items() if v != "not given"}
    return {"head_dim": 32, "max_position_embeddings": 1024, "rope_parameters": rope}


FAMILIES = {  # model_type and a name: changes of the small model
    "llama_multi_head": {"num_key_value_heads": 4},
    "llama_grouped": {"num_key_value_heads": 2},
    "llama_one_kv_head_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama_head_dim_given": {"head_dim": 20, "num_key_value_heads": 2},
    "llama_other_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 310822.4}},
    "mistral": {"sliding_window": None, "head_dim": 20},
    "mistral_window": {"sliding_window": 50},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2_untied": {"num_key_value_heads": 4},
    "qwen3": {"head_dim": 20},
    "llama_linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama_llama3": {"rope_parameters": LLAMA3},
    "llama_yarn": with_yarn(),
    "qwen2_yarn": with_yarn(),
    "llama_yarn_for_the_whole_window": with_yarn(original_max_position_embeddings="not given"),
    "llama_yarn_factor_null": with_yarn(factor=None),
    "llama_yarn_attention_factor": with_yarn(attention_factor=1.4),
    "llama_yarn_mscale": with_yarn(mscale=0.7, mscale_all_dim=1.2),
    "llama_yarn_mscale_alone": with_yarn(mscale=0.7),
    "llama_yarn_betas": with_yarn(beta_fast=8, beta_slow=1.5),
    "llama_yarn_betas_null": with_yarn(beta_fast=None, beta_slow=None, attention_factor=None),
    "llama_yarn_truncate": with_yarn(truncate=True),
    "llama_yarn_truncate_false": with_yarn(truncate=False),
}


@pytest.mark.parametrize(("spelling", "gaps"), [("new", True), ("old", False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_rope_types_equal_transformers(family, spelling, gaps, tmp_path):
    """[E1], [E27] and [E28] in their place: logits to 1e-4, every gradient to 1e-4 of its largest
    entry. Both spellings of RoPE in config.json say the same."""
    hf = make_hf_llama(family.split("_")[0], **FAMILIES[family])
    hf.save_pretrained(tmp_path)
    if spelling == "old":
        config = json.loads((tmp_path / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        if rope["rope_type"] != "default":
            config["rope_scaling"] = {"type" if k == "rope_type" else k: v for k, v in rope.items()}
        (tmp_path / "config.json").write_text(json.dumps(config))
    ours, ids = load_pretrained(tmp_path), torch.randint(331, (2, 50))
    jumps = torch.randint(40 if gaps else 1, (50,))  # far beyond the window of 256, or none
    pos = (torch.arange(50) + jumps.cumsum(0)).expand(2, -1)
    # subtle: without the all-ones mask transformers cuts attention at every gap, see below
    theirs = hf(ids, position_ids=pos, attention_mask=torch.ones_like(ids)).logits
    logits, weights = ours(ids, pos), torch.randn(theirs.shape)
    assert (logits - theirs).abs().max() < 1e-4
    (theirs * weights).sum().backward()
    (logits * weights).sum().backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    for name, p in hf.named_parameters():
        error = (grads[name] - p.grad).abs().max() / p.grad.abs().max()
        assert error < 1e-4, (name, error)


# the hub's config.json files: model_type, the fields of SHAPE, others; and the published counts
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SHAPE += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rope_theta")
WINDOW = {"sliding_window": 131072, "use_sliding_window": False}
PUBLISHED = {  # Llama-3-8B, Llama-3.2-1B, Mistral-7B-v0.3, Qwen2-7B
    8_030_261_248: ("llama", (128256, 4096, 14336, 32, 32, 8, 8192, 5e5), {}),
    1_235_814_400: (
        "llama",
        (128256, 2048, 8192, 16, 32, 8, 131072, 5e5),
        {"tie_word_embeddings": True, "rope_scaling": LLAMA3 | {"factor": 32.0}},
    ),
    7_248_023_552: ("mistral", (32768, 4096, 14336, 32, 32, 8, 32768, 1e6), {}),
    7_615_616_512: ("qwen2", (152064, 3584, 18944, 28, 28, 4, 131072, 1e6), WINDOW),
}


@pytest.mark.parametrize("count", PUBLISHED)
def test_published_configs_give_the_published_counts(count, tmp_path):
    family, shape, more = PUBLISHED[count]
    config = {"model_type": family, "rms_norm_eps": 1e-5, "sliding_window": None}
    config |= dict(zip(SHAPE, shape, strict=True)) | more
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dir(tmp_path))
    assert sum(p.numel() for p in model.parameters()) == count


def test_transformers_cuts_attention_at_gaps_and_we_do_not(tmp_path):
    """Do not "fix" ours: with gapped ids and no mask, transformers takes gaps for document
    borders."""
    hf = make_hf_llama()
    hf.save_pretrained(tmp_path)
    ids = torch.randint(331, (1, 40), generator=torch.Generator().manual_seed(2))
    pos = torch.cat((torch.arange(20), torch.arange(120, 140)))[None]
    with torch.no_grad():
        cut = hf(ids, position_ids=pos, use_cache=False).logits  # as its Trainer calls it
        whole = hf(ids, position_ids=pos, attention_mask=torch.ones_like(ids)).logits
        second_half_alone = hf(ids[:, 20:], position_ids=pos[:, 20:]).logits
        assert (cut[:, 20:] - second_half_alone).abs().max() < 1e-4
        assert (cut[:, 20:] - whole[:, 20:]).abs().max() > 0.1
        assert (load_pretrained(tmp_path)(ids, pos) - whole).abs().max() < 1e-4


def test_rotation_equals_a_slow_loop():
    """[E1] angles from the position ids, and each pair turned by them, in float64."""
    pos, d, theta = torch.tensor([[0, 7, 131071]]), 8, 10000.0
    x = torch.randn(1, 2, 3, d, dtype=torch.float64)
    cos, sin = rotary_angles(pos, inverse_frequencies(d, theta))
    slow = torch.empty_like(x)
    for t in range(3):
        for j in range(d // 2):
            angle = pos[0, t].double() * theta ** (-2 * j / d)
            a, b = x[0, :, t, j], x[0, :, t, j + d // 2]
            slow[0, :, t, j] = a * angle.cos() - b * angle.sin()
            slow[0, :, t, j + d // 2] = b * angle.cos() + a * angle.sin()
    error = (rotate(x, cos, sin) - slow).abs().max(dim=-1).values.max(dim=1).values[0]
    assert error[1] < 1e-5 and error[2] < 2e-2  # fp32 at 131,071 radians: half an ulp is 4e-3


def test_yarn_slows_the_pairs_that_turn_rarely():
    """[E27] by a slow loop over the turns of each pair; and transformers' own function, also where
    no pair turns often, or all of them do."""
    d, theta, L0 = 64, 1e4, 256
    turns = [L0 * theta ** (-2 * i / d) / (2 * math.pi) for i in range(d // 2)]
    first = max(i for i in range(d // 2) if turns[i] >= 8)
    last = min(i for i in range(d // 2) if turns[i] <= 2)
    share = [min(1, max(0, (last - i) / (last - first))) for i in range(d // 2)]
    slow = [theta ** (-2 * i / d) * (s + (1 - s) / 4) for i, s in enumerate(share)]
    found = inverse_frequencies(d, theta, YARN | {"beta_fast": 8, "beta_slow": 2})
    assert (found / torch.tensor(slow) - 1).abs().max() < 1e-5
    assert 0 < first < last - 2 < d // 2 - 3  # some pairs of each kind

    for theta, L0, truncate in itertools.product((3.0, 1e4, 1e6), (2, 40, 8192, 1e7), (0, 1)):
        scaling = YARN | {"original_max_position_embeddings": L0, "truncate": bool(truncate)}
        config = LlamaConfigOfTransformers(rope_parameters=scaling | {"rope_theta": theta})
        theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
        assert (inverse_frequencies(128, theta, scaling) / theirs - 1).abs().max() < 1e-5
        assert yarn.attention_factor(scaling) == factor


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({}, 1.1386294361),  # 1 + 0.1 ln 4
        ({"factor": 1.0}, 1.0),
        ({"factor": 0.5}, 1.0),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, 1.1944648761),  # 1.2772589 / 1.0693147
        ({"mscale": 2.0}, 1.1386294361),
        ({"attention_factor": 0.8, "mscale": 2.0, "mscale_all_dim": 0.5}, 0.8),
    ],
    ids=str,
)
def test_the_attention_factor_of_yarn_by_hand(fields, factor):
    """[E28]"""
    assert yarn.attention_factor(YARN | fields) == pytest.approx(factor, rel=1e-9)


def test_angles_stay_fp32_when_the_model_is_cast():
    model = Llama(SMALL).to(torch.bfloat16)
    assert not list(model.buffers()) and model(IDS).dtype == torch.bfloat16
    cos, _ = rotary_angles(torch.tensor([[1001]]), inverse_frequencies(8, 10000.0))
    # bf16 would round position 1001 to 1000: another angle
    assert cos.dtype == torch.float32 and abs(float(cos[0, 0, 0, 0]) - math.cos(1001)) < 1e-4


def test_the_norm_is_computed_in_fp32_and_rounded_once():
    torch.manual_seed(0)
    norm, x = model_py.RMSNorm(64, 1e-6).double(), torch.randn(5, 64).double() * 100
    with torch.no_grad():
        norm.weight.copy_(torch.rand(64) + 0.5)
    exact = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight
    for dtype, precision in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        y = norm.to(dtype)(x.to(dtype))
        assert y.dtype == dtype and (y / exact - 1).abs().max() < precision
    norm, x = norm.bfloat16(), x.bfloat16()  # half a step of its 8 bits: rounded twice is more
    rounded = norm.double()(x.double()).bfloat16()
    assert torch.equal(norm.bfloat16()(x), rounded)


class Watch(TorchDispatchMode):
    """Counts operations by name, and records the element count of the largest tensor returned."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *(x.numel() for x in tensors)])
        return out


ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_activation_checkpointing_and_its_levers_change_no_bit(dtype, monkeypatch):
    """Attention runs forward once a layer where it is kept, else twice. The host gets the layer
    inputs and nothing else. In pieces the MLP keeps nothing of its width (192)."""
    monkeypatch.setattr(activations, "PIECE_TOKENS", 64)
    ids, results = (torch.arange(172) % 97)[None], []
    for on, keep, offload, split in [
        (0, 1, 0, 0),
        (0, 1, 0, 1),
        *itertools.product([1], *3 * [(0, 1)]),
    ]:
        torch.manual_seed(0)
        model = Llama(LlamaConfig(97, 64, 192, 2, 4, 2, 16, 64)).to(dtype)
        model.model["embed_tokens"].weight.requires_grad_(False)
        names = {"keep_attention": keep, "offload_inputs": offload, "split_mlp": split}
        set_levers(model, SimpleNamespace(**names))
        model.activation_checkpointing, widths = bool(on), []

        def pack(x, widths=widths):
            widths.append(x.shape[-1] if x.ndim == 3 else 0)
            return x

        for _ in range(2):  # the second sequence finds the host's buffers used
            with Watch() as watch:
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                    h = model.hidden(ids)
                h.float().square().mean().backward()
        assert (192 in widths) == (not on and not split)
        assert watch.calls[ATTENTION] == (2 if keep else 4)
        assert watch.calls[f"{ATTENTION}_backward"] == 2
        assert not offload or len(model.around_layers.buffers) == 2  # no angles
        results.append([h.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == 20
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_second_forward_pass_before_the_backward_pass_is_noticed():
    """Its layer inputs would have taken the place of the first one's."""
    model = Llama(LlamaConfig(97, 32, 48, 2, 4, 2, 8, 64))
    model.activation_checkpointing, model.around_layers = True, LayerInputsOnHost()
    first, second = (model.hidden(torch.arange(9)[None]).sum() for _ in range(2))
    second.backward()
    with pytest.raises(RuntimeError, match="overwritten"):
        first.backward()


# ---- attention, cache, generation --------------------------------------------------------------


@pytest.mark.parametrize(("T", "S"), [(7, 7), (1, 9), (5, 12), (128, 300)])
def test_attention_equals_a_slow_loop(T, S):
    """[E12] The T queries are the last of the S tokens, whatever T and S are; where there is a
    past, it is taken apart and joined by its logsumexp."""
    torch.manual_seed(0)
    q = torch.randn(1, 4, T, 8, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, S, 8, dtype=torch.float64)
    slow = torch.empty_like(q)
    for h in range(4):
        for t in range(T):
            seen = S - T + t + 1
            weights = (k[0, h // 2, :seen] @ q[0, h, t] / 8**0.5).softmax(0)
            slow[0, h, t] = weights @ v[0, h // 2, :seen]
    assert (attention(q, k, v) - slow).abs().max() < 1e-10


@pytest.mark.parametrize("wanted", ["qkv", "q", "k", "v"])
def test_attention_over_a_past_has_gradients_where_they_are_asked_for(wanted):
    """The fast path on CPU has none through its logsumexp, so it must not be taken then."""
    torch.manual_seed(0)
    shapes = {"q": (1, 4, 5, 8), "k": (1, 2, 9, 8), "v": (1, 2, 9, 8)}
    qkv = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=name in wanted)
        for name, shape in shapes.items()
    )
    assert torch.autograd.gradcheck(attention, tuple(qkv))


def test_chunked_prefill_and_generation_equal_the_uncached_forward(tmp_path):
    make_hf_llama().save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    ids = torch.randint(331, (101,), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        whole = model(ids[None])[0, -1]
    for chunk in (1, 13, 50, 101, 4096):
        logits, cache = prefill(model, ids, chunk_tokens=chunk)
        assert cache.length == 101 and (logits - whole).abs().max() < 1e-4
    slow = ids.tolist()  # no cache at all
    for _ in range(8):
        with torch.no_grad():
            slow.append(int(model(torch.tensor(slow)[None])[0, -1].argmax()))
    assert generate(model, ids, 8) == slow[101:]
    # continued from a truncated cache that has seen something else behind the common beginning
    _, cache = prefill(model, torch.cat((ids[:60], torch.zeros(30, dtype=torch.int64))))
    cache.truncate(60)
    assert generate(model, ids[60:], 8, cache) == slow[101:]
    assert generate(model, ids, 8, stop_ids={slow[104]}) == slow[101:104]


def test_the_cache_makes_room_for_many_tokens_at_once():
    model, cache, ids, rooms = Llama(SMALL), KVCache(), torch.arange(1500) % 50, set()
    for chunk in ids.split(100):
        logits, _ = prefill(model, chunk, cache)
        rooms.add(cache.layers[0].shape[3])
    assert rooms == {100 + 1024, 1200 + 1024}
    _, in_chunks = prefill(model, ids.repeat(3), chunk_tokens=4000)
    assert in_chunks.layers[0].shape[3] == 4500 + 1024  # made for all, before the first chunk
    with torch.no_grad():
        assert (logits - model(ids[None])[0, -1]).abs().max() < 1e-5


HEADS, HEAD = torch.zeros(1, 2, 5, 8), MODEL.lm_head.weight
REFUSED = [  # the message, the function, its arguments
    (r"input_ids \(1, 0\)", prefill, MODEL, NONE),
    (r"input_ids \(1, 1, 4\)", generate, MODEL, IDS, 3),
    (r"input_ids \(1, 0\)", MODEL, IDS[:, :0]),
    (r"input_ids \(0, 4\)", MODEL.hidden, IDS[:0]),
    (r"input_ids \(4,\)", MODEL, IDS[0]),
    ("position_ids", MODEL, IDS, IDS[:, :3]),
    ("51 tokens exceed sliding_window 50", WINDOWED, IDS[:, :1].expand(1, 51)),
    ("cannot truncate a cache of 0 tokens to 5", KVCache().truncate, 5),
    ("a cache has no gradients", MODEL.hidden, IDS, None, KVCache()),
    ("attention of 0 queries", attention, HEADS[:, :, :0], HEADS, HEADS),
    ("attention of 5 queries to 0", attention, HEADS, HEADS[:, :, :0], HEADS[:, :, :0]),
    ("empty", linear_cross_entropy, torch.zeros(0, 16), HEAD, NONE),
    ("do not fit", linear_cross_entropy, torch.zeros(3, 16), HEAD, IDS),
    ("2\\^31", linear_cross_entropy, torch.zeros(1, 4, 16), HEAD, IDS, -100, 2**30),
]


@pytest.mark.parametrize(("match", "function", "arguments"), [(m, f, a) for m, f, *a in REFUSED])
def test_nonsense_is_one_value_error(match, function, arguments):
    with pytest.raises(ValueError, match=match):
        function(*arguments)


def test_a_sliding_window_counts_what_the_cache_holds():
    _, cache = prefill(WINDOWED, torch.arange(50))
    with pytest.raises(ValueError, match="51 tokens exceed sliding_window 50"):
        prefill(WINDOWED, torch.arange(1), cache)


# ---- loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", ["", "hidden", "weight", "hidden weight"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_linear_cross_entropy_equals_f_cross_entropy(chunk, needed):
    """[E9] loss and gradients in float64, with ignored targets and a ragged last chunk. Only the
    gradients that are needed are computed, and all logits never exist at once."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 30, 4).double(), torch.randn(83, 4).double()
    targets = torch.randint(83, (2, 30))
    targets[0, 3:9] = -100
    inputs = {"hidden": hidden, "weight": weight}
    asked = [inputs[name].requires_grad_() for name in needed.split()]
    with Watch() as naive:
        logits = (hidden @ weight.T).flatten(0, 1)
        oracle = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    with Watch() as ours:
        loss, n = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk)
    with Watch() as judging, torch.no_grad():  # a parameter asks for its gradient even here
        judged, _ = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk)
    assert n == 54 and loss.dtype == torch.float64 and abs((loss - oracle).item()) < 1e-6
    assert torch.equal(judged, loss.detach())
    assert ours.largest <= max(min(chunk, 60) * 83, 83 * 4) <= naive.largest == 60 * 83
    chunks = math.ceil(60 / chunk)
    assert (judging.calls["mm"], ours.calls["mm"]) == (chunks, chunks * (1 + len(asked)))
    if asked:
        expected = torch.autograd.grad(oracle * 0.7, asked)
        for _ in range(2):  # twice: the same
            grads = torch.autograd.grad(loss * 0.7, asked, retain_graph=True)
            assert all((a - b).abs().max() < 1e-6 for a, b in zip(grads, expected, strict=True))


def test_any_ignore_index_is_ignored_and_nonsense_targets_are_not():
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    expected = F.cross_entropy(hidden[:2] @ weight.T, torch.tensor([1, 2]), reduction="sum")
    loss, n = linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 255]), ignore_index=255)
    assert n == 2 and abs(float(loss - expected)) < 1e-5
    with pytest.raises((RuntimeError, IndexError)):
        linear_cross_entropy(hidden, weight, torch.tensor([1, 2, -1]))


def test_loss_of_bf16_is_summed_in_fp32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 300, 32), torch.randn(70, 32)
    targets = torch.randint(70, (1, 300))
    b_hidden, b_weight = hidden.bfloat16(), weight.bfloat16()
    loss, _ = linear_cross_entropy(b_hidden, b_weight, targets, chunk_tokens=16)
    exact, _ = linear_cross_entropy(b_hidden.double(), b_weight.double(), targets)
    assert loss.dtype == torch.float32
    assert abs(float(loss) / float(exact) - 1) < 1e-3  # bf16 logits: 2^-9 a row, averaged out


# ---- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_opens_what_we_save(tied, tmp_path, monkeypatch):
    """With another theta and window; read and written in shards."""
    hf = make_hf_llama(tie_word_embeddings=tied)
    hf.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    ours = load_pretrained(tmp_path / "hf")
    ours.config = ours.config.with_rope(250_000.0, 1024)
    monkeypatch.setattr("support.huggingface.checkpoint.SHARD_BYTES", 50_000)
    save_pretrained(ours, tmp_path / "ours")
    for folder in (tmp_path / "hf", tmp_path / "ours"):
        assert len(list(folder.glob("*.safetensors"))) > 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    again, ids = load_pretrained(tmp_path / "ours"), torch.arange(60)[None]
    with torch.no_grad():
        assert torch.equal(again(ids), ours(ids)) and again.config == ours.config
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4
        assert (hf(ids).logits - ours(ids)).abs().max() > 1e-2  # the new theta was not ignored
    assert theirs.config.max_position_embeddings == 1024
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 250_000.0


def test_a_save_that_is_cut_off_leaves_the_old_folder(tmp_path, monkeypatch):
    """By an error; and by a kill between moving the old folder away and the new one in."""
    save_pretrained(MODEL, tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / ".m.old")
    (tmp_path / "m.old").mkdir()  # somebody's own
    save_pretrained(MODEL, tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.old"]
    before = (tmp_path / "m" / "model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("support.huggingface.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(MODEL, tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.old"]


# ---- a real model ------------------------------------------------------------------------------


def test_the_tokenizer_of_a_real_model(smollm2_dir):
    """Ids are those of `tokenizers`. Special tokens in a text are data."""
    ours = load_tokenizer(smollm2_dir)
    theirs = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    for text in (
        "1234 5 6\n\n  7\t8 it's  they'LL\r\n",
        "a  1  b \x04\x06 c\u00f1\U000f0000 tail",
        "你好。 Привет!  \u00a0 x\u2028y ①²",
        "   \n 3.14 os.path\n\n\n",
        "'s't're 've'm",
        standard_library_topics()[:300_000],
    ):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)[:100]
        assert ours.decode(ids) == text or "\x04" in text  # that byte is not in its vocabulary
    ids = ours.encode("<|im_start|>user")
    assert ours.bos_id not in ids and ours.decode(ids) == "<|im_start|>user"
    assert (ours.bos_id, ours.eos_id, ours.adds_bos, ours.vocab_size) == (1, 2, False, 49152)


def test_a_real_model_speaks(smollm2_dir):
    """The conversion from GGUF is right only if all of it is: permuted q and k, Digits, tied
    head."""
    model, tokenizer = load_pretrained(smollm2_dir), load_tokenizer(smollm2_dir)
    ids = torch.tensor(tokenizer.encode("The capital of France is"))
    assert tokenizer.decode(generate(model, ids, 2)) == " Paris."


# ---- copied into another project ---------------------------------------------------------------

RESCALED = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}


def of_the_model(model_py, scaling: dict | None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    config = model_py.LlamaConfig(97, 32, 48, 2, 4, 2, 8, 64, rope_scaling=scaling)
    model, pos = model_py.Llama(config), torch.tensor([[0, 1, 2, 9, 10, 40, 41, 42, 43, 99]])
    model.activation_checkpointing = True
    ids, head = torch.randint(97, (1, 10)), model.lm_head.weight
    loss, n = model_py.linear_cross_entropy(model.hidden(ids, pos), head, ids.roll(-1))
    (loss / n).backward()
    out = model_py.generate(model, ids[0], 5)
    _, cache = model_py.prefill(model, ids[0, :4], chunk_tokens=3)
    assert model_py.generate(model, ids[0, 4:], 5, cache) == out
    return [model(ids, pos).detach(), loss.detach(), head.grad, torch.tensor(out)]


def of_the_recipe(model_py, recipe) -> list[torch.Tensor]:
    config = model_py.LlamaConfig(256, 32, 48, 2, 4)
    original, tuned = model_py.Llama(config), model_py.Llama(config)
    theta = recipe.ntk_rope_base(1e4, 8, 64, 512)
    tuned.config = tuned.config.with_rope(theta, 512)
    text = torch.tensor(list(b"Ada had 7 apples. Nobody knew! Was it Bob? " * 12))
    starts, g = torch.arange(0, len(text), 18), torch.Generator().manual_seed(0)

    def sample(select, impactful=None):
        kept, begins = recipe.select_segments(text, starts, 160, select, g, impactful)
        return text[kept], recipe.sample_position_ids("longrecipe", 160, 512, begins, g)

    sums = recipe.logit_shift(original, tuned, *sample("random"), first_position=64)
    types = recipe.impactful_types(*sums[1:])
    x, pos = (t[None] for t in sample("impact", types))
    targets = recipe.next_token_targets(x)
    loss, _ = model_py.linear_cross_entropy(tuned.hidden(x, pos), tuned.lm_head.weight, targets)
    merged = recipe.merge_weights(original.state_dict(), tuned.state_dict())
    return [torch.tensor(theta), sums[0], types, x, pos, loss.detach(), *merged.values()]


def test_model_py_and_recipe_py_work_alone(monkeypatch):
    """Without support/ they give what they give here; what splits texts, or reads or writes model
    folders, says what it lacks."""

    def results(*files) -> list[torch.Tensor]:
        plain, scaled = (of_the_model(files[0], scaling) for scaling in (None, RESCALED))
        assert (plain[0] - scaled[0]).abs().max() > 5e-5  # the scaling does act
        return plain + scaled + of_the_recipe(*files)

    expected, alone = results(model_py, recipe_py), []
    for name in {"support", *(name for name in sys.modules if name.startswith("support."))}:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    for name in ("model", "recipe"):
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
        monkeypatch.setitem(sys.modules, name, importlib.util.module_from_spec(spec))
        spec.loader.exec_module(sys.modules[name])
        alone.append(sys.modules[name])
    for a, b in zip(results(*alone), expected, strict=True):
        assert a.dtype == b.dtype and torch.allclose(a.double(), b.double(), atol=1e-5)
    model, recipe = alone
    yarn, options = {"rope_type": "yarn", "factor": 8.0}, {"method": "none", "select": "first"}
    for ask in (
        lambda: model.load_pretrained("x"),
        lambda: model.load_tokenizer("x"),
        lambda: model.LlamaConfig.from_dir("x"),
        lambda: model.save_pretrained(MODEL, "x"),
        lambda: model.inverse_frequencies(8, 1e4, yarn),
        lambda: recipe.split_segments(IDS[0], None),
        lambda: recipe.make_example(IDS[0], None, 3, 4, generator=torch.Generator(), **options),
        lambda: recipe.merge("a", "b", "c"),
        lambda: recipe.main([]),
    ):
        with pytest.raises(ModuleNotFoundError, match="support"):
            ask()
