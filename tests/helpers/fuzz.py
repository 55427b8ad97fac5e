"""Seeded damage to the files of a model folder: for test_faults.py."""

import base64
import copy
import functools
import json
import operator
import random

ODD = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**24, 2**31, 2**63, 10**30, 10**400, -(2**63)),
    *(0.5, -0.0, 1e308, 1e-308, float("nan"), float("inf")),
    *("", "x", "\x00", "\ud800", "Ġ", "a b", "(a+)+$", "[", "default", "llama3", "Ab" * 5000),
    *([], {}, [None], [[]], {"type": None}, {"Regex": "(?<=x)*"}, ["a", "b"], ["a"], [1, 2]),
)


def places(value, path=()) -> list[tuple]:
    """The paths of everything inside a JSON value; of long lists and objects only the ends."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        for key, inner in items if len(items) < 40 else items[:10] + items[-10:]:
            found += places(inner, (*path, key))
    return found


def at(value, path):
    """What a path of `places` leads to."""
    return functools.reduce(operator.getitem, path, value)


def damage_value(value, rng: random.Random):
    """A JSON value with one to three places changed, dropped or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        if not (paths := places(value)):
            break
        *above, last = rng.choice(paths)
        owner, kind = at(value, above), rng.random()
        if kind < 0.15:
            del owner[last]
        elif kind < 0.3:
            owner[last] = copy.deepcopy(at(value, rng.choice(paths)))
        elif kind < 0.4 and isinstance(owner, dict):
            owner[str(rng.choice(ODD))[:20]] = owner.pop(last)
        else:
            owner[last] = copy.deepcopy(rng.choice(ODD))
    return value


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes flipped, cut out, doubled or put in; or the file cut off; or nested deeply."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(data) + 1)
        j = min(len(data), i + rng.randint(1, 8))
        kind = rng.random()
        if kind < 0.4 and i < len(data):
            data[i] ^= 1 << rng.randrange(8)
        elif kind < 0.6:
            del data[i:j]
        elif kind < 0.75:
            data[i:i] = data[i:j] * rng.randint(1, 3)
        elif kind < 0.9:
            data[i:i] = rng.randbytes(rng.randint(1, 4))
        elif kind < 0.97:
            del data[i:]
        else:
            data[i:i] = b"[" * 100_000
    return bytes(data)


def damage_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.25:
        return damage_bytes(data, rng)
    # surrogates are written as \ud800 in the file
    return json.dumps(damage_value(json.loads(data), rng)).encode()


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The length, the header or the bytes of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    kind = rng.random()
    if kind < 0.15:
        length = rng.choice((0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1))
        return length.to_bytes(8, "little") + header + rest
    if kind < 0.3:
        return damage_bytes(data, rng)
    if kind < 0.4:
        return data[: rng.randrange(len(data))]
    header = damage_json(header, rng)
    return len(header).to_bytes(8, "little") + header + rest


def base64_line(token: bytes, rank: int) -> bytes:
    """A line of tokenizer.model in tiktoken's format."""
    return base64.b64encode(token) + b" %d\n" % rank
