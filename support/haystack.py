"""What the needle evaluation draws from: haystack text, words for keys, templates; and who was
judged."""

import hashlib
from pathlib import Path

from support.config_files import read_json
from support.standard_library import SEPARATOR, standard_library_topics
from support.text import find_files, read_texts

ROOT = Path(__file__).resolve().parent.parent
ESSAYS = ROOT / "data" / "essays"  # where tests/smollm2.py puts them

REFERENCE = "python-reference"  # --haystack by this name: the reference that Python ships

CITIES = tuple(
    """
Accra Adelaide Algiers Amsterdam Ankara Athens Auckland Baku Bangkok Barcelona Beirut Belgrade
Bergen Berlin Bogota Boston Bratislava Brussels Bucharest Budapest Cairo Calgary Canberra Caracas
Chicago Copenhagen Dakar Dallas Delhi Denver Dhaka Dublin Durban Edinburgh Florence Geneva Glasgow
Hamburg Hanoi Havana Helsinki Houston Istanbul Jakarta Karachi Kiev Kyoto Lagos Lahore Lima Lisbon
London Lyon Madrid Manila Marseille Melbourne Miami Milan Minsk Montreal Moscow Mumbai Munich
Nairobi Naples Osaka Oslo Ottawa Paris Perth Porto Prague Quito Riga Rome Santiago Seattle Seoul
Shanghai Singapore Sofia Stockholm Sydney Taipei Tallinn Tehran Tokyo Toronto Tunis Turin
Vancouver Venice Vienna Warsaw
""".split()
)


def load_haystack(path: str | None) -> tuple[str, str]:
    """(text, where it came from): files or a folder, else the essays if fetched, else Python's
    reference."""
    if path == REFERENCE or (path is None and not ESSAYS.is_dir()):
        return standard_library_topics(), "Python's language reference (--haystack for your own)"
    text = SEPARATOR.join("".join(p) for p in read_texts(find_files([path or str(ESSAYS)])))
    source = path or str(ESSAYS.relative_to(ROOT))  # so that no result names a machine's folders
    if not text.strip():
        raise ValueError(f"haystack {source} holds no text (--haystack)")
    return text, source


WORDING = {
    "intro": str,
    "needle": str,
    "question": str,
    "answer": str,
    "keys": list,
    "values": list,
}
DEFAULTS = {"task": str, "needles": int, "n": int, "n_beyond": int, "haystack": str}


def read_template(path: Path) -> tuple[dict, dict]:
    """A template file, JSON -> (wording of the needles, defaults of the command for this model).

    ValueError names a field that is unknown, of the wrong type, or lacks {key} or {value}."""
    fields = read_json(path)
    for name, value in fields.items():
        kind = (WORDING | DEFAULTS).get(name)
        if kind is None:
            raise ValueError(f"{path}: unknown field {name!r}; {', '.join(WORDING | DEFAULTS)}")
        if type(value) is not kind or (kind is int and value < 1):
            raise ValueError(f"{path}: {name} is {value!r}, wanted: {kind.__name__}")
        if kind is list and not (value and all(isinstance(x, str) and x for x in value)):
            raise ValueError(f"{path}: {name} must be a list of words")
        if kind is list and len(set(value)) < len(value):
            raise ValueError(f"{path}: {name} holds a word twice")
        try:
            value.format(key="", value="") if kind is str else None
        except (KeyError, IndexError, ValueError):
            raise ValueError(
                f"{path}: {name}: only {{key}} and {{value}} may be in braces"
            ) from None
    needle, asking = fields.get("needle"), fields.get("question", "") + fields.get("answer", "")
    if needle is not None and not ("{key}" in needle and "{value}" in needle):
        raise ValueError(f"{path}: needle must hold {{key}} and {{value}}")
    if {"question", "answer"} <= set(fields) and "{key}" not in asking:
        raise ValueError(f"{path}: neither question nor answer holds {{key}}")
    return (
        {k: fields[k] for k in WORDING if k in fields},
        {k: fields[k] for k in DEFAULTS if k in fields},
    )


def fingerprint(folder: str | Path) -> str:
    """Tells one checkpoint from another at the same path: a hash over config.json and parts of
    the weights."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")) + [Path(folder) / "config.json"]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as stream:
            for begin in range(0, size, max(1, size // 64)):
                stream.seek(begin)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:12]
