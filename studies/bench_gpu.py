"""What one GPU does with a Llama-3-8B of random weights: `python studies/bench_gpu.py --cap_GB 80`.

Each part takes less than 9 minutes (to be seen: nothing here has run on a GPU yet) and writes its
result to --out at once; parts that are there are skipped, so the same command goes on where it was
cut off. --parts picks some. --toy is the same at a size for two CPU cores: tests/test_plan.py runs
it. --cap_GB emulates a smaller card on a larger one.

    machine                 names and versions, the attention backends that take our shapes
    gemm                    ceiling of matrix products in the model's shapes
    attention LENGTH        forward and backward, by backend
    transfer                host to device and back, page-locked and ordinary
    step MODE               seconds a sequence, causal MFU, peak reserved; then one optimizer step
    serve                   prefill and decode at the target length
"""

import argparse
import functools
import gc
import json
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import CUDA_BACKENDS, Llama, LlamaConfig, generate, prefill
from support.memory import count as budget
from support.memory.activations import LayerInputsOnHost
from support.memory.optimizer import make_optimizer
from support.system.bad_input import BadInput
from support.system.console import provenance, report_errors
from support.system.whole_files import write_atomically
from train import accumulate, next_token_targets

LLAMA3_8B = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, 500_000.0)
TOY = LlamaConfig(512, 64, 128, 2, 4, 2, 16, 64)
MODES = {  # name: optimizer, keep_attention, offload_inputs
    "adamw-host": ("adamw-host", False, False),
    "adamw-host keep offload": ("adamw-host", True, True),
    "adamw-8bit offload": ("adamw-8bit", False, True),
}


class Bench:
    def __init__(self, args):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.config, self.toy = (TOY, True) if args.toy else (LLAMA3_8B, False)
        self.lengths = (128, 256) if args.toy else (39_424, 131_072)
        self.dtype = torch.float32 if args.toy else torch.bfloat16
        if self.device == "cuda" and args.cap_GB:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_GB * 1e9 / total))

    def parts(self) -> dict:
        attention = {f"attention {n}": (self.attention, n) for n in self.lengths}
        steps = {f"step {name}": (self.step, *mode) for name, mode in MODES.items()}
        first = {"machine": (self.machine,), "gemm": (self.gemm,)}
        return first | attention | {"transfer": (self.transfer,)} | steps | {"serve": (self.serve,)}

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work, n: int = 3) -> float:
        """Best of n, after one to warm up."""
        work()
        times = []
        for _ in range(n):
            self.synchronize()
            started = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - started)
        return min(times)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    # ---- parts ---------------------------------------------------------------------------------

    def backends(self) -> list[SDPBackend]:
        return CUDA_BACKENDS if self.device == "cuda" else [SDPBackend.FLASH_ATTENTION]

    def machine(self) -> dict:
        found = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": self.device}
        if self.device == "cuda":
            gpu = torch.cuda.get_device_properties(0)
            found |= {"gpu": gpu.name, "bytes": gpu.total_memory}
            found["cudnn"] = torch.backends.cudnn.version()
        return found

    def gemm(self) -> dict:
        c, T = self.config, self.lengths[0]
        found = {}
        for name, n in {"q_proj": c.hidden_size, "gate_proj": c.intermediate_size}.items():
            a, b = self.random(T, c.hidden_size), self.random(c.hidden_size, n)
            seconds = self.seconds(lambda a=a, b=b: a @ b, 10)
            found[name] = {"tflops_per_s": 2 * T * c.hidden_size * n / seconds / 1e12}
        return found

    def attention(self, T: int) -> dict:
        c, found = self.config, {}
        forward_flops = 2.0 * budget.attention_flops(c, T) / c.num_hidden_layers
        q = self.random(1, c.num_attention_heads, T, c.head_dim).requires_grad_()
        shape = (1, c.num_key_value_heads, T, c.head_dim)
        k, v = (self.random(*shape).requires_grad_() for _ in range(2))
        for backend in self.backends():
            with sdpa_kernel(backend):

                def forward():
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

                try:
                    once = self.seconds(lambda: forward().detach())
                    both = self.seconds(lambda: forward().sum().backward())
                except RuntimeError as error:  # this backend does not take these shapes
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

    def model(self) -> Llama:
        """Random weights, made where they live and in their dtype."""
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                return Llama(self.config)
        finally:
            torch.set_default_dtype(torch.float32)

    def step(self, optimizer_name: str, keep: bool, offload: bool) -> dict:
        T, sequences = self.lengths[0], 2
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model = self.model()
        model.activation_checkpointing, model.keep_attention = True, keep
        model.layer_inputs = LayerInputsOnHost() if offload else None
        optimizer = make_optimizer(optimizer_name, model, 1e-6, 0.1)
        ids = torch.randint(self.config.vocab_size, (1, T))
        batch = [(ids, torch.arange(T)[None], next_token_targets(ids))]
        accumulate(model, batch)  # warm up: gradients, page-locked buffers
        self.synchronize()
        started = time.perf_counter()
        for _ in range(sequences):
            loss = accumulate(model, batch)
        self.synchronize()
        seconds = (time.perf_counter() - started) / sequences
        peak = torch.cuda.max_memory_reserved() if self.device == "cuda" else None
        optimizer.step(1e-6, 1.0)  # makes m and v
        accumulate(model, batch)
        self.synchronize()
        started = time.perf_counter()
        optimizer.step(1e-6, 1.0)
        self.synchronize()
        step_s = time.perf_counter() - started
        if offload:
            model.layer_inputs.close()
        w = self.dtype.itemsize
        plan = budget.device_bytes(self.config, T, w, optimizer_name, keep, offload)
        found = budget.speed(self.config, T, 1, seconds, self.device)
        found |= {"seconds_per_sequence": seconds, "optimizer_step_s": step_s, "loss": loss}
        peak_all = torch.cuda.max_memory_reserved() if self.device == "cuda" else None
        reserved = {"max_reserved": peak_all, "max_reserved_without_optimizer_step": peak}
        return found | reserved | {"planned": sum(plan.values())}

    def serve(self) -> dict:
        T, new, model = self.lengths[1], 16, self.model()
        ids = torch.randint(self.config.vocab_size, (T,))
        prefill(model, ids[:64])
        self.synchronize()
        started = time.perf_counter()
        _, cache = prefill(model, ids)
        self.synchronize()
        prefill_s = time.perf_counter() - started
        started = time.perf_counter()
        generate(model, ids[:1], new, cache)
        self.synchronize()
        decode = (time.perf_counter() - started) / new
        return {"tokens": T, "prefill_s": prefill_s, "decode_s_per_token": decode}


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, default=Path("assets/results/gpu.json"))
    p.add_argument("--parts", nargs="+", help="of the parts above (None: all)")
    p.add_argument("--cap_GB", type=float, help="1e9 bytes that may be allocated (None: all)")
    p.add_argument("--toy", action="store_true", help="a tiny model, on whatever is here")
    args = p.parse_args(argv)
    with report_errors():
        if not (args.toy or torch.cuda.is_available()):
            raise BadInput("no CUDA device here; --toy runs on a CPU")
        bench = Bench(args)
        known = bench.parts()
        if unknown := set(args.parts or ()) - set(known):
            raise BadInput(f"--parts {sorted(unknown)} are none of {list(known)}")
        found = json.loads(args.out.read_text()) if args.out.is_file() else {"parts": {}}
        for name in args.parts or known:
            if name in found["parts"]:
                print(f"{name}: there already", flush=True)
                continue
            started = time.time()
            work, *options = known[name]
            try:
                result = work(*options)
            except torch.OutOfMemoryError as error:  # a result too: this mode does not fit the cap
                result = {"out of memory": str(error).split("\n")[0]}
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
