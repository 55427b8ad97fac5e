"""train.py: a step, the whole story on a toy, resuming, and every setting in its place.

(What it refuses is in test_bad_input.py.)"""

import dataclasses
import json
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from conftest import PROSE, edit_config, make_hf_llama, snapshot, write_tokenizer
from torch.nn.utils.rnn import pad_sequence

import eval_needle
import recipe
import train
from model import Llama, LlamaConfig, load_pretrained, load_tokenizer, save_pretrained
from support.data import sources
from support.data.sources import load_texts, load_tokens
from support.data.text import Corpus
from support.data.toy import TINY
from support.memory.activations import LayerInputsOnHost, keep_attention
from support.memory.count import matmul_parameters, training_flops
from support.memory.optimizer import MasterAdamW
from support.runs.flags import as_kept, original_of_run, settings_of
from support.runs.settings import TOY
from support.system.ahead import made_ahead

CONFIG = LlamaConfig(97, 32, 48, 2, 4, 2, 8, 64)

# ---- one step ----------------------------------------------------------------------------------


def test_four_times_one_equals_one_times_four_at_unequal_lengths():
    """[E17] Normalised by the whole step, and equal to torch's mean over all its targets: same loss
    and gradients (float64)."""
    torch.manual_seed(0)
    model = Llama(CONFIG).double()
    ids = [torch.randint(97, (1, n)) for n in (5, 12, 30, 17)]
    singles = [(x, torch.arange(x.shape[1])[None], train.next_token_targets(x)) for x in ids]
    input_ids, positions, targets = (
        pad_sequence([row[0] for row in rows], batch_first=True, padding_value=value)
        for rows, value in zip(zip(*singles, strict=True), (0, 0, -100), strict=True)
    )
    logits = model(input_ids, positions).flatten(0, 1)
    mean = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-100)
    gradients = torch.autograd.grad(mean, list(model.parameters()))
    expected = float(mean.detach())
    for batch in (singles, [(input_ids, positions, targets)]):
        model.zero_grad()
        assert abs(train.accumulate(model, batch) - expected) < 1e-10
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            assert (p.grad - gradient).abs().max() < 1e-10
    # the usual mistake, the mean of the four means, is far away
    means = [train.accumulate(model, [single]) for single in singles]
    assert abs(sum(means) / 4 - expected) > 1e-4


def test_an_update_of_1e_5_does_not_vanish_in_bf16():
    """bf16 near 1.0 has steps of 0.0078. 1,000 updates of 1e-5 must move a weight by 0.01."""
    model = torch.nn.Linear(4, 4, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    optimizer = MasterAdamW(model, lr=1e-5, weight_decay=0.0)
    for _ in range(1000):
        model.weight.grad = torch.ones(4, 4)  # fp32: the master's gradient
        optimizer.step(1e-5, max_norm=1e9)
    assert (optimizer.masters[0] - 0.99).abs().max() < 1e-4
    assert model.weight.dtype == torch.bfloat16
    assert (model.weight.float() - 0.99).abs().max() < 0.004


def test_learning_rate_warms_up_then_stays_and_replay_falls():
    """[E18]"""
    stage = train.Stage("extend", 10, 1, 1, lr=8.0, how={})
    assert [train.learning_rate(stage, i, 4) for i in range(6)] == [2, 4, 6, 8, 8, 8]
    assert train.learning_rate(stage, 0, 4, first_step=2) == 6  # goes on where the probe was
    replay = train.Stage("replay", 4, 1, 1, lr=8.0, how={})
    assert [train.learning_rate(replay, i, 4) for i in range(4)] == [8, 6, 4, 2]


def test_flops_are_those_of_the_papers_model():
    """[E23] design figures for Llama-3-8B: 7.505e9 parameters without the input embedding, 2.99e15
    FLOPs."""
    llama3 = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192)
    assert abs(matmul_parameters(llama3) / 7.505e9 - 1) < 1e-3
    assert abs(training_flops(llama3, 39322) / 2.99e15 - 1) < 2e-3
    assert abs(1 - training_flops(llama3, 39322) / training_flops(llama3, 131072) - 0.846) < 1e-3


# ---- runs on a toy -----------------------------------------------------------------------------


def command(model, data, out, *more: str) -> list[str]:
    """Flags of a small run: 2 + 4 steps, a replay of 3."""
    flags = (
        f"--model {model} --data {data} --out {out} --target_len 512 --train_len 128"
        " --steps 6 --probe_steps 2 --replay_steps 3 --batch_sequences 2 --analysis_samples 2"
        " --lr 5e-3 --replay_lr 1e-3 --warmup_steps 2"
    )
    return [*flags.split(), *more]


def read_metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def read_run(out) -> dict:
    return json.loads((out / "run.json").read_text())


def shifts_in(out) -> dict[str, float]:
    """Impactful type -> its mean shift."""
    return {k: v for k, (_, v) in json.loads((out / "impactful.json").read_text()).items()}


def parameters(folder) -> dict[str, torch.Tensor]:
    return dict(load_pretrained(folder).named_parameters())


def model_bytes(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def watched(owner, name: str, effects=None):
    """Within this, the calls of the function are recorded: see unittest.mock."""
    return mock.patch.object(owner, name, wraps=getattr(owner, name), side_effect=effects)


def code_of(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    return stop.value.code


def run_stopped(argv: list[str], after: int, by=KeyboardInterrupt) -> int:
    """Run train.py and press Ctrl-C (or raise `by`) in the step after so many: its exit code."""
    with watched(train, "accumulate", [mock.DEFAULT] * after + [by]):
        return code_of(argv)


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
    run = read_run(finished)
    assert run["status"] == "done" and run["seconds"] > 0 and run["settings"]["target_len"] == 512
    config = LlamaConfig.from_dir(finished)
    expected = recipe.ntk_rope_base(10_000.0, 12, 64, 512)
    assert config.rope_theta == expected and config.max_position_embeddings == 512
    assert shifts_in(finished)
    assert not (finished / "state.pt").exists() and (finished / "tokenizer.json").is_file()
    # [E10] the result is the average of the original and the replayed weights
    original, extended, replayed, result = (
        parameters(d) for d in (toy_dir, finished / "extended", finished / "replayed", finished)
    )
    for name, p in result.items():
        assert torch.allclose(p, (original[name] + replayed[name]) / 2, atol=1e-7)
    assert any(not torch.equal(extended[n], replayed[n]) for n in extended)


def test_transformers_opens_the_result(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(finished).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(finished)("Ada had 7 apples.").input_ids)[None]
    with torch.no_grad():
        assert (hf(ids).logits - load_pretrained(finished)(ids)).abs().max() < 1e-4


def test_every_setting_reaches_its_place(toy_dir, tmp_path, prose_file):
    """Optimizer, schedule, memory options, analysis, replay's text and merge weight of one run."""
    (tmp_path / "other.txt").write_text("Zoe sings. " * 400)
    more = f"--replay_data {tmp_path}/other.txt --merge_weight 0.25 --weight_decay 0.3 --clip 0.7"
    more += " --keep_stages --optimizer adamw --keep_attention --offload_inputs"
    more += " --log_softmax --top 0.3 --min_count 3 --prefix --min_segment_tokens 4"
    step, out = MasterAdamW.step, tmp_path / "out"
    with (
        watched(train, "make_optimizer") as made,
        mock.patch.object(MasterAdamW, "step", autospec=True, side_effect=step) as stepped,
        watched(train, "accumulate") as accumulated,
        watched(recipe, "logit_shift") as compared,
        watched(recipe, "impactful_types") as chosen,
        watched(recipe, "make_example") as drawn,
    ):
        train.main(command(toy_dir, prose_file, out, *more.split()))

    name, model, *numbers = made.call_args.args
    assert (name, numbers) == ("adamw", [5e-3, 0.3])
    assert model.activation_checkpointing and isinstance(model.around_layers, LayerInputsOnHost)
    assert model.checkpoint_options["context_fn"] is keep_attention
    assert [call.args[2] for call in stepped.call_args_list] == [0.7] * 9
    expected = [2.5e-3, *[5e-3] * 5, 1e-3, 2e-3 / 3, 1e-3 / 3]
    assert [row["lr"] for row in read_metrics(out)] == pytest.approx(expected)
    original, replayed, result = map(parameters, (toy_dir, out / "replayed", out))
    assert compared.call_count == 2 and chosen.call_args.args[2:] == (0.3, 3)
    for call in compared.call_args_list:
        compared_with, extended = call.args[:2]
        assert all(torch.equal(p, original[k]) for k, p in compared_with.named_parameters())
        assert compared_with.config == LlamaConfig.from_dir(toy_dir)  # without --rebased_analysis
        assert extended is model and call.kwargs == {"first_position": 64, "log_softmax": True}
    extend, replay = (call.kwargs for call in drawn.call_args_list[-7:-5])
    asked = {"method": "longrecipe", "select": "impact", "prefix": True, "min_segment_tokens": 4}
    assert extend == extend | asked and extend["two_segments"]
    assert replay == replay | {"method": "none", "select": "first"}
    assert not {"prefix", "min_segment_tokens", "two_segments"} & replay.keys()
    tokenizer = load_tokenizer(toy_dir)
    batches = [call.args[1] for call in accumulated.call_args_list]
    texts = ["".join(tokenizer.decode(x[0].tolist()) for x, _, _ in batch) for batch in batches]
    assert ["Zoe sings" in text for text in texts] == [False] * 6 + [True] * 3
    for k, p in result.items():
        assert torch.allclose(p, 0.75 * original[k] + 0.25 * replayed[k], atol=1e-7)


# ---- samples -----------------------------------------------------------------------------------


def extension(model, data, flags: str) -> tuple[Corpus, list[tuple[torch.Tensor, torch.Tensor]]]:
    """What the extension of a small run draws from, and the samples of its fourth step."""
    given, options = train.parse(command(model, data, "out", *flags.split()))
    there = train.machine(train.HERE, "cpu", options.out)
    settings = train.resolve(given, LlamaConfig.from_dir(model), there)
    tokenizer, stage = load_tokenizer(model), train.plan_stages(settings)[1]
    corpus, _ = load_texts(settings, tokenizer)
    return corpus, list(train.draw(stage, 3, corpus, tokenizer, settings, None))


def test_a_sample_is_drawn_from_seed_step_and_number_alone(toy_dir, prose_file):
    """The numbering that recorded runs rest on."""
    tokenizer = load_tokenizer(toy_dir)
    settings = train.Settings(target_len=512, train_len=128, batch_sequences=2, seed=3)
    corpus = Corpus(load_tokens([str(prose_file)], tokenizer), 128)
    probe = train.plan_stages(settings)[0]
    seen = set()
    for step in (0, 1, 7):
        drawn = train.draw(probe, step, corpus, tokenizer, settings, None)
        for b, (ids, positions) in enumerate(drawn):
            generator = torch.Generator().manual_seed(3 * 1_000_003 + step + 100_000_000 * b)
            again = train.sample(probe, corpus, tokenizer, None, generator)
            assert torch.equal(ids, again[0]) and torch.equal(positions, again[1])
            seen.add(tuple(ids.tolist()))
    assert len(seen) == 6


def test_all_methods_but_full_see_the_same_tokens(toy_dir, prose_file):
    """Every sample of a step, not only the first, whatever a method draws; prefix or not."""
    seen = {
        method: extension(toy_dir, prose_file, f"--select random --train_len 96 --method {method}")
        for method in (*recipe.METHODS.keys() - {"full"}, "longrecipe --prefix")
    }
    _, expected = seen.pop("none")
    assert len(seen) > 5
    for _, samples in seen.values():
        for (ids, positions), (same_ids, plain) in zip(samples, expected, strict=True):
            assert torch.equal(ids, same_ids) and not torch.equal(positions, plain)


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


def test_a_bos_token_comes_first_where_the_tokenizer_adds_one(toy_dir, prose_file, tmp_path):
    """At position 0, and the sample is as long as without; the text takes the positions after."""
    folder = tmp_path / "model"
    shutil.copytree(toy_dir, folder)
    about = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    bos = load_tokenizer(folder).bos_id
    for method, length in (("longrecipe", 128), ("full", 512), ("rpes", 128)):
        flags = f"--select first --method {method} --train_len {length}"
        for ids, positions in extension(folder, prose_file, flags)[1]:
            assert len(ids) == len(positions) == length and ids[0] == bos
            assert positions[0] == 0 and (positions.diff() > 0).all()
            assert positions[-1] < 512 and (ids[1:] != bos).all()


def test_windows_without_sentences_are_drawn_again(toy_dir, tmp_path):
    """A long run without a sentence end would leave longrecipe without a gap. It is not cut at its
    spaces, as a text that has no sentences at all is."""
    text, different = tmp_path / "text.txt", []
    for content in (PROSE[:6000] + " word" * 4000 + PROSE[:6000], " word" * 40_000):
        text.write_text(content)
        corpus, samples = extension(toy_dir, text, "--select first --batch_sequences 24")
        assert corpus.at_spaces == ("." not in content)
        different.append(len({tuple(ids.tolist()) for ids, _ in samples}))
    assert different[0] > 20 > different[1]  # of 24: most begin elsewhere


def test_short_documents_are_counted_and_joined_only_on_request(toy_dir, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(PROSE[: 300 if i else 9000])
    for more, short in (("", 3), ("--join", 0)):
        corpus, _ = extension(toy_dir, tmp_path, f"--select random {more}")
        assert f" {short} documents too short" in corpus.summary()


# ---- stopped and resumed -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop_at", "optimizer"), [(1, None), (7, None), (4, "adamw-host"), (4, "adamw-8bit")]
)
def test_ctrl_c_saves_and_resume_goes_on(
    stop_at, optimizer, finished, toy_dir, prose_file, tmp_path, request, capsys
):
    """Ctrl-C in the probe, the extension or the replay saves and says how to go on. That command,
    without the flags of the run, gives the same weights and the same metrics."""
    out, whole, more = tmp_path / "out", finished, []
    if optimizer == "adamw-8bit":
        request.getfixturevalue("eager")
    if optimizer:
        whole, more = tmp_path / "whole", ["--optimizer", optimizer, "--dtype", "bfloat16"]
        train.main(command(toy_dir, prose_file, whole, *more, "--keep_stages"))
    assert run_stopped(command(toy_dir, prose_file, out, *more), stop_at) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    told, argv = last.split("; to go on: python train.py ")
    assert told == f"interrupted; saved up to step {stop_at} in {out / 'state.pt'}"
    assert torch.load(out / "state.pt", weights_only=True)["step"] == stop_at
    train.main([*argv.split(), "--keep_stages"])
    assert model_bytes(out) == model_bytes(whole)
    assert model_bytes(out / "replayed") == model_bytes(whole / "replayed")
    # stopped in the replay and without --keep_stages until then: the extended weights are gone
    assert (out / "extended").exists() == (stop_at < 6)
    rows, expected = read_metrics(out), read_metrics(whole)
    assert rows[5]["loss"] < rows[0]["loss"] - 0.5
    for name in ("stage", "step", "loss", "lr", "grad_norm"):
        assert [row[name] for row in rows] == [row[name] for row in expected]
    dtype = json.loads((out / "config.json").read_text())["dtype"]
    assert dtype == ("bfloat16" if optimizer else "float32")


def test_ctrl_c_before_the_first_step_says_so(toy_dir, prose_file, tmp_path, capsys):
    argv, resume = command(toy_dir, prose_file, tmp_path), f"--resume --out {tmp_path}"
    assert run_stopped(argv, 0) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    told = f"nothing is saved yet; to begin again: python train.py {resume}"
    assert last == f"interrupted; {told}"
    with watched(train, "resolve", KeyboardInterrupt):  # earlier still, there is no run
        code_of(argv)
    assert capsys.readouterr().err == "interrupted\n"


def edited_run(finished, out, **settings) -> None:
    """Make out a run like `finished`, begun with other settings (None: without)."""
    run = read_run(finished)
    changed = run["settings"] | settings
    run["settings"] = {k: v for k, v in changed.items() if k not in settings or v is not None}
    (out / "run.json").write_text(json.dumps(run))
    shutil.copy(finished / "impactful.json", out)  # --top has been used


def test_resume_takes_the_flags_that_are_not_given_from_the_run(finished, tmp_path):
    run, kept = settings_of(finished), {"keep_stages": True, "no_saves": True}
    for edited, flags, differ in (
        ({}, "", {}),
        ({}, "--lr 0.25", {"lr": 0.25}),
        ({}, "--no_saves", {"no_saves": True}),
        (kept, "", kept),
        (kept, "--no-keep_stages", {"keep_stages": False, "no_saves": True}),
        ({"spell": 1}, "", {}),  # of a newer version
    ):
        edited_run(finished, tmp_path, **edited)
        given, options = train.parse(["--resume", "--out", str(tmp_path), *flags.split()])
        assert as_kept(train.Settings(**given), options) == run | differ


def test_resume_refuses_what_would_change_the_run(finished, tmp_path, error_of):
    """Other settings, and those of an older or newer version; giving a default changes nothing."""
    for settings, flags, match in (
        ({}, "--lr 1e-9", "another lr (0.005, now 1e-09)"),
        ({"log_softmax": None}, "--log_softmax", "another log_softmax (False, now True)"),
        ({"top": None}, "--top 0.3 --keep_stages", "another top (0.2, now 0.3)"),
        ({"spell": 1, "top": None}, "--top 0.2 --save_minutes 1", "another spell (1, now None)"),
    ):
        edited_run(finished, tmp_path, **settings)
        argv = ["--resume", "--out", str(tmp_path), *flags.split()]
        assert match in error_of(train.main, argv, tmp_path)


def test_a_finished_run_says_so_and_is_left_alone(finished, toy_dir, prose_file, capsys, error_of):
    before = snapshot(finished)
    train.main(command(toy_dir, prose_file, finished, "--resume"))
    assert "finished: nothing to do" in capsys.readouterr().err and snapshot(finished) == before
    error = error_of(train.main, command(toy_dir, prose_file, finished), finished)
    assert "holds a finished run: give another --out, or move it away" in error


# ---- the analysis ------------------------------------------------------------------------------


def test_the_analysis_can_be_reused_or_given_an_extended_model(
    finished, toy_dir, prose_file, tmp_path, capsys
):
    """--impactful FILE: same table, same tokens from the extension on. --extended DIR: no probe."""
    file = str(finished / "impactful.json")
    train.main(command(toy_dir, prose_file, tmp_path / "a", "--impactful", file))
    assert model_bytes(tmp_path / "a") == model_bytes(finished)  # the probe's two steps included
    err = capsys.readouterr().err
    assert "impactful types of" not in err and "no CUDA device: going on with the CPU" in err
    plan = "probe 2 x 2 x 128, extend 4 x 2 x 128, replay 3 x 2 x 64"
    assert f"{plan}\ntraining, from its first step on, may take" in err
    assert "\n  recipe: method=longrecipe select=impact prefix=False" in err
    assert re.search(r"100%.*<00:00.*tok/s", err)  # the progress line has rate and ETA
    hint = f"next: python eval_needle.py --model {tmp_path / 'a'}"
    assert f"{hint} --lengths 512 --n 1\n" in err  # small, for a CPU
    more = ("--extended", str(finished), "--probe_steps", "0")
    train.main(command(toy_dir, prose_file, tmp_path / "b", *more))
    stages = [r["stage"] for r in read_metrics(tmp_path / "b")]
    assert stages == ["extend"] * 6 + ["replay"] * 3
    assert "impactful types of" in capsys.readouterr().err


def test_types_that_are_seen_too_rarely_are_not_impactful(toy_dir, prose_file, tmp_path):
    """As long as there is no analysis, --resume takes another --min_count."""
    more = "--steps 2 --replay_steps 0 --top 1 --min_count 12".split()
    assert run_stopped(command(toy_dir, prose_file, tmp_path, *more), 1) == 130
    train.main(["--resume", "--out", str(tmp_path), "--min_count", "4"])
    assert settings_of(tmp_path)["min_count"] == 4 and len(shifts_in(tmp_path)) > 10


def test_the_rebased_analysis_sees_no_shift_where_nothing_was_learnt(
    finished, toy_dir, prose_file, tmp_path
):
    """H' has the original's weights under a new theta. Against the original under that theta (even
    if the run's own theta is another) the shift is zero everywhere; after training it is not."""
    extended = tmp_path / "extended"
    model = load_pretrained(toy_dir)
    model.config = model.config.with_rope(5e5, 512)
    save_pretrained(model, extended, tokenizer_from=toy_dir)
    more = "--replay_steps 0 --steps 1 --probe_steps 0 --rebased_analysis --rope_base 2e5".split()
    out = tmp_path / "out"
    train.main(command(toy_dir, prose_file, out, *more, "--extended", str(extended)))
    assert set(shifts_in(out).values()) == {0.0}
    assert max(map(abs, shifts_in(finished).values())) > 0.01


# ---- other kinds of RoPE, models and texts -----------------------------------------------------

OF_QWEN = {"factor": 4.0, "original_max_position_embeddings": 32_768}  # Qwen2.5's card


@pytest.mark.parametrize(("kind", "fields"), [("linear", {"factor": 2.0}), ("yarn", OF_QWEN)])
def test_scaled_rope_asks_for_a_theta_and_keeps_its_scaling(
    kind, fields, prose_file, tmp_path, error_of
):
    """In a model of another shape than the toy's: untied, head_dim given."""
    folder, out = tmp_path / "scaled", tmp_path / "out"
    make_hf_llama(head_dim=20, max_position_embeddings=64).save_pretrained(folder)
    write_tokenizer(folder, PROSE, 331)
    scaling = {"type": kind, **fields}
    edit_config(folder, rope_parameters=None, rope_theta=1e4, rope_scaling=scaling)
    for more, match in (
        ([], f"scales its RoPE already \\({kind}\\).*--rope_base"),
        (["--rope", "yarn"], f"\\({kind}\\), which --rope yarn would replace"),
    ):
        error = error_of(train.main, command(folder, prose_file, out, *more), tmp_path)
        assert re.search(match, error), error
    train.main(command(folder, prose_file, out, "--rope_base", "5e5"))
    config = LlamaConfig.from_dir(out)
    assert (config.rope_theta, config.rope_scaling) == (5e5, {"rope_type": kind, **fields})


def test_rope_yarn_from_the_command_to_transformers(toy_dir, prose_file, tmp_path):
    """Resumed after a stop; the rebased analysis compares under yarn; transformers opens the
    result; eval_needle.py's untrained row has the original's weights under it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, by_hand = tmp_path / "out", tmp_path / "by_hand"
    argv = command(toy_dir, prose_file, out, "--rope", "yarn", "--rebased_analysis")
    train.main([*argv, "--plan"])
    with watched(recipe, "logit_shift") as compared:
        with watched(recipe, "impactful_types", lambda *_: signal.raise_signal(signal.SIGINT)):
            assert code_of(argv) == 130
        train.main(["--resume", "--out", str(out)])
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    configs = [call.args[0].config for call in compared.call_args_list]
    assert len(configs) == 4 and settings_of(out)["rope"] == "yarn"
    for config in (*configs, LlamaConfig.from_dir(out)):
        assert (config.rope_theta, config.rope_scaling) == (10_000.0, scaling)

    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(out)(PROSE[:1200]).input_ids)[None]
    with torch.no_grad():
        assert (theirs(ids).logits - load_pretrained(out)(ids)).abs().max() < 1e-4

    untrained = load_pretrained(toy_dir)
    untrained.config = untrained.config.with_rope(10_000.0, 512, scaling)
    save_pretrained(untrained, by_hand, tokenizer_from=toy_dir)
    losses = []
    for folder in (out, by_hand):
        judge = f"--model {folder} --loss --tasks --lengths 300 --n 1 --haystack {prose_file}"
        eval_needle.main(judge.split())
        found = json.loads((folder / "needle_results.json").read_text())
        losses.append({e["model"]: e["mean"] for e in found["table"]})
    assert list(losses[0]) == ["original", "untrained", "out"]
    assert losses[0]["untrained"] == losses[1]["by_hand"] != losses[0]["original"]


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


def test_the_toy_runs_through_all_stages(tmp_path, capsys, monkeypatch):
    """Same code path, everything smaller; of Python's sources only the first."""
    root, files = sources.standard_library_files()
    monkeypatch.setattr(sources, "standard_library_files", lambda: (root, files[:40]))
    out = tmp_path / "out"
    flags = "--target_len 9216 --train_len 2048 --steps 3 --probe_steps 1 --analysis_samples 1"
    train.main(f"{flags} --replay_steps 1 --replay_len 512 --out {out}".split())
    log = capsys.readouterr().err
    assert "toy model; for a real one: --model DIR" in log
    assert f"next: python eval_needle.py --model {out}\n" in log
    assert (out / "needle.json").is_file() and original_of_run(out) == [TOY["model"]]
