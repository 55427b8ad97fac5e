"""What one GPU does with a Llama-3-8B of random weights:

    python studies/bench_gpu.py --cap_GB 80 --minutes 8

Each part writes its result to --out at once. Parts that are there are skipped, so the same command
goes on where it was cut off; a part that failed is recorded, and tried again by the next call. The
parts come in order of importance, each with its seconds: --minutes runs those that fit.
--parts picks some. --toy is the same at a size for two CPU cores, and a test runs it. --cap_GB
emulates a smaller card on a larger one. Parts that assets/results/gpu.json lacks: not run yet.
"""

import argparse
import functools
import gc
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import KVCache, Llama, LlamaConfig, generate, prefill
from support.memory import count as budget
from support.memory import kernels
from support.memory.activations import LayerInputsOnHost
from support.memory.optimizer import make_optimizer
from support.system.bad_input import BadInput
from support.system.console import provenance, report_errors
from support.system.whole_files import write_atomically
from train import accumulate, next_token_targets

LLAMA3_8B = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, 500_000.0)
SMOLLM2 = LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 8192, 1e5, tie_word_embeddings=True)
TOY = LlamaConfig(512, 64, 128, 2, 4, 2, 16, 64)


class Bench:
    def __init__(self, args):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.config, self.small = (TOY, TOY) if args.toy else (LLAMA3_8B, SMOLLM2)
        self.toy = args.toy
        self.lengths = (128, 256) if args.toy else (39_424, 131_072)
        self.replay_length = 64 if args.toy else 8192
        self.dtype = torch.float32 if args.toy else torch.bfloat16
        if self.device == "cuda" and args.cap_GB:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_GB * 1e9 / total))

    def parts(self) -> dict[str, tuple[float, functools.partial]]:
        """Name -> (seconds, work), the most important first. Seconds: measured on an H200 where
        assets/results/gpu.json has the part, else estimated."""
        sample, target = self.lengths
        step, small = functools.partial(self.step, tokens=sample), self.small
        eight_bit = {"optimizer": "adamw-8bit", "offload": True}
        full = {"tokens": target, "offload": True, "split_mlp": True, "sequences": 1}
        on_small = {"config": small, "optimizer": "adamw"}
        work = {
            "machine": (0, self.machine),
            "step adamw-host keep offload": (72, functools.partial(step, keep=True, offload=True)),
            "prefill joined": (40, functools.partial(self.prefill, join=True)),
            "decode": (40, self.decode),
            "step full length, split MLP": (180, functools.partial(self.step, **full)),
            "step adamw-host keep offload, not compiled": (
                72,
                functools.partial(step, keep=True, offload=True, compiled=False),
            ),
            "prefill masked": (50, functools.partial(self.prefill, join=False)),
            "resume": (30, self.resume),
            "step small, sample": (30, functools.partial(step, keep=True, **on_small)),
            "step small, replay": (
                15,
                functools.partial(step, **on_small | {"tokens": self.replay_length}, keep=True),
            ),
            "gemm": (1, self.gemm),
            f"attention {sample}": (4, functools.partial(self.attention, sample)),
            "transfer": (2, self.transfer),
            "step adamw-8bit offload": (60, functools.partial(step, **eight_bit)),
            "step adamw-host": (75, step),
            f"attention {target}": (20, functools.partial(self.attention, target)),
        }
        return work

    # ---- measuring -----------------------------------------------------------------------------

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def once(self, work) -> float:
        """Seconds of one call."""
        self.synchronize()
        started = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started

    def seconds(self, work, n: int = 3) -> float:
        """Best of n, after one to warm up."""
        work()
        return min(self.once(work) for _ in range(n))

    def peaks(self) -> dict:
        """Bytes since the part began (main resets the counters)."""
        if self.device != "cuda":
            return {"max_allocated": None, "max_reserved": None}
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return dict(zip(("max_allocated", "max_reserved"), peaks, strict=True))

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

    # ---- parts ---------------------------------------------------------------------------------

    def machine(self) -> dict:
        found = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": self.device}
        if self.device == "cuda":
            gpu = torch.cuda.get_device_properties(0)
            found |= {"gpu": gpu.name, "bytes": gpu.total_memory}
            found["cudnn"] = torch.backends.cudnn.version()
        return found

    def gemm(self) -> dict:
        """The ceiling of matrix products in the model's shapes."""
        c, T = self.config, self.lengths[0]
        found = {}
        for name, n in {"q_proj": c.hidden_size, "gate_proj": c.intermediate_size}.items():
            a, b = self.random(T, c.hidden_size), self.random(c.hidden_size, n)
            seconds = self.seconds(lambda a=a, b=b: a @ b, 10)
            found[name] = {"tflops_per_s": 2 * T * c.hidden_size * n / seconds / 1e12}
        return found

    def attention(self, T: int) -> dict:
        """Forward and backward, by kernel."""
        c, found = self.config, {}
        forward_flops = 2.0 * budget.attention_flops(c, T) / c.num_hidden_layers
        q = self.random(1, c.num_attention_heads, T, c.head_dim).requires_grad_()
        shape = (1, c.num_key_value_heads, T, c.head_dim)
        k, v = (self.random(*shape).requires_grad_() for _ in range(2))
        on_cpu = [SDPBackend.FLASH_ATTENTION]
        for backend in kernels.CUDA_BACKENDS if self.device == "cuda" else on_cpu:
            with sdpa_kernel(backend):

                def forward():
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

                try:
                    once = self.seconds(lambda: forward().detach())
                    both = self.seconds(lambda: forward().sum().backward())
                except RuntimeError as error:  # this kernel does not take these shapes
                    found[backend.name] = {"refused": str(error).split("\n")[0]}
                    continue
            found[backend.name] = {
                "forward_s": once,
                "backward_s": both - once,
                "forward_tflops_per_s": forward_flops / once / 1e12,
                "backward_tflops_per_s": 2.5 * forward_flops / max(both - once, 1e-9) / 1e12,
            }
        return found

    def transfer(self) -> dict:
        """Host to device and back, page-locked and ordinary memory."""
        n = 1 << (20 if self.toy else 30)
        there, found = torch.empty(n, dtype=torch.uint8, device=self.device), {"bytes": n}
        for name, pin in {"ordinary": False, "page-locked": True}.items():
            if pin and self.device == "cpu":
                continue
            here = torch.ones(n, dtype=torch.uint8, pin_memory=pin)
            for way, copy in {
                "to device": functools.partial(there.copy_, here),
                "to host": functools.partial(here.copy_, there),
            }.items():
                found[f"{name} {way}, GB/s"] = n / self.seconds(copy) / 1e9
        return found

    def trainee(self, config: LlamaConfig, tokens: int) -> tuple[Llama, list]:
        """(a model, one batch of one random sample)."""
        model = self.model(config)
        model.activation_checkpointing = True
        ids = torch.randint(config.vocab_size, (1, tokens))
        return model, [(ids, torch.arange(tokens)[None], next_token_targets(ids))]

    def step(
        self,
        tokens: int,
        optimizer: str = "adamw-host",
        keep: bool = False,
        offload: bool = False,
        split_mlp: bool = False,
        compiled: bool = True,
        sequences: int = 2,
        config: LlamaConfig | None = None,
    ) -> dict:
        """Seconds a sequence, causal MFU, peaks of memory; then one optimizer step."""
        os.environ[kernels.COMPILE] = str(int(compiled))
        config = config or self.config
        model, batch = self.trainee(config, tokens)
        model.keep_attention = keep
        model.layer_inputs = LayerInputsOnHost() if offload else None
        for block in model.model["layers"]:
            block.mlp.split = split_mlp
        stepper = make_optimizer(optimizer, model, 1e-6, 0.1)
        accumulate(model, batch)  # warm up: gradients, page-locked buffers
        losses = []

        def accumulate_all() -> None:
            losses.extend(accumulate(model, batch) for _ in range(sequences))

        seconds = self.once(accumulate_all) / sequences
        of_sequences = self.peaks()
        stepper.step(1e-6, 1.0)  # makes m and v
        accumulate(model, batch)
        step_s = self.once(lambda: stepper.step(1e-6, 1.0))
        levers = (self.dtype.itemsize, optimizer, keep, offload, split_mlp, self.device)
        return {
            **budget.speed(config, tokens, 1, seconds, self.device),
            "seconds_per_sequence": seconds,
            "optimizer_step_s": step_s,
            "loss": losses[-1],
            **self.peaks(),
            **{f"{name}_without_optimizer_step": n for name, n in of_sequences.items()},
            "planned": sum(budget.device_bytes(config, tokens, *levers).values()),
        }

    def prefill(self, join: bool) -> dict:
        """A whole context of the target's length, once; join: the past by [E12]."""
        T, model, chunk = self.lengths[1], self.model(self.config), 64 if self.toy else None
        ids = torch.randint(self.config.vocab_size, (T,))
        before, joining = kernels.JOIN_FROM_TOKENS, kernels.joining
        kernels.joining = joining if join else lambda q, k: None
        try:
            prefill(model, ids[: T // 16], chunk_tokens=chunk)  # warm up
            seconds = self.once(lambda: prefill(model, ids, chunk_tokens=chunk))
        finally:
            kernels.JOIN_FROM_TOKENS, kernels.joining = before, joining
        return {"tokens": T, "seconds": seconds, **self.peaks()}

    def decode(self) -> dict:
        """Seconds a new token behind a context of the target's length, with room reserved."""
        T, new, model = self.lengths[1], 16, self.model(self.config)
        ids, cache = torch.randint(self.config.vocab_size, (T,)), KVCache()
        cache.reserve(T + 2 * new)
        prefill(model, ids[: T - new], cache)
        generate(model, ids[:1], new, cache)  # warm up
        seconds = self.once(lambda: generate(model, ids[:1], new, cache)) / new
        return {"tokens": T, "seconds_per_token": seconds, **self.peaks()}

    def resume(self) -> dict:
        """Two optimizer steps, against one, a save, and one more in a model of its own."""
        found, weights = {}, []
        for cut in (False, True):
            torch.manual_seed(0)
            model, batch = self.trainee(self.small, self.replay_length)
            stepper = make_optimizer("adamw", model, 1e-4, 0.1)
            for _ in range(2):
                accumulate(model, batch)
                stepper.step(1e-4, 1.0)
                if cut:
                    state = stepper.state_dict()
                    model, _ = self.trainee(self.small, self.replay_length)
                    stepper = make_optimizer("adamw", model, 1e-4, 0.1)
                    found["load_s"] = self.once(lambda s=stepper, x=state: s.load_state_dict(x))
            weights.append([p.detach().float() for p in model.parameters()])
        gaps = [float((a - b).abs().max()) for a, b in zip(*weights, strict=True)]
        return found | {"largest_difference_of_weights": max(gaps)}


def fitting(parts: dict, names, minutes: float | None) -> list[str]:
    """Of the names in order, those whose seconds fit into what is left of the minutes."""
    left, taken = float("inf") if minutes is None else 60 * minutes, []
    for name in names:
        if parts[name][0] <= left:
            taken.append(name)
            left -= parts[name][0]
    return taken


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description="What one GPU does with a Llama-3-8B, part by part.")
    p.add_argument("--out", type=Path, default=Path("assets/results/gpu.json"))
    p.add_argument("--parts", nargs="+", help="some of Bench.parts (None: all)")
    p.add_argument("--minutes", type=float, help="run the first parts that fit (None: all)")
    p.add_argument("--cap_GB", type=float, help="1e9 bytes that may be allocated (None: all)")
    p.add_argument("--toy", action="store_true", help="a tiny model, on whatever is here")
    args = p.parse_args(argv)
    with report_errors():
        if not (args.toy or torch.cuda.is_available()):
            raise BadInput("no CUDA device here; --toy runs on a CPU")
        parts = Bench(args).parts()
        if unknown := set(args.parts or ()) - set(parts):
            raise BadInput(f"--parts {sorted(unknown)} are none of {list(parts)}")
        found = json.loads(args.out.read_text()) if args.out.is_file() else {"parts": {}}
        done = [name for name, result in found["parts"].items() if "failed" not in result]
        print("there already:", ", ".join(done) or "nothing", flush=True)
        names = [name for name in args.parts or parts if name not in done]
        for name in fitting(parts, names, args.minutes):
            started, compiled = time.time(), os.environ.get(kernels.COMPILE)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            try:
                result = parts[name][1]()
            except (RuntimeError, BadInput) as error:  # a result too, and the next part runs
                result = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            finally:
                os.environ.pop(kernels.COMPILE, None)
                if compiled is not None:
                    os.environ[kernels.COMPILE] = compiled
            about = {"cap_GB": args.cap_GB, "toy": args.toy, **provenance(started)}
            found["parts"][name] = {**result, "about": about}
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.out, json.dumps(found, indent=2) + "\n")
            print(f"{name}: {json.dumps(result)}", flush=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
