-- The journal's tables, version 1 (PRAGMA user_version). Opened by cloud/journal/sqlite.py.

-- One row per batch that held anything new. AUTOINCREMENT: an offset is never reused, also after trim emptied the log.
CREATE TABLE entry (
    offset         INTEGER PRIMARY KEY AUTOINCREMENT,
    gateway        TEXT    NOT NULL,
    epoch          INTEGER NOT NULL,
    first          INTEGER NOT NULL,
    last           INTEGER NOT NULL,
    readings       INTEGER NOT NULL,
    received_at_ns INTEGER NOT NULL,
    fresh          TEXT    NOT NULL,  -- '' where all of first..last was new, else '3-5,9-9'
    crc32          INTEGER NOT NULL,  -- over every column above and the payload: SQLite itself checks none
    payload        BLOB    NOT NULL
) STRICT;

-- Which seqs were ever held, coalesced: the memory that makes a resend harmless. Never trimmed.
CREATE TABLE held (
    gateway TEXT    NOT NULL,
    epoch   INTEGER NOT NULL,
    first   INTEGER NOT NULL,
    last    INTEGER NOT NULL,
    PRIMARY KEY (gateway, epoch, first)
) STRICT, WITHOUT ROWID;

CREATE TABLE cursor (
    sink   TEXT PRIMARY KEY,
    offset INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- In frames: received = stored + duplicate, since the journal was made.
CREATE TABLE gateway_count (
    gateway          TEXT PRIMARY KEY,
    batches          INTEGER NOT NULL,
    frames_received  INTEGER NOT NULL,
    frames_duplicate INTEGER NOT NULL,
    readings_stored  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- The latest heartbeat of every gateway, as it came.
CREATE TABLE gateway_state (
    gateway        TEXT PRIMARY KEY,
    received_at_ns INTEGER NOT NULL,
    state          TEXT NOT NULL
) STRICT, WITHOUT ROWID;

PRAGMA user_version = 1;
