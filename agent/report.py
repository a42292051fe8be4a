"""What a support archive holds, with every secret taken out. Pure.

Rules: a secret that is known (the gateway's token, what a secret's key holds in the configuration) is replaced wherever
it stands; a value whose key sounds like a secret is replaced whatever it is, in comments too; credentials in addresses
are replaced. Where it is doubtful how far a value goes, more is taken out rather than less. What is cut short or left
out is said in the archive's own list. Readings themselves are not in it.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping
from typing import Final
from urllib.parse import quote, quote_plus

REMOVED: Final = "[removed]"
MAX_FILE_BYTES: Final = 4 * 1024 * 1024  #: of one file in the archive; the end of a log is kept

_SHORTEST: Final = 4  #: characters; what is shorter would be found everywhere

#: What names a secret: a part of a key, or (what is a common part of other words) a whole one. A key that ends in
#: _file or _env only says where one is.
_NAMED: Final = r"""[\w.-]{0,128}?(?:token|secret|passw(?:or)?d|pass[ _-]?(?:phrase|code|word)|credential|cookie|psk|jwt
    |authorization|community|signature|(?:api|app|private|bind|encryption|access|signing|shared|account|auth|network)
    [ _-]?key)[\w.-]*+(?<!_file)(?<!_env)"""
_WORD: Final = r"(?:basic_?auth|auth|pass|pwd|pw|pin|sig|sid|session(?:_?id)?|app_?id|keys?)"
_SECRET_NAME: Final = re.compile(rf"(?ix) (?:{_NAMED} | {_WORD})")
#: Not in a path: "/etc/headgate/gateway-token: Permission denied" is worth knowing.
_SECRET_KEY: Final = re.compile(
    rf"""(?ix) (?: (?P<lead> [?&] | (?<![\w.-]) -- ) | (?<![\w./-]) )
    (?P<open>\\{{0,16}}["'])? (?P<name>{_NAMED} | {_WORD})
    (?:\\{{0,16}}["'])?
    (?P<sep> \s* (?: =>? (?![=>]) | : (?!:) ) [^\S\n]* | (?<=["']) \s*,\s* | \s+ (?=["']) | [^\S\n]+ )"""
)
_TABLE: Final = re.compile(
    rf"""(?imx) ^ ([^\S\n]* \[{{1,2}} [^\]\n]{{0,200}}? (?<![\w/-]) {_NAMED} [^\]\n]{{0,200}} \]{{1,2}}
    [^\S\n]* (?:\#.*)? \n)
    (?: (?! \s*\[ ) .* (?:\n|\Z) )+"""
)
_NO_SECRET: Final = frozenset({"none", "basic", "bearer", "header", "query", "digest", "true", "false", ""})
_USERINFO: Final = re.compile(
    r"(?i)\b([a-z][a-z0-9+.-]{0,31}://)(?:[^\s/@:\"]{1,128}:[^\s\"?#]{1,256}|[^\s/?#@\"']{1,256})@"
)
_LOGIN: Final = re.compile(r"(?<=\s)((?:-u|--user)[ =])[^\s:]+:\S+")
_PEM: Final = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY[A-Z ]*-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY[A-Z ]*-----|\Z)"
)
_BEARER: Final = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/_=.~-]{8,}")
_JWT: Final = re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*")  #: RFC 7519: a JSON header in base64url

_ESCAPED_QUOTE: Final = re.compile(r"""[bru]?(\\{1,16}["'])""")
_TRIPLE: Final = re.compile(r"""[bru]?(\"{3}|'{3})[\s\S]*?(?:\1|\Z)""")
_QUOTED: Final = re.compile(r"""[bru]?(?:"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|'[^'\n]*'|["'].*)""")
_JSON_WORD: Final = re.compile(r"(?:-?\d[\d.eE+-]*|true|false|null)(?=\s*[,}\]]|[^\S\n]*$)", re.MULTILINE)
_BRACKETS: Final = {"[": "]", "{": "}", "(": ")"}
_LONGEST: Final = 65_536  #: characters between a bracket and its partner


def scrubbed(text: str, known: Collection[str] = ()) -> str:
    """The text without secrets: the `known` ones, and what looks like one."""
    for secret in sorted({form for s in known for form in _forms(s)}, key=len, reverse=True):
        text = text.replace(secret, REMOVED)
    text = _PEM.sub(REMOVED, text)
    text = _TABLE.sub(rf"\1{REMOVED}\n", text)
    text = _without_values(text)
    text = _USERINFO.sub(rf"\1{REMOVED}@", text)
    text = _LOGIN.sub(rf"\1{REMOVED}", text)
    text = _JWT.sub(REMOVED, text)
    return _BEARER.sub(rf"\1 {REMOVED}", text)


def secrets_in(table: object) -> list[str]:
    """The secrets that stand in a parsed configuration, to be found wherever else they went: values of keys that sound
    like one, credentials in addresses, header lines."""
    found: list[str] = []

    def walk(value: object, secret: bool) -> None:
        if isinstance(value, Mapping):
            for key, held in value.items():
                walk(held, secret or bool(_SECRET_NAME.fullmatch(str(key))))
        elif isinstance(value, list):
            pair = len(value) == 2 and isinstance(value[0], str) and _SECRET_NAME.fullmatch(value[0])
            for held in value[1:] if pair else value:
                walk(held, secret or bool(pair))
        elif secret and str(value).lower() not in _NO_SECRET:
            found.append(str(value).strip())
        elif isinstance(value, str):
            found.extend(_inside(value))

    walk(table, secret=False)
    return [secret for secret in found if len(secret) >= _SHORTEST]


def _inside(value: str) -> Iterator[str]:
    """What is secret of an address or a header line."""
    address = re.match(r"(?i)[a-z][a-z0-9+.-]*://(?:([^\s/?#]*)@)?", value)
    if address and address[1]:
        yield address[1].partition(":")[2] or address[1]
    for name, held in re.findall(r"[?&]([^=&#\s]+)=([^&#\s]+)", value):
        if _SECRET_NAME.fullmatch(name):
            yield held
    header = re.fullmatch(r"\s*([\w-]+)\s*:\s*(.+)", value)
    if header and _SECRET_NAME.fullmatch(header[1]):
        yield header[2]


def _forms(secret: str) -> Iterator[str]:
    """How a secret may be written."""
    if len(secret) < _SHORTEST:
        return
    yield secret
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    yield quote(secret, safe="")
    yield quote_plus(secret)
    for line in secret.splitlines():
        if len(line.strip()) >= 2 * _SHORTEST and not line.startswith("-----"):
            yield line.strip()


def _without_values(text: str) -> str:
    """Every value of a key that sounds like a secret is replaced: in TOML, JSON (also inside a text), headers,
    queries, command lines, and in plain words."""
    out: list[str] = []
    at = 0
    while (found := _SECRET_KEY.search(text, at)) is not None:
        end, shown = _value(text, found)
        out += text[at : found.end()], shown
        at = max(end, found.end())
    out.append(text[at:])
    return "".join(out)


def _value(text: str, found: re.Match[str]) -> tuple[int, str]:
    """Where the value behind this key ends, and what stands there instead; the start and nothing where it has none."""
    start, name, separator = found.end(), found["name"], found["sep"]
    nothing = start, ""
    assigned = "=" in separator or ":" in separator
    if "," in separator and not re.search(
        r"[\[(]\s*[bru]?$", text[max(0, found.start() - 8) : found.start("open")]
    ):
        return nothing  # no pair of a name and its value, but a list of words
    if separator.isspace() and found["lead"] is None and re.fullmatch(rf"(?i){_WORD}", name):
        return nothing  # "unknown key 'registr'"
    if escaped := _ESCAPED_QUOTE.match(text, start):
        closing = re.compile(rf"(?<!\\){re.escape(escaped[1])}").search(text, escaped.end())
        end = _end_of_line(text, start) if closing is None else closing.end()
        return end, f"{escaped[1]}{REMOVED}{escaped[1]}"
    quoted = _TRIPLE.match(text, start) or _QUOTED.match(text, start)
    if quoted is not None:
        within = quoted[0].strip("\"'")
        return nothing if name.lower() == "auth" and within in _NO_SECRET else (quoted.end(), f'"{REMOVED}"')
    if not assigned:
        # "--password x" is one, "the token of plant-1 was refused" is not.
        word = re.compile(r"\S*").match(text, start)
        return (word.end(), REMOVED) if found["lead"] == "--" and word and word[0] else nothing
    if text[start : start + 1] in _BRACKETS:
        return _partner(text, start), f'"{REMOVED}"'
    if re.fullmatch(r"(?i)keys?", name) and found["lead"] is None:
        return nothing  # a key of something
    if plain := _JSON_WORD.match(text, start):
        return plain.end(), f'"{REMOVED}"'
    end = _end_of_bare(text, found)
    return (end, REMOVED) if re.search(r"\w", text[start:end]) else nothing


def _end_of_bare(text: str, found: re.Match[str]) -> int:
    """A value without quotes: to the end of its parameter, its word, the text that it stands in, or its line."""
    start = found.end()
    stops = {"?": "&#\"'", "&": "&#\"'", "--": ""}.get(found["lead"] or "")
    if stops is not None:
        ends = re.compile(rf"[\s{stops}]").search(text, start)
        return len(text) if ends is None else ends.start()
    before = text[text.rfind("\n", 0, start) + 1 : found.start()]
    end = _end_of_line(text, start)
    for quote_mark in "\"'":
        if before.count(quote_mark) % 2:
            closing = text.find(quote_mark, start, end)
            end = end if closing < 0 else closing
    return end - (len(text[start:end]) - len(text[start:end].rstrip("\\")))


def _end_of_line(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _partner(text: str, start: int) -> int:
    """Behind the bracket that closes the one at `start`; the end of the line where none does."""
    wanted: list[str] = []
    at, most = start, min(len(text), start + _LONGEST)
    while at < most:
        mark = text[at]
        if mark in _BRACKETS:
            wanted.append(_BRACKETS[mark])
        elif wanted and mark == wanted[-1]:
            wanted.pop()
            if not wanted:
                return at + 1
        elif mark in "\"'":
            quoted = _TRIPLE.match(text, at) or _QUOTED.match(text, at)
            at = quoted.end() - 1 if quoted is not None else at
        at += 1
    return _end_of_line(text, start)


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
