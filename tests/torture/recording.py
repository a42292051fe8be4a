"""What a program asked of the disk, and every state in which a power cut may leave that disk.

`record` runs a program under `recorder.c` and reads its log; `Disk` takes the log's operations one by one and, at any
of them, makes up the files that a machine may find when its power comes back.

Rules of what may be left (Pillai et al., OSDI 2014; Rebello et al., ATC 2020):
1. What a sync of the file covered is there. Of what came after it, anything may be: each write whole, in part or not
   at all, in any order.
2. A sector (512 B or 4,096 B) is the unit of a torn write. A file may have grown and its new bytes be zeros.
3. Names (create, rename, unlink) are durable once their folder is synced, and until then in their order: the file
   systems in use journal them. A sync of the file alone does not make its name durable.
"""

from __future__ import annotations

import enum
import hashlib
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from tests.servers.install import InstallError, install_packages

SOURCE: Final = Path(__file__).with_name("recorder.c")
MARKS: Final = (
    "marks"  #: a file in the recorded folder: what is written there is no data but the program's own word
)
_HEADER: Final = struct.Struct("<cHHQqq")
_SECTORS: Final = (512, 4096)


class RecordingError(Exception):
    """The log cannot prove anything; the text says why and what helps."""


class Kind(enum.StrEnum):
    WRITE = "W"
    SYNC = "S"
    TRUNCATE = "T"
    ALLOCATE = "A"
    CREATE = "C"
    RENAME = "R"
    UNLINK = "U"
    FOLDER_SYNC = "D"
    MARK = "M"


class Operation(msgspec.Struct, frozen=True, gc=False):
    kind: Kind
    name: str
    other: str  #: a rename's target
    inode: int
    offset: int  #: of a truncate: the new size
    length: int
    data: bytes


class Variant(enum.StrEnum):
    """What becomes of the operations that no sync covered."""

    NONE = "none"
    ALL = "all"
    PREFIX = "prefix"  #: the first n of all files together
    SUBSET = "subset"  #: any of them
    SECTORS = "sectors"  #: any sectors of any of them
    TORN = "torn"  #: a prefix whose last write stops half-way
    ZEROS = "zeros"  #: the sizes of all, the bytes of some


def library(code: Path = SOURCE) -> Path:
    """The recorder, or another file to preload, compiled once per source. Brings a compiler where there is none and
    apt-get may be used; raises `RecordingError` otherwise."""
    source = code.read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headgate"
    made = cache / f"{code.stem}-{hashlib.sha256(source).hexdigest()[:16]}.so"
    if made.exists():
        return made
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not Path("/usr/include/stdlib.h").exists():
        try:
            install_packages(("gcc", "libc6-dev"))
        except InstallError as err:
            raise RecordingError(f"the recorder of writes needs a C compiler: {err}") from err
        compiler = shutil.which("cc") or shutil.which("gcc") or "gcc"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        fresh = Path(folder) / made.name
        done = subprocess.run(
            [compiler, "-O1", "-Wall", "-shared", "-fPIC", "-o", fresh, code, "-ldl"],
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RecordingError(f"{compiler} cannot compile {code}: {done.stderr.strip()[-2000:]}")
        fresh.replace(made)
    return made


def record(module: str, words: Sequence[str], scratch: Path) -> list[Operation]:
    """Run `python -m module FOLDER words...` and return what it asked of the files in FOLDER, in order."""
    folder, log = scratch / "recorded", scratch / "log"
    folder.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder), *words],
        env={**os.environ, "LD_PRELOAD": str(library()), "RECORDER_FOLDER": str(folder), "RECORDER_LOG": str(log)},
        capture_output=True, text=True, timeout=500, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    if done.returncode:
        raise RecordingError(f"{module} failed: {(done.stderr or done.stdout).strip()[-3000:]}")
    operations = read_log(log.read_bytes())
    shutil.rmtree(scratch)
    return operations


def read_log(data: bytes) -> list[Operation]:
    found: list[Operation] = []
    at = 0
    while at < len(data):
        kind, name_length, other_length, inode, offset, length = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        name = os.fsdecode(data[at : at + name_length])
        at += name_length
        other = os.fsdecode(data[at : at + other_length])
        at += other_length
        written = b""
        if kind == b"W":
            written = data[at : at + length]
            at += length
        if kind == b"X":
            raise RecordingError(f"{name}: {other}: the recorder does not model this call; teach it first")
        if name == MARKS:
            if kind == b"W":
                found.append(Operation(Kind.MARK, name, "", 0, 0, 0, written))
            continue
        found.append(Operation(Kind(kind.decode()), name, other, inode, offset, length, written))
    if not found:
        raise RecordingError("nothing was recorded: was the recorder preloaded?")
    return found


class _File:
    """One inode: what is durable of it, and what was asked of it since its last sync."""

    __slots__ = ("durable", "pending")

    def __init__(self) -> None:
        self.durable = bytearray()
        self.pending: list[Operation] = []


class Disk:
    """What is durable, and what is not yet."""

    def __init__(self) -> None:
        self._files: list[_File] = []
        self._of_inode: dict[
            int, int
        ] = {}  #: an inode's number is used again after an unlink: the newest wins
        self._names: dict[str, int] = {}  #: durable names
        self._renaming: list[tuple[Operation, int]] = []  #: names asked for, not yet durable
        self._order: list[tuple[int, Operation]] = []  #: all pending data, over all files

    def take(self, op: Operation) -> None:
        match op.kind:
            case Kind.MARK:
                pass
            case Kind.CREATE:
                self._of_inode[op.inode] = len(self._files)
                self._renaming.append((op, len(self._files)))
                self._files.append(_File())
            case Kind.RENAME | Kind.UNLINK:
                self._renaming.append((op, self._known(op)))
            case Kind.FOLDER_SYNC:
                _name_all(self._names, self._renaming)
                self._renaming = []
            case Kind.SYNC:
                key = self._known(op)
                file = self._files[key]
                for one in file.pending:
                    _put(file.durable, one)
                file.pending = []
                self._order = [pair for pair in self._order if pair[0] != key]
            case _:
                key = self._known(op)
                self._files[key].pending.append(op)
                self._order.append((key, op))

    def _known(self, op: Operation) -> int:
        if op.inode not in self._of_inode:
            raise RecordingError(f"{op.name}: {op.kind} of a file that was there before the recording began")
        return self._of_inode[op.inode]

    @property
    def uncertain(self) -> bool:
        return bool(self._order or self._renaming)

    def left(self, variant: Variant, rnd: random.Random) -> dict[str, bytes]:
        """The files by name, as one power cut here may leave them."""
        names = dict(self._names)
        whole = {Variant.NONE: 0, Variant.ALL: len(self._renaming)}
        named = whole.get(variant, rnd.randint(0, len(self._renaming)))
        _name_all(names, self._renaming[:named])
        chosen = list(self._chosen(variant, rnd))
        images: dict[int, bytearray] = {}
        for key in set(names.values()):
            images[key] = bytearray(self._files[key].durable)
        for key, op in chosen:
            if key in images:
                _put(images[key], op)
        return {name: bytes(images[key]) for name, key in names.items()}

    def _chosen(self, variant: Variant, rnd: random.Random) -> Iterator[tuple[int, Operation]]:
        pending = self._order
        match variant:
            case Variant.NONE:
                return
            case Variant.ALL:
                yield from pending
            case Variant.PREFIX:
                yield from pending[: rnd.randint(0, len(pending))]
            case Variant.SUBSET:
                share = rnd.random()
                yield from (pair for pair in pending if rnd.random() < share)
            case Variant.SECTORS:
                sector, share = rnd.choice(_SECTORS), rnd.random()
                for key, op in pending:
                    for piece in _sectors(op, sector):
                        if rnd.random() < share:
                            yield key, piece
            case Variant.TORN:
                upto = rnd.randint(0, len(pending))
                yield from pending[: max(0, upto - 1)]
                for key, op in pending[max(0, upto - 1) : upto]:
                    pieces = list(_sectors(op, rnd.choice(_SECTORS)))
                    for piece in pieces[: rnd.randint(0, len(pieces))]:
                        yield key, piece
            case Variant.ZEROS:
                share = rnd.random()
                for key, op in pending:
                    if op.kind is Kind.WRITE and rnd.random() >= share:
                        # Grown, and the bytes never came.
                        end = op.offset + len(op.data)
                        yield (
                            key,
                            msgspec.structs.replace(op, kind=Kind.ALLOCATE, offset=0, length=end, data=b""),
                        )
                    else:
                        yield key, op


def _sectors(op: Operation, sector: int) -> Iterator[Operation]:
    """A write, cut at the disk's sectors."""
    if op.kind is not Kind.WRITE:
        yield op
        return
    start, end = op.offset, op.offset + len(op.data)
    while start < end:
        stop = min(end, (start // sector + 1) * sector)
        data = op.data[start - op.offset : stop - op.offset]
        yield msgspec.structs.replace(op, offset=start, length=len(data), data=data)
        start = stop


def _put(image: bytearray, op: Operation) -> None:
    match op.kind:
        case Kind.WRITE:
            end = op.offset + len(op.data)
            if len(image) < op.offset:
                image.extend(bytes(op.offset - len(image)))
            image[op.offset : end] = op.data
        case Kind.TRUNCATE:
            if op.offset < len(image):
                del image[op.offset :]
            else:
                image.extend(bytes(op.offset - len(image)))
        case Kind.ALLOCATE:
            image.extend(bytes(max(0, op.offset + op.length - len(image))))
        case _:
            raise AssertionError(op.kind)


def _name_all(names: dict[str, int], changes: Sequence[tuple[Operation, int]]) -> None:
    for op, key in changes:
        match op.kind:
            case Kind.CREATE:
                names[op.name] = key
            case Kind.RENAME:
                if names.get(op.name) == key:
                    del names[op.name]
                names[op.other] = key
            case Kind.UNLINK:
                if names.get(op.name) == key:
                    del names[op.name]
            case _:
                raise AssertionError(op.kind)


def lay_out(files: Mapping[str, bytes], folder: Path) -> None:
    """Write a state into an empty folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
