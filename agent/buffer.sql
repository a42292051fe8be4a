-- The gateway's buffer, schema 2 (PRAGMA user_version; agent/store_migrations.py). Written by agent/store.py alone; readers open mode=ro.
--
-- seq comes from ledger.next_seq, raised in the transaction that inserts the frames: like AUTOINCREMENT it is never
-- used again after the table empties, and it costs no page of its own at every commit (sqlite_sequence would).

CREATE TABLE ledger (
    id               INTEGER PRIMARY KEY CHECK (id = 1),
    epoch            INTEGER NOT NULL,  -- random, made with this file
    next_seq         INTEGER NOT NULL,
    boot             INTEGER NOT NULL,  -- number of the newest boot that wrote here
    kept_frames      INTEGER NOT NULL,  -- kept = settled + gapped + what `frames` holds
    kept_readings    INTEGER NOT NULL,
    settled_frames   INTEGER NOT NULL,
    settled_readings INTEGER NOT NULL,
    gapped_frames    INTEGER NOT NULL,
    gapped_readings  INTEGER NOT NULL,
    alarm_frames      INTEGER NOT NULL DEFAULT 0,  -- how many the tables alarms, bulk and gaps name
    bulk_frames       INTEGER NOT NULL DEFAULT 0,
    gap_frames        INTEGER NOT NULL DEFAULT 0,
    bulk_thinned_to   INTEGER NOT NULL DEFAULT 0,  -- frames below this seq have been thinned, and are not thinned again
    normal_thinned_to INTEGER NOT NULL DEFAULT 0
) STRICT;

-- One row, one encoded frame (sync/wire.py). crc covers data, seq, readings and priority: SQLite's own checks miss bit
-- rot. The row is that of schema 1, and so is the crc of a frame of normal priority.
CREATE TABLE frames (
    seq      INTEGER PRIMARY KEY,
    readings INTEGER NOT NULL,
    crc      INTEGER NOT NULL,
    data     BLOB NOT NULL
) STRICT;

-- Where the frames are that are not of normal priority, and where the gap frames are. Only to find them: what a frame's
-- priority is, its crc says.
CREATE TABLE alarms (seq INTEGER PRIMARY KEY) STRICT;
CREATE TABLE bulk (seq INTEGER PRIMARY KEY) STRICT;
CREATE TABLE gaps (
    seq  INTEGER PRIMARY KEY,
    told BLOB                           -- the frame once more, with a CRC (agent/gap_copies.py)
) STRICT;

-- Which agents may use the file: those that know schema `usable_by` or a later one.
CREATE TABLE format (
    id        INTEGER PRIMARY KEY,
    version   INTEGER NOT NULL,
    usable_by INTEGER NOT NULL
) STRICT;

-- Batches whose bounds are fixed, before they are first sent; `clocks` is what else their bytes are made of.
CREATE TABLE batches (
    first    INTEGER PRIMARY KEY,
    last     INTEGER NOT NULL,
    readings INTEGER NOT NULL,
    bytes    INTEGER NOT NULL,          -- of the frames, before compression
    clocks   BLOB NOT NULL,             -- msgpack: the rows of the clock table that the batch carries
    crc      INTEGER NOT NULL DEFAULT 0 -- of the row (agent/store_rows.py)
) STRICT;

CREATE TABLE layouts (
    id   BLOB PRIMARY KEY,              -- sync.wire.layout_id, 8 bytes big-endian
    data BLOB NOT NULL                  -- msgpack
) STRICT;

CREATE TABLE clock (
    id           INTEGER PRIMARY KEY,
    boot         INTEGER NOT NULL,
    boot_id      TEXT NOT NULL,
    boot_ns      INTEGER NOT NULL,
    wall_ns      INTEGER NOT NULL,
    synchronized INTEGER NOT NULL,
    error_ns     INTEGER NOT NULL,
    next_seq     INTEGER NOT NULL,      -- frames from here on were taken later: the age limit goes by this
    crc          INTEGER NOT NULL DEFAULT 0 -- of the row but its id
) STRICT;

-- Frames that the cloud refused for good, with its reason; each was reported as a gap.
CREATE TABLE parked (
    seq       INTEGER PRIMARY KEY,
    readings  INTEGER NOT NULL,
    code      TEXT NOT NULL,
    reason    TEXT NOT NULL,
    parked_ns INTEGER NOT NULL,         -- wall clock
    data      BLOB NOT NULL
) STRICT;
