"""recipe.py: slow twins, examples by hand, and what `python recipe.py` says and draws."""

import json
import math
import re
import shutil
import time
from functools import partial
from statistics import NormalDist

import pytest
import torch
from conftest import PROSE, edit_config, make_hf_llama, write_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from smollm2 import ROOT

import recipe
from model import (
    BadInput,
    Llama,
    LlamaConfig,
    inverse_frequencies,
    load_pretrained,
    load_tokenizer,
    save_pretrained,
)
from recipe import (
    impactful_share,
    impactful_types,
    logit_shift,
    make_example,
    merge,
    merge_weights,
    ntk_rope_base,
    sample_position_ids,
    select_segments,
    split_segments,
    train_length,
)
from support.data.segments import CLOSERS, STOPS, WIDE_STOPS, digit_types
from support.data.sources import standard_library_topics
from support.data.toy import TINY
from support.explain import command, distances
from support.huggingface.config import read_window


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(low: int, high: int, g: torch.Generator) -> int:
    """A random integer, both ends included."""
    return int(torch.randint(low, high + 1, (1,), generator=g))


@pytest.fixture(scope="module")
def tokenizer(toy_dir):
    return load_tokenizer(toy_dir)


class ByteTokenizer:
    """Token id = byte."""

    vocab_size = 256

    def token_bytes(self, i):
        return bytes([i])

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode()


BYTES = ByteTokenizer()


# ---- 1. Analysis -------------------------------------------------------------------------------


@pytest.mark.parametrize("log_softmax", [False, True])
def test_logit_shift_equals_a_slow_loop(log_softmax, tmp_path):
    """[E2] [E3] extended minus original, of the realised token, at the position before it."""
    models = []
    for name, theta in (("a", 1e4), ("b", 3e5)):
        rope = {"rope_type": "default", "rope_theta": theta}
        make_hf_llama(rope_parameters=rope).save_pretrained(tmp_path / name)
        models.append(load_pretrained(tmp_path / name))
    ids = torch.randint(20, (40,), generator=generator())  # few types: they repeat
    pos = torch.arange(40) * 3
    options = {"first_position": 30, "log_softmax": log_softmax, "chunk_tokens": 7}
    delta, total, count = logit_shift(*models, ids, pos, **options)
    with torch.no_grad():
        before, after = (m(ids[None], pos[None])[0] for m in models)
    if log_softmax:
        before, after = before.log_softmax(-1), after.log_softmax(-1)
    slow_total, slow_count = [0.0] * 331, [0] * 331
    for t in range(1, 40):
        shift = float(after[t - 1, ids[t]] - before[t - 1, ids[t]])
        assert abs(float(delta[t]) - shift) < 1e-4
        if pos[t] >= 30:
            slow_total[ids[t]] += shift
            slow_count[ids[t]] += 1
    assert delta[0] == 0 and count.tolist() == slow_count
    assert (total - torch.tensor(slow_total)).abs().max() < 1e-3
    assert float(delta.abs().max()) > 0.1  # the two models do differ


#                      frequent  rare, best  negative  unseen
SHIFTS = torch.tensor([50.0, 6.0, -30.0, 0.0])
COUNTS = torch.tensor([100, 2, 98, 0])


def test_impactful_types_by_hand():
    """[E4] Means decide, not sums; unseen types never count. With a floor the rare one is out, and
    what it covered is not made up for beyond `top`."""
    for options, chosen in (
        ({"top": 0.01}, [1]),
        ({"top": 0.2}, [0, 1]),
        ({"top": 1.0}, [0, 1, 2]),
        ({"top": 0.01, "min_count": 3}, [0]),
        ({"top": 1.0, "min_count": 3}, [0, 2]),
        ({"top": 0.2, "min_count": 2}, [0, 1]),
    ):
        assert impactful_types(SHIFTS, COUNTS, **options).nonzero()[:, 0].tolist() == chosen


def test_impactful_types_covers_the_share_and_no_type_more():
    """[E4]"""
    for seed in range(20):
        total = torch.randn(200, generator=generator(seed), dtype=torch.float64)
        count = torch.randint(0, 9, (200,), generator=generator(seed + 100))
        chosen = impactful_types(total, count, 0.2)
        mean = total / count
        covered, needed = int(count[chosen].sum()), 0.2 * int(count.sum())
        weakest = count[chosen & (mean == mean[chosen].min())].sum()
        assert covered >= needed > covered - int(weakest)
        assert mean[chosen].min() >= mean[~chosen & (count > 0)].max()


# ---- 2. Segments -------------------------------------------------------------------------------


def slow_starts(text: str) -> list[int]:
    """Character offsets where segments begin, one run of stops after the other."""
    starts, i = [0], 0
    while i < len(text):
        j = i
        while j < len(text) and text[j] in STOPS + WIDE_STOPS + CLOSERS:
            j += 1
        wide, stop = (any(c in stops for c in text[i:j]) for stops in ("。！？।؟", ".!?…"))
        if wide or (stop and (j == len(text) or text[j].isspace())):
            starts.append(j)
        if text[i] == "\n":
            starts.append(i + 1)
        i = max(j, i + 1)
    if (len(starts) - 1) * 2000 < len(text):  # hardly any: before each run of spaces, too
        starts += [k for k in range(1, len(text)) if text[k - 1 : k + 1].strip() == text[k - 1]]
    return sorted({s for s in starts if s < len(text)})


ALPHABET = "aB1 .!?\n\"')]。！？」é\U0001f600\u2003…।؟"


@given(
    st.text(alphabet=ALPHABET, min_size=1, max_size=40), st.sampled_from(["", "", "aB 1 " * 600])
)
@settings(max_examples=300, deadline=None)
def test_split_equals_a_slow_loop(text, more):
    """[E5] With one token a byte, borders can be compared exactly."""
    text += more
    expected = [len(text[:s].encode()) for s in slow_starts(text)]
    assert split_segments(torch.tensor(BYTES.encode(text)), BYTES).tolist() == expected


def pieces_of(text: str, tokenizer) -> list[str]:
    ids = torch.tensor(tokenizer.encode(text))
    pieces = ids.tensor_split(split_segments(ids, tokenizer)[1:])
    return [tokenizer.decode(piece.tolist()) for piece in pieces]


def test_segments_by_hand(tokenizer, tmp_path):
    """By bytes, and by tokens that hold several of them, a whole number in one token or not."""
    write_tokenizer(tmp_path, PROSE, 300, digits=False)
    sentences = ["Pi is 3.14.", " See os.path!", ' "Really?"', " she said.", "\n", "\n"]
    sentences += ["你好。", "再见！", "Done."]
    for each in (BYTES, tokenizer, load_tokenizer(tmp_path)):
        assert pieces_of("".join(sentences), each) == sentences
    begins_inside_a_character = torch.tensor(list("é. x\n".encode())[1:])
    assert split_segments(begins_inside_a_character, BYTES).tolist() == [0, 2]
    pieces = pieces_of(PROSE[:3000], tokenizer)
    assert "".join(pieces) == PROSE[:3000] and len(pieces) > 60
    assert all(p.rstrip()[-1:] in ".?!" for p in pieces[:-1])


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=12)  # of segments


@given(LENGTHS, st.integers(1, 80))
def test_short_segments_are_joined(lengths, least):
    """[E29] Segment by segment; at least 1 token: as they are."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    slow: list[int] = []  # lengths
    for n in lengths:
        if slow and slow[-1] < least:
            slow[-1] += n
        else:
            slow.append(n)
    if len(slow) > 1 and slow[-1] < least:
        slow[-2:] = [sum(slow[-2:])]
    joined = recipe.join_short_segments(starts, sum(lengths), least)
    assert recipe.segment_lengths(joined, sum(lengths)).tolist() == slow
    assert torch.equal(recipe.join_short_segments(starts, sum(lengths)), starts)


# ---- 3. Selection ------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", recipe.STRATEGIES)
def test_selection_equals_a_slow_loop_and_is_aligned(strategy):
    """[E13] Best segment first, back in text order, cut at the end."""
    for seed in range(30):
        ids = torch.randint(0, 50, (400,), generator=generator(seed))
        cuts = torch.randperm(399, generator=generator(seed + 1))[:40].sort().values + 1
        borders = [0, *cuts.tolist(), 400]
        starts, table = torch.tensor(borders[:-1]), torch.arange(50) < 6
        segments = [range(*pair) for pair in zip(borders, borders[1:], strict=False)]
        share = [sum(int(ids[t]) < 6 for t in segment) / len(segment) for segment in segments]
        assert (
            impactful_share(ids, starts, table) - torch.tensor(share).double()
        ).abs().max() < 1e-7

        order = torch.randperm(41, generator=generator(seed + 2)).tolist()  # of ties
        if strategy == "first":
            order = list(range(41))
        elif strategy != "random":
            worth = share if strategy == "impact" else [x > 0 for x in share]
            order.sort(key=worth.__getitem__, reverse=True)
        slow: list[int] = []
        for i in order:
            slow += segments[i] if len(slow) < 120 else ()
        slow = sorted(slow)[:120]
        kept, new = select_segments(ids, starts, 120, strategy, generator(seed + 2), table)
        assert kept.tolist() == slow
        assert new.tolist() == [i for i, t in enumerate(slow) if t in borders]


def test_digits_select_by_digits_whatever_table_is_given(tokenizer):
    ids = torch.tensor(tokenizer.encode(PROSE))[:3000]
    options = {"method": "none", "select": "digits"}
    tables = (None, torch.ones(tokenizer.vocab_size, dtype=torch.bool))
    with_none, with_all = (
        make_example(ids, tokenizer, 600, 3000, generator=generator(), impactful=table, **options)
        for table in tables
    )
    assert torch.equal(with_none[0], with_all[0])
    digits = digit_types(tokenizer)
    for i in range(tokenizer.vocab_size):
        assert bool(digits[i]) == any(c in "0123456789" for c in tokenizer.decode([i]))


# ---- 4. Positions ------------------------------------------------------------------------------


def slow_longrecipe(lengths: list[int], T: int, g: torch.Generator) -> list[int]:
    """Algorithm 1, slot by slot: a filled slot places a segment, an empty one skips a position."""
    slots = T - sum(lengths) + len(lengths)
    filled = {0} | {int(s) + 1 for s in torch.randperm(slots - 1, generator=g)[: len(lengths) - 1]}
    out, pos, segment = [], 0, 0
    for slot in range(slots):
        if slot in filled:
            out += range(pos, pos + lengths[segment])
            pos += lengths[segment]
            segment += 1
        else:
            pos += 1
    return out


def slow_prefix(lengths: list[int], T: int, g: torch.Generator) -> list[int]:
    """The released code's: of an odd length, the larger half is (L + 1) // 2."""
    positions = slow_longrecipe(lengths, T, g)
    r = uniform(1, (sum(lengths) + 1) // 2, g)
    return [*range(r), *positions[r:]]


def slow_pose(lengths: list[int], T: int, g: torch.Generator) -> list[int]:
    L = sum(lengths)
    r, u = uniform(1, (L + 1) // 2, g), uniform(0, T - L, g)
    return [i if i < r else i + u for i in range(L)]


def slow_cream(lengths: list[int], T: int, g: torch.Generator) -> list[int]:
    """Their steps one by one, the Gaussian by the standard library."""
    L = sum(lengths)
    head = L // 3 if uniform(0, 1, g) == 0 else min(int(4 * T / L), L // 3)
    gaussian = NormalDist(1 + T / L, 3)
    u = float(torch.rand((), dtype=torch.float64, generator=g))
    inside = gaussian.cdf(2 * T / L) - gaussian.cdf(2)
    W = max(L, min(T, int(gaussian.inv_cdf(gaussian.cdf(2) + u * inside) / 2 * L)))
    last = uniform(head + (L - 2 * head - 1) * W // L, W - head - 1, g)
    middle = range(last - (L - 2 * head) + 1, last + 1)
    return [*range(head), *middle, *range(T - head, T)]


TWINS = {
    "none": lambda lengths, T, g: list(range(sum(lengths))),
    "longrecipe": slow_longrecipe,
    "longrecipe, prefix": slow_prefix,
    "pose": slow_pose,
    "rpes": lambda lengths, T, g: sorted(torch.randperm(T, generator=g).tolist()[: sum(lengths)]),
    "endprompt": lambda lengths, T, g: [*range(sum(lengths) - 20), *range(T - 20, T)],
    "cream": slow_cream,
}


@pytest.mark.parametrize("name", TWINS)
@given(LENGTHS, st.integers(0, 3000), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_positions_equal_their_slow_twins(name, lengths, more, seed):
    """[E6] [E7] [E14] [E15] [E25] [E26] Fed with the same random numbers."""
    L, T, starts = sum(lengths), sum(lengths) + more, torch.tensor([0, *lengths[:-1]]).cumsum(0)
    method, *prefix = name.split(", ")
    assume(method != "longrecipe" or len(lengths) > 1)
    assume(method != "endprompt" or L > 20)
    fast = sample_position_ids(method, L, T, starts, generator(seed), prefix=bool(prefix))
    assert fast.tolist() == TWINS[name](lengths, T, generator(seed))
    if more == 0:  # the full length
        assert torch.equal(fast, sample_position_ids("full", L, T))


STARTS = torch.arange(0, 600, 20)  # 30 segments of 20 tokens


@pytest.mark.parametrize("method", [m for m in recipe.METHODS if m != "full"])
def test_positions_increase_and_stay_below_the_target(method):
    drawn = []
    for seed in range(50):
        p = sample_position_ids(method, 600, 2000, STARTS, generator(seed))
        assert p.shape == (600,) and p.dtype == torch.int64
        assert (p.diff() > 0).all() and p[0] >= 0 and p[-1] < 2000
        drawn.append(tuple(p.tolist()))
    # Drawn afresh, or always the same. Fewer than 45 different draws of 50 has a chance below 1e-6
    # for pose, the coarsest.
    assert len(set(drawn)) == 1 or len(set(drawn)) > 45
    assert len(set(drawn)) > 45 or method not in ("pose", "cream", "rpes", "longrecipe")


# ---- 5. One sample -----------------------------------------------------------------------------


def test_make_example_aligns_tokens_and_positions(tokenizer):
    """Jumps of the positions lie where a kept sentence begins: seen in the text itself. All methods
    get the same tokens."""
    ids = torch.tensor(tokenizer.encode(PROSE))
    assert len(ids) > 9000  # longer than the target: a random window is taken
    samples = {
        m: make_example(ids, tokenizer, 600, 2000, method=m, select="digits", generator=generator())
        for m in recipe.METHODS
        if m != "full"
    }
    tokens, pos = samples["longrecipe"]
    assert len(tokens) == len(pos) == 600
    assert all(torch.equal(tokens, others) for others, _ in samples.values())
    jumps = (pos.diff() > 1).nonzero()[:, 0] + 1
    assert len(jumps) > 5
    for at in jumps.tolist():
        before = tokenizer.decode(tokens[:at].tolist())
        assert before.rstrip()[-1] in ".?!", before[-20:]


def test_131072_tokens_take_a_tenth_of_a_second(tokenizer):
    ids = torch.tensor(tokenizer.encode(PROSE)).repeat(20)[:131_072]
    options = {"method": "longrecipe", "select": "impact", "impactful": digit_types(tokenizer)}
    seconds = []
    for seed in range(5):  # of this process: others use this machine too
        started = time.process_time()
        make_example(ids, tokenizer, 39_424, 131_072, generator=generator(seed), **options)
        seconds.append(time.process_time() - started)
    assert len(ids) == 131_072 and min(seconds) < 0.1, seconds


def test_sample_length_is_30_percent_rounded_up_to_whole_blocks():
    """[E16] the smallest multiple of 128 that is not below 30 % (in whole numbers), at most all."""
    for target in [*range(1, 3000), 32_768, 81_920, 131_072]:
        enough = next(n for n in range(0, target + 128, 128) if 10 * n >= 3 * target)
        assert train_length(target) == min(target, enough), target
    assert train_length(131_072) == 39_424


# ---- 6. and 7. theta, merge --------------------------------------------------------------------


def test_rope_base_gives_the_papers_table():
    """[E8]"""
    assert round(ntk_rope_base(5e5, 128, 8192, 81920) / 1e6, 1) == 48.9
    assert round(ntk_rope_base(5e5, 128, 8192, 131072) / 1e6, 1) == 131.5
    assert round(ntk_rope_base(1e6, 128, 32768, 131072, factor=4) / 1e6, 1) == 13.5


def test_merge_weighs_and_keeps_the_tuned_config(tmp_path):
    """[E10] Of folders and in memory; the dtype is the tuned one's."""
    make_hf_llama().save_pretrained(tmp_path / "a")
    original = load_pretrained(tmp_path / "a")
    tuned = load_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    tuned.config = tuned.config.with_rope(77777.0, 999)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p))
    save_pretrained(tuned, tmp_path / "b")
    a, b = (dict(m.named_parameters()) for m in (original, tuned))
    for weight in (0.0, 0.25, 0.5, 1.0):
        merge(tmp_path / "a", tmp_path / "b", tmp_path / "out", weight)
        out = load_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        in_memory = merge_weights(a, b, weight)
        for name, p in out.named_parameters():
            slow = ((1 - weight) * a[name] + weight * b[name].float()).bfloat16()
            assert torch.equal(p, slow) and torch.equal(in_memory[name], slow), (name, weight)
            assert in_memory[name].dtype == torch.bfloat16
    assert out.config.rope_theta == 77777.0 and out.config.max_position_embeddings == 999


def test_merge_refuses_what_does_not_fit(tmp_path):
    make_hf_llama().save_pretrained(tmp_path / "a")
    for family, changes, weight, match in (
        ("llama", {"vocab_size": 330}, 0.5, "vocab_size is 331 and 330"),
        ("mistral", {"sliding_window": None}, 0.5, "model_type is llama and mistral"),
        ("llama", {}, 1.5, "merge weight 1.5"),
    ):
        make_hf_llama(family, **changes).save_pretrained(tmp_path / "b")
        with pytest.raises(BadInput, match=match):
            merge(tmp_path / "a", tmp_path / "b", tmp_path / "out", weight)
        assert not (tmp_path / "out").exists()


# ---- what is refused ---------------------------------------------------------------------------

NONE, IDS = torch.zeros(0, dtype=torch.int64), torch.arange(10)
MODEL = Llama(LlamaConfig(50, 16, 16, 1, 2, 2, 8, 64))
W = {"w": torch.ones(2)}
example = partial(make_example, method="none", select="first", generator=None)
REFUSED = [  # what flags and files can cause: the message, the function, its arguments
    ("no token was counted", impactful_types, NONE.double(), NONE),
    ("no token was counted", impactful_types, SHIFTS, COUNTS * 0),
    (r"top must be in \(0, 1\], got 0", impactful_types, SHIFTS, COUNTS, 0.0),
    ("no token type was seen 101 times .*--min_count", impactful_types, SHIFTS, COUNTS, 0.2, 101),
    ("unknown selection 'best'", select_segments, IDS, IDS, 5, "best", None),
    ("10 tokens are shorter than a sample of --train_len 11", example, IDS, BYTES, 11, 40),
    ("--train_len 0 must have at least one", example, IDS, BYTES, 0, 40),
    ("at least two segments", partial(example, two_segments=True), IDS, BYTES, 4, 40),
    ("--train_len 0 tokens do not fit", sample_position_ids, "none", 0, 4),
    ("do not fit into --target_len 40", sample_position_ids, "none", 50, 40),
    ("full needs --train_len 10 to equal", sample_position_ids, "full", 10, 40),
    ("unknown method 'yarn'", sample_position_ids, "yarn", 10, 40),
    ("prefix belongs to method longrecipe", sample_position_ids, "pose", 6, 20, None, None, True),
    ("two segments", sample_position_ids, "longrecipe", 10, 40, IDS[:1]),
    ("two segments", sample_position_ids, "longrecipe", 10, 40),
    ("more than 20 tokens", sample_position_ids, "endprompt", 20, 40),
    ("--target_len 0 must have at least one token", train_length, 0),
    ("longer than the old one", ntk_rope_base, 5e5, 128, 8192, 8192),
    ("single frequency", ntk_rope_base, 5e5, 2, 8192, 9999),
    ("w is not in both models", merge_weights, W, {}),
    ("w is not in both models, or has another shape", merge_weights, W, {"w": torch.ones(3)}),
    ("v is not in both models", merge_weights, W, W | {"v": torch.ones(1)}),
    ("merge weight -1", merge_weights, W, W, -1),
]
BUGS = [  # what only code can cause: no BadInput, so that it keeps its traceback
    ("0 token ids need as many", logit_shift, MODEL, MODEL, NONE),
    ("need as many position ids", logit_shift, MODEL, MODEL, IDS, IDS[:2]),
    ("cannot split an empty", split_segments, NONE, BYTES),
    ("cannot split an empty", example, NONE, BYTES, 1, 4),
    ("needs `impactful`", select_segments, IDS, IDS, 5, "impact", None),
    # starts: none, not from 0, not increasing, beyond the end
    ("starts must", select_segments, IDS, NONE, 5, "first", None),
    ("starts must", select_segments, IDS, IDS[1:], 5, "first", None),
    ("starts must", impactful_share, IDS, torch.tensor([0, 5, 5]), IDS > 3),
    ("starts must", sample_position_ids, "longrecipe", 9, 40, torch.tensor([0, 9])),
]


@pytest.mark.parametrize(
    ("row", "kind"), [(row, BadInput) for row in REFUSED] + [(row, ValueError) for row in BUGS]
)
def test_what_is_refused(row, kind):
    match, function, *arguments = row
    with pytest.raises(ValueError, match=match) as refused:
        function(*arguments)
    assert isinstance(refused.value, BadInput) == (kind is BadInput)


# ---- `python recipe.py`: its words -------------------------------------------------------------


@pytest.fixture()
def drawn(monkeypatch) -> list[Figure]:
    """The figures that a test draws, instead of files."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return figures


@pytest.fixture()
def explain(capsys, tmp_path, toy_dir, prose_file):
    """Run the command with these flags -> what it says."""

    def run(*flags) -> str:
        defaults = ("--model", toy_dir, "--text", prose_file, "--figure", tmp_path / "r.png")
        recipe.main([str(flag) for flag in (*defaults, "--target_len", 4000, *flags)])
        return capsys.readouterr().out

    return run


def verdicts(out: str) -> list[tuple[str, str]]:
    return re.findall(r"^ *(keep|fill|drop) +(\d+)%  ", out, re.MULTILINE)


def test_fill_is_what_was_kept_without_an_impactful_token(explain, tmp_path, drawn):
    """Two sentences of 60 hold a digit: all others of the sample only fill it up."""
    text = tmp_path / "a.txt"
    text.write_text("Ada had apples. " * 5 + "Bob had 7. Eve had 8. " + "Nobody knew it. " * 53)
    out = explain("--text", text, "--train_len", 130)
    keep, fill = (int(re.search(rf"{v}: (\d+)", out)[1]) for v in ("keep", "fill"))
    segments = int(re.search(r"tokens in (\d+) segments, chosen by digits", out)[1])
    assert keep == 2 and fill == segments - 2 > 5
    shown = verdicts(out)
    assert [v for v, share in shown if share != "0"] == ["keep", "keep"]
    assert {v for v, share in shown if share == "0"} == {"fill", "drop"}


def test_the_analysis_that_recipe_suggests_fits_its_model(smollm2_dir, explain, drawn):
    """Found with this very tokenizer: the texts in it are those of the ids."""
    assert command.EXAMPLE in command.NO_ANALYSIS
    tokenizer = load_tokenizer(smollm2_dir)
    for i, (text, _) in json.loads((ROOT / command.EXAMPLE).read_text()).items():
        assert tokenizer.decode([int(i)]) == text
    out = explain("--model", smollm2_dir, "--impactful", ROOT / command.EXAMPLE)
    assert "chosen by impact" in out and "keep" in {v for v, _ in verdicts(out)}


def test_without_text_the_sample_is_prose(toy_dir, monkeypatch, drawn):
    seen = []
    monkeypatch.setattr(command, "tell_types", lambda *found: seen.append(found))
    recipe.main(f"--model {toy_dir} --target_len 4000".split())
    _, _, ids, tokenizer = seen[0]
    assert tokenizer.decode(ids.tolist()) in standard_library_topics()


def test_the_types_that_the_analysis_found_are_shown_within_the_text(tmp_path, explain, drawn):
    """The toy's kept analysis by default: its shifts, its order, and sentences of the text."""
    types = json.loads((ROOT / command.OF_THE_TOY).read_text())
    text = tmp_path / "a.txt"
    text.write_text("The caption was long. " * 30 + "Nobody plemented it, level or not. " * 60)
    out = explain("--model", TINY, "--text", text, "--target_len", 9000, "--train_len", 300)
    assert f"({command.OF_THE_TOY})" in out and "chosen by impact" in out
    ids = load_tokenizer(TINY).encode(text.read_text())
    times = {i: ids.count(int(i)) for i in types}
    found = [(f"{types[i][1]:+.1f}", str(n), types[i][0].strip()) for i, n in times.items() if n]
    rows = re.findall(r"^ *([+-][\d.]+) +(\d+)  (.*?)\[(.*?)\](.*)$", out, re.MULTILINE)
    assert [(shift, n, own.strip()) for shift, n, _, own, _ in rows] == found[:8] != []
    assert all(
        (before + own + after).strip() in text.read_text() for *_, before, own, after in rows
    )
    assert f"{sum(times.values()) / len(ids):.1%} of this text's tokens" in out


def test_where_the_types_are_from(toy_dir, tmp_path, explain, drawn):
    """A table made by hand needs no shifts; a model of train.py's, and the toy, bring their own."""
    table, text_of = tmp_path / "impactful.json", load_tokenizer(toy_dir).decode
    rows = {"42": 1, "300": ["x"], "301": [text_of([301]), -2], "302": [text_of([302]), "y"]}
    table.write_text(json.dumps(rows))
    assert command.mean_shifts(table) == {42: "", 300: "", 301: "-2.0", 302: ""}
    assert f"4 of 318 ({table})" in explain("--impactful", table)
    assert command.known_analysis(str(toy_dir)) is None
    assert command.known_analysis(str(tmp_path)) == table
    assert command.known_analysis(f"./{TINY}/") == command.OF_THE_TOY


# ---- what it counts: distances and angles ------------------------------------------------------


@given(st.integers(2, 60), st.integers(0, 40), st.integers(1, 4))
@settings(deadline=None)
def test_distances_equal_a_slow_loop(L, more, draws):
    """Counts, shares and the mean; of the full length every distance, T - d pairs of each."""
    T = L + more
    samples = [sample_position_ids("rpes", L, T, None, generator(i)) for i in range(draws)]
    pairs = [[int(b - a) for i, a in enumerate(p) for b in p[i + 1 :]] for p in samples]
    found, together = distances.Distances.of(samples, T), sum(pairs, [])
    assert found.pairs.tolist() == [pairs[0].count(d) for d in range(T)]
    one = sum(len(set(p)) for p in pairs) / draws
    shares = (one / (T - 1), len(set(together)) / (T - 1), sum(together) / len(together))
    assert (found.covered_by_one, found.covered, found.mean) == pytest.approx(shares)
    full = distances.Distances.of([torch.arange(T)], T)
    assert full.pairs[1:].tolist() == list(range(T - 1, 0, -1)) and full.covered == 1


def new_angles_one_by_one(old: float, now: float, old_len: int, target_len: int) -> bool:
    """Does a position of the target put the pair into a gap between angles met in the old window
    that is wider than one of its steps? (A turn and more: every gap is at most a step.)"""
    turn = 2 * math.pi
    seen = sorted((p * old) % turn for p in range(old_len))
    for a, b in zip(seen, [*seen[1:], seen[0] + turn], strict=True):
        if b - a > old * (1 + 1e-9):  # a gap: this pair has not been everywhere
            inside = [a + 1e-9 < (p * now) % turn < b - 1e-9 for p in range(target_len)]
            if any(inside):
                return True
    return False


@given(st.integers(2, 20), st.integers(1, 30), st.floats(0.02, 2), st.floats(0.1, 1))
@settings(max_examples=400, deadline=None)
def test_new_angles_equal_a_brute_force_over_positions(old_len, more, turns, slower):
    """A pair that makes so many turns in the old window, and is slower afterwards. (The windows are
    small, so that one position too many or too few is seen.)"""
    old = turns * 2 * math.pi / old_len
    beyond = slower * (old_len + more - 1) - (old_len - 1)
    assume(min(abs(turns - 1), abs(beyond)) > 1e-6)  # on the border rounding decides
    slow = new_angles_one_by_one(old, old * slower, old_len, old_len + more)
    pairs = (torch.tensor([w], dtype=torch.float64) for w in (old, old * slower))
    assert bool(distances.meets_new_angles(*pairs, old_len, old_len + more)) == slow


def test_angles_of_a_folder_or_why_there_are_none(toy_dir, tmp_path, explain):
    formulas = (inverse_frequencies, ntk_rope_base)
    toy = distances.angles_of(TINY, 131_072, *formulas)
    assert (int(toy.before.sum()), int(toy.after.sum()), len(toy.old)) == (7, 0, 32)
    assert toy.thetas == (10_000, ntk_rope_base(10_000, 64, 8192, 131_072))
    with pytest.raises(BadInput, match="the new window 64 must be longer than the old one 64"):
        distances.angles_of(toy_dir, 64, *formulas)

    shutil.copy(toy_dir / "tokenizer.json", tmp_path)
    out = explain("--model", tmp_path)  # a tokenizer only: all but the RoPE
    assert f"\nnothing to say of the RoPE: model folder {tmp_path} holds no config.json\n" in out
    assert (tmp_path / "r.png").is_file() and read_window(tmp_path) is None
    shutil.copy(toy_dir / "config.json", tmp_path)
    edit_config(tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(BadInput, match=r"already scales it \(train.py then needs --rope_base\)"):
        distances.angles_of(tmp_path, 999, *formulas)


# ---- its figures -------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    return [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", text)]


def test_what_is_said_and_what_is_drawn_agree(explain, drawn, tmp_path):
    """The figure can be read alone, too: titles, axes with units, n, the old window."""
    out = explain()
    story = [
        "no --impactful FILE",
        "impactful types:",
        "sample: 1,280 tokens",
        "verdict  impactful",
    ]
    story += ["mean distance", "RoPE: 6 pairs of dimensions", f"figure: {tmp_path / 'r.png'}"]
    assert [out.index(part) for part in story] == sorted(out.index(part) for part in story)
    assert len(verdicts(out)) == 12 and {v for v, _ in verdicts(out)} == {"keep", "drop"}
    above, below = drawn[0].subfigs
    assert "1,280 tokens for a window of 4,000 positions" in above.get_suptitle()
    selection, covered, angles = below.axes[:3]
    assert all(panel.get_title() and panel.get_xlabel() for panel in (selection, covered, angles))

    # selection: the tokens of the bars are those of the sample and of the text
    bars = [round(1000 * sum(bar.get_height() for bar in c)) for c in selection.containers]
    labels = [numbers(t.get_text()) for t in selection.get_legend().get_texts()]
    assert bars == [tokens for _, tokens in labels]
    assert sum(bars) == numbers(re.search("text: .* tokens", out)[0])[0]
    assert numbers(re.search("sample: .* segments", out)[0]) == labels[0][::-1]

    # by method: where its tokens are, and which distances they train
    row = r"^ *([a-z]+)  0\.\.([\d,]+ +[\d,]+) +[\d,]+ +([\d.]+%) +([\d.]+%)$"
    table = re.findall(row, out, re.MULTILINE)
    assert [name for name, *_ in table] == list(recipe.METHODS)
    ticks = [t.get_text() for t in covered.get_yticklabels()]
    panels = zip(above.axes[: len(table)], above.axes[len(table) :], ticks, strict=True)
    for (name, last_and_jumps, one, many), (whole, zoom, tick) in zip(table, panels, strict=True):
        assert tick == f"{name}\none: {one}\n{distances.DRAWS}: {many}"
        points = [round(1000 * y) for line in whole.lines[1:] for y in line.get_ydata()]
        jump_at = [i for i in range(1, len(points)) if points[i] - points[i - 1] > 1]
        assert [points[-1], len(jump_at)] == numbers(last_and_jumps)
        said = {whole.get_title()} | {text.get_text() for text in whole.texts}
        label = recipe.METHODS[name][0]
        assert said >= {name, label, f"{len(points):,} tokens", "old window 64"}
        first = zoom.lines[0].get_ydata().tolist()
        assert first == points[: len(first)]
        borders = {round(p.get_x() + 0.5 + w) for p in zoom.patches for w in (0, p.get_width())}
        if name == "longrecipe":  # positions jump at borders of sentences only
            near = {i for i in jump_at if i < len(first)}
            assert near and near <= borders
    for i in (0, -1):  # none and full: every sample is the same one
        share = covered.images[0].get_array()[i].mean()
        assert abs(share - float(table[i][2].rstrip("%")) / 100) < 0.01

    # RoPE: the circled pairs
    circled = [len(line.get_xdata()) for line in angles.lines if line.get_marker() == "o"]
    said = [int(re.search(rf"{w}: +(\d+) of 6", out)[1]) for w in ("before", "after")]
    assert circled == said and said[0] > 0 and "n = 6" in angles.get_xlabel()


def test_the_first_figure_of_readme(explain, tmp_path):
    """--positions; the same bytes when drawn again, and a sample shorter than its lower row."""
    for name in ("a.png", "b.png"):
        out = explain("--positions", tmp_path / name, "--train_len", 60)
        assert out == f"figure: {tmp_path / name}\n"
    first, second = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second and first[:4] == b"\x89PNG"
