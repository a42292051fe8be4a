"""Where the agent's words go: standard error, one line each.

Rules: below systemd the journal stamps and grades each line itself (sd-daemon(3)), elsewhere the line says the UTC
time and the level; secrets never come here, because they never leave `sync.identity.Secret`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Final

_ROOMS: Final = ("agent", "sync", "firmware", "drivers", "config")
# sd-daemon(3): a line may open with its syslog priority.
_PRIORITY: Final = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


class _Journal(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).replace("\n", "\n    ")
        return f"<{_PRIORITY.get(record.levelno, 6)}>{text}"


class _Plain(logging.Formatter):
    converter = staticmethod(time.gmtime)
    default_msec_format = "%s.%03dZ"
    default_time_format = "%Y-%m-%dT%H:%M:%S"


def start_logging(level: str) -> None:
    """Send everything of this level and above to standard error; libraries only from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    if os.environ.get("JOURNAL_STREAM"):
        handler.setFormatter(_Journal("%(message)s"))
    else:
        handler.setFormatter(_Plain("%(asctime)s %(levelname)-7s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for room in _ROOMS:
        logging.getLogger(room).setLevel(level.upper())
    # A job that raised is reported by us; that a run was skipped because the last still ran is normal here.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
