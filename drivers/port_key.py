"""One name for one serial port, whatever it is called: two drivers, or two devices, that name the same port must
find out before they open it.

A link (`/dev/serial/by-id/…`) is followed; a second node or a bind mount of the same device is known by its device
number, which the kernel gives a name (`/sys/dev/char`). A port that is not plugged in is known by its path alone.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_BY_NUMBER = Path("/sys/dev/char")  #: a link per character device, sysfs(5)


def port_key(device: str) -> str:
    """The port's own path: equal for all names of one port."""
    path = os.path.realpath(device)
    try:
        status = Path(path).stat()
    except OSError:
        return path
    if not stat.S_ISCHR(status.st_mode):
        return path
    name = _kernel_name(os.major(status.st_rdev), os.minor(status.st_rdev))
    if name is not None:
        return f"/dev/{name}"
    # A pseudo-terminal has no name in sysfs; its own path is in its file system, by its number.
    own = f"/dev/pts/{os.minor(status.st_rdev)}"
    try:
        same = os.path.samestat(Path(own).stat(), status)
    except OSError:
        same = False
    return own if same else path


def _kernel_name(major: int, minor: int) -> str | None:
    try:
        words = (_BY_NUMBER / f"{major}:{minor}" / "uevent").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((word.removeprefix("DEVNAME=") for word in words if word.startswith("DEVNAME=")), None)
