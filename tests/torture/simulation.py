"""The whole path under virtual time: seeded faults of network, disk, clock, machines and sinks, and what must hold.

    python -m tests.torture.simulation --seed 7            one day with all faults, of one seed, with its story
    python -m tests.torture.simulation --seeds 100 --week --poll --record
    HEADGATE_SIM_S=300 pytest tests/test_torture_simulation.py

A seed makes the whole run: same seed, same trace. One that fails is printed, and `--seed` gives it again. What must
hold is in `tests/torture/sim_oracle.py`, by name; what is shipped and what is simulated in
`tests/torture/sim_world.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import random
import sys
import time
from collections.abc import Iterable
from typing import Final

import msgspec

from config.agent import Buffer as BufferSettings
from config.agent import Uplink as UplinkSettings
from tests.torture.report import Finding, record
from tests.torture.sim_oracle import Verdict
from tests.torture.sim_world import DeviceSpec, World

TEN_YEARS_NS: Final = 10 * 365 * 86_400 * 10**9
_SHIPPED: Final = ("/agent/", "/cloud/", "/sync/", "/drivers/", "/config/")


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """What a random run is made of."""

    hours: float = 24.0
    between_s: float = 300.0  #: mean time between two faults
    only: tuple[str, ...] = ()  #: these faults alone; empty: all
    small_buffer: bool | None = None  #: None: by the seed
    sparse: bool = False  #: readings so rare that the buffer is empty between them


# ------------------------------------------------------------------------------------------------- the faults


async def _outage(world: World, rng: random.Random) -> None:
    world.network.cut()
    await asyncio.sleep(rng.choice((2.0, 20.0, 120.0, 1_800.0)))
    world.network.mend()


async def _half_open(world: World, rng: random.Random) -> None:
    world.network.half_open()
    await asyncio.sleep(rng.uniform(1.0, 120.0))
    world.network.mend()


async def _flapping(world: World, rng: random.Random) -> None:
    for _ in range(rng.randrange(3, 12)):
        world.network.cut()
        await asyncio.sleep(10.0)
        world.network.mend()
        await asyncio.sleep(10.0)


async def _bad_weather(world: World, rng: random.Random) -> None:
    weather = world.network.weather
    before = msgspec.structs.asdict(weather)
    weather.lost, weather.doubled = rng.choice((0.02, 0.2, 0.5)), rng.uniform(0.0, 0.3)
    weather.damaged, weather.late = rng.choice((0.0, 0.01)), rng.choice((0.0, 0.1, 0.4))
    weather.delay_s = rng.choice((0.01, 0.5, 4.0))
    await asyncio.sleep(rng.uniform(10.0, 600.0))
    for name in ("lost", "doubled", "damaged", "late", "delay_s"):
        setattr(weather, name, before[name])


async def _agent_killed(world: World, rng: random.Random) -> None:
    await _at_a_statement(world.agent_disk, rng)
    await world.kill_agent(power_cut=False, down_s=rng.uniform(0.5, 30.0))


async def _gateway_unplugged(world: World, rng: random.Random) -> None:
    """A boot after a power cut: the clock shows 1970, is years off, or is right, and is not synchronized yet."""
    await _at_a_statement(world.agent_disk, rng)
    true_ns = world.clock.true_ns()
    wrong_by_ns = rng.choice((0, -true_ns, TEN_YEARS_NS, -TEN_YEARS_NS, -3_600 * 10**9))
    await world.kill_agent(power_cut=True, down_s=rng.uniform(1.0, 120.0), wrong_by_ns=wrong_by_ns)
    await asyncio.sleep(rng.choice((0.0, 20.0, 600.0)))
    world.clock.off_ns, world.clock.synchronized = 0, True


async def _cloud_killed(world: World, rng: random.Random) -> None:
    await _at_a_statement(world.cloud_disk, rng)
    await world.kill_cloud(power_cut=rng.random() < 0.5, down_s=rng.uniform(0.5, 120.0))


async def _at_a_statement(disk: object, rng: random.Random) -> None:
    """Let the machine die by itself, within the next statements of its database."""
    from tests.torture.sim_disk import Disk

    assert isinstance(disk, Disk)
    disk.dies_in = rng.randrange(1, 60)
    for _ in range(40):
        await asyncio.sleep(0.25)
        if disk.machine.dead:
            return


async def _clock_jumps(world: World, rng: random.Random) -> None:
    """Who sets a clock by hand takes its synchronization away (the kernel does: ntp_clear)."""
    clock = world.clock
    clock.off_ns = rng.choice((TEN_YEARS_NS, -TEN_YEARS_NS, -clock.true_ns(), 3_600 * 10**9, -2 * 10**9))
    clock.synchronized = False
    await asyncio.sleep(rng.choice((5.0, 90.0, 900.0)))
    clock.off_ns, clock.synchronized = 0, True


async def _clock_unsynchronized(world: World, rng: random.Random) -> None:
    world.clock.synchronized = False
    await asyncio.sleep(rng.uniform(30.0, 3_600.0))
    world.clock.off_ns, world.clock.synchronized = 0, True


async def _disk_refuses(world: World, rng: random.Random) -> None:
    disk = world.agent_disk
    assert disk is not None
    disk.fault = rng.choice(("full", "io", "readonly"))
    await asyncio.sleep(rng.choice((0.5, 5.0, 60.0)))
    disk.fault = ""


async def _disk_short(world: World, rng: random.Random) -> None:
    """Somebody else fills the disk: the floor is reached, and room comes back later."""
    disk = world.agent_disk
    assert disk is not None
    disk.free_bytes = 64 * 2**20 + rng.randrange(2**20)
    await asyncio.sleep(rng.uniform(10.0, 300.0))
    disk.free_bytes = 64 * 2**30


async def _journal_refuses(world: World, rng: random.Random) -> None:
    disk = world.cloud_disk
    assert disk is not None
    disk.fault = rng.choice(("full", "io", "readonly"))
    await asyncio.sleep(rng.uniform(1.0, 60.0))
    disk.fault = ""


async def _sink_down(world: World, rng: random.Random) -> None:
    sink = rng.choice(world.sinks)
    sink.down = True
    await asyncio.sleep(rng.choice((5.0, 120.0, 1_200.0)))
    sink.down = False


FAULTS: Final = {
    "outage": _outage,
    "half_open": _half_open,
    "flapping": _flapping,
    "bad_weather": _bad_weather,
    "agent_killed": _agent_killed,
    "gateway_unplugged": _gateway_unplugged,
    "cloud_killed": _cloud_killed,
    "clock_jumps": _clock_jumps,
    "clock_unsynchronized": _clock_unsynchronized,
    "disk_refuses": _disk_refuses,
    "disk_short": _disk_short,
    "journal_refuses": _journal_refuses,
    "sink_down": _sink_down,
}
_PART: Final = {
    "agent_killed": "agent", "gateway_unplugged": "agent", "disk_refuses": "agent", "disk_short": "agent",
    "cloud_killed": "cloud", "journal_refuses": "cloud", "sink_down": "cloud",
    "clock_jumps": "clock", "clock_unsynchronized": "clock",
}  # fmt: skip
"""Faults of one part come one after the other; those of different parts may meet."""


class _Tormentor:
    """Draws faults by the seed and lets them loose; those of one part never overlap."""

    def __init__(self, world: World, story: Story) -> None:
        self._world = world
        self._story = story
        self._busy: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, until_s: float) -> None:
        world, story = self._world, self._story
        names = story.only or tuple(FAULTS)
        while world.loop.now_s < until_s:
            await asyncio.sleep(world.rng.expovariate(1 / story.between_s))
            name = world.rng.choice(names)
            lock = self._busy.setdefault(_PART.get(name, "network"), asyncio.Lock())
            if lock.locked():
                continue
            world.counted(name)
            await lock.acquire()
            task = asyncio.get_running_loop().create_task(self._loose(name, lock), name=name)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self._tasks:
            await asyncio.gather(*self._tasks)

    async def _loose(self, name: str, lock: asyncio.Lock) -> None:
        try:
            await FAULTS[name](self._world, random.Random(self._world.rng.random()))
        finally:
            lock.release()


# ---------------------------------------------------------------------------------------------- the scenarios


def _verdict(world: World, began_s: float, **more: float) -> Verdict:
    took_s = time.perf_counter() - began_s
    figures: dict[str, int | float] = {
        "simulated_s": round(world.loop.now_s, 1),
        "took_s": round(took_s, 2),
        "events": world.loop.events,
        "events_per_s": round(world.loop.events / took_s),
        "faults": sum(world.counts.values()),
        "frames_kept": len(world.oracle.promised),
        "scans": sum(token is not None for token in world.oracle.promised.values()),
        "gaps": len(world.oracle.sinks["table"].gaps),
        "letters": world.letters,
        "disk_faults": (world.agent_disk.faults_given if world.agent_disk else 0),
        **more,
    }
    return Verdict(seed=world.seed, violations=world.oracle.violations, figures=figures, trace=world.digest())


def run_random(seed: int, story: Story | None = None) -> Verdict:
    """One day (or what the story says) with all faults."""
    story = story or Story()
    began_s = time.perf_counter()
    rng = random.Random(f"{seed}:setup")
    small = rng.random() < 0.3 if story.small_buffer is None else story.small_buffer
    buffer = BufferSettings(
        max_mb=4 if small else 64,
        ballast_kb=64,
        free_disk_mb=64,
        commit_interval_s=0.5 if story.sparse else rng.choice((0.5, 2.0, 10.0)),
    )
    uplink = UplinkSettings(
        ack_timeout_s=rng.choice((3.0, 10.0)),
        window=rng.choice((2, 4, 16)),
        backoff_max_s=rng.choice((10.0, 60.0)),
    )
    world = World(seed, buffer=buffer, uplink=uplink)
    world.specs = _devices(rng, wide=small)
    for spec in world.specs:
        spec.period_s *= 15.0 if story.sparse else 1.0

    async def told(world: World) -> None:
        await _Tormentor(world, story).run(story.hours * 3_600)
        await world.settle_down()

    world.run(told)
    return _verdict(world, began_s)


def _devices(rng: random.Random, *, wide: bool) -> list[DeviceSpec]:
    """`wide`: enough to fill a buffer of 4 MB within an outage of half an hour."""
    points = 600 if wide else 12
    return [
        DeviceSpec("boiler", rng.choice((1.0, 2.0, 5.0)), points, takes_s=0.4, fails=0.002),
        DeviceSpec("meter", 10.0, 24, takes_s=2.0, fails=0.01),
        DeviceSpec("weather", 4.0, 3, coarse_ns=10**10),
        DeviceSpec("door", 7.0, 2, priority="alarm"),
    ]


def run_week(seed: int, days: float = 7.0) -> Verdict:
    """Offline for seven days at 100 readings a second; then all of it is delivered, at five times the pace at which it
    came, while what is new arrives within ten seconds."""
    began_s = time.perf_counter()
    world = World(
        seed, faulty_sinks=False, buffer=BufferSettings(max_mb=1024, ballast_kb=64, free_disk_mb=64)
    )
    world.specs = [DeviceSpec("plant", 1.0, 100)]
    figures: dict[str, float] = {}

    async def told(world: World) -> None:
        world.network.cut()
        await asyncio.sleep(days * 86_400)
        buffer = world.buffer
        assert buffer is not None
        backlog = buffer.state.buffered_readings
        world.network.mend()
        began = world.loop.now_s
        oldest_live_s, ended = 0.0, began + days * 86_400
        live = _LiveAge(world)
        while world.loop.now_s < ended and buffer.state.buffered_readings > 2_000:
            await asyncio.sleep(1.0)
            if world.loop.now_s > began + 70.0:  # the way is found again within backoff_max_s
                oldest_live_s = max(oldest_live_s, live.age_s())
        took_s = max(world.loop.now_s - began, 1.0)
        figures["backlog_readings"] = backlog
        figures["drain_s"] = round(took_s, 1)
        figures["times_real_time"] = round(days * 86_400 / took_s, 1)
        figures["oldest_live_s"] = round(oldest_live_s, 1)
        if days * 86_400 / took_s < 5.0:
            world.oracle.violated(
                "drained", f"the backlog went at {days * 86_400 / took_s:.1f} times real time"
            )
        if oldest_live_s > 10.0:
            world.oracle.violated("drained", f"live readings were {oldest_live_s:.1f} s old meanwhile")
        await world.settle_down()

    world.run(told)
    return _verdict(world, began_s, **figures)


class _LiveAge:
    """How old the newest scan is that the sink holds."""

    def __init__(self, world: World) -> None:
        self._world = world

    def age_s(self) -> float:
        world = self._world
        seen = world.oracle.sinks["table"]
        newest = max((held.ranges()[-1][1] for held in seen.frames.values() if len(held)), default=0)
        epoch = next(iter(seen.frames), 0)
        token = world.oracle.tokens.get((epoch, newest))
        return (world.clock.true_ns() - token.taken_wall_ns) / 1e9 if token is not None else 1e9


def run_poll(seed: int, hours: float = 72.0) -> Verdict:
    """72 hours of slow devices, steps of the clock and outages: the scans kept are as many as the schedule says, to
    0.1 %. None of these devices fails: one that does gives a scan less, and is tried again between its slots."""
    began_s = time.perf_counter()
    world = World(seed, faulty_sinks=False, buffer=BufferSettings(ballast_kb=64, commit_interval_s=10.0))
    world.specs = [
        DeviceSpec("fast", 1.0, 4, takes_s=0.7),
        DeviceSpec("slow", 30.0, 12, takes_s=4.0),
        DeviceSpec("meter", 10.0, 8, takes_s=2.0),
    ]
    story = Story(hours=hours, only=("outage", "half_open", "clock_jumps", "clock_unsynchronized", "bad_weather"),
                  between_s=900.0)  # fmt: skip
    worst = 0.0

    async def told(world: World) -> None:
        nonlocal worst
        await _Tormentor(world, story).run(hours * 3_600)
        polled_s = world.loop.now_s
        for spec in world.specs:
            expected = polled_s / spec.period_s
            off = abs(spec.serial - expected) / expected
            worst = max(worst, off)
            if off > max(0.001, 1.5 / expected):
                world.oracle.violated(
                    "poll_count_within_0.1_percent",
                    f"{spec.name}: {spec.serial} scans, {expected:.0f} expected",
                )
        await world.settle_down()

    world.run(told)
    return _verdict(world, began_s, poll_count_off_percent=round(worst * 100, 4))


def run_seeds(seeds: Iterable[int], story: Story, *, within_s: float = 1e9) -> list[Verdict]:
    """One after the other, until the time is over (at least one)."""
    verdicts: list[Verdict] = []
    began_s = time.perf_counter()
    for seed in seeds:
        verdicts.append(run_random(seed, story))
        if time.perf_counter() - began_s > within_s:
            break
    return verdicts


def told(verdict: Verdict, what: str = "") -> str:
    """One line, and one for each violation."""
    figures = " ".join(f"{name}={value:,}" for name, value in verdict.figures.items())
    lines = [
        f"{what}seed {verdict.seed}: {'FAILED' if verdict.violations else 'ok'} trace {verdict.trace} {figures}"
    ]
    lines += [f"    {name}: {detail}" for name, detail in verdict.violations.items()]
    if verdict.violations:
        lines.append(f"    again: python -m tests.torture.simulation --seed {verdict.seed}")
    return "\n".join(lines)


def shipped_share(seed: int, hours: float) -> float:
    """Of the time that a run takes, how much is spent in the shipped code and what it calls (SQLite, zstd, msgspec)."""
    profile = cProfile.Profile()
    profile.enable()
    run_random(seed, Story(hours=hours))
    profile.disable()
    stats = pstats.Stats(profile)
    total = shipped = 0.0
    for (file, _, _), (_, _, own_s, _, callers) in stats.stats.items():  # type: ignore[attr-defined]  # untyped
        total += own_s
        if any(part in file for part in _SHIPPED) and "/tests/" not in file:
            shipped += own_s
        elif file == "~" or "site-packages" in file:  # a built-in: whose caller it is decides
            shipped += sum(
                own
                for (caller, _, _), (_, _, own, _) in callers.items()
                if (any(part in caller for part in _SHIPPED) and "/tests/" not in caller)
                or "sim_disk" in caller
            )
    return shipped / total if total else 0.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture.simulation", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--seeds", type=int, default=10, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--hours", type=float, default=24.0, help="simulated, of each seed")
    parser.add_argument("--within-s", type=float, default=1e9, help="begin no other seed after this")
    parser.add_argument("--week", action="store_true", help="seven days offline too")
    parser.add_argument("--poll", action="store_true", help="72 hours of polling too")
    parser.add_argument("--no-random", action="store_true", help="only what --week and --poll ask for")
    parser.add_argument("--profile", action="store_true", help="say what share of the time is shipped code")
    parser.add_argument("--record", action="store_true", help="write the finding for the report page")
    args = parser.parse_args(argv)
    began_s = time.perf_counter()
    seeds = [args.seed] if args.seed is not None else range(args.first, args.first + args.seeds)
    verdicts: list[Verdict] = []
    random_events, random_s = 0.0, 0.0
    if not args.no_random:
        for seed in seeds:
            verdict = run_random(seed, Story(hours=args.hours))
            print(told(verdict), flush=True)
            verdicts.append(verdict)
            random_events += verdict.figures["events"]
            random_s += verdict.figures["took_s"]
            if time.perf_counter() - began_s > args.within_s:
                break
    days = len(verdicts)
    figures: dict[str, int | float | str] = {
        "seeds": days,
        "simulated hours each": args.hours,
        "faults": sum(int(v.figures["faults"]) for v in verdicts),
        "readings' frames kept": sum(int(v.figures["frames_kept"]) for v in verdicts),
        "simulated events per second": round(random_events / random_s) if random_s else 0,
        "simulated hours per second": round(days * args.hours / random_s, 2) if random_s else 0,
    }
    if args.poll:
        verdicts.append(verdict := run_poll(args.first))
        print(told(verdict, "72 h of polling, "), flush=True)
        figures["72 h: poll count off by percent"] = verdict.figures["poll_count_off_percent"]
    if args.week:
        verdicts.append(verdict := run_week(args.first))
        print(told(verdict, "seven days offline, "), flush=True)
        figures["seven days offline: readings delivered"] = verdict.figures["backlog_readings"]
        figures["seven days offline: times real time on return"] = verdict.figures["times_real_time"]
    if args.profile:
        share = shipped_share(args.first, min(args.hours, 2.0))
        print(f"shipped code and what it calls: {share:.0%} of the time")
        figures["percent of the time that is shipped code"] = round(share * 100)
    failed = [v for v in verdicts if v.violations]
    figures["violations"] = sum(len(v.violations) for v in failed)
    print(f"{len(verdicts)} runs, {len(failed)} failed, {figures}")
    if args.record:
        record(Finding(
            proof="simulation",
            promise="The shipped code under virtual time, with seeded faults of network, disk, clock, machines and "
            "sinks: nothing kept is lost, doubled, changed or misdated, and every loss is a counted gap.",
            command=" ".join(["python -m tests.torture.simulation", *(sys.argv[1:] if argv is None else argv)]),
            passed=not failed, figures=figures, seed=args.first, took_s=time.perf_counter() - began_s,
        ))  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
