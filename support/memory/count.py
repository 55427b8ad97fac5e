"""What training costs, from the shape of a model alone: FLOPs and bytes, part by part.

Counted by hand from model.py and train.py; tests/test_plan.py holds the bytes against what is
alive in real runs and in a simulation of an 8B, the FLOPs against design figures.
L layers, D width, F width of the MLP, H and KV heads of d numbers, V types, T tokens of a sample,
N parameters, w bytes of a weight (2: bf16, 4: fp32). `run`: anything that has the settings of
train.py called dtype, optimizer, keep_attention, offload_inputs and split_mlp."""

from types import SimpleNamespace

import torch

GPUS = {  # dense bf16 FLOP/s, bytes to plan with
    "H100": (989e12, 80e9),
    "H200": (989e12, 141e9),
    "A100": (312e12, 80e9),
    "A800": (312e12, 80e9),
}
LLAMA3_8B = SimpleNamespace(  # the shape that was measured
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
)
CHUNK = 2048  # tokens of the loss at a time, see model.linear_cross_entropy
EIGHT_BIT = 1 + 4 / 256  # bytes of a number in m or v of adamw-8bit: a block of 256 has one scale

# ---- parameters and FLOPs ----------------------------------------------------------------------


def layer_parameters(config) -> int:
    """Parameters in the matrices of all layers."""
    D, d = config.hidden_size, config.head_dim
    attention = 2 * D * d * (config.num_attention_heads + config.num_key_value_heads)
    return config.num_hidden_layers * (attention + 3 * D * config.intermediate_size)


def matmul_parameters(config) -> int:
    """Parameters that multiply activations: all but norms, biases and the input embedding."""
    return layer_parameters(config) + config.vocab_size * config.hidden_size


def parameters(config) -> tuple[int, int]:
    """(parameters in matrices, parameters in vectors: norms and biases)."""
    L, D, d = config.num_hidden_layers, config.hidden_size, config.head_dim
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * D
    vectors = (2 * L + 1) * D + 2 * L * d * config.qk_norm
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    return matmul_parameters(config) + embedding, vectors + L * heads * d * config.qkv_bias


def attention_flops(config, tokens: int) -> float:
    """FLOPs of one product of queries and keys in all layers, the causal half only; a multiply and
    an add count two."""
    return config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens**2


def forward_flops(config, begin: int, end: int) -> float:
    """FLOPs of a forward pass of tokens begin..end after a cache of `begin`, without the head."""
    products = 2.0 * layer_parameters(config) * (end - begin)
    return products + 2.0 * (attention_flops(config, end) - attention_flops(config, begin))


def training_flops(config, tokens: int) -> float:
    """FLOPs of one sequence, forward and backward, causal attention, nothing computed twice."""
    # [E23] 6 N T + 6 L H d T^2, N without the input embedding: 2 N T + 2 L H d T^2, three times
    return 6.0 * matmul_parameters(config) * tokens + 6.0 * attention_flops(config, tokens)


def executed_flops(config, tokens: int, keep_attention: bool, split_mlp: bool = False) -> float:
    """What the machine computes: layers run forward twice (activation checkpointing; the second
    time without their last product, which nothing needs), attention once or twice, and attention's
    backward pass computes the scores again (5 products instead of 4). With split_mlp the three
    products of the MLP run once more."""
    last = config.num_hidden_layers * config.hidden_size * config.intermediate_size
    again = layer_parameters(config) - last + 3 * last * split_mlp
    linear = 6.0 * matmul_parameters(config) + 2.0 * again
    products = 7.0 if keep_attention else 9.0
    return linear * tokens + products * attention_flops(config, tokens)


def noncausal_flops(config, tokens: int) -> float:
    """training_flops as if attention were not causal: a convention of some papers."""
    # [E23] without the causal half: 6 N T + 12 L H d T^2
    return training_flops(config, tokens) + 6.0 * attention_flops(config, tokens)


def peak_flops(gpu: str) -> float | None:
    """FLOP/s of the GPU of this name; None if it is not in GPUS."""
    return next((peak for key, (peak, _) in GPUS.items() if key in gpu), None)


def speed(config, tokens: int, sequences: int, seconds: float, device: str) -> dict:
    """Tokens and FLOPs a second of one optimizer step; causal MFU where the GPU's peak is known."""
    flops = training_flops(config, tokens) * sequences / seconds
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    return {
        "tokens": tokens * sequences,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens * sequences / seconds, 1),
        "tflops_per_s": round(flops / 1e12, 3),
        "causal_mfu": round(flops / peak, 3) if peak else None,
    }


# ---- bytes -------------------------------------------------------------------------------------


def weight_bytes(run) -> int:
    """w: bytes of a weight."""
    return 2 if run.dtype == "bfloat16" else 4


def layer_bytes(config, run, T: int, kind: str) -> int:
    """Peak of one layer's backward pass, which is in its MLP: what the recomputation left, and the
    gradients of the widest product. With keep_attention, its output is counted elsewhere."""
    D, F, d, w = config.hidden_size, config.intermediate_size, config.head_dim, weight_bytes(run)
    H, KV = config.num_attention_heads, config.num_key_value_heads
    # gate, up, silu(gate), their product, and two gradients; in pieces: the product, two gradients
    mlp = (3 if run.split_mlp else 6) * F * w
    norms = 5 * D * w
    if kind == "cpu":  # there the norm is several operations, whose results are kept in fp32
        norms += 4 * D * (3 if w == 2 else 1)
    attention = (2 * H + 2 * KV) * d * w  # q, k, v, and the output in token order
    again = 0 if run.keep_attention else H * d * w + 4 * H
    # subtle: autograd adds up the two gradients of a tied embedding before it passes them on, so
    # the head's gradient waits until the last layer is done
    tied = 4 * config.vocab_size * D if config.tie_word_embeddings else 0
    return T * (mlp + norms + attention + again + 4 * d) + w * D * F + tied


def loss_bytes(config, T: int, w: int) -> int:
    """Peak around the loss: hidden states, their gradient, the head's gradient, one chunk."""
    D, V = config.hidden_size, config.vocab_size
    head = V * D * (4 + w)  # the sum in fp32 and one chunk's part of it
    chunk = min(T, CHUNK) * V * (4 + (w if w == 2 else 0))
    backward = V * D * (8 + (w if w == 2 else 0))  # the sum, scaled, cast
    return T * D * (4 + 3 * w) + max(head + chunk, backward)


def device_bytes(config, run, T: int, kind: str) -> dict[str, int]:
    """Bytes by part at the peak of a training step, the backward pass of the last layer. kind:
    "cuda" or "cpu"; on a CPU this is host memory."""
    matrices, vectors = parameters(config)
    N, L, w = matrices + vectors, config.num_hidden_layers, weight_bytes(run)
    masters = 12 if w == 2 else 8  # fp32 weights are their own masters
    eight_bit = int(2 * matrices * EIGHT_BIT + masters * vectors)
    optimizers = {"adamw": masters * N, "adamw-host": 0, "adamw-8bit": eight_bit}
    inputs = min(2, L) if run.offload_inputs else L
    attention = T * config.num_attention_heads * (config.head_dim * w + 4)
    return {
        "weights": w * N,
        "gradients": 4 * N,
        "optimizer": optimizers[run.optimizer],
        "layer inputs": inputs * T * config.hidden_size * w,
        "attention outputs": L * attention if run.keep_attention else 0,
        "working set": max(layer_bytes(config, run, T, kind), loss_bytes(config, T, w)),
    }


def host_bytes(config, run, T: int) -> dict[str, int]:
    """Bytes by part that wait in the memory of the host."""
    w, D = weight_bytes(run), config.hidden_size
    largest = max(config.vocab_size, config.intermediate_size) * D
    staged = 12 * sum(parameters(config)) + (4 + w) * largest
    inputs = config.num_hidden_layers * T * D * w
    return {
        "optimizer": staged if run.optimizer == "adamw-host" else 0,
        "layer inputs": inputs if run.offload_inputs else 0,
    }


def disk_bytes(config, run, options) -> dict[str, int]:
    """Bytes by part when the disk is fullest: while a state is written beside the last one, or at
    the end, when replayed and merged weights lie beside the state. options: no_saves and
    keep_stages of train.py."""
    (matrices, vectors), w = parameters(config), weight_bytes(run)
    state = 12 * (matrices + vectors)
    if run.optimizer == "adamw-8bit":
        state = int(matrices * (w + 2 * EIGHT_BIT) + 12 * vectors)
    state = 0 if options.no_saves else state
    weights = w * (matrices + vectors)
    return {
        "training state": state,
        "state being written, or result": max(state, 2 * weights),
        "extended weights": weights if options.keep_stages else 0,
    }
