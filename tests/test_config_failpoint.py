"""A failpoint ends the process where and when it was told to, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from config.failpoint import VARIABLE, Failpoint


def test_the_third_time_a_place_is_reached_ends_it_and_no_other_place_does() -> None:
    ends: list[str] = []
    point = Failpoint("store.before_commit:3", lambda: ends.append("end"))
    for name in ["store.before_commit", "store.after_commit", "store.before_commit", "store.after_commit"]:
        point.reached(name)
    assert not ends
    point.reached("store.before_commit")
    point.reached("store.before_commit")
    assert ends == ["end"]


@pytest.mark.parametrize("told", ["", ":2", "x:0", "x:-1", "x:y"])
def test_a_place_that_cannot_be_meant_is_refused(told: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Failpoint(told, lambda: None)


def test_a_process_that_reaches_its_failpoint_is_killed_at_once() -> None:
    program = "from config.failpoint import reached as at; at('a'); print('between', flush=True); at('b'); print('on')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, VARIABLE: "b", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-9, "between\n")
