-- From version 2 to 3: an interval that a flipped bit made longer would swallow readings as duplicates, so each has a
-- CRC; one that fails it is not believed, and what it held is taken again. held_crc() is sqlite.py's own.

ALTER TABLE held ADD COLUMN crc32 INTEGER NOT NULL DEFAULT 0;
UPDATE held SET crc32 = held_crc(gateway, epoch, first, last);

PRAGMA user_version = 3;
