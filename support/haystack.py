"""What the needle evaluation draws from: haystack text, words for keys; and who was judged."""

import hashlib
from pathlib import Path

from support.text import SEPARATOR, find_files, read_texts, standard_library_topics

ROOT = Path(__file__).resolve().parent.parent
ESSAYS = ROOT / "data" / "essays"  # where tests/smollm2.py puts them

CITIES = """
Accra Adelaide Algiers Amsterdam Ankara Athens Auckland Baku Bangkok Barcelona Beirut Belgrade
Bergen Berlin Bogota Boston Bratislava Brussels Bucharest Budapest Cairo Calgary Canberra Caracas
Chicago Copenhagen Dakar Dallas Delhi Denver Dhaka Dublin Durban Edinburgh Florence Geneva Glasgow
Hamburg Hanoi Havana Helsinki Houston Istanbul Jakarta Karachi Kiev Kyoto Lagos Lahore Lima Lisbon
London Lyon Madrid Manila Marseille Melbourne Miami Milan Minsk Montreal Moscow Mumbai Munich
Nairobi Naples Osaka Oslo Ottawa Paris Perth Porto Prague Quito Riga Rome Santiago Seattle Seoul
Shanghai Singapore Sofia Stockholm Sydney Taipei Tallinn Tehran Tokyo Toronto Tunis Turin
Vancouver Venice Vienna Warsaw
""".split()


def load_haystack(path: str | None) -> tuple[str, str]:
    """(text, where it came from): files or a folder, else the essays if fetched, else Python's
    reference."""
    if path is None and not ESSAYS.is_dir():
        return (
            standard_library_topics(),
            "Python's language reference (default; --haystack for your own)",
        )
    text = SEPARATOR.join("".join(p) for p in read_texts(find_files([path or str(ESSAYS)])))
    source = path or str(ESSAYS.relative_to(ROOT))  # so that no result names a machine's folders
    if not text.strip():
        raise ValueError(f"haystack {source} holds no text (--haystack)")
    return text, source


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
