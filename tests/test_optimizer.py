"""memory/optimizer.py: three ways to keep AdamW's state, against plain fp32 training and float64.

torchao compiles its step, which takes a CPU half a minute a shape; here its own functions run
uncompiled (`eager`)."""

import gc
import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path

import optimizer_run
import pytest
import torch

import train
from model import Llama, LlamaConfig
from support.memory.optimizer import NAMES, make_optimizer

CONFIG = LlamaConfig(97, 32, 48, 2, 4, 2, 8, 64)
TIED = LlamaConfig(97, 32, 48, 2, 4, 2, 8, 64, tie_word_embeddings=True)
LINUX = Path("/proc/self/maps").is_file()


@pytest.fixture()
def eager():
    pytest.importorskip("torchao")
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def batch(step: int) -> list:
    """Three sequences of unequal length."""
    generator = torch.Generator().manual_seed(step)
    ids = [torch.randint(97, (1, n), generator=generator) for n in (12, 30, 21)]
    return [(x, torch.arange(x.shape[1])[None], train.next_token_targets(x)) for x in ids]


def trained(name: str, config=CONFIG, dtype=torch.float32, steps: int = 50, clip: float = 0.5):
    """(parameters, norms before clipping) after some steps of accumulate, clip, step."""
    torch.manual_seed(0)
    model = Llama(config).to(dtype)
    optimizer = make_optimizer(name, model, 1e-3, 0.1)
    norms = []
    for i in range(steps):
        train.accumulate(model, batch(i))
        norms.append(optimizer.step(1e-3 * (1 + i % 3), clip))
    return list(model.parameters()), norms


def plain(config, steps: int = 50, clip: float = 0.5):
    """The same without this project's optimizers: fp32 weights under torch.optim.AdamW."""
    torch.manual_seed(0)
    model = Llama(config)
    norms_apart = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1}]
    norms_apart += [{"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0}]
    adamw, norms = torch.optim.AdamW(norms_apart, fused=True), []
    for i in range(steps):
        train.accumulate(model, batch(i))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        for group in adamw.param_groups:
            group["lr"] = 1e-3 * (1 + i % 3)
        adamw.step()
        adamw.zero_grad()
    return list(model.parameters()), norms


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("name", NAMES[:2])
def test_fifty_steps_equal_plain_fp32_training(name, config):
    """Tolerance: none. Accumulating, clipping and stepping are the same fp32 operations on the same
    numbers in the same order, wherever the state lives, so not one bit may differ; the clipping
    was at work."""
    ours, our_norms = trained(name, config)
    theirs, their_norms = plain(config)
    assert our_norms == their_norms and sum(n > 0.5 for n in our_norms) > 25
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_host_and_device_give_bf16_models_the_same_bits():
    a, b = (trained(name, dtype=torch.bfloat16, steps=20)[0] for name in NAMES[:2])
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(x.dtype == torch.bfloat16 for x in b)


def textbook_adamw(w, gradients, rates, decay):
    """Loshchilov & Hutter, algorithm 2, in float64."""
    w, m, v = w.double(), 0.0, 0.0
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        m, v = 0.9 * m + 0.1 * g.double(), 0.999 * v + 0.001 * g.double() ** 2
        step = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        w = w - lr * decay * w - lr * step
    return w


@pytest.mark.parametrize("name", NAMES[:2])
def test_fifty_steps_equal_the_textbook_in_float64(name):
    """The same gradients for both, so errors do not feed back. u = 2^-24 is fp32's rounding.

    A step rounds w three times (decay, update, sum): 3 u |w|. The update lr * m / sqrt(v) is off by
    its own relative error; m and v are sums of at most 50 rounded terms, no term of m larger than
    max|g|, so m is off by < 50 * 3 u max|g| (1 - 0.9^t) after its correction, v by a relative
    50 * 3 u, and |g| / sqrt(v) <= R with R measured below. lr and the corrections are computed
    in double or rounded once. Sum over 50 steps: 50 * (3 u |w| + lr * (2 * 150 u R + 4 u R))."""
    u, steps, lr = 2.0**-24, 50, 1e-3
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(40, 30, bias=False)
    start = model.weight.detach().clone()
    gradients = [torch.randn(30, 40, generator=generator) + 0.3 for _ in range(steps)]
    optimizer = make_optimizer(name, model, lr, 0.1)
    for g in gradients:
        model.weight.grad = g.clone()
        optimizer.step(lr, max_norm=1e9)
    expected = textbook_adamw(start, gradients, [lr] * steps, 0.1)
    squares = torch.stack(gradients).square()
    root = min((squares[:t].mean(0).sqrt().min() for t in range(5, steps)), default=1)
    R = float(squares.max().sqrt() / root)
    bound = steps * (3 * u * float(start.abs().max() + 0.1) + lr * 304 * u * R)
    error = float((model.weight.detach().double() - expected).abs().max())
    assert error < bound < 1e-4, (error, bound)  # fifty updates sum up to 0.05
    assert float((expected - start).abs().max()) > 0.01


def test_96_gradients_are_summed_in_fp32_not_in_bf16():
    """p.grad_dtype: error of the sum over 96 bf16 gradients, relative to the largest entry.
    In fp32 at most 95 roundings of 2^-24; in bf16 they show."""
    torch.manual_seed(0)
    x = torch.randn(96, 1, 64).bfloat16()
    errors = []
    for fp32 in (True, False):
        layer = torch.nn.Linear(64, 32, bias=False).bfloat16()
        if fp32:
            make_optimizer("adamw", layer, 1e-3, 0.0)
        for row in x:
            layer(row).sum().backward()
        exact = x.double().sum(0).expand(32, -1)
        errors.append(float((layer.weight.grad.double() - exact).abs().max() / exact.abs().max()))
    assert errors[0] <= 95 * 2.0**-24 < 1e-3 < errors[1]


def test_the_host_holds_one_gradient_at_a_time():
    torch.manual_seed(0)
    model = Llama(CONFIG)
    optimizer, held = make_optimizer("adamw-host", model, 1e-3, 0.1), []
    optimizer.adamw.register_step_pre_hook(
        lambda *_: held.append(
            (
                sum(m.grad is not None for m in optimizer.masters),
                sum(p.grad is not None for p in optimizer.params),
            )
        )
    )
    train.accumulate(model, batch(0))
    optimizer.step(1e-3, 1.0)
    n = len(optimizer.params)
    assert held == [(1, n - 1 - i) for i in range(n)]  # the device's gradients go one by one


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("value", "usable"), [(float("nan"), True), (1.0, False)])
def test_gradients_that_are_not_finite_or_not_usable_are_dropped(name, value, usable, request):
    if name == "adamw-8bit":
        request.getfixturevalue("eager")
    model = torch.nn.Linear(4, 4)
    optimizer = make_optimizer(name, model, 1e-3, 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full(p.shape, value)
    optimizer.step(1e-3, 1.0, usable=usable)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_goes_on_bit_for_bit_and_lets_go_of_its_file(name, tmp_path, request):
    if name == "adamw-8bit":
        request.getfixturevalue("eager")
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Llama(CONFIG).bfloat16()
        optimizer = make_optimizer(name, model, 1e-3, 0.1)
        if results:  # the second one starts from the file, with other weights
            with torch.no_grad():
                model.lm_head.weight.zero_()
            state = torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)
            optimizer.load_state_dict(state)
            del state
            gc.collect()
            if LINUX and name != "adamw-8bit":  # its state is small, and copied to the GPU anyway
                assert "state.pt" not in Path("/proc/self/maps").read_text()
        else:
            for i in range(3):
                train.accumulate(model, batch(i))
                optimizer.step(1e-3, 1.0)
            torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        torch.manual_seed(len(results))  # rounding at random must not hang on it
        for i in range(3, 6):
            train.accumulate(model, batch(i))
            optimizer.step(1e-3, 1.0)
        results.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- 8 bits ------------------------------------------------------------------------------------


def test_8_bit_state_takes_a_quarter_and_vectors_stay_fp32(eager):
    model = torch.nn.Sequential(torch.nn.Linear(128, 64, bias=False), torch.nn.LayerNorm(64))
    optimizer = make_optimizer("adamw-8bit", model.bfloat16(), 1e-3, 0.0)
    for p in model.parameters():
        p.grad = torch.ones(p.shape)
    optimizer.step(1e-3, 1e9)
    (matrix,) = optimizer.eight_bit.state.values()
    assert matrix["exp_avg"].codes.dtype == torch.uint8 == matrix["exp_avg_sq"].codes.dtype
    assert len(matrix["exp_avg"].scale) == 128 * 64 // 256
    assert [m.ndim for m in optimizer.masters] == [1, 1]
    assert all(s["exp_avg_sq"].dtype == torch.float32 for s in optimizer.adamw.state.values())


def test_small_updates_survive_8_bit_on_average(eager):
    """1,000 updates of 1e-5 on 8,192 bf16 ones: each rounds down with probability 1e-5 / 0.0039, so
    on average the weights move by 0.01. The mean's standard deviation is
    sqrt(1000 * 1e-5 * 0.0039 / 8192) = 7e-5: a deviation of 1e-3 has no chance by accident."""
    model = torch.nn.Linear(128, 64, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    optimizer = make_optimizer("adamw-8bit", model, 1e-5, 0.0)
    for _ in range(1000):
        model.weight.grad = torch.ones(64, 128)
        optimizer.step(1e-5, max_norm=1e9)
    assert model.weight.dtype == torch.bfloat16
    assert abs(float(model.weight.float().mean()) - 0.99) < 1e-3


def test_8_bit_stays_close_to_fp32_on_a_toy(eager):
    """Not equal; how close on a real model: optimizer_run.py."""
    (eight, norms), (exact, their_norms) = (trained(n, clip=10.0) for n in ("adamw-8bit", "adamw"))
    assert norms[0] == their_norms[0] and norms != their_norms
    moved = [trained("adamw", steps=0)[0], exact, eight]
    start, exact, eight = (torch.cat([p.flatten() for p in ps]) for ps in moved)
    assert (eight - exact).norm() < 0.1 * (exact - start).norm()


def test_without_torchao_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match="needs torchao: pip install torchao"):
        make_optimizer("adamw-8bit", Llama(CONFIG), 1e-3, 0.1)


LOUD = """
import logging, warnings
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).warning("noise")
    logging.getLogger(name).error("real")
warnings.warn("noise")
raise ImportError("no libcuda.so")
"""


@pytest.fixture()
def loud_torchao(tmp_path, monkeypatch):
    """A package of that name that warns as torchao 0.18 does, and then fails."""
    real = {n: sys.modules.pop(n) for n in [*sys.modules] if n.split(".")[0] == "torchao"}
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").touch()
    (tmp_path / "torchao" / "optim.py").write_text(LOUD)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    del sys.modules["torchao"]
    sys.modules.update(real)


def test_the_warnings_of_torchaos_import_are_not_shown_but_its_errors(loud_torchao, recwarn):
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with pytest.raises(ValueError, match=r"needs torchao: .* \(no libcuda.so\)"):
            make_optimizer("adamw-8bit", Llama(CONFIG), 1e-3, 0.1)
        loggers[0].warning("as before")
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert said == ["real", "real", "as before"] and not recwarn.list


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="torchao is not installed")
def test_the_real_torchao_is_imported_without_a_word():
    code = "import torch; from support.memory.optimizer import make_optimizer as make\n"
    code += "make('adamw-8bit', torch.nn.Linear(4, 4), 1e-3, 0.1)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, cwd=optimizer_run.ROOT
    )
    assert (done.stdout, done.stderr) == (b"", b"")


def test_the_recorded_run_on_smollm2_is_within_its_band():
    """assets/results/adamw_8bit.json, by optimizer_run.py."""
    found = json.loads(optimizer_run.OUT.read_text())
    assert optimizer_run.outside_the_band(found) == []
    assert found["fell"]["adamw-fp32"] > 5 * optimizer_run.BAND["any_step"]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="torchao is not installed")
def test_8_bit_on_smollm2_is_within_its_band(smollm2_dir, tmp_path):
    optimizer_run.main(["--model", str(smollm2_dir), "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert optimizer_run.outside_the_band(found) == []
