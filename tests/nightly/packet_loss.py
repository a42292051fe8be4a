"""Packets lost by the kernel: what TCP itself does, which no proxy shows. Root, network namespaces and nftables.

A broker and the cloud's door run in this process's network; the uplink in a namespace behind a veth pair, whose
nftables drop packets at random (10 %, 20 %), and then all of them without a word. Judged: every batch acked at 20 %
loss, a line that is dead for 50 s found dead at the default keepalive of 20 s, and a return after it.

`python -m tests.nightly.packet_loss [--batches 100]`; ends with 0 where all held, 1 with what did not, 2 where this
machine cannot do it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Final

from config.agent import Uplink as UplinkSettings
from sync.mqtt import MqttUplink
from sync.uplink import AckTimeout, LinkDown
from tests.fakes.cloud_door import FarSide, mqtt_door
from tests.fakes.fault_proxy import FaultProxy
from tests.servers import run
from tests.test_sync_uplinks import ACL, USERS
from tests.uplink_conformance import GATEWAY, TOKEN, batch

SPACE: Final = f"hgloss{os.getpid()}"
OUTSIDE, INSIDE = "10.213.7.1", "10.213.7.2"


class CannotRun(RuntimeError):
    """This machine lacks what it takes; the text says what."""


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotRun(f"{' '.join(words)}: {done.stderr.strip() or done.returncode}")


@contextlib.contextmanager
def namespace() -> Iterator[None]:
    """A namespace of our own, joined to this one by a pair of interfaces."""
    for program in ("ip", "nft"):
        if shutil.which(program) is None:
            raise CannotRun(f"{program} is not here; to get it: apt-get install nftables iproute2")
    if os.geteuid() != 0:
        raise CannotRun("network namespaces take root")
    near, far = f"hgn{os.getpid()}", f"hgf{os.getpid()}"
    _do("ip", "netns", "add", SPACE)
    try:
        _do("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", SPACE)
        _do("ip", "addr", "add", f"{OUTSIDE}/30", "dev", near)
        _do("ip", "link", "set", near, "up")
        _do("ip", "-n", SPACE, "addr", "add", f"{INSIDE}/30", "dev", far)
        _do("ip", "-n", SPACE, "link", "set", far, "up")
        _do("ip", "-n", SPACE, "link", "set", "lo", "up")
        lose(0)
        yield
    finally:
        subprocess.run(["ip", "netns", "del", SPACE], capture_output=True, check=False)


def lose(percent: int) -> None:
    """From now on, each way."""
    rules = "flush ruleset\n"
    if percent:
        drop = "drop" if percent >= 100 else f"numgen random mod 100 < {percent} drop"
        rules += "table inet loss {\n"
        for way, device in (("input", "iifname"), ("output", "oifname")):
            rules += f'chain {way} {{ type filter hook {way} priority 0; {device} != "lo" {drop}; }}\n'
        rules += "}\n"
    done = subprocess.run(
        ["ip", "netns", "exec", SPACE, "nft", "-f", "-"],
        input=rules,
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise CannotRun(f"nft: {done.stderr.strip()}")


# --- the gateway, in the namespace ---


def _gateway(port: int, line: Connection) -> None:
    fd = os.open(f"/run/netns/{SPACE}", os.O_RDONLY)
    _setns(fd)
    os.close(fd)
    asyncio.run(_obey(port, line))


def _setns(fd: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).setns(
        fd, 0x40000000
    ):  # CLONE_NEWNET (setns(2)); os.setns is of Python 3.12
        raise OSError(ctypes.get_errno(), "setns")


class _Here(MqttUplink):
    """Plaintext to the address of the pair, which never leaves this machine; the uplink itself allows loopback only."""


async def _obey(port: int, line: Connection) -> None:
    # The uplink speaks to a port on its own loopback, which carries the stream over the pair.
    way = FaultProxy(port, to_host=OUTSIDE)
    await way.start()
    settings = UplinkSettings(host="127.0.0.1", port=way.port, tls=False)
    uplink = _Here(GATEWAY, settings, TOKEN)
    while True:
        told = await asyncio.to_thread(line.recv)
        if told is None:
            await uplink.close()
            await way.stop()
            return
        first, count = told
        began_s, acked, lost = time.monotonic(), 0, 0
        while acked < count:
            try:
                await uplink.send(batch(first + 10 * acked))
                acked += 1
            except AckTimeout:
                continue
            except LinkDown:
                lost += 1
                with contextlib.suppress(LinkDown):
                    await uplink.open()
                await asyncio.sleep(0.2)
        line.send((time.monotonic() - began_s, lost))


async def _prove(batches: int) -> list[str]:
    found: list[str] = []
    far = FarSide()
    with namespace(), run.mosquitto(users=USERS, acl=ACL) as broker:
        async with mqtt_door(far, broker.host, broker.port):
            bridge = FaultProxy(broker.port)  # from the pair's address to the broker's loopback
            server = await asyncio.start_server(bridge._serve, OUTSIDE, 0)
            port = server.sockets[0].getsockname()[1]
            near, there = multiprocessing.get_context("spawn").Pipe()
            child = multiprocessing.get_context("spawn").Process(
                target=_gateway_of, args=(SPACE, port, there), daemon=True
            )
            child.start()

            async def go(first: int, count: int, most_s: float) -> tuple[float, int]:
                near.send((first, count))
                if not await asyncio.to_thread(near.poll, most_s):
                    raise TimeoutError
                told: tuple[float, int] = near.recv()
                return told

            first = 1
            for percent in (0, 10, 20):
                lose(percent)
                try:
                    took_s, lost = await go(first, batches, 600)
                    print(
                        f"{percent:3} % lost: {batches} batches acked in {took_s:.1f} s, {lost} reconnects",
                        flush=True,
                    )
                except TimeoutError:
                    found.append(f"{percent} % lost: not all of {batches} batches acked in 600 s")
                first += 10 * batches
            lose(100)
            near.send((first, 1))
            began_s = time.monotonic()
            connects = bridge.seen.connects
            await asyncio.sleep(50)
            lose(0)
            if await asyncio.to_thread(near.poll, 60):
                took_s, lost = near.recv()
                print(
                    f"dead for {time.monotonic() - began_s:.0f} s: acked {took_s:.1f} s later, {lost} losses seen",
                    flush=True,
                )
                if not lost:
                    found.append("a line that was dead for 50 s was not found dead")
            else:
                found.append("the batch of the dead line was never acked")
            print(f"{bridge.seen.connects - connects} connects after the line healed", flush=True)
            near.send(None)
            await asyncio.to_thread(child.join, 10)
            server.close()
            await bridge.stop()
        far.over.set()
    return found


def _gateway_of(space: str, port: int, line: Connection) -> None:
    globals()["SPACE"] = space  # the parent's: this process has another id
    _gateway(port, line)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.nightly.packet_loss", description=__doc__)
    parser.add_argument("--batches", type=int, default=100)
    told = parser.parse_args(argv)
    try:
        found = asyncio.run(_prove(told.batches))
    except CannotRun as err:
        print(f"this machine cannot lose packets: {err}", file=sys.stderr)
        return 2
    for violation in found:
        print(f"VIOLATED: {violation}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
