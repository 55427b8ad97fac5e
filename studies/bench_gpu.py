"""What one GPU does with a Llama-3-8B of random weights:

    python studies/bench_gpu.py --cap_GB 80 --minutes 8

Each part writes its result to --out at once. Parts that are there are skipped, so the same command
goes on where it was cut off; a part that failed is recorded, and tried again by the next call. The
parts come in order of importance, each with its seconds: --minutes runs those that fit.
--parts picks some. --toy is the same at a size for two CPU cores, and a test runs it. --cap_GB
emulates a smaller card on a larger one. Parts that assets/results/gpu.json lacks: not run yet.
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from common import read_json, write_json
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import KVCache, Llama, LlamaConfig, generate, prefill
from support.memory import count, kernels
from support.memory.activations import set_levers
from support.memory.optimizer import make_optimizer
from support.system.bad_input import BadInput
from support.system.console import provenance, report_errors
from train import Settings, accumulate, next_token_targets

LLAMA3_8B = LlamaConfig(**vars(count.LLAMA3_8B), max_position_embeddings=8192)
SMOLLM2 = LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 8192, 1e5, tie_word_embeddings=True)
TOY = LlamaConfig(512, 64, 128, 2, 4, 2, 16, 64)


class Bench:
    """The parts and what they share: the device, the model's shape, the lengths."""

    def __init__(self, args):
        self.on_gpu, self.toy = torch.cuda.is_available(), args.toy
        self.device = "cuda" if self.on_gpu else "cpu"
        self.config, self.small = (TOY, TOY) if args.toy else (LLAMA3_8B, SMOLLM2)
        self.sample, self.target = (128, 256) if args.toy else (39_424, 131_072)
        self.replay_length = 64 if args.toy else 8192
        self.dtype = torch.float32 if args.toy else torch.bfloat16
        if self.on_gpu and args.cap_GB:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_GB * 1e9 / total))

    def parts(self) -> dict[str, tuple[float, Callable[[], dict]]]:
        """Name -> (seconds, work), the most important first. Seconds: measured on an H200 where
        assets/results/gpu.json has the part, else estimated."""
        step, best = self.step, ("keep_attention", "offload_inputs")
        small = partial(step, "keep_attention", config=self.small, optimizer="adamw")
        full = partial(step, "offload_inputs", "split_mlp", tokens=self.target)
        uncompiled = partial(step, *best, compiled=False)
        eight_bit = partial(step, "offload_inputs", optimizer="adamw-8bit")
        return {
            "machine": (0, self.machine),
            "step adamw-host keep offload": (72, partial(step, *best)),
            "prefill joined": (40, partial(self.prefill, join=True)),
            "decode": (40, self.decode),
            "step full length, split MLP": (180, full),
            "step adamw-host keep offload, not compiled": (72, uncompiled),
            "prefill masked": (50, partial(self.prefill, join=False)),
            "resume": (30, self.resume),
            "step small, sample": (30, small),
            "step small, replay": (15, partial(small, tokens=self.replay_length)),
            "gemm": (1, self.gemm),
            f"attention {self.sample}": (4, partial(self.attention, self.sample)),
            "transfer": (2, self.transfer),
            "step adamw-8bit offload": (60, eight_bit),
            "step adamw-host": (75, step),
            f"attention {self.target}": (20, partial(self.attention, self.target)),
        }

    def once(self, work: Callable) -> float:
        """Seconds of one call."""
        wait = torch.cuda.synchronize if self.on_gpu else lambda: None
        wait()
        started = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - started

    def seconds(self, work: Callable, n: int = 3) -> float:
        """Best of n, after one to warm up."""
        work()
        return min(self.once(work) for _ in range(n))

    def peaks(self) -> dict:
        """Bytes since the part began; None without a GPU."""
        if not self.on_gpu:
            return {"max_allocated": None, "max_reserved": None}
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"max_allocated": allocated, "max_reserved": reserved}

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def model(self, config: LlamaConfig) -> Llama:
        """Random weights, made where they live and in their dtype."""
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                return Llama(config)
        finally:
            torch.set_default_dtype(torch.float32)

    def trainee(self, config: LlamaConfig, tokens: int, optimizer: str, levers=()) -> tuple:
        """(a model with these levers, its optimizer, one batch of one random sample, settings)."""
        settings = Settings(optimizer=optimizer, dtype=str(self.dtype).removeprefix("torch."))
        settings = replace(settings, **dict.fromkeys(levers, True))
        model, ids = self.model(config), torch.randint(config.vocab_size, (1, tokens))
        set_levers(model, settings)
        batch = [(ids, torch.arange(tokens)[None], next_token_targets(ids))]
        return model, make_optimizer(optimizer, model, 1e-6, 0.1), batch, settings

    # ---- parts ---------------------------------------------------------------------------------

    def machine(self) -> dict:
        found = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": self.device}
        if self.on_gpu:
            gpu = torch.cuda.get_device_properties(0)
            found |= {"gpu": gpu.name, "bytes": gpu.total_memory}
            found["cudnn"] = torch.backends.cudnn.version()
        return found

    def gemm(self) -> dict:
        """The ceiling of matrix products in the model's shapes."""
        c, T, found = self.config, self.sample, {}
        for name, n in {"q_proj": c.hidden_size, "gate_proj": c.intermediate_size}.items():
            a, b = self.random(T, c.hidden_size), self.random(c.hidden_size, n)
            seconds = self.seconds(partial(torch.matmul, a, b), 10)
            found[name] = {"tflops_per_s": 2 * T * c.hidden_size * n / seconds / 1e12}
        return found

    def attention(self, T: int) -> dict:
        """Forward and backward, by kernel."""
        c, found = self.config, {}
        tera_flops = 2.0 * count.attention_flops(c, T) / c.num_hidden_layers / 1e12  # forward
        heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        q, k, v = (self.random(1, n, T, c.head_dim).requires_grad_() for n in heads)

        def forward() -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        for backend in kernels.CUDA_BACKENDS if self.on_gpu else [SDPBackend.FLASH_ATTENTION]:
            try:
                with sdpa_kernel(backend):
                    once = self.seconds(lambda: forward().detach())
                    backward = self.seconds(lambda: forward().sum().backward()) - once
            except RuntimeError as error:  # this kernel does not take these shapes
                found[backend.name] = {"refused": str(error).split("\n")[0]}
                continue
            found[backend.name] = {
                "forward_s": once,
                "backward_s": backward,
                "forward_tflops_per_s": tera_flops / once,
                "backward_tflops_per_s": 2.5 * tera_flops / max(backward, 1e-9),
            }
        return found

    def transfer(self) -> dict:
        """Host to device and back, page-locked and ordinary memory."""
        n = 1 << (20 if self.toy else 30)
        there, found = torch.empty(n, dtype=torch.uint8, device=self.device), {"bytes": n}
        for name in ("ordinary", "page-locked") if self.on_gpu else ("ordinary",):
            here = torch.ones(n, dtype=torch.uint8, pin_memory=name == "page-locked")
            for way, to, source in (("device", there, here), ("host", here, there)):
                seconds = self.seconds(partial(to.copy_, source))
                found[f"{name} to {way}, GB/s"] = n / seconds / 1e9
        return found

    def step(
        self, *levers: str, tokens=0, config=None, optimizer="adamw-host", compiled=True
    ) -> dict:
        """Seconds a sequence, causal MFU, peaks of memory; then one optimizer step."""
        tokens, config = tokens or self.sample, config or self.config
        sequences = 1 if tokens == self.target else 2
        model, stepper, batch, settings = self.trainee(config, tokens, optimizer, levers)
        with mock.patch.dict(os.environ, {kernels.COMPILE: str(int(compiled))}):
            accumulate(model, batch)  # warm up: gradients, page-locked buffers
            total = self.once(lambda: [accumulate(model, batch) for _ in range(sequences)])
            of_sequences = self.peaks()
            stepper.step(1e-6, 1.0)  # makes m and v
            loss = accumulate(model, batch)
        step_s = self.once(lambda: stepper.step(1e-6, 1.0))
        return {
            **count.speed(config, tokens, 1, total / sequences, self.device),
            "seconds_per_sequence": total / sequences,
            "optimizer_step_s": step_s,
            "loss": loss,
            **self.peaks(),
            **{f"{name}_without_optimizer_step": n for name, n in of_sequences.items()},
            "planned": sum(count.device_bytes(config, settings, tokens, self.device).values()),
        }

    def prefill(self, join: bool) -> dict:
        """A whole context of the target's length, once; join: the past by [E12]."""
        T, model, chunk = self.target, self.model(self.config), 64 if self.toy else None
        ids = torch.randint(self.config.vocab_size, (T,))
        joining = kernels.joining if join else lambda q, k: None
        with mock.patch.object(kernels, "joining", joining):
            prefill(model, ids[: T // 16], chunk_tokens=chunk)  # warm up
            seconds = self.once(lambda: prefill(model, ids, chunk_tokens=chunk))
        return {"tokens": T, "seconds": seconds, **self.peaks()}

    def decode(self) -> dict:
        """Seconds a new token behind a context of the target's length."""
        T, new, model = self.target, 16, self.model(self.config)
        ids, cache = torch.randint(self.config.vocab_size, (T,)), KVCache()
        prefill(model, ids[: T - new], cache)
        generate(model, ids[:1], new, cache)  # warm up
        seconds = self.once(lambda: generate(model, ids[:1], new, cache)) / new
        return {"tokens": T, "seconds_per_token": seconds, **self.peaks()}

    def resume(self) -> dict:
        """Two optimizer steps, against one, a save, and one more in a model of its own."""
        found, weights, what = {}, [], (self.small, self.replay_length, "adamw")
        for cut in (False, True):
            torch.manual_seed(0)
            model, stepper, batch, _ = self.trainee(*what)
            for _ in range(2):
                accumulate(model, batch)
                stepper.step(1e-4, 1.0)
                if cut:
                    state = stepper.state_dict()
                    model, stepper, *_ = self.trainee(*what)
                    found["load_s"] = self.once(partial(stepper.load_state_dict, state))
            weights.append([p.detach().float() for p in model.parameters()])
        gaps = [float((a - b).abs().max()) for a, b in zip(*weights, strict=True)]
        return found | {"largest_difference_of_weights": max(gaps)}


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description="What one GPU does with a Llama-3-8B, part by part.")
    p.add_argument("--out", type=Path, default=Path("assets/results/gpu.json"))
    p.add_argument("--parts", nargs="+", help="some of Bench.parts (None: all)")
    p.add_argument("--minutes", type=float, default=1e9, help="run the first parts that fit")
    p.add_argument("--cap_GB", type=float, help="1e9 bytes that may be allocated (None: all)")
    p.add_argument("--toy", action="store_true", help="a tiny model, on whatever is here")
    args = p.parse_args(argv)
    with report_errors():
        if not (args.toy or torch.cuda.is_available()):
            raise BadInput("no CUDA device here; --toy runs on a CPU")
        parts, left = Bench(args).parts(), 60 * args.minutes
        if unknown := set(args.parts or ()) - set(parts):
            raise BadInput(f"--parts {sorted(unknown)} are none of {list(parts)}")
        found = read_json(args.out) or {"parts": {}}
        done = [name for name, result in found["parts"].items() if "failed" not in result]
        print("there already:", ", ".join(done) or "nothing", flush=True)
        for name in args.parts or parts:
            seconds, work = parts[name]
            if name in done or seconds > left:
                continue
            started, left = time.time(), left - seconds
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            try:
                result = work()
            except (RuntimeError, BadInput) as error:  # a result too, and the next part runs
                result = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            about = {"cap_GB": args.cap_GB, "toy": args.toy, **provenance(started)}
            found["parts"][name] = {**result, "about": about}
            write_json(args.out, found, indent=2)
            print(f"{name}: {json.dumps(result)}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
