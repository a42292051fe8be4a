"""The conformance suite finds each planted fault, by the check that is meant for it and by no other."""

from __future__ import annotations

import pytest

from drivers import conformance
from drivers.conformance import Check, Subject
from drivers.contract import Driver, Point
from tests.fakes import meter as fake
from tests.fakes.meter import POINTS, Meter, MeterOptions, SoundListener, SoundMeter, meter


def subject_of(kind: type[SoundMeter | SoundListener], device: Meter) -> Subject:
    def build(port: int = 0) -> SoundMeter | SoundListener:
        return kind("m", MeterOptions(port or device.port), POINTS)

    def absent() -> SoundMeter | SoundListener:
        return build(1)  # nobody serves tcpmux here

    pulled = issubclass(kind, Driver)
    # A listener asks nothing, so no answer is late; and what a driver tells again is also wrong where values move.
    late = pulled and kind is not fake.TellsTheLastValueInSilence
    return Subject(
        build=build,
        absent=absent,
        provoke=None if pulled else device.provoke,
        change=device.change,
        truth=device.truth,
        silence=device.silence(),
        faults={name: fault for name, fault in device.faults().items() if late or name != "late"},
        deadline_s=3.0,
        recovery_s=3.0,
        try_s=0.2,
        reads_s=0.4,
    )


async def failures(kind: type[SoundMeter | SoundListener]) -> dict[str, str]:
    """The checks that a driver fails, and what they say."""
    found: dict[str, str] = {}
    for check in conformance.checks_of(kind):
        async with meter() as device:
            subject = subject_of(kind, device)
            assert conformance.lacks(check, subject) is None
            try:
                await check(subject)
            except Exception as err:  # noqa: BLE001 - a check fails with what the driver raised, too
                found[conformance.title(check)] = f"{type(err).__name__}: {err}"
    return found


@pytest.mark.parametrize("kind", [SoundMeter, SoundListener, fake.SaysThatItIsWell])
async def test_a_sound_driver_passes_everything(kind: type[SoundMeter | SoundListener]) -> None:
    assert await failures(kind) == {}


async def test_a_sign_of_life_with_a_reason_is_none() -> None:
    async with meter() as device:
        with pytest.raises(AssertionError, match="without points has values or reasons"):
            await conformance.scans_tell_what_the_device_said(
                subject_of(fake.SaysThatItIsWellWithAReason, device)
            )


C = conformance
PLANTED: list[tuple[type[SoundMeter | SoundListener], Check, str]] = [
    (fake.LetsOsErrorOut, C.only_the_contracts_errors_leave_it, "raised OSError"),
    (fake.NamesAReasonThatHasAValue, C.only_the_contracts_errors_leave_it, "reason RANGE"),
    (fake.StaysBroken, C.it_recovers_after_each_fault, "still broken"),
    (fake.TellsTheLastValueInSilence, C.old_values_get_no_new_time, "while the device said nothing"),
    (fake.AnswersFromACache, C.old_values_get_no_new_time, "after the device changed"),
    (fake.BlocksTheLoop, C.the_event_loop_is_never_held_up, r"meter\.py:\d+ in asked: time\.sleep"),
    (fake.WaitsForFarewell, C.a_hanging_device_holds_up_nobody, "close took longer"),
    (fake.FinishesInTheBackground, C.a_read_that_is_over_goes_on_nowhere, "still goes on"),
    (fake.FinishesInAThread, C.a_read_that_is_over_goes_on_nowhere, "still goes on"),
    (fake.KeepsEveryScan, C.many_reads_leak_nothing, r"meter\.py"),
    (fake.OpensAFilePerRead, C.many_reads_leak_nothing, "more open files"),
    (fake.LeavesATaskBehind, C.nothing_is_left_behind, "tasks"),
    (fake.IgnoresTheCheck, C.a_fault_gives_no_wrong_value, "under 'garbled'"),
    (fake.TakesALateAnswer, C.a_fault_gives_no_wrong_value, "'late'"),
    (fake.OpensWhenBuilt, C.building_opens_nothing, "opened a file"),
    (fake.NeedsALoopToBeBuilt, C.building_opens_nothing, "no event loop"),
    (fake.ClaimsWhatItFinds, C.its_line_is_told_by_its_configuration, "changed with connect"),
    (fake.TrustsWhatItRemembers, C.what_it_remembers_may_be_lost_or_damaged, "recall of"),
    (fake.RemembersAgainAndAgain, C.what_it_remembers_may_be_lost_or_damaged, "told the same again"),
    (fake.WritesAnything, C.a_write_that_cannot_be_is_refused, "was written"),
    (fake.ClosesOnlyOnce, C.close_is_safe_at_any_time, "closed already"),
    (fake.OrdersByName, C.points_come_in_the_order_asked, "in that order"),
    (fake.RepeatsInSilence, C.old_values_get_no_new_time, "while the device said nothing"),
    (fake.StopsAtGarbage, C.only_the_contracts_errors_leave_it, "raised ValueError"),
    (fake.StampsWhenAsked, C.scans_tell_what_the_device_said, "stood still"),
]


@pytest.mark.parametrize(("kind", "check", "says"), PLANTED, ids=[kind.__name__ for kind, _, _ in PLANTED])
async def test_each_planted_fault_fails_the_check_that_is_meant_for_it_and_no_other(
    kind: type[SoundMeter | SoundListener], check: Check, says: str
) -> None:
    found = await failures(kind)
    assert list(found) == [conformance.title(check)], found
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(found[conformance.title(check)])


async def test_a_read_that_cannot_be_cancelled_is_found() -> None:
    async with meter() as device:
        with pytest.raises(AssertionError, match="could not be cancelled"):
            await conformance.a_hanging_device_holds_up_nobody(subject_of(fake.CannotBeCancelled, device))


def test_every_check_has_a_planted_fault_or_one_among_the_contracts_own_tests() -> None:
    elsewhere = {  # tests/test_drivers_contract.py
        C.connect_may_be_called_again,
        C.an_absent_device_is_unreachable,
        C.a_scan_is_stamped_when_it_arrived,
        C.reading_before_connect_is_unreachable,
        C.a_cancelled_read_does_no_harm,
        C.listening_can_be_cancelled_and_resumed,
    }
    assert {*C.PULL, *C.PUSH} - elsewhere == {check for _, check, _ in PLANTED}


def test_what_a_subject_does_not_give_is_told() -> None:
    bare = Subject(build=lambda: SoundMeter("m", MeterOptions(1), [Point(name="a")]))
    assert conformance.lacks(C.close_is_safe_at_any_time, bare) is None
    told = conformance.lacks(C.a_fault_gives_no_wrong_value, bare)
    assert told == "not shown: the subject gives no faults and no truth"
