"""recipe.py: slow twins, hand-worked examples, distributions with a stated chance of accident."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from statistics import NormalDist

import pytest
import torch
from conftest import PROSE, make_hf_llama, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm2 import ROOT

import recipe
from model import BadInput, inverse_frequencies, load_pretrained, load_tokenizer
from recipe import (
    impactful_share,
    impactful_types,
    logit_shift,
    make_example,
    merge,
    ntk_rope_base,
    sample_position_ids,
    select_segments,
    split_segments,
    train_length,
)
from support.data.segments import CLOSERS, STOPS, WIDE_STOPS, digit_types
from support.data.sources import standard_library_text, standard_library_topics
from support.data.toy import TINY
from support.explain import distances as coverage
from support.explain import figure as explain_figure
from support.explain import words
from support.huggingface.config import read_window


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer(toy_dir):
    return load_tokenizer(toy_dir)


class ByteTokenizer:
    """Token id = byte."""

    vocab_size = 256

    def token_bytes(self, i):
        return bytes([i])


# ---- 1. Analysis -------------------------------------------------------------------------------


def test_logit_shift_equals_a_slow_loop(tmp_path):
    """[E2] [E3] extended minus original, of the realised token, at the position before it."""
    models = []
    for name, theta in (("a", 1e4), ("b", 3e5)):
        rope = {"rope_type": "default", "rope_theta": theta}
        make_hf_llama(rope_parameters=rope).save_pretrained(tmp_path / name)
        models.append(load_pretrained(tmp_path / name))
    base, extended = models
    ids = torch.randint(20, (40,), generator=generator())  # few types: they repeat
    pos = torch.arange(40) * 3
    for log_softmax in (False, True):
        delta, total, count = logit_shift(
            base, extended, ids, pos, first_position=30, log_softmax=log_softmax, chunk_tokens=7
        )
        with torch.no_grad():
            after, before = extended(ids[None], pos[None])[0], base(ids[None], pos[None])[0]
        if log_softmax:
            after, before = after.log_softmax(-1), before.log_softmax(-1)
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


def test_impactful_types_by_hand():
    """[E4] Means decide, not sums; unseen types never count."""
    #            frequent   rare, best   seen, negative   unseen
    total = torch.tensor([50.0, 6.0, -30.0, 0.0])
    count = torch.tensor([100, 2, 98, 0])
    assert impactful_types(total, count, 0.01).tolist() == [False, True, False, False]
    assert impactful_types(total, count, 0.2).tolist() == [True, True, False, False]
    assert impactful_types(total, count, 1.0).tolist() == [True, True, True, False]
    # with a floor the rare one is out, and what it covered is not made up for beyond `top`
    assert impactful_types(total, count, 0.01, min_count=3).tolist() == [True, False, False, False]
    assert impactful_types(total, count, 1.0, min_count=3).tolist() == [True, False, True, False]
    assert impactful_types(total, count, 0.2, min_count=2).tolist() == [True, True, False, False]
    with pytest.raises(BadInput, match="no token type was seen 101 times .*--min_count"):
        impactful_types(total, count, 0.2, min_count=101)
    with pytest.raises(ValueError, match="top"):
        impactful_types(total, count, 0.0)
    with pytest.raises(ValueError, match="no token was counted"):
        impactful_types(total, count * 0)


def test_impactful_types_covers_the_share_and_no_type_more():
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
@settings(max_examples=500, deadline=None)
def test_split_equals_a_slow_loop(text, more):
    """[E5] With one token a byte, borders can be compared exactly."""
    text += more
    ids = torch.tensor(list(text.encode()))
    expected = [len(text[:s].encode()) for s in slow_starts(text)]
    assert split_segments(ids, BYTES).tolist() == expected


BYTES = ByteTokenizer()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 20))
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


def test_segments_by_hand(tmp_path):
    text = 'Pi is 3.14. See os.path! "Really?" she said.\n\n你好。再见！Done.'
    ids = torch.tensor(list(text.encode()))
    starts = [*split_segments(ids, BYTES).tolist(), len(ids)]
    raw = text.encode()
    parts = [raw[a:b].decode() for a, b in zip(starts, starts[1:], strict=False)]
    assert parts == [
        "Pi is 3.14.",
        " See os.path!",
        ' "Really?"',
        " she said.",
        "\n",
        "\n",
        "你好。",
        "再见！",
        "Done.",
    ]


def test_segments_survive_broken_utf8_and_tokens_that_straddle(tokenizer):
    ids = torch.tensor(list("é. x\n".encode())[1:])  # begins inside a character
    assert split_segments(ids, BYTES).tolist() == [0, 2]
    text = PROSE[:3000]
    ids = torch.tensor(tokenizer.encode(text))
    starts = split_segments(ids, tokenizer)
    pieces = [tokenizer.decode(p.tolist()) for p in ids.tensor_split(starts[1:])]
    assert "".join(pieces) == text and len(pieces) > 60
    assert all(p.rstrip()[-1:] in ".?!" for p in pieces[:-1])
    with pytest.raises(ValueError, match="empty"):
        split_segments(ids[:0], tokenizer)


# ---- 3. Selection ------------------------------------------------------------------------------


def slow_select(ids, starts, train_len, rank):
    """Best segment first (rank is unique here), back in text order, cut at the end."""
    ends = [*starts[1:].tolist(), len(ids)]
    kept = []
    for i in sorted(range(len(starts)), key=lambda i: rank[i]):
        if len(kept) < train_len:
            kept += range(int(starts[i]), ends[i])
    return sorted(kept)[:train_len]


@pytest.mark.parametrize("strategy", recipe.STRATEGIES)
def test_selection_equals_a_slow_loop_and_is_aligned(strategy):
    """[E13] shares too."""
    for seed in range(30):
        ids = torch.randint(0, 50, (400,), generator=generator(seed))
        cuts = torch.randperm(399, generator=generator(seed + 1))[:40].sort().values + 1
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), cuts))
        table = torch.arange(50) < 6
        kept, new = select_segments(ids, starts, 120, strategy, generator(seed + 2), table)
        order = torch.randperm(41, generator=generator(seed + 2))  # the tie-breaker
        ties = {int(s): i for i, s in enumerate(order)}
        share = impactful_share(ids, starts, table)
        ends = [*starts[1:].tolist(), 400]
        for i in range(41):  # a slow twin of impactful_share
            run = ids[int(starts[i]) : ends[i]]
            assert abs(float(share[i]) - sum(int(t) < 6 for t in run) / len(run)) < 1e-12
        rank = {
            "impact": [(-float(share[i]), ties[i]) for i in range(41)],
            "digits": [(-(float(share[i]) > 0), ties[i]) for i in range(41)],
            "random": [ties[i] for i in range(41)],
            "first": list(range(41)),
        }[strategy]
        assert kept.tolist() == slow_select(ids, starts, 120, rank)
        # aligned: jumps of `kept` lie only at the new segment starts, and each new start is an
        # old one
        jumps = (kept.diff() > 1).nonzero()[:, 0] + 1
        assert set(jumps.tolist()) <= set(new.tolist())
        assert set(kept[new].tolist()) <= set(starts.tolist()) and new[0] == 0
        # every kept segment but the last one is whole
        lengths = dict(
            zip(
                starts.tolist(),
                (e - int(s) for s, e in zip(starts, ends, strict=True)),
                strict=True,
            )
        )
        for a, b in zip(new, new[1:], strict=False):
            assert int(b - a) == lengths[int(kept[a])]


def test_selection_refuses():
    ids, starts = torch.arange(10), torch.tensor([0, 5])
    with pytest.raises(ValueError, match="shorter than a sample of --train_len 11"):
        select_segments(ids, starts, 11, "first", generator())
    with pytest.raises(ValueError, match="unknown selection 'best'"):
        select_segments(ids, starts, 5, "best", generator())
    with pytest.raises(ValueError, match="needs `impactful`"):
        select_segments(ids, starts, 5, "impact", generator())
    with pytest.raises(ValueError, match="--train_len 0 must have at least one token"):
        select_segments(ids, starts, 0, "first", generator())


@pytest.mark.parametrize("starts", [[], [1, 5], [0, 5, 5], [0, 10]])
def test_starts_that_are_not_those_of_the_ids_are_refused(starts):
    """None, not from 0, not increasing, beyond the end: everywhere the same words."""
    starts, ids = torch.tensor(starts, dtype=torch.int64), torch.arange(10)
    table = torch.ones(10, dtype=torch.bool)
    for refusing in (
        lambda: select_segments(ids, starts, 5, "first", generator()),
        lambda: impactful_share(ids, starts, table),
        lambda: recipe.spread_segments(10, 40, torch.cat((starts, starts)), generator()),
    ):
        with pytest.raises(ValueError, match="starts must increase from 0|two segments"):
            refusing()


def test_empty_inputs_are_refused(toy_dir):
    """What flags and files can cause in one line; what only code can keeps its traceback."""
    model, none = load_pretrained(toy_dir), torch.zeros(0, dtype=torch.int64)
    options = {"method": "none", "select": "first", "generator": generator()}
    for bug, refusing in (
        (True, lambda: logit_shift(model, model, none)),
        (True, lambda: logit_shift(model, model, torch.arange(3), torch.arange(2))),
        (True, lambda: split_segments(none, BYTES)),
        (True, lambda: make_example(none, BYTES, 1, 4, **options)),
        (False, lambda: impactful_types(none.double(), none)),
        (False, lambda: make_example(torch.arange(3), BYTES, 0, 4, **options)),
        (False, lambda: make_example(torch.arange(3), BYTES, 4, 4, **options)),
        (False, lambda: sample_position_ids("none", 0, 4)),
        (False, lambda: train_length(0)),
    ):
        with pytest.raises(ValueError) as refused:
            refusing()
        assert isinstance(refused.value, BadInput) is not bug


def test_strategies_differ_on_real_text(smollm2_dir):
    tokenizer = load_tokenizer(smollm2_dir)
    ids = torch.tensor(tokenizer.encode(standard_library_topics()[:200_000]))[:16384]
    impactful = torch.zeros(49152, dtype=torch.bool)
    impactful[ids.unique()[::9]] = True  # any ninth type will do to tell the strategies apart
    samples = {}
    for strategy in recipe.STRATEGIES:
        samples[strategy], pos = make_example(
            ids,
            tokenizer,
            4992,
            16384,
            method="longrecipe",
            select=strategy,
            impactful=None if strategy == "digits" else impactful,
            generator=generator(),
        )
        assert len(samples[strategy]) == len(pos) == 4992
    names = list(samples)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert (samples[a] != samples[b]).float().mean() > 0.5, (a, b)
    share = {n: float(impactful[s].float().mean()) for n, s in samples.items()}
    assert share["impact"] > 1.5 * share["random"]
    digits = {n: float(digit_types(tokenizer)[s].float().mean()) for n, s in samples.items()}
    assert digits["digits"] > 1.2 * digits["random"]


# ---- 4. Positions ------------------------------------------------------------------------------


def slow_longrecipe(lengths: list[int], target: int, gen: torch.Generator) -> list[int]:
    """Algorithm 1, slot by slot: a filled slot places a segment, an empty one skips a position."""
    slots = target - sum(lengths) + len(lengths)
    filled = {0} | {
        int(s) + 1 for s in torch.randperm(slots - 1, generator=gen)[: len(lengths) - 1]
    }
    out, pos, segment = [], 0, 0
    for slot in range(slots):
        if slot in filled:
            out += range(pos, pos + lengths[segment])
            pos += lengths[segment]
            segment += 1
        else:
            pos += 1
    return out


@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.integers(0, 60), st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_longrecipe_equals_algorithm_1_slot_by_slot(lengths, extra, seed):
    """[E6]"""
    L = sum(lengths)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    fast = sample_position_ids("longrecipe", L, L + extra, starts, generator(seed))
    assert fast.tolist() == slow_longrecipe(lengths, L + extra, generator(seed))


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


def test_longrecipe_jumps_only_at_segments_and_every_gap_has_the_same_mean():
    """Gap i is one part of a uniform composition of T - L = 1400 into 30 parts: mean 1400/30 =
    46.7, standard deviation about 46. Over 3,000 draws the mean of a gap has standard error 0.84;
    6 of them are allowed: chance of accident < 1e-7 for all 29 gaps. The released code doubles
    the first gap."""
    gaps = torch.zeros(29)
    g = generator()
    for _ in range(3000):
        p = sample_position_ids("longrecipe", 600, 2000, STARTS, g)
        jump = p.diff() - 1
        assert p[0] == 0 and jump[jump > 0].sum() == jump.sum()
        at = jump.nonzero()[:, 0] + 1
        assert (at % 20 == 0).all()
        gaps += jump[19::20] / 3000
    assert (gaps - 1400 / 30).abs().max() < 6 * 0.84, gaps


def test_pose_and_prefix_equal_their_slow_twins():
    """[E14] Fed with the same draws: two numbers for pose; algorithm 1 and one for the prefix. Of
    an odd length, the larger half is (L + 1) // 2: 300 of 599, as of 600."""
    for seed, L in ((seed, 600 - seed % 2) for seed in range(80)):
        g = generator(seed)
        r, u = (int(torch.randint(*b, (1,), generator=g)) for b in ((1, 301), (0, 2001 - L)))
        slow = [i if i < r else i + u for i in range(L)]
        assert sample_position_ids("pose", L, 2000, None, generator(seed)).tolist() == slow
        g = generator(seed)
        slow = sample_position_ids("longrecipe", L, 2000, STARTS, g).tolist()
        slow[:r] = range(r := int(torch.randint(1, 301, (1,), generator=g)))
        fast = sample_position_ids("longrecipe", L, 2000, STARTS, generator(seed), prefix=True)
        assert fast[r:].tolist() == slow[r:] and fast[:r].tolist() == list(range(r))


def test_digits_select_by_digits_whatever_table_is_given(tokenizer):
    ids = torch.tensor(tokenizer.encode(PROSE))[:3000]
    options = {"method": "none", "select": "digits"}
    table = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
    a, _ = make_example(ids, tokenizer, 600, 3000, generator=generator(), **options)
    b, _ = make_example(
        ids, tokenizer, 600, 3000, generator=generator(), impactful=table, **options
    )
    assert torch.equal(a, b)
    digits = digit_types(tokenizer)
    for i in range(tokenizer.vocab_size):
        assert bool(digits[i]) == any(c in "0123456789" for c in tokenizer.decode([i]))


def test_prefix_keeps_a_contiguous_uniform_beginning():
    g, prefixes = generator(), []
    for _ in range(4000):
        p = sample_position_ids("longrecipe", 600, 2000, STARTS, g, prefix=True)
        assert (p.diff() > 0).all() and p[-1] < 2000
        run = int((p == torch.arange(600)).long().cumprod(0).sum())
        prefixes.append(run)
    mean = sum(prefixes) / 4000
    # r ~ U{1..300}: mean 150.5, std 86.6, standard error 1.37; the run may go on to the end of a
    # segment whose gap is 0 or by the segment it is in (never where jumps came before): 6
    # errors + 1 token
    assert abs(mean - 150.5) < 6 * 1.37 + 1 and max(prefixes) <= 320
    with pytest.raises(ValueError, match="prefix belongs to method longrecipe"):
        sample_position_ids("pose", 6, 20, None, g, prefix=True)


def chi_square(counts: torch.Tensor, shares: torch.Tensor | None = None) -> float:
    """Against equal shares if none are given."""
    expected = counts.sum() * (1 / len(counts) if shares is None else shares)
    return float(((counts - expected) ** 2 / expected).sum())


def test_pose_has_one_uniform_split_and_a_uniform_skip():
    """[E7] split ~ U{1..(L+1)//2}, skip ~ U{0..T-L}: chi-square against uniform, 10 bins, 9
    degrees of freedom: above 60 by accident has a chance of 2e-9. The released code draws the
    split from 0..T-L."""
    g = generator()
    splits, skips = [], []
    for _ in range(5000):
        p = sample_position_ids("pose", 600, 2000, None, g)
        jump = p.diff() - 1
        assert (jump > 0).sum() <= 1 and p[0] == 0
        skips.append(int(jump.sum()))
        if skips[-1]:
            splits.append(int(jump.argmax()) + 1)
    assert (
        min(splits) == 1 and max(splits) == 300
    )  # each missed with chance (1 - 1/300)^4995 < 6e-8
    assert min(skips) < 10 and max(skips) > 1390
    assert chi_square(torch.histc(torch.tensor(splits).float(), 10, 1, 301)) < 60
    assert chi_square(torch.histc(torch.tensor(skips).float(), 10, 0, 1401)) < 60


def test_rpes_is_a_uniform_subset():
    """[E15] Each of 2000 positions is in a draw with chance 0.3: over 2,000 draws 600 times, std
    20.5; further than 6.5 of those for any position: chance below 2e-7."""
    hits, g = torch.zeros(2000), generator()
    for _ in range(2000):
        hits[sample_position_ids("rpes", 600, 2000, None, g)] += 1
    assert (hits - 600).abs().max() < 6.5 * 20.5


def test_endprompt_puts_the_last_tokens_at_the_end():
    """[E25]"""
    for L, T in ((600, 2000), (21, 21), (21, 500)):
        slow = [i if i < L - 20 else T - (L - i) for i in range(L)]
        assert sample_position_ids("endprompt", L, T).tolist() == slow
    with pytest.raises(BadInput, match="endprompt needs more than --train_len 20"):
        sample_position_ids("endprompt", 20, 500)


def slow_cream(L: int, T: int, gen: torch.Generator) -> list[int]:
    """Their steps one by one, the Gaussian by the standard library."""
    head = L // 3 if torch.randint(2, (1,), generator=gen) == 0 else min(int(4 * T / L), L // 3)
    gaussian = NormalDist(1 + T / L, 3)
    u = float(torch.rand((), dtype=torch.float64, generator=gen))
    inside = gaussian.cdf(2 * T / L) - gaussian.cdf(2)
    W = max(L, min(T, int(gaussian.inv_cdf(gaussian.cdf(2) + u * inside) / 2 * L)))
    first_last = head + (L - 2 * head - 1) * W // L
    last = int(torch.randint(first_last, W - head, (1,), generator=gen))
    middle = range(last - (L - 2 * head) + 1, last + 1)
    return [*range(head), *middle, *range(T - head, T)]


@given(st.integers(1, 700), st.integers(0, 3000), st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_cream_equals_its_slow_twin(L, more, seed):
    """[E26] Any length of a sample and of a target, next to each other too."""
    p = sample_position_ids("cream", L, L + more, None, generator(seed))
    assert p.tolist() == slow_cream(L, L + more, generator(seed))
    assert (p.diff() > 0).all() and p[0] >= 0 and p[-1] < L + more
    assert more or p.tolist() == list(range(L))


def test_cream_draws_a_truncated_gaussian():
    """Half of the samples have long heads: of 6,000, further than 6 standard deviations (39) off
    by accident: 2e-9. Then, for either head, the middle's last position against the sum over the
    density: chi-square, 10 bins of equal chance, 9 degrees of freedom, above 60 by accident: 2e-9.
    Their code's Gaussian, with what is outside at its two ends, gives more than 1,000."""
    L, T, g = 600, 2000, generator()
    lasts: dict[int, list[int]] = {200: [], 13: []}
    for _ in range(6000):
        p = sample_position_ids("cream", L, T, None, g)
        head = 200 if int(p[L - 100]) == T - 100 and int(p[L - 200]) == T - 200 else 13
        lasts[head].append(int(p[L - head - 1]))
    assert abs(len(lasts[200]) - 3000) < 6 * 39
    for head, found in lasts.items():
        chance = torch.zeros(T, dtype=torch.float64)
        for a in torch.linspace(2, 2 * T / L, 4001).tolist():
            W = int(a * L / 2)
            lowest = head + (L - 2 * head - 1) * W // L
            weight = NormalDist(1 + T / L, 3).pdf(a)
            chance[lowest : W - head] += weight / (W - head - lowest)
        upto = (chance / chance.sum()).cumsum(0)
        bins = (upto * 10).long().clamp(max=9)  # of each position
        counts = torch.bincount(bins[torch.tensor(found)], minlength=10)
        shares = torch.stack([(chance * (bins == i)).sum() for i in range(10)]) / chance.sum()
        assert chi_square(counts, shares) < 60


def test_positions_refuse():
    g = generator()
    with pytest.raises(ValueError, match="at least two segments"):
        sample_position_ids("longrecipe", 10, 40, torch.tensor([0]), g)
    with pytest.raises(ValueError, match="do not fit into --target_len 40"):
        sample_position_ids("none", 50, 40, None, g)
    with pytest.raises(ValueError, match="full"):
        sample_position_ids("full", 10, 40, None, g)
    with pytest.raises(ValueError, match="unknown method 'yarn'"):
        sample_position_ids("yarn", 10, 40, None, g)
    with pytest.raises(ValueError, match="segment starts"):
        sample_position_ids("longrecipe", 10, 40, torch.tensor([0, 12]), g)
    assert sample_position_ids("full", 40, 40, None, g).tolist() == list(range(40))


def test_make_example_aligns_tokens_and_positions(tokenizer):
    """Jumps of the positions lie where a kept sentence begins: seen in the text itself."""
    ids = torch.tensor(tokenizer.encode(PROSE))
    assert len(ids) > 9000  # longer than the target: a random window is taken
    tokens, pos = make_example(
        ids, tokenizer, 600, 2000, method="longrecipe", select="digits", generator=generator()
    )
    assert len(tokens) == len(pos) == 600
    for at in ((pos.diff() > 1).nonzero()[:, 0] + 1).tolist():
        before = tokenizer.decode(tokens[:at].tolist())
        assert before.rstrip()[-1] in ".?!", before[-20:]
    with pytest.raises(ValueError, match="shorter than a sample"):
        make_example(
            ids[:500], tokenizer, 600, 2000, method="none", select="first", generator=generator()
        )


def test_all_methods_get_the_same_tokens(tokenizer):
    ids = torch.tensor(tokenizer.encode(PROSE))
    samples = [
        make_example(ids, tokenizer, 600, 2000, method=m, select="random", generator=generator(5))
        for m in recipe.METHODS
        if m != "full"
    ]
    assert all(torch.equal(samples[0][0], tokens) for tokens, _ in samples)


def test_131072_tokens_take_a_tenth_of_a_second(smollm2_dir):
    tokenizer = load_tokenizer(smollm2_dir)
    ids = torch.tensor(tokenizer.encode(standard_library_text()[:600_000]))[:131072]
    assert len(ids) == 131072
    impactful = digit_types(tokenizer)
    split_segments(ids[:10], tokenizer)  # makes the table
    seconds = []
    for seed in range(7):  # the best of seven: others use this machine too
        started = time.perf_counter()
        make_example(
            ids,
            tokenizer,
            39424,
            131072,
            method="longrecipe",
            select="impact",
            impactful=impactful,
            generator=generator(seed),
        )
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.1, seconds


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
    with pytest.raises(ValueError, match="longer"):
        ntk_rope_base(5e5, 128, 8192, 8192)


def test_merge_weighs_and_keeps_the_tuned_config(tmp_path):
    """[E10]"""
    rope = {"rope_type": "default", "rope_theta": 77777.0}
    make_hf_llama().save_pretrained(tmp_path / "a")
    make_hf_llama(rope_parameters=rope, max_position_embeddings=999).save_pretrained(tmp_path / "b")
    b = load_pretrained(tmp_path / "b")
    with torch.no_grad():
        for p in b.parameters():
            p.add_(torch.randn_like(p))
    from model import save_pretrained

    save_pretrained(b, tmp_path / "b")
    a = dict(load_pretrained(tmp_path / "a").named_parameters())
    b = dict(b.named_parameters())
    for weight in (0.0, 0.25, 0.5, 1.0):
        merge(tmp_path / "a", tmp_path / "b", tmp_path / "out", weight)
        out = load_pretrained(tmp_path / "out")
        for name, p in out.named_parameters():
            assert torch.equal(p, (1 - weight) * a[name] + weight * b[name]), (name, weight)
        in_memory = recipe.merge_weights(a, b, weight)
        assert all(torch.equal(p, in_memory[name]) for name, p in out.named_parameters())
    assert out.config.rope_theta == 77777.0 and out.config.max_position_embeddings == 999


def test_merge_in_memory_keeps_the_dtype_and_refuses_what_does_not_fit():
    ours, other = {"w": torch.tensor([1.0, 2.0]).bfloat16()}, {"w": torch.tensor([3.0, 6.0])}
    merged = recipe.merge_weights(other, ours, 0.25)["w"]
    assert merged.dtype == torch.bfloat16 and merged.tolist() == [2.5, 5.0]
    for odd in ({}, {"w": torch.ones(3)}, ours | {"v": torch.ones(1)}):
        with pytest.raises(BadInput, match="cannot merge: [vw] is not in both models"):
            recipe.merge_weights(ours, odd)
    with pytest.raises(BadInput, match="merge weight -1"):
        recipe.merge_weights(ours, ours, -1)


def test_merge_refuses_what_does_not_fit(tmp_path):
    make_hf_llama().save_pretrained(tmp_path / "a")
    make_hf_llama(vocab_size=330).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="vocab_size is 331 and 330"):
        merge(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    make_hf_llama("mistral", sliding_window=None).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="model_type is llama and mistral"):
        merge(tmp_path / "a", tmp_path / "m", tmp_path / "out")
    with pytest.raises(ValueError, match="merge weight 1.5"):
        merge(tmp_path / "a", tmp_path / "a", tmp_path / "out", 1.5)
    assert not (tmp_path / "out").exists()


# ---- recipe.py in another project ------------------------------------------------------------

ALONE = """
import sys, torch
import recipe
from model import Llama, LlamaConfig, linear_cross_entropy

torch.manual_seed(0)
config = LlamaConfig(256, 32, 48, 2, 4, max_position_embeddings=64)
original, tuned = Llama(config), Llama(config)
theta = recipe.ntk_rope_base(config.rope_theta, config.head_dim, 64, 512)
tuned.config = config.with_rope(theta, 512)
ids = torch.tensor(list(b"Ada had 7 apples. Nobody knew! Was it Bob? " * 12))
starts = torch.arange(0, len(ids), 18)  # segments of one's own
g = torch.Generator().manual_seed(0)

def sample(method, select, impactful=None):
    kept, begins = recipe.select_segments(ids, starts, 160, select, g, impactful)
    return ids[kept], recipe.sample_position_ids(method, 160, 512, begins, g)

results = [torch.tensor(theta)]
for method in ("none", "longrecipe"):
    results += sample(method, "random")
delta, total, count = recipe.logit_shift(original, tuned, *results[-2:], first_position=64)
types = recipe.impactful_types(total, count)
results += [delta, types]
results += sample("longrecipe", "impact", types)
x, pos = (t[None] for t in results[-2:])
targets = recipe.next_token_targets(x)
loss, n = linear_cross_entropy(tuned.hidden(x, pos), tuned.lm_head.weight, targets)
merged = recipe.merge_weights(original.state_dict(), tuned.state_dict())
results += [loss.detach() / n, *merged.values()]
"""
ASKS = """
errors = []
for ask in (
    lambda: recipe.split_segments(ids, None),
    lambda: recipe.make_example(ids, None, 9, 99, method="none", select="first", generator=g),
    lambda: recipe.merge("a", "b", "c"),
    lambda: recipe.main([]),
):
    try:
        ask()
    except ModuleNotFoundError as error:
        errors.append(str(error))
assert "support" not in sys.modules
torch.save((results, errors), "results.pt")
"""


def test_recipe_py_works_with_model_py_alone(tmp_path):
    """Copied into an empty folder: selection, positions, analysis, theta, targets and the merge in
    memory give what they give here; what splits texts or reads model folders says what it lacks."""
    for name in ("model.py", "recipe.py"):
        shutil.copy(ROOT / name, tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", ALONE + ASKS], check=True, cwd=tmp_path, env=env)
    theirs, errors = torch.load(tmp_path / "results.pt", weights_only=True)
    here: dict = {}
    exec(ALONE, here)
    assert len(theirs) == len(here["results"]) > 10
    for a, b in zip(theirs, here["results"], strict=True):
        assert a.dtype == b.dtype and torch.allclose(a.double(), b.double())
    assert errors == ["this takes support/ beside model.py: No module named 'support'"] * 4


# ---- `python recipe.py` ------------------------------------------------------------------------


def explain(capsys, *flags) -> str:
    recipe.main([str(f) for f in flags])
    return capsys.readouterr().out


def verdicts(out: str) -> list[tuple[str, str]]:
    return re.findall(r"^ *(keep|fill|drop) +(\d+)%  ", out, re.MULTILINE)


def test_recipe_explains_one_sample(toy_dir, prose_file, tmp_path, capsys):
    figure = tmp_path / "recipe.png"
    flags = ("--model", toy_dir, "--text", prose_file, "--target_len", 4000, "--figure", figure)
    out = explain(capsys, *flags)
    assert "sample: 1,280 tokens" in out and "(the paper drops those)" in out
    story = ("no --impactful FILE", "impactful types:", "verdict  impactful  segment")
    story += ("mean distance", "RoPE: 6 pairs of dimensions", f"figure: {figure}")
    places = [out.index(part) for part in story]
    assert places == sorted(places)
    assert len(verdicts(out)) == 12 and {v for v, _ in verdicts(out)} == {"keep", "drop"}
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_fill_is_what_was_kept_without_an_impactful_token(toy_dir, tmp_path, capsys):
    """Two sentences of 60 hold a digit: all others of the sample only fill it up."""
    text = tmp_path / "a.txt"
    text.write_text("Ada had apples. " * 5 + "Bob had 7. Eve had 8. " + "Nobody knew it. " * 53)
    flags = ("--model", toy_dir, "--text", text, "--target_len", 4000, "--train_len", 130)
    out = explain(capsys, *flags, "--figure", tmp_path / "r.png")
    keep, fill = (int(re.search(rf"{v}: (\d+)", out)[1]) for v in ("keep", "fill"))
    segments = int(re.search(r"tokens in (\d+) segments, chosen", out)[1])
    assert keep == 2 and fill == segments - 2 > 5
    shown = verdicts(out)
    assert [v for v, share in shown if share != "0"] == ["keep", "keep"]
    assert {v for v, share in shown if share == "0"} == {"fill", "drop"}


def test_the_analysis_that_recipe_suggests_is_there_and_fits(smollm2_dir, tmp_path, capsys):
    """Found with this very tokenizer: the texts in it are those of the ids."""
    flags = ("--model", smollm2_dir, "--figure", tmp_path / "r.png")
    out = explain(capsys, *flags, "--target_len", 16384)
    path = ROOT / re.search(r"--impactful (\S+\.json)", out)[1]
    tokenizer = load_tokenizer(smollm2_dir)
    for i, (text, _) in json.loads(path.read_text()).items():
        assert tokenizer.decode([int(i)]) == text
    again = explain(capsys, *flags, "--target_len", 16384, "--impactful", path)
    assert "chosen by impact" in again and "no --impactful" not in again
    assert "chosen by digits" in out and "keep" in {v for v, _ in verdicts(again)}


def test_without_text_the_sample_is_prose(toy_dir, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(words, "tell_types", lambda *found: seen.append(found))
    monkeypatch.setattr(explain_figure, "draw", lambda *_: None)
    recipe.main(f"--model {toy_dir} --target_len 9000 --figure {tmp_path / 'r.png'}".split())
    _, _, ids, _, tokenizer = seen[0]
    assert tokenizer.decode(ids.tolist()) in standard_library_topics()


TYPE = re.compile(r"^ *([+-][\d.]+)? +([\d,]+)  (.*?)\[(.*?)\](.*)$", re.MULTILINE)


def test_the_types_that_the_analysis_found_are_shown_within_the_text(tmp_path, capsys, monkeypatch):
    """The toy's kept analysis by default: its shifts, its order, and sentences of the text."""
    monkeypatch.setattr(explain_figure, "draw", lambda *_: None)
    types = json.loads((ROOT / "assets/results/tiny_128k/impactful.json").read_text())
    text = tmp_path / "a.txt"
    text.write_text("The caption was long. " * 30 + "Nobody plemented it, level or not. " * 60)
    flags = ("--text", text, "--target_len", 9000, "--train_len", 300)
    out = explain(capsys, *flags, "--figure", tmp_path / "r.png")
    assert "(assets/results/tiny_128k/impactful.json)" in out and "chosen by impact" in out
    ids = torch.tensor(load_tokenizer(TINY).encode(text.read_text()))
    count = torch.bincount(ids, minlength=2048)
    expected = [(f"{v[1]:+.1f}", int(count[int(i)]), v[0].strip()) for i, v in types.items()]
    expected = [row for row in expected if row[1]][:8]
    shown = [(m[1], int(m[2].replace(",", "")), m[4].strip()) for m in TYPE.finditer(out)]
    assert shown == expected and len(shown) >= 3
    for m in TYPE.finditer(out):
        assert (m[3] + m[4] + m[5]).strip() in text.read_text()
    share = sum(int(count[int(i)]) for i in types) / len(ids)
    assert f"{share:.1%} of this text's tokens" in out


def test_a_table_made_by_hand_needs_no_shifts(toy_dir, prose_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(explain_figure, "draw", lambda *_: None)
    table = tmp_path / "types.json"
    table.write_text('{"42": 1, "300": ["x"], "301": ["x", -2], "302": ["x", "y"]}')
    assert words.mean_shifts(table) == {42: "", 300: "", 301: "-2.0", 302: ""}
    flags = ("--model", toy_dir, "--text", prose_file, "--target_len", 4000, "--impactful", table)
    assert f"4 of 318 ({table})" in explain(capsys, *flags, "--figure", tmp_path / "r.png")


@pytest.mark.parametrize(
    ("run", "unit"),
    [
        ({"settings": {"log_softmax": True}}, "nats"),
        ({"settings": {"log_softmax": False}}, "logits"),
        ({"settings": {"lr": 1}}, "logits"),  # of a version that knew nothing else
        ({}, "shift"),
        (None, "shift"),
    ],
)
def test_the_shifts_say_their_unit_where_it_is_known(
    run, unit, toy_dir, prose_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(explain_figure, "draw", lambda *_: None)
    table = tmp_path / "impactful.json"
    table.write_text('{"300": ["x", 2.5]}')
    if run is not None:
        (tmp_path / "run.json").write_text(json.dumps(run))
    flags = ("--model", toy_dir, "--text", prose_file, "--target_len", 600, "--impactful", table)
    out = explain(capsys, *flags, "--figure", tmp_path / "r.png")
    [header] = [line for line in out.splitlines() if "  times  type" in line]
    assert header.split()[0] == unit


def test_a_model_that_train_py_made_brings_its_own_types(toy_dir, tmp_path):
    assert words.known_analysis(str(toy_dir)) is None
    (tmp_path / "impactful.json").write_text('{"42": ["x", 1.0]}')
    assert words.known_analysis(str(tmp_path)) == tmp_path / "impactful.json"
    assert words.known_analysis(f"./{TINY}/") == words.OF_THE_TOY


# ---- what it counts: distances and angles ------------------------------------------------------


@given(st.integers(2, 60), st.integers(0, 40), st.integers(0, 9))
def test_distance_counts_equal_a_slow_loop(L, more, seed):
    positions = sample_position_ids("rpes", L, L + more, None, generator(seed))
    slow = [0] * (L + more)
    for i in range(L):
        for j in range(i + 1, L):
            slow[positions[j] - positions[i]] += 1
    assert coverage.distance_counts(positions, L + more).tolist() == slow


def test_distances_of_many_samples():
    """Shares, mean and sums against sets and loops; of the full length every distance, T - d pairs
    of each."""
    draws = [sample_position_ids("pose", 40, 100, None, generator(i)) for i in range(5)]
    found = coverage.Distances.of(draws, 100)
    pairs = [[int(b - a) for i, a in enumerate(p) for b in p[i + 1 :]] for p in draws]
    together = sum(pairs, [])
    assert found.counts.tolist() == [together.count(d) for d in range(100)]
    assert found.first.tolist() == [pairs[0].count(d) for d in range(100)]
    assert found.covered == len(set(together)) / 99
    assert abs(found.covered_by_one - sum(len(set(p)) for p in pairs) / 5 / 99) < 1e-12
    assert abs(found.mean - sum(together) / len(together)) < 1e-9
    assert found.covered_by_one < found.covered < 1  # all three say something
    full = coverage.Distances.of([torch.arange(100)], 100)
    assert full.counts[1:].tolist() == list(range(99, 0, -1)) and full.covered == 1


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


@pytest.mark.parametrize("old_len", [64, 200])
@pytest.mark.parametrize("times", [2, 16])
@pytest.mark.parametrize("theta", [500.0, 10_000.0])
def test_new_angles_equal_a_brute_force_over_positions(old_len, times, theta):
    """Before and after the change of theta; and for a theta that is changed too little."""
    target, freq = old_len * times, inverse_frequencies(24, theta)
    bases = (theta, theta * 2, ntk_rope_base(theta, 24, old_len, target))
    some = []
    for base in bases:
        now = inverse_frequencies(24, base)
        pairs = zip(freq.tolist(), now.tolist(), strict=True)
        slow = [new_angles_one_by_one(a, b, old_len, target) for a, b in pairs]
        assert coverage.meets_new_angles(freq, now, old_len, target).tolist() == slow
        some.append(sum(slow))
    assert some[0] > 0 and some[0] >= some[1] >= some[2]


def test_the_borders_of_a_new_angle():
    """Wavelength of the old window: a whole circle. One position more is beyond an arc."""
    w = torch.tensor([2 * math.pi / 64], dtype=torch.float64)
    assert not coverage.meets_new_angles(w * (1 + 1e-12), w, 64, 1000)
    slower = w * (1 - 1e-6)
    assert coverage.meets_new_angles(slower, slower, 64, 65)
    assert not coverage.meets_new_angles(slower, slower, 64, 64)
    assert not coverage.meets_new_angles(slower, slower * 63 / 64.001, 64, 65)
    assert coverage.meets_new_angles(slower, slower * 63 / 63.999, 64, 65)


def test_the_toys_and_the_papers_angles():
    """docs/method.md: under the paper's theta no pair of the toy's meets a new angle."""
    toy = coverage.angles(TINY, 131_072, inverse_frequencies, ntk_rope_base)
    assert (int(toy.before.sum()), int(toy.after.sum()), len(toy.old)) == (7, 0, 32)
    assert toy.thetas == (10_000, ntk_rope_base(10_000, 64, 8192, 131_072))


@pytest.mark.parametrize(
    ("theta", "head_dim", "old_len", "target", "before"),
    [(5e5, 128, 8192, 131_072, 29), (5e5, 128, 8192, 81_920, 29), (1e6, 128, 32_768, 131_072, 24)],
)
def test_new_angles_in_the_papers_settings(theta, head_dim, old_len, target, before):
    """Llama 3 and Qwen2 (LOG.md): none under the paper's theta, all of them under x T / L0."""
    old = inverse_frequencies(head_dim, theta)
    bases = (theta, theta * target / old_len, ntk_rope_base(theta, head_dim, old_len, target))
    new = (inverse_frequencies(head_dim, base) for base in bases)
    met = [int(coverage.meets_new_angles(old, now, old_len, target).sum()) for now in new]
    assert met == [before, before, 0]


def test_why_there_are_no_angles(toy_dir, tmp_path):
    formulas = (inverse_frequencies, ntk_rope_base)
    assert "reaches 64 tokens as it is" in coverage.angles(toy_dir, 64, *formulas)
    assert "holds no config.json" in coverage.angles(tmp_path, 999, *formulas)
    config = json.loads((toy_dir / "config.json").read_text())
    scaled = config | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(scaled))
    assert "scales it already (train.py: --rope_base)" in coverage.angles(tmp_path, 999, *formulas)
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    assert "model_type 'other'" in coverage.angles(tmp_path, 999, *formulas)
    assert read_window(toy_dir) == 64 and read_window(tmp_path) is None


def test_a_folder_with_a_tokenizer_only_is_explained_too(toy_dir, prose_file, tmp_path, capsys):
    """All but the RoPE, and why not that."""
    (tmp_path / "tokenizer.json").write_bytes((toy_dir / "tokenizer.json").read_bytes())
    flags = ("--model", tmp_path, "--text", prose_file, "--target_len", 4000)
    out = explain(capsys, *flags, "--figure", tmp_path / "r.png")
    assert f"\nnothing to say of the RoPE: model folder {tmp_path} holds no config.json\n" in out
    assert (tmp_path / "r.png").is_file()


# ---- the figure --------------------------------------------------------------------------------


LABELS = {m: f"{m}: {label}" for m, (label, _) in recipe.METHODS.items() if m != "full"}


@pytest.fixture(scope="module")
def told_and_drawn(toy_dir, prose_file):
    """What the command says, and its figure instead of a file."""
    import matplotlib.figure

    drawn, said = [], io.StringIO()
    flags = f"--model {toy_dir} --text {prose_file} --target_len 4000"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(
            matplotlib.figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self)
        )
        recipe.main(flags.split())
    return said.getvalue(), drawn[0]


def test_the_figure_can_be_read_alone(told_and_drawn):
    """Its words, not its pixels: panels, axes with units, n, the old window, one name a method."""
    _, figure = told_and_drawn
    panels = figure.axes[:6]
    assert [p.get_title()[:3] for p in panels] == [f"{x}. " for x in "ABCDEF"]
    assert all(p.get_xlabel() for p in panels) and "for a window of 4,000" in figure.get_suptitle()
    for panel in panels[1], panels[3]:
        labels = [text.get_text() for text in panel.get_legend().get_texts()]
        assert "old window (64)" in labels and set(LABELS.values()) < set(labels)
    for part, name in zip(
        ("thousand tokens", "units of 1,024", "pairs in one sample at each distance", "turns"),
        (panels[0], panels[1], panels[3], panels[5]),
        strict=True,
    ):
        assert part in name.get_ylabel()
    assert f"n = {coverage.DRAWS} samples, full length: 1" in panels[3].get_title()
    legend = [text.get_text() for text in panels[5].get_legend().get_texts()]
    assert any("— is above this line went round\nthe whole circle" in x for x in legend)
    assert "n = 6" in panels[5].get_xlabel()


def test_the_first_figure_of_readme(toy_dir, prose_file, tmp_path, capsys, monkeypatch):
    """--positions: a column for each method; in it the very position ids, the sentences, the old
    window, and how many tokens; the same bytes when drawn again."""
    import matplotlib.figure

    drawn, draw = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *args, **more: drawn.append(self) or draw(self, *args, **more),
    )
    flags = ["--model", toy_dir, "--text", prose_file, "--target_len", "4000", "--positions"]
    for name in ("a.png", "b.png"):
        assert explain(capsys, *flags, tmp_path / name) == f"figure: {tmp_path / name}\n"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    axes, methods = drawn[0].axes, list(recipe.METHODS)
    whole, zoom = axes[: len(methods)], axes[len(methods) :]
    assert [axis.get_title() for axis in whole] == methods and len(zoom) == len(methods)
    assert "1,280 tokens for a window of 4,000 positions" in drawn[0].get_suptitle()
    for name, axis, near in zip(methods, whole, zoom, strict=True):
        tokens = 4000 if name == "full" else 1280
        said = [t.get_text() for t in axis.texts]
        assert f"{tokens:,} tokens" in said and "old window 64" in said
        assert recipe.METHODS[name][0] in said and "token" in near.get_xlabel()
        points = [line.get_ydata() for line in axis.lines[1:]]
        assert sum(map(len, points)) == tokens
        first = near.lines[0].get_ydata()
        assert [round(1000 * y) for p in points for y in p][: len(first)] == first.tolist()
        bands = [(p.get_x() + 0.5, p.get_x() + p.get_width() + 0.5) for p in near.patches]
        assert len(bands) > 2
        if name == "longrecipe":  # positions jump at borders of sentences only
            jumps = [i for i in range(1, len(first)) if first[i] - first[i - 1] > 1]
            assert jumps and set(jumps) <= {int(x) for band in bands for x in band}
    explain(capsys, *flags, tmp_path / "short.png", "--train_len", 60)  # shorter than the lower row
    assert len(drawn[2].axes[-2].lines[0].get_ydata()) == 60


def number(pattern: str, text: str) -> int:
    return int(re.search(pattern, text)[1].replace(",", ""))


def test_the_words_agree_with_the_figure(told_and_drawn):
    out, figure = told_and_drawn
    selection, index, strips, pairs, covered, angles = figure.axes[:6]
    # A: the tokens of the bars are those of the sample and of the text
    bars = [sum(bar.get_height() for bar in c) for c in selection.containers]
    text, sample = number("text: ([\\d,]+) tokens", out), number("sample: ([\\d,]+) tok", out)
    labels = [t.get_text() for t in selection.get_legend().get_texts()]
    taken, dropped = (number("segments, ([\\d,]+) tok", x) for x in labels)
    assert abs(1000 * sum(bars) - text) < 1e-6 and taken + dropped == text
    assert f"keep: {labels[0].split(':')[1].split()[0]} that hold" in out and taken == sample
    # B to E, by method: last position, jumps, distances
    row = r"^ *([a-z]+(?: length)?)  0\.\.([\d,]+) +([\d,]+) +([\d,]+) +([\d.]+)% +([\d.]+)%$"
    rows = re.findall(row, out, re.MULTILINE)
    table = {name: [float(x.replace(",", "")) for x in row] for name, *row in rows}
    assert set(table) == {*LABELS, coverage.FULL}
    lines = {line.get_label(): line for line in index.lines}
    ticks = [t.get_text().split("\n") for t in covered.get_yticklabels()]
    image = covered.images[0].get_array()
    widths = explain_figure.bin_edges(4000)[1:] - explain_figure.bin_edges(4000)[:-1]
    for row, (name, one, many) in enumerate(ticks):
        last, jumps, _, by_one, by_many = table[name]
        assert (one, many) == (f"one: {by_one}%", f"{coverage.DRAWS}: {by_many}%")
        if name == coverage.FULL or name == "none":
            assert abs((image[row] * widths).sum() / 3999 - by_one / 100) < 6e-4
        if name in LABELS:
            y = lines[LABELS[name]].get_ydata() * 1024
            assert round(y[-1]) == last and sum(y[1:] - y[:-1] > 1.5) == jumps
    # F: the circled pairs
    circled = [len(line.get_xdata()) for line in angles.lines if line.get_marker() == "o"]
    said = [int(re.search(rf"{w}: +(\d+) of 6", out)[1]) for w in ("before", "after")]
    assert circled == said and said[0] > 0


def test_a_tokenizer_without_digits_still_splits(tmp_path):
    write_tokenizer(tmp_path, PROSE, 300, digits=False)
    tokenizer = load_tokenizer(tmp_path)
    ids = torch.tensor(tokenizer.encode("One. Two 2.5 three.\n"))
    starts = split_segments(ids, tokenizer)
    pieces = [tokenizer.decode(p.tolist()) for p in ids.tensor_split(starts[1:])]
    assert pieces == ["One.", " Two 2.5 three.", "\n"]
