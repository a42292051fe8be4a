-- From version 1 to 2: what sinks missed or let expire, and an index for the accounts.

-- What was trimmed before a sink had it, at most, until it was given it again.
CREATE TABLE missed (
    sink         TEXT    NOT NULL,
    gateway      TEXT    NOT NULL,
    batches      INTEGER NOT NULL,
    readings     INTEGER NOT NULL,
    first_offset INTEGER NOT NULL,
    last_offset  INTEGER NOT NULL,
    from_ns      INTEGER NOT NULL,
    to_ns        INTEGER NOT NULL,
    PRIMARY KEY (sink, gateway)
) STRICT, WITHOUT ROWID;

-- Readings that a sink did not take because they were older than it keeps anything; counted with its cursor.
CREATE TABLE expired (
    sink     TEXT    NOT NULL,
    gateway  TEXT    NOT NULL,
    readings INTEGER NOT NULL,
    PRIMARY KEY (sink, gateway)
) STRICT, WITHOUT ROWID;

-- What is pending is counted without touching the payloads: 60 bytes an entry instead of its page. It grows at its end.
CREATE INDEX entry_account ON entry (offset, gateway, first, last, readings, fresh);

PRAGMA user_version = 2;
