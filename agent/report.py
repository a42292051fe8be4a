"""What a support archive holds, with every secret taken out. Pure.

Rules: a secret that is known (the gateway's token) is replaced wherever it stands; a value whose key sounds like a
secret is replaced whatever it is, in comments too; credentials in addresses are replaced. What is cut short or left
out is said in the archive's own list. Readings themselves are not in it.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Collection, Mapping
from typing import Final

REMOVED: Final = "[removed]"
MAX_FILE_BYTES: Final = 4 * 1024 * 1024  #: of one file in the archive; the end of a log is kept

#: Keys whose values are secrets. A key that ends in _file or _env only says where one is.
_SECRET_KEY: Final = re.compile(
    r"""(?ix)
    ( (?<![\w-]) ["']? [\w.-]*
      (?:token|secret|passw(?:or)?d|passphrase|credential|api_?key|private_?key|psk|bind_?key|encryption_?key
        |access_?key|authorization|cookie)
      [\w.-]* (?<!_file) (?<!_env) ["']?
      \s* [=:] \s* )
    ( \"\"\" [\s\S]*? \"\"\" | ''' [\s\S]*? ''' | "(?:[^"\\\n]|\\.)*" | '[^'\n]*' | \[[^\]]*\] | \{[^}\n]*\}
      | (?:bearer\s+|basic\s+)? [^\s,;}#]+ )
    """
)
_KEY_ALONE: Final = re.compile(r"""(?im)^(\s*\#?\s*["']?key["']?\s*=\s*)("[^"\n]*"|'[^'\n]*')""")
_USERINFO: Final = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/@\"']+@")
_PEM: Final = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)")
_BEARER: Final = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/_=.~-]{8,}")


def scrubbed(text: str, known: Collection[str] = ()) -> str:
    """The text without secrets: the `known` ones, and what looks like one."""
    for secret in sorted({s for s in known if s}, key=len, reverse=True):
        text = text.replace(secret, REMOVED)
    text = _PEM.sub(REMOVED, text)
    text = _SECRET_KEY.sub(lambda m: f'{m[1]}"{REMOVED}"', text)
    text = _KEY_ALONE.sub(lambda m: f'{m[1]}"{REMOVED}"', text)
    text = _USERINFO.sub(rf"\1{REMOVED}@", text)
    return _BEARER.sub(rf"\1 {REMOVED}", text)


def end_of(text: str, max_bytes: int = MAX_FILE_BYTES) -> tuple[str, bool]:
    """The last `max_bytes` of it, from a whole line on, and whether something was cut."""
    data = text.encode(errors="replace")
    if len(data) <= max_bytes:
        return text, False
    tail = data[-max_bytes:]
    return tail[tail.find(b"\n") + 1 :].decode(errors="replace"), True


def archive(folder: str, files: Mapping[str, str], *, made_s: int) -> bytes:
    """A .tar.gz of text files under one folder, with the same bytes for the same content."""
    import gzip

    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, text in sorted(files.items()):
            data = text.encode(errors="replace")
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size, entry.mtime, entry.mode = len(data), made_s, 0o640
            tar.addfile(entry, io.BytesIO(data))
    return gzip.compress(plain.getvalue(), mtime=made_s)
