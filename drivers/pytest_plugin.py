"""The conformance suite in pytest, for any driver in any package (entry point `pytest11`).

    @pytest.mark.headgate_driver(kind=MyDriver)
    async def test_conforms(headgate_check: Check, subject: Subject) -> None:
        await headgate_check(subject)

Rules: a test that does not ask for `headgate_check` never notices that this is installed (nothing is imported for it);
a check that the `Subject` gives too little for is skipped aloud, with what it would need.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

_MARK = "headgate_driver"
_FIXTURE = "headgate_check"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{_MARK}(kind): the driver class whose conformance this test checks")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if _FIXTURE not in metafunc.fixturenames:
        return
    from drivers.conformance import checks_of, title
    from drivers.contract import Driver, PushDriver

    mark = metafunc.definition.get_closest_marker(_MARK)
    kind = mark.kwargs.get("kind") if mark is not None else None
    if not (isinstance(kind, type) and issubclass(kind, Driver | PushDriver)):
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: say which driver it checks: @pytest.mark.{_MARK}(kind=MyDriver), "
            "a Driver or PushDriver of drivers.contract"
        )
    metafunc.parametrize(_FIXTURE, checks_of(kind), ids=title, indirect=True)


@pytest.fixture
def headgate_check(request: pytest.FixtureRequest) -> Callable[..., object]:
    """One check of `drivers.conformance`, to be awaited with the `Subject`."""
    from drivers.conformance import Check, Subject, lacks

    check: Check = request.param

    async def run(subject: Subject) -> None:
        missing = lacks(check, subject)
        if missing is not None:
            pytest.skip(missing)
        await check(subject)

    return run
