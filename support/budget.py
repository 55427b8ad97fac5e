"""What training costs: FLOPs of a sequence, and how fast the machine did them."""

import torch

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "A800": 312e12}  # dense bf16


def matmul_parameters(config) -> int:
    """Parameters that multiply activations: all but norms and the input embedding."""
    D, d = config.hidden_size, config.head_dim
    attention = 2 * D * d * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * D * config.intermediate_size
    return config.num_hidden_layers * layer + config.vocab_size * D


def training_flops(config, tokens: int) -> float:
    """FLOPs of one sequence, forward and backward, causal attention, nothing computed twice."""
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens**2
    return 6.0 * matmul_parameters(config) * tokens + 6.0 * attention


def speed(config, tokens: int, sequences: int, seconds: float, device: str) -> dict:
    """Tokens and FLOPs a second of one optimizer step; causal MFU where the GPU's peak is known."""
    flops = training_flops(config, tokens) * sequences / seconds
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
    return {
        "tokens": tokens * sequences,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens * sequences / seconds, 1),
        "tflops_per_s": round(flops / 1e12, 3),
        "causal_mfu": round(flops / peak, 3) if peak else None,
    }
