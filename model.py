"""A Llama from scratch that takes any position ids.

What it is: the decoder-only transformer of the Llama family in plain PyTorch, bottom-up, with a
loss that never holds all logits and a cache for greedy generation. In fp32, logits and gradients
equal those of `transformers` up to rounding. The file can be copied alone: see `support` below.

Why it exists beside `transformers`: LongRecipe (Hu et al., ACL 2025, section 4.2) trains on
samples whose position ids have gaps. Here a position id is a RoPE position and nothing else;
attention is causal in token order, whatever the ids say. (transformers reads a gap as the border
between two packed documents and silently cuts attention there, unless given an all-ones mask.)

    import torch
    from model import load_pretrained, load_tokenizer, generate
    model, tokenizer = load_pretrained("models/smollm2"), load_tokenizer("models/smollm2")
    ids = torch.tensor(tokenizer.encode("The capital of France is"))
    print(tokenizer.decode(generate(model, ids, max_new_tokens=8)))

Does NOT do: padding masks, dropout, sampling, several GPUs, sliding windows.

Glossary (one for all four files)
    B, T, S    sequences in a batch; tokens in a sequence; keys seen by attention (cache included)
    D, V       width of the model (hidden_size); size of the vocabulary
    H, KV, d   query heads; key and value heads (H is a multiple of KV); width of one head
    pos        position ids (B, T) int64: what RoPE rotates by. NOT the token index
    theta      RoPE's base frequency (rope_theta in config.json, --rope_base)
    window L0  longest context of the checkpoint (max_position_embeddings, --base_len)
    target T*  the window we extend to (--target_len); sample L: tokens trained on (--train_len)
    segment    a sentence or line: N in a text, M kept of it; positions may jump between segments
    fill       segments without an impactful token, kept because the others are too few
    prefix r   length of the contiguous start that the released code puts before the spread-out rest
    original   the model one starts from, the paper's H; H': the same after a few steps
    untrained  the original's weights under the new theta (or yarn): the control to beat
    plain positions  0, 1, 2, ... (--method none): the control without spread-out positions
    text       one haystack of the evaluation, with its needles
    result     one line of needle.jsonl: one prompt and what the model answered
    n          answers behind a percentage: a result that asks for 8 values counts 8 times
"""

import dataclasses
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

try:  # the fastest kernels for this device
    from support.memory.kernels import compiled_in_training, scaled_dot_product_attention
    from support.system.bad_input import BadInput  # a command prints it as one line
except ModuleNotFoundError:
    # Copied without support/: plain torch gives the same numbers. But on a GPU in fp32 attention
    # with grouped heads then takes memory that grows with the square of the length.
    BadInput, scaled_dot_product_attention = ValueError, F.scaled_dot_product_attention

    def compiled_in_training(function):
        return function


def support(name: str):
    """Import a module of support/ on first use, so that this file works when it is copied alone.
    What then fails: chapter 9, LlamaConfig.from_dir, RoPE type yarn, and the MLP in pieces."""
    return import_module(f"support.{name}")


# ---- 1. Configuration --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama: names and defaults are Hugging Face's (those of the first 7B Llama)."""

    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # None: RoPE type default; else `linear`, `llama3` or `yarn`
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False  # qwen2
    qk_norm: bool = False  # qwen3
    sliding_window: int | None = None  # mistral; a longer input is refused, not cut
    raw: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)  # config.json

    def __post_init__(self):  # object.__setattr__ gets past frozen=True
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @classmethod
    def from_dir(cls, path: str | Path) -> "LlamaConfig":
        """Read `path`/config.json. Raises BadInput for a field that is missing or unsupported."""
        return cls(**support("huggingface.folders").read_config(path))

    def with_rope(self, theta: float, max_len: int, scaling: dict | None = None) -> "LlamaConfig":
        """The same shape with another theta, window and, if one is given, rope_scaling."""
        rope = {"rope_theta": float(theta), "rope_scaling": scaling or self.rope_scaling}
        return dataclasses.replace(self, max_position_embeddings=max_len, **rope)


# ---- 2. Norm -----------------------------------------------------------------------------------

# x / sqrt(mean(x^2) + eps) * weight, in fp32 inside (Zhang and Sennrich, 2019). transformers rounds
# a bf16 result also before the product with the weight, so the last bit of the two may differ.
RMSNorm = nn.RMSNorm


# ---- 3. Rotary position embedding --------------------------------------------------------------


def inverse_frequencies(head_dim: int, theta: float, scaling: dict | None = None) -> Tensor:
    """Radians per position of each pair of dimensions, (d/2,) fp32. scaling: as in config.json."""
    j = torch.arange(head_dim // 2).float()
    # [E1] theta_j = theta^(-2j/d), j = 0 .. d/2 - 1   pair 0 turns by 1 radian a position
    inv_freq = 1.0 / theta ** (2 * j / head_dim)
    if scaling is None:
        return inv_freq
    slow = inv_freq / scaling["factor"]  # position interpolation: as if all ids were divided
    if scaling["rope_type"] == "linear":
        return slow
    # llama3 and yarn: pairs that turn often within the original window keep their frequency, those
    # that turn rarely slow down by the factor, and those in between get a mixture of both.
    if scaling["rope_type"] == "yarn":
        stay = support("huggingface.yarn").share(head_dim, theta, scaling)
    else:
        turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * torch.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        stay = ((turns - low) / (high - low)).clamp(0, 1)
    return stay * inv_freq + (1 - stay) * slow


def rotary_angles(position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE (Su et al., 2021), (B, 1, T, d/2) fp32, for position ids (B, T)."""
    # [E1] angle[t, j] = pos[t] * theta_j   pos is the position ID, not the index t
    angle = position_ids[:, None, :, None].float() * inv_freq  # (B, 1, T, d/2) fp32, radians
    return angle.cos(), angle.sin()


@compiled_in_training
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[j], x[j + d/2]) of x (B, H, T, d) by its angle, in fp32. Hugging Face's
    checkpoints pair the two halves of a head; the RoPE paper pairs neighbours, x[2j], x[2j + 1]."""
    a, b = x.chunk(2, dim=-1)  # (B, H, T, d/2) each; bf16 times fp32 is fp32
    # [E1] (a, b) -> (a cos - b sin, b cos + a sin)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# ---- 4. Attention ------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in token order: q (B, H, T, d), k and v (B, KV, S, d) -> (B, H, T, d). The
    T queries are the LAST T of the S tokens. ValueError unless 1 <= T <= S."""
    T, S = q.shape[2], k.shape[2]
    if not 1 <= T <= S:
        raise ValueError(f"attention of {T} queries to {S} tokens: 1 <= T <= S must hold")
    # subtle: for T < S, SDPA's is_causal aligns the triangle top-left: query 0 would see key 0, not
    # S - T + 1 keys, and a prefill in chunks would be silently wrong. Hence lower-right.
    mask = causal_lower_right(T, S) if 1 < T < S else None  # a single query sees all keys
    return scaled_dot_product_attention(q, k, v, mask, is_causal=T == S, enable_gqa=True)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        self.head_dim = d
        self.q_proj = nn.Linear(D, config.num_attention_heads * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d, D, bias=False)
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache, layer: int) -> Tensor:
        B, T, _ = x.shape  # cache: a KVCache of the tokens before these T, or None (chapter 8)
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, KV, T, d)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, KV, T, d)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, KV, S, d)
        return self.o_proj(attention(q, k, v).transpose(1, 2).reshape(B, T, -1))


# ---- 5. Block ----------------------------------------------------------------------------------


@compiled_in_training
def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.split = False  # True: some tokens at a time (support/memory/activations.py)

    def forward(self, x: Tensor) -> Tensor:
        if self.split and torch.is_grad_enabled():
            return support("memory.activations").split_mlp(x, self, gated)
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---- 6. The model ------------------------------------------------------------------------------


class Llama(nn.Module):
    """The whole model. Its parameters have the names of Hugging Face's checkpoints.

    `activation_checkpointing` stores only each layer's input and computes the layer again in the
    backward pass, so that the activations of one layer are alive at a time. Other ways to save
    memory are in support/memory/activations.py. None changes what is computed."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.checkpoint_options = {"use_reentrant": False}  # of torch.utils.checkpoint
        self.around_layers = nullcontext  # a context for the loop over checkpointed layers
        embed = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.model = nn.ModuleDict({"embed_tokens": embed, "layers": layers, "norm": norm})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for weight in self.parameters():
            if weight.ndim > 1:  # norms stay at one
                nn.init.normal_(weight, std=0.02)
        if config.tie_word_embeddings:
            self.lm_head.weight = embed.weight

    def hidden(self, input_ids: Tensor, position_ids: Tensor | None = None, cache=None) -> Tensor:
        """Last hidden states after the final norm: input_ids (B, T) int64 -> (B, T, D).

        position_ids (B, T) int64 may have gaps and exceed the window; None: they go on from the
        tokens in the cache, or from 0. A KVCache is extended. ValueError for empty or misshaped
        input, and for a cache while gradients are on; BadInput beyond a sliding_window."""
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids {tuple(input_ids.shape)} are not (B, T), or hold no token")
        if cache is not None and torch.is_grad_enabled():
            raise ValueError("a cache has no gradients: call the model under torch.no_grad()")
        B, T = input_ids.shape
        c = self.config
        start = 0 if cache is None else cache.length
        if c.sliding_window is not None and start + T > c.sliding_window:
            raise BadInput(f"{start + T} tokens exceed sliding_window {c.sliding_window}")
        if position_ids is None:
            position_ids = torch.arange(start, start + T, device=input_ids.device).expand(B, T)
        if position_ids.shape != (B, T):
            raise ValueError(f"position_ids {tuple(position_ids.shape)} must be shaped {(B, T)}")
        # subtle: computed at each call and not stored. model.to(bfloat16) would round a buffer to 8
        # bits, and position * frequency would be off by radians at position 8,192.
        inv_freq = inverse_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        cos, sin = rotary_angles(position_ids, inv_freq.to(input_ids.device))
        if c.rope_scaling and c.rope_scaling["rope_type"] == "yarn":
            factor = support("huggingface.yarn").attention_factor(c.rope_scaling)
            cos, sin = factor * cos, factor * sin  # scales q and k, so the scores by its square
        x = self.model["embed_tokens"](input_ids)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        with self.around_layers() if recompute else nullcontext():
            for i, block in enumerate(self.model["layers"]):
                # subtle: checkpoint() stores its tensor arguments for every layer. Bound with
                # partial, cos and sin are stored once.
                run = partial(block, cos=cos, sin=sin, cache=cache, layer=i)
                x = checkpoint(run, x, **self.checkpoint_options) if recompute else run(x)
        if cache is not None:
            cache.length += T
        return self.model["norm"](x)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), for short texts: 39,424 tokens of Llama 3 would take 20 GB in fp32."""
        return self.lm_head(self.hidden(input_ids, position_ids))


# ---- 7. Loss in chunks -------------------------------------------------------------------------


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss is one number, so its gradients can be computed in the forward pass, chunk by chunk,
    while a chunk's logits exist; the backward pass only multiplies them by grad_loss."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, chunk_tokens):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        of_hidden, of_weight = ctx.needs_input_grad[:2]  # a frozen weight needs none
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if of_weight else None
        for i in range(0, len(hidden), chunk_tokens):
            h, y = hidden[i : i + chunk_tokens], targets[i : i + chunk_tokens]
            valid = y != ignore_index
            index = y.where(valid, 0)[:, None]  # an ignored row may have any index
            logits = (h @ weight.T).to(wide)  # (chunk, V)
            lse = logits.logsumexp(-1, keepdim=True)
            # [E9] loss = sum over valid t of  log sum_v exp(z[t, v]) - z[t, y_t]
            loss += ((lse - logits.gather(-1, index))[:, 0] * valid).sum()
            if of_hidden or of_weight:
                # d loss / d z[t, v] = softmax(z)[t, v] - [v == y_t]
                grad = logits.sub_(lse).exp_().scatter_add_(-1, index, -torch.ones_like(lse))
                grad = grad.mul_(valid[:, None]).to(hidden.dtype)
                if of_hidden:
                    grad_hidden[i : i + chunk_tokens] = grad @ weight
                if of_weight:
                    grad_weight += grad.T @ h
            logits = grad = None  # free them before the next chunk's are made
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        grads = (None if g is None else (g * grad_loss).to(dtype) for g, dtype in pairs)
        return *grads, None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index=-100, chunk_tokens: int = 2048
) -> tuple[Tensor, int]:
    """Cross-entropy of `hidden @ weight.T` against targets without ever holding the (T, V) logits.

    hidden (..., D), weight (V, D), targets (...) int64 -> (loss_sum, n_valid): the SUM of the
    losses in nats, fp32 (float64 for float64 input), and the number of targets that are not
    ignore_index. The caller divides by the targets of a whole optimizer step ([E17] in train.py).
    ValueError if there are no tokens, shapes do not fit or chunk_tokens * V reaches 2^31."""
    V, D = weight.shape
    if hidden.shape != (*targets.shape, D) or targets.numel() == 0:
        shapes = [tuple(x.shape) for x in (hidden, targets, weight)]
        raise ValueError(f"hidden, targets, weight {shapes}: empty or do not fit")
    if chunk_tokens < 1 or chunk_tokens * V >= 2**31:
        raise ValueError(f"chunk_tokens {chunk_tokens} x vocabulary {V} must be below 2^31")
    flat_hidden, flat_targets = hidden.reshape(-1, D), targets.reshape(-1)
    if not torch.is_grad_enabled():  # an autograd.Function would still compute gradients
        flat_hidden, weight = flat_hidden.detach(), weight.detach()
    loss = _LinearCrossEntropy.apply(flat_hidden, weight, flat_targets, ignore_index, chunk_tokens)
    return loss, int((targets != ignore_index).sum())


# ---- 8. Key-value cache and greedy generation --------------------------------------------------


class KVCache:
    """Keys and values of the `length` tokens seen so far. Each layer extends its own; Llama.hidden
    raises `length` after the last layer."""

    def __init__(self):
        self.length = self.room = 0  # tokens held; tokens for which extend makes room at once
        self.layers: dict[int, Tensor] = {}  # keys and values in one tensor, (2, B, KV, room, d)

    def truncate(self, length: int) -> None:
        """Forget all but the first tokens: prompts with a common beginning then prefill it once."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, KV, T, d) of one layer; returns views (B, KV, length + T, d)."""
        new, end = torch.stack((k, v)), self.length + k.shape[2]
        kept = self.layers.get(layer, new[:, :, :, :0])
        missing = max(end, self.room) - kept.shape[3]
        if missing > 0:  # 1,024 more than asked for, so that generation seldom has to copy
            kept = self.layers[layer] = F.pad(kept, (0, 0, 0, missing + 1024))
        kept[:, :, :, self.length : end] = new
        return kept[0, :, :, :end], kept[1, :, :, :end]


@torch.no_grad()
def prefill(
    model: Llama, ids: Tensor, cache: KVCache | None = None, chunk_tokens: int | None = None
) -> tuple[Tensor, KVCache]:
    """Run ids (T,) int64, T >= 1, after what the cache holds, chunk_tokens at a time to save memory
    (None: 16,384 on a GPU, 2,048 on a CPU) -> (logits of the last token (V,), the cache)."""
    cache = KVCache() if cache is None else cache
    cache.room = cache.length + len(ids)
    ids = ids.to(model.lm_head.weight.device)
    chunk_tokens = chunk_tokens or (16_384 if ids.is_cuda else 2048)
    for chunk in ids.split(chunk_tokens):
        hidden = model.hidden(chunk[None], cache=cache)
    return model.lm_head(hidden[0, -1]), cache


@torch.no_grad()
def generate(
    model: Llama, ids: Tensor, max_new_tokens: int, cache: KVCache | None = None, stop_ids=()
) -> list[int]:
    """Greedy continuation. ids (T,) int64, T >= 1: the tokens not yet in the cache -> the new ids.

    Stops before the first id in stop_ids (which is not returned) or after max_new_tokens."""
    out: list[int] = []
    while len(out) < max_new_tokens:
        logits, cache = prefill(model, ids, cache)
        ids = logits.argmax(keepdim=True)  # (1,)
        if int(ids) in stop_ids:
            break
        out.append(int(ids))
    return out


# ---- 9. Hugging Face folders -------------------------------------------------------------------


def load_tokenizer(path: str | Path):
    """A folder's tokenizer: encode(text), decode(ids), ... (support/huggingface/tokenizer.py)."""
    return support("huggingface.tokenizer").load_tokenizer(path)


def load_pretrained(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Llama:
    """Read a Hugging Face folder (config.json + safetensors, single or sharded), tensor by tensor.

    dtype None: bf16 on CUDA, fp32 on CPU (where bf16 can be 50 times slower than fp32).
    BadInput names tensors that are missing, unknown or of the wrong shape."""
    config = LlamaConfig.from_dir(path)
    with torch.device("meta"):  # shapes without memory
        model = Llama(config)
    return support("huggingface.folders").load_weights(model, path, dtype, torch.device(device))


def save_pretrained(model: Llama, path: str | Path, tokenizer_from: str | Path | None = None):
    """Write a folder that transformers can load as it is: config.json, safetensors, and the
    tokenizer files of `tokenizer_from`. Written beside `path`, then renamed: never half a model."""
    support("huggingface.folders").save(model, path, tokenizer_from)
