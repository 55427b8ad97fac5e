"""train.py: accumulation, master weights, schedules, the whole story on a toy, resume, bad
input."""

import dataclasses
import json
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import PROSE, make_hf_llama, write_tokenizer

import eval_needle
import recipe
import train
from model import Llama, LlamaConfig, load_pretrained, load_tokenizer, save_pretrained
from support.data.sources import load_texts, load_tokens
from support.data.text import Corpus
from support.data.toy import TINY
from support.memory.count import matmul_parameters, training_flops
from support.memory.optimizer import MasterAdamW
from support.runs.flags import as_kept, base_of_run, check_same, settings_of
from support.runs.settings import TOY
from support.system.ahead import made_ahead
from support.system.bad_input import BadInput

CONFIG = LlamaConfig(97, 32, 48, 2, 4, 2, 8, 64)

# ---- accumulation ------------------------------------------------------------------------------


def unequal_batches() -> list[tuple[torch.Tensor, ...]]:
    """Four micro-batches of one sequence, then the same as one of four, padded."""
    torch.manual_seed(0)
    lengths = [5, 12, 30, 17]
    ids = [torch.randint(97, (1, n)) for n in lengths]
    singles = [(x, torch.arange(x.shape[1])[None], train.next_token_targets(x)) for x in ids]
    padded = [torch.zeros(4, 30, dtype=torch.int64), torch.arange(30).expand(4, -1)]
    padded.append(torch.full((4, 30), -100))
    for row, (x, _, y) in enumerate(singles):
        padded[0][row, : x.shape[1]], padded[2][row, : x.shape[1]] = x, y
    return singles, [tuple(padded)]


def accumulated(batches) -> tuple[float, list]:
    """(loss, gradients) of the same model."""
    torch.manual_seed(1)
    model = Llama(CONFIG).double()
    loss = train.accumulate(model, batches)
    return loss, [p.grad for p in model.parameters()]


def test_four_times_one_equals_one_times_four_at_unequal_lengths():
    """[E17] Normalised by the whole step, and equal to a slow loop over its targets: same loss and
    gradients (float64)."""
    singles, padded = unequal_batches()
    torch.manual_seed(1)
    model, losses = Llama(CONFIG).double(), []
    for ids, positions, targets in singles:
        for logits, target in zip(model(ids, positions)[0], targets[0], strict=True):
            if target != -100:
                losses.append(-logits.log_softmax(-1)[target])
    mean = sum(losses) / len(losses)
    mean.backward()
    for batches in (singles, padded):
        loss, grads = accumulated(batches)
        assert abs(loss - float(mean.detach())) < 1e-10
        for a, p in zip(grads, model.parameters(), strict=True):
            # angles are fp32 inside, equal in both; the rest is float64
            assert (a - p.grad).abs().max() < 1e-10
    # the usual mistake, the mean of the four means, is far away
    means = [accumulated([single])[0] for single in singles]
    assert abs(sum(means) / 4 - loss) > 1e-4


def test_a_step_without_targets_is_refused():
    x = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="without a single target"):
        train.accumulate(Llama(CONFIG), [(x, x, torch.full_like(x, -100))])


# ---- optimizer ---------------------------------------------------------------------------------


def test_an_update_of_1e_5_does_not_vanish_in_bf16():
    """bf16 near 1.0 has steps of 0.0078. 1,000 updates of 1e-5 must move a weight by 0.01."""
    model = torch.nn.Linear(4, 4, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    optimizer = MasterAdamW(model, lr=1e-5, weight_decay=0.0)
    for _ in range(1000):
        model.weight.grad = torch.ones(4, 4)  # fp32: the master's gradient
        optimizer.step(1e-5, max_norm=1e9)
    assert (optimizer.masters[0] - 0.99).abs().max() < 1e-4
    assert (
        model.weight.dtype == torch.bfloat16 and (model.weight.float() - 0.99).abs().max() < 0.004
    )
    # what happens without masters, on the same numbers
    plain = torch.ones(4, dtype=torch.bfloat16)
    for _ in range(1000):
        plain -= 1e-5
    assert (plain == 1).all()


def test_gradients_of_bf16_models_are_summed_in_fp32():
    torch.manual_seed(0)
    model = Llama(CONFIG).to(torch.bfloat16)
    MasterAdamW(model, 1e-3, 0.0)
    x = torch.randint(97, (1, 20))
    train.accumulate(model, [(x, torch.arange(20)[None], train.next_token_targets(x))] * 2)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_clipping_is_by_the_global_norm():
    model = torch.nn.Linear(3, 2)
    optimizer = MasterAdamW(model, 1.0, 0.0)
    seen = []
    optimizer.adamw.register_step_pre_hook(
        lambda *_: seen.append([m.grad.clone() for m in optimizer.masters])
    )
    model.weight.grad, model.bias.grad = torch.full((2, 3), 2.0), torch.full((2,), -1.0)
    norm = optimizer.step(1e-3, max_norm=1.0)
    assert abs(norm - (6 * 4 + 2) ** 0.5) < 1e-5
    clipped = torch.cat([g.flatten() for g in seen[0]])
    assert abs(float(clipped.norm()) - 1) < 1e-4
    assert torch.allclose(clipped[:6] / clipped[-1], torch.tensor(-2.0))


def test_weight_decay_spares_norms():
    optimizer = MasterAdamW(Llama(CONFIG), 1e-3, 0.1)
    decay = {p.ndim: g["weight_decay"] for g in optimizer.adamw.param_groups for p in g["params"]}
    assert decay == {2: 0.1, 1: 0.0}


def test_learning_rate_warms_up_then_stays_and_replay_falls():
    """[E18]"""
    stage = train.Stage("extend", 10, 1, 1, "none", "first", lr=8.0)
    assert [train.learning_rate(stage, i, 4) for i in range(6)] == [2, 4, 6, 8, 8, 8]
    assert train.learning_rate(stage, 0, 4, first_step=2) == 6  # goes on where the probe was
    replay = train.Stage("replay", 4, 1, 1, "none", "first", lr=8.0)
    assert [train.learning_rate(replay, i, 4) for i in range(4)] == [8, 6, 4, 2]


def test_flops_are_those_of_the_papers_model():
    """[E23] design figures for Llama-3-8B: 7.505e9 parameters without the input embedding, 2.99e15
    FLOPs."""
    llama3 = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192)
    assert abs(matmul_parameters(llama3) / 7.505e9 - 1) < 1e-3
    assert abs(training_flops(llama3, 39322) / 2.99e15 - 1) < 2e-3
    assert abs(1 - training_flops(llama3, 39322) / training_flops(llama3, 131072) - 0.846) < 1e-3


# ---- the whole story ---------------------------------------------------------------------------


def command(toy_dir, prose_file, out, *more: str) -> list[str]:
    flags = (
        f"--model {toy_dir} --data {prose_file} --out {out} --target_len 512 --train_len 128"
        " --steps 6 --probe_steps 2 --replay_steps 3 --batch_sequences 2 --analysis_samples 2"
        " --lr 5e-3 --replay_lr 1e-3 --warmup_steps 2"
    )
    return [*flags.split(), *more]


def read_metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def impactful_of(out) -> dict[str, list]:
    return json.loads((out / "impactful.json").read_text())


def settings_in(out) -> dict:
    return json.loads((out / "run.json").read_text())["settings"]


def without_probe_steps(argv: list[str]) -> list[str]:
    i = argv.index("--probe_steps")
    return argv[:i] + argv[i + 2 :]


def record(monkeypatch) -> list[list]:
    """The batch of every step that train.py takes from now on."""
    seen, original = [], train.accumulate

    def recording(model, batch, *rest):
        seen.append(batch)
        return original(model, batch, *rest)

    monkeypatch.setattr(train, "accumulate", recording)
    return seen


def model_bytes(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def run_stopped(argv: list[str], after: int) -> int:
    """Run train.py and press Ctrl-C in the step after so many: its exit code."""
    calls, original = [], train.accumulate

    def stopping(*args):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "accumulate", stopping)
        train.main(argv)
    return stop.value.code


@pytest.fixture(scope="module")
def finished(toy_dir, prose_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    train.main(command(toy_dir, prose_file, out, "--keep_stages"))
    return out


def test_the_whole_story_on_a_toy(finished, toy_dir):
    rows = read_metrics(finished)
    assert [r["stage"] for r in rows] == ["probe"] * 2 + ["extend"] * 4 + ["replay"] * 3
    assert [r["step"] for r in rows] == list(range(1, 10))
    assert [r["tokens"] for r in rows] == [256] * 6 + [128] * 3  # replay: the old window of 64
    assert rows[5]["loss"] < rows[0]["loss"] - 0.5  # it learns
    run = json.loads((finished / "run.json").read_text())
    assert run["status"] == "done" and run["seconds"] > 0 and run["settings"]["target_len"] == 512
    config = LlamaConfig.from_dir(finished)
    expected = recipe.ntk_rope_base(10_000.0, 12, 64, 512)
    assert config.rope_theta == expected and config.max_position_embeddings == 512
    assert json.loads((finished / "impactful.json").read_text())
    assert not (finished / "state.pt").exists() and (finished / "tokenizer.json").is_file()
    # [E10] the result is the average of the original and the replayed weights
    original, replayed, result = (
        dict(load_pretrained(d).named_parameters())
        for d in (toy_dir, finished / "replayed", finished)
    )
    extended = dict(load_pretrained(finished / "extended").named_parameters())
    for name, p in result.items():
        assert torch.allclose(p, (original[name] + replayed[name]) / 2, atol=1e-7)
    assert any(not torch.equal(extended[n], replayed[n]) for n in extended)


def test_a_sample_is_drawn_from_seed_step_and_number_alone(toy_dir, prose_file):
    """The numbering that recorded runs rest on."""
    tokenizer = load_tokenizer(toy_dir)
    settings = train.Settings(target_len=512, train_len=128, batch_sequences=2, seed=3)
    corpus = Corpus(load_tokens([str(prose_file)], tokenizer), 128)
    probe = train.plan_stages(settings)[0]
    drawn = [
        one
        for step in (0, 1, 7)
        for one in train.draw(probe, step, corpus, tokenizer, settings, None)
    ]
    seeds = [3 * 1_000_003 + step + 100_000_000 * b for step in (0, 1, 7) for b in (0, 1)]
    for (ids, positions), seed in zip(drawn, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        again = train.sample(probe, corpus, tokenizer, None, generator)
        assert torch.equal(ids, again[0]) and torch.equal(positions, again[1])
    assert len({tuple(ids.tolist()) for ids, _ in drawn}) == 6


@pytest.mark.parametrize("n", [0, 1, 5])
def test_what_is_made_ahead_is_the_same_and_its_error_comes_in_its_place(n):
    def items():
        yield from range(3)
        raise KeyError("a bug")

    with ThreadPoolExecutor(1) as thread, made_ahead(thread, items(), n) as made:
        assert [next(made) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(KeyError, match="a bug"):
            next(made)
    with ThreadPoolExecutor(1) as thread, made_ahead(thread, "abc", n) as made:
        assert list(made) == ["a", "b", "c"]


def test_every_setting_reaches_its_place(toy_dir, tmp_path, prose_file, monkeypatch):
    """Optimizer, schedule, memory options, analysis, replay's text and merge weight of one run."""
    other = tmp_path / "other.txt"
    other.write_text("Zoe sings. " * 400)
    seen = {"analysis": [], "batches": [], "steps": []}
    make, shift, accumulate = train.make_optimizer, recipe.logit_shift, train.accumulate

    def made(name, model, lr, weight_decay):
        seen["optimizer"] = (name, lr, weight_decay)
        optimizer = make(name, model, lr, weight_decay)
        step = optimizer.step
        optimizer.step = lambda lr, clip, **kw: seen["steps"].append(clip) or step(lr, clip, **kw)
        return optimizer

    def compared(original, extended, *rest, first_position, **options):
        seen["analysis"].append((original, extended, first_position))
        return shift(original, extended, *rest, first_position=first_position, **options)

    def recorded(model, batch, *rest):
        seen["model"] = model
        seen["options"] = (model.activation_checkpointing, model.keep_attention)
        seen["batches"].append(torch.cat([ids for ids, _, _ in batch]))
        assert model.layer_inputs is not None
        return accumulate(model, batch, *rest)

    monkeypatch.setattr(train, "make_optimizer", made)
    monkeypatch.setattr(recipe, "logit_shift", compared)
    monkeypatch.setattr(train, "accumulate", recorded)
    more = f"--replay_data {other} --merge_weight 0.25 --weight_decay 0.3 --clip 0.7 --keep_stages"
    more += " --optimizer adamw --keep_attention --offload_inputs"
    train.main(command(toy_dir, prose_file, tmp_path / "out", *more.split()))

    assert seen["optimizer"] == ("adamw", 5e-3, 0.3) and seen["steps"] == [0.7] * 9
    assert seen["options"] == (True, True)
    rates = [row["lr"] for row in read_metrics(tmp_path / "out")]
    expected = [2.5e-3, *[5e-3] * 5, 1e-3, 2e-3 / 3, 1e-3 / 3]
    assert rates == pytest.approx(expected)
    original = load_pretrained(toy_dir)
    assert len(seen["analysis"]) == 2
    for compared_with, extended, first_position in seen["analysis"]:
        pairs = zip(compared_with.parameters(), original.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert extended is seen["model"] and first_position == 64
    tokenizer = load_tokenizer(toy_dir)
    texts = ["".join(tokenizer.decode(row.tolist()) for row in ids) for ids in seen["batches"]]
    assert ["Zoe sings" in text for text in texts] == [False] * 6 + [True] * 3
    a, b, result = (
        dict(load_pretrained(folder).named_parameters())
        for folder in (toy_dir, tmp_path / "out" / "replayed", tmp_path / "out")
    )
    assert all(torch.allclose(p, 0.75 * a[k] + 0.25 * b[k], atol=1e-7) for k, p in result.items())


def test_a_bos_token_comes_first_where_the_tokenizer_adds_one(toy_dir, prose_file, tmp_path):
    """At position 0, and the sample is as long as without; the text takes the positions after."""
    folder = tmp_path / "bos"
    shutil.copytree(toy_dir, folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
    )
    tokenizer = load_tokenizer(folder)
    corpus = Corpus(load_tokens([str(prose_file)], tokenizer), 128)
    for method in ("longrecipe", "full", "rpes"):
        stage = train.Stage("extend", 1, 128, 512, method, "first", 1.0)
        if method == "full":
            stage = dataclasses.replace(stage, target_len=128)
        ids, positions = train.sample(stage, corpus, tokenizer, None, torch.Generator())
        assert len(ids) == len(positions) == 128 and ids[0] == tokenizer.bos_id
        assert positions[0] == 0 and (positions.diff() > 0).all()
        assert positions[-1] < stage.target_len and (ids[1:] != tokenizer.bos_id).all()


def test_transformers_opens_the_result(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(finished).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(finished)("Ada had 7 apples.").input_ids)[None]
    with torch.no_grad():
        assert (hf(ids).logits - load_pretrained(finished)(ids)).abs().max() < 1e-4


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_ctrl_c_saves_and_resume_goes_on(stop_at, finished, toy_dir, prose_file, tmp_path, capsys):
    """Ctrl-C in the probe, the extension or the replay saves and says how to go on. That command,
    without the flags of the run, gives the same weights and the same metrics."""
    out = tmp_path / "out"
    assert run_stopped(command(toy_dir, prose_file, out), stop_at) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    told, argv = last.split("; to go on: python train.py ")
    assert told == f"interrupted; saved up to step {stop_at} in {out / 'state.pt'}"
    train.main([*argv.split(), "--keep_stages"])
    assert model_bytes(out) == model_bytes(finished)
    assert model_bytes(out / "replayed") == model_bytes(finished / "replayed")
    # stopped in the replay and without --keep_stages until then: the extended weights are gone
    assert (out / "extended").exists() == (stop_at < 6)
    same = ("stage", "step", "loss", "lr", "grad_norm")
    for a, b in zip(read_metrics(out), read_metrics(finished), strict=True):
        assert all(a[k] == b[k] for k in same)


@pytest.mark.parametrize("name", ["adamw-host", "adamw-8bit"])
def test_the_other_optimizers_resume_too(name, toy_dir, prose_file, tmp_path):
    """Their states pass the check for NaN, are read again, and give the same bytes."""
    if name == "adamw-8bit":
        pytest.importorskip("torchao")
    torch.compiler.set_stance("force_eager")  # torchao compiles its step for half a minute
    try:
        more = ("--optimizer", name, "--dtype", "bfloat16")
        train.main(command(toy_dir, prose_file, tmp_path / "whole", *more))
        run_stopped(command(toy_dir, prose_file, tmp_path / "out", *more), 4)
        assert torch.load(tmp_path / "out/state.pt", weights_only=True)["step"] == 4
        train.main(["--resume", "--out", str(tmp_path / "out")])
    finally:
        torch.compiler.set_stance("default")
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "whole")


def test_ctrl_c_before_the_first_step_says_so(toy_dir, prose_file, tmp_path, monkeypatch, capsys):
    assert run_stopped(command(toy_dir, prose_file, tmp_path / "out"), 0) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("interrupted; nothing is saved yet")
    assert last.endswith(f"to begin again: python train.py --resume --out {tmp_path / 'out'}")
    monkeypatch.setattr(train, "resolve", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):  # earlier still, there is no run
        train.main(command(toy_dir, prose_file, tmp_path / "other"))
    assert capsys.readouterr().err == "interrupted\n"


def resumed(out, *flags: str) -> dict:
    """The settings of a run that is resumed with these flags, as they are kept."""
    given, options = train.parse(["--resume", "--out", str(out), *flags])
    there = train.machine(train.HERE, "cpu", options.out)
    return as_kept(train.resolve(given, LlamaConfig.from_dir(given["model"]), there), options)


def test_resume_takes_the_flags_that_are_not_given_from_the_run(finished):
    run = settings_in(finished)
    assert run["keep_stages"] is True and run["target_len"] == 512 and run["lr"] == 5e-3
    assert resumed(finished) == run and resumed(finished, "--lr", "0.25") == run | {"lr": 0.25}


def edited_run(finished, out, **settings) -> None:
    """Make out a run like `finished`, begun with other settings (None: without)."""
    run = json.loads((finished / "run.json").read_text())
    changed = run["settings"] | settings
    run["settings"] = {k: v for k, v in changed.items() if k not in settings or v is not None}
    (out / "run.json").write_text(json.dumps(run))


def test_what_is_kept_may_change_with_resume(finished, tmp_path):
    for kept in (True, False):
        edited_run(finished, tmp_path, keep_stages=kept, no_saves=kept)
        for flags, expected in (((), kept), (("--no-keep_stages",), False)):
            now = resumed(tmp_path, *flags)
            check_same(settings_of(tmp_path), now)
            assert (now["keep_stages"], now["no_saves"]) == (expected, kept)
    assert resumed(tmp_path, "--no_saves")["no_saves"] is True


def test_a_flag_that_an_older_run_knew_nothing_of_is_refused(finished, tmp_path, bad):
    edited_run(finished, tmp_path, log_softmax=None, top=None)
    before = settings_of(tmp_path)
    assert "log_softmax" not in before and "top" not in before
    # giving the default changes nothing
    for flags in ([], ["--top", "0.2", "--save_minutes", "1"]):
        check_same(before, resumed(tmp_path, *flags))
    for flags in (["--log_softmax"], ["--top", "0.3"]):
        match = f"--resume with {flags[0]}: the run was begun by a version without that flag"
        bad(match, "--resume", *flags, out=tmp_path)


def test_bf16_runs_on_the_cpu_and_saves_bf16(toy_dir, prose_file, tmp_path):
    train.main(command(toy_dir, prose_file, tmp_path / "out", "--dtype", "bfloat16"))
    rows = read_metrics(tmp_path / "out")
    assert rows[5]["loss"] < rows[0]["loss"] - 0.5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("method", ["pose", "rpes", "none"])
def test_other_methods_take_the_same_path_and_the_same_tokens(
    method, toy_dir, prose_file, tmp_path, monkeypatch
):
    """Every sample of every step, not only the first of a step, whatever a method draws."""
    seen = record(monkeypatch)
    for name in (method, "longrecipe"):
        flags = ("--method", name, "--select", "random")
        train.main(command(toy_dir, prose_file, tmp_path / name, *flags))
    rows = read_metrics(tmp_path / method)
    assert len(rows) == 9 and rows[5]["loss"] < rows[0]["loss"] - 0.5
    for ours, other in zip(seen[:6], seen[9:15], strict=True):
        for (ids, positions, _), (same_ids, other_positions, _) in zip(ours, other, strict=True):
            assert torch.equal(ids, same_ids) and not torch.equal(positions, other_positions)


def test_full_prefix_and_replay_data(toy_dir, prose_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Zoe sings. " * 400)
    flags = "--method full --train_len 512 --select first --replay_data"
    train.main(command(toy_dir, prose_file, tmp_path / "full", *flags.split(), str(other)))
    rows = read_metrics(tmp_path / "full")
    assert [r["tokens"] for r in rows] == [1024] * 6 + [128] * 3
    train.main(command(toy_dir, prose_file, tmp_path / "prefix", "--prefix"))
    assert len(read_metrics(tmp_path / "prefix")) == 9


def test_the_analysis_can_be_reused_or_given_an_extended_model(
    finished, toy_dir, prose_file, tmp_path, capsys
):
    """--impactful FILE: same table, same tokens from the extension on. --extended DIR: no probe."""
    file = str(finished / "impactful.json")
    train.main(command(toy_dir, prose_file, tmp_path / "a", "--impactful", file))
    assert model_bytes(tmp_path / "a") == model_bytes(finished)  # the probe's two steps included
    err = capsys.readouterr().err
    assert "impactful types of" not in err and "no CUDA device: going on with the CPU" in err
    assert "probe 2 x 2 x 128, extend 4 x 2 x 128, replay 3 x 2 x 64" in err
    assert re.search(r"100%.*<00:00.*tok/s", err)  # the progress line has rate and ETA
    hint = f"next: python eval_needle.py --model {tmp_path / 'a'}"
    assert f"{hint} --lengths 512 --n 1\n" in err  # small, for a CPU
    argv = command(toy_dir, prose_file, tmp_path / "b", "--extended", str(finished))
    train.main(without_probe_steps(argv))
    rows = read_metrics(tmp_path / "b")
    assert [r["stage"] for r in rows] == ["extend"] * 6 + ["replay"] * 3
    assert "impactful types of" in capsys.readouterr().err


def test_the_analysis_of_log_probabilities(finished, toy_dir, prose_file, tmp_path):
    """--log_softmax: the same probe, so the mean shift of a type moves by the mean offset alone."""
    stop = ["--steps", "2", "--replay_steps", "0", "--log_softmax", "--top", "1"]
    train.main(command(toy_dir, prose_file, tmp_path / "out", *stop))
    shift, raw = (
        {k: v for k, (_, v) in impactful_of(folder).items()}
        for folder in (tmp_path / "out", finished)
    )
    assert raw.keys() < shift.keys()
    assert all(abs(shift[k] - raw[k]) > 1e-3 for k in raw)


def test_types_that_are_seen_too_rarely_are_not_impactful(toy_dir, prose_file, tmp_path, capsys):
    """--min_count: the same probe, so the same means; only types are left out. As long as there is
    no analysis, --resume takes another one."""
    stop, found = ["--steps", "2", "--replay_steps", "0", "--top", "1", "--min_count"], []
    for floor in ("1", "4"):
        out = tmp_path / floor
        with pytest.raises(SystemExit):
            train.main(command(toy_dir, prose_file, out, *stop, "999999"))
        error = capsys.readouterr().err.splitlines()[-1]
        assert "no token type was seen 999999 times in the analysis, the most frequent one" in error
        train.main(["--resume", "--out", str(out), "--min_count", floor])
        assert settings_in(out)["min_count"] == int(floor)
        found.append(impactful_of(out))
    assert found[1].items() < found[0].items() and len(found[1]) > 10


def test_the_least_length_of_a_segment_reaches_the_samples(toy_dir, prose_file, tmp_path):
    """--min_segment_tokens: jumps of the extension's samples are at least so far apart; those of
    the replay have none."""
    flags = command(toy_dir, prose_file, tmp_path, "--min_segment_tokens", "40")
    settings, _ = train.parse(flags)
    config = train.LlamaConfig.from_dir(toy_dir)
    settings = train.resolve(settings, config, train.machine(train.HERE, "cpu", str(tmp_path)))
    tokenizer = load_tokenizer(toy_dir)
    corpus, _ = load_texts(settings, tokenizer)
    probe, _, replay = train.plan_stages(settings)
    for stage, jumps in ((probe, True), (replay, False)):
        _, pos = train.sample(stage, corpus, tokenizer, None, torch.Generator().manual_seed(1))
        at = (pos.diff() > 1).nonzero()[:, 0] + 1
        assert (len(at) > 0) is jumps and (at.diff() >= 40).all()


def test_the_rebased_analysis_sees_no_shift_where_nothing_was_learnt(toy_dir, prose_file, tmp_path):
    """H' has the original's weights under a new theta. Against the original under that theta (even
    if the run's own theta is another) the shift is zero everywhere; against the original under its
    own theta it is not, as that fails past its window."""
    again = tmp_path / "again"
    more = ["--replay_steps", "0", "--steps", "1", "--extended", str(again)]
    model = load_pretrained(toy_dir)
    model.config = model.config.with_rope(5e5, 512)
    save_pretrained(model, again, tokenizer_from=toy_dir)
    rebased = "--rebased_analysis"
    for name, flags in (
        ("zero", ["--rope_base", "5e5", rebased]),
        ("unequal", ["--rope_base", "2e5", rebased]),
        ("failure", ["--rope_base", "5e5"]),
    ):
        argv = command(toy_dir, prose_file, tmp_path / name, *more, *flags)
        train.main(without_probe_steps(argv))
    shifts = [
        [v for _, v in impactful_of(tmp_path / name).values()]
        for name in ("zero", "unequal", "failure")
    ]
    assert set(shifts[0]) == set(shifts[1]) == {0.0} and max(map(abs, shifts[2])) > 0.01


def test_windows_without_sentences_are_drawn_again(toy_dir, tmp_path):
    """A long run without a sentence end would leave longrecipe without a gap. It is not cut at its
    spaces, as a text that has no sentences at all is."""
    tokenizer, samples = load_tokenizer(toy_dir), []
    for name, words, at_spaces in (("mixed", 4000, False), ("words", 40_000, True)):
        text = tmp_path / f"{name}.txt"
        prose = "" if at_spaces else PROSE[:6000]
        text.write_text(prose + " word" * words + prose)
        lengths = {"target_len": 512, "train_len": 128, "replay_len": 64, "steps": 24}
        more = {"probe_steps": 0, "select": "first", "batch_sequences": 1}
        settings = train.Settings(model=str(toy_dir), data=[str(text)], **lengths, **more)
        corpus, _ = load_texts(settings, tokenizer)
        assert corpus.at_spaces == at_spaces
        stage = train.plan_stages(settings)[1]
        drawn = [next(train.draw(stage, i, corpus, tokenizer, settings, None)) for i in range(24)]
        samples.append({tuple(ids.tolist()) for ids, _ in drawn})
    assert len(samples[0]) > 20 > len(samples[1])  # of 24: most begin elsewhere


def test_a_finished_run_says_so_and_is_left_alone(finished, toy_dir, prose_file, capsys):
    before = snapshot(finished)
    train.main(command(toy_dir, prose_file, finished, "--resume"))
    assert "finished: nothing to do" in capsys.readouterr().err and snapshot(finished) == before


OF_QWEN = {"factor": 4.0, "original_max_position_embeddings": 32_768}  # Qwen2.5's card


@pytest.mark.parametrize(("kind", "fields"), [("linear", {"factor": 2.0}), ("yarn", OF_QWEN)])
def test_scaled_rope_asks_for_a_base_and_keeps_its_scaling(
    kind, fields, toy_dir, prose_file, tmp_path, bad
):
    folder = tmp_path / "scaled"
    shutil.copytree(toy_dir, folder)
    scaling = {"type": kind, **fields}
    edit_config(folder, rope_parameters=None, rope_theta=1e4, rope_scaling=scaling)
    bad(f"scales its RoPE already \\({kind}\\).*--rope_base", folder=folder)
    bad(f"\\({kind}\\), which --rope yarn would replace", "--rope", "yarn", folder=folder)
    train.main(command(folder, prose_file, tmp_path / "out", "--rope_base", "5e5"))
    config = LlamaConfig.from_dir(tmp_path / "out")
    assert (config.rope_theta, config.rope_scaling) == (5e5, {"rope_type": kind, **fields})
    edit_config(folder, rope_scaling=None)
    edit_config(folder, model_type="mistral", sliding_window=500, rope_parameters=None)
    bad("sliding_window 500 is shorter than --target_len 512", folder=folder, out=tmp_path / "o2")


def test_rope_yarn_from_the_command_to_transformers(toy_dir, prose_file, tmp_path, monkeypatch):
    """Resumed after a stop; the rebased analysis compares under yarn; eval_needle.py's untrained
    row has the original's weights under it."""
    from transformers import AutoModelForCausalLM

    out, compared = tmp_path / "out", []
    logit_shift = recipe.logit_shift

    def watched(original, *rest, **options):
        compared.append(original.config)
        return logit_shift(original, *rest, **options)

    monkeypatch.setattr(recipe, "logit_shift", watched)
    argv = command(toy_dir, prose_file, out, "--rope", "yarn", "--rebased_analysis")
    train.main([*argv, "--plan"])
    with monkeypatch.context() as stopping:
        stopping.setattr(recipe, "impactful_types", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(SystemExit):
            train.main(argv)
    train.main(["--resume", "--out", str(out)])
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    config = LlamaConfig.from_dir(out)
    assert (config.rope_theta, config.rope_scaling) == (10_000.0, scaling)
    assert all((c.rope_theta, c.rope_scaling) == (10_000.0, scaling) for c in compared)
    assert len(compared) == 4 and config.max_position_embeddings == 512
    assert json.loads((out / "run.json").read_text())["settings"]["rope"] == "yarn"

    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.randint(400, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(ids).logits - load_pretrained(out)(ids)).abs().max() < 1e-4

    judge = f"--model {out} --loss --tasks --lengths 300 --n 1 --haystack {prose_file}"
    eval_needle.main(judge.split())
    found = json.loads((out / "needle_results.json").read_text())
    losses = {e["model"]: e["mean"] for e in found["table"]}
    untrained = load_pretrained(toy_dir)
    untrained.config = untrained.config.with_rope(10_000.0, 512, scaling)
    save_pretrained(untrained, tmp_path / "by_hand", tokenizer_from=toy_dir)
    judge = judge.replace(str(out), str(tmp_path / "by_hand"))
    eval_needle.main(judge.split())
    found = json.loads((tmp_path / "by_hand" / "needle_results.json").read_text())
    assert losses["untrained"] == found["table"][0]["mean"] != losses["original"]
    assert list(losses) == ["original", "untrained", "out"]


# ---- bad input: one `error:` line, exit code 2, nothing written --------------------------------


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def snapshot(*folders) -> dict:
    """Every file below the folders, with its bytes."""
    files = [p for folder in folders for p in sorted(folder.rglob("*"))]
    return {p: p.read_bytes() if p.is_file() else None for p in files}


@pytest.fixture()
def bad(toy_dir, prose_file, tmp_path, capsys):
    """Run the command, expect exit code 2 and one error line that matches; nothing may be
    written."""

    def run(match: str, *more: str, folder=toy_dir, out=None):
        out = out or tmp_path / "out"
        before = snapshot(tmp_path, out)
        with pytest.raises(SystemExit) as stop:
            train.main(command(folder, prose_file, out, *more))
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
        assert stop.value.code == 2 and len(lines) == 1
        assert re.search(match, lines[0]), lines[0]
        assert snapshot(tmp_path, out) == before

    return run


def test_resume_from_a_folder_without_settings_is_one_line(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "run.json holds no settings of a run" in capsys.readouterr().err


def test_without_a_model_the_toy_numbers_hold_and_with_one_the_papers():
    (toy, _), (real, _) = train.parse([]), train.parse(["--model", "x"])
    assert toy == {k: v for k, v in TOY.items() if k != "save_minutes"}
    assert real == {"model": "x"} and train.parse(["--steps", "3"])[0] == toy | {"steps": 3}
    assert train.parse([])[1].save_minutes == 2 < train.parse(["--model", "x"])[1].save_minutes
    same, _ = train.parse(["--model", f"./{TINY}/"])  # its folder, written in another way
    assert same == toy
    paper = train.Settings()
    assert (paper.steps, paper.batch_sequences, paper.lr) == (104, 96, 5e-5)
    assert (paper.target_len, paper.train_len) == (131_072, 39_424)
    with pytest.raises(dataclasses.FrozenInstanceError):
        paper.steps = 1


def test_the_toy_runs_through_all_stages(tmp_path, capsys):
    """Same code path, everything smaller."""
    train.main(
        "--target_len 9216 --train_len 2048 --steps 3 --probe_steps 1 --analysis_samples 1"
        f" --replay_steps 1 --replay_len 512 --out {tmp_path / 'out'}".split()
    )
    log = capsys.readouterr().err
    assert "toy model; for a real one: --model DIR" in log
    assert f"next: python eval_needle.py --model {tmp_path / 'out'}\n" in log
    assert (tmp_path / "out" / "needle.json").is_file()
    assert base_of_run(tmp_path / "out") == [TOY["model"]]


def test_a_folder_that_holds_another_run_is_refused(finished, bad):
    bad("holds a finished run: another --out, or move it away", out=finished)
    bad("--resume with another --lr", "--resume", "--lr", "1e-9", out=finished)


def test_samples_that_cannot_be_made_are_refused_before_the_model_is_loaded(
    tmp_path, bad, monkeypatch, capsys
):
    """The replay's too, and those of an analysis that would see nothing past the old window."""
    monkeypatch.setattr(train, "load_pretrained", lambda *_: pytest.fail("loaded"))
    bad(
        r"no position of the 1 samples of the analysis is past the old window 505.*--seed than 0",
        "--base_len",
        "505",
        "--method",
        "pose",
        "--analysis_samples",
        "1",
    )
    with pytest.raises(SystemExit):
        train.main(f"--replay_len 8 --target_len 9216 --out {tmp_path / 'out'}".split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 8 tokens are too few") and "--replay_len" in error
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_version_is_not_resumed(finished, bad, tmp_path):
    out = tmp_path / "old"
    out.mkdir()
    run = json.loads((finished / "run.json").read_text())
    run["settings"]["spell"] = 1
    (out / "run.json").write_text(json.dumps(run))
    bad("--resume with another --spell: the run has 1, now None", "--resume", out=out)


def test_nothing_is_drawn_below_the_error_line(toy_dir, prose_file, tmp_path, capsys):
    """The open bar of the training is closed first (stderr is not a terminal here)."""
    flags = "--lr 1e30 --warmup_steps 0".split()
    with pytest.raises(SystemExit) as stop:
        train.main(command(toy_dir, prose_file, tmp_path / "out", *flags))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "probe:" in err
    assert re.search(r"\nerror: steps \d to \d had no finite loss .*\n$", err), err[-300:]


def test_short_documents_are_counted_and_joined_only_on_request(toy_dir, tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(PROSE[: 300 if i else 9000])
    train.main(command(toy_dir, folder, tmp_path / "a"))
    assert "3 documents too short" in capsys.readouterr().err
    train.main(command(toy_dir, folder, tmp_path / "b", "--join"))
    assert " 0 documents too short" in capsys.readouterr().err


def test_hf_models_of_another_shape_train_too(tmp_path, prose_file):
    """Untied, head_dim given, grouped-query: nothing in the loop assumes the toy's shape."""
    folder = tmp_path / "m"
    folder.mkdir()
    write_tokenizer(folder, PROSE, 331)
    make_hf_llama(head_dim=20, max_position_embeddings=64).save_pretrained(folder)
    train.main(command(folder, prose_file, tmp_path / "out"))
    assert len(read_metrics(tmp_path / "out")) == 9


@pytest.mark.parametrize("path", ["a\ud800", "a\0b"])
def test_a_path_that_no_file_can_have_is_refused(path, tmp_path):
    for settings in ({"model": path}, {"model": "m", "data": [path]}):
        (tmp_path / "run.json").write_text(json.dumps({"settings": settings}))
        with pytest.raises(BadInput, match="no file can have the path 'a"):
            settings_of(tmp_path)
