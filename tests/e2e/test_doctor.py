"""`bfaas doctor` as a program, against local machines and the stand-in for Fly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest_twisted

from bfaas.deadline import Deadline
from tests.e2e.coordinator import PATIENCE, free_port, reactor, start, stop
from tests.e2e.fly import start_fly

if TYPE_CHECKING:
    from collections.abc import Mapping

with_twisted = pytest_twisted.ensureDeferred


async def doctor(settings: Mapping[str, str]) -> tuple[int | None, str]:
    program, _ = start(["-m", "bfaas.cli", "doctor"], dict(settings))
    code = await Deadline(reactor, 2 * PATIENCE).run(program.ended)
    return code, program.said.decode()


@with_twisted
async def test_local_machines_are_tried() -> None:
    code, said = await doctor({"WORKER_APP": "mock", "MAXREQTIME": "10s"})
    assert code == 0, said
    assert "ok    worker: ran a script at http://127.0.0.1:" in said


@with_twisted
async def test_settings_that_are_wrong_are_told_and_nothing_else_is_tried() -> None:
    code, said = await doctor({"WORKER_APP": "mock", "MAXREQTIME": "10"})
    assert code == 1
    assert said.splitlines()[0] == 'FAIL  settings: MAXREQTIME: "10" is not a duration such as 1m30s'
    assert "worker" not in said


@with_twisted
async def test_on_fly_all_is_tried_and_each_failure_has_a_remedy() -> None:
    fly = await start_fly()
    well = fly.settings("a", MAXREQTIME="10s")

    code, said = await doctor(well)
    assert code == 0, said
    assert [line[:4] for line in said.splitlines()] == ["ok  "] * 4
    assert await fly.api.list() == []

    for wrong, failure, remedy in [
        ({"FLY_TOKEN": "other"}, "FAIL  API, token, app: ", "-> FLY_TOKEN: "),
        ({"WORKER_APP": "nobodys"}, "FAIL  API, token, app: ", "-> WORKER_APP: "),
        (
            {"FLY_FLAPS_BASE_URL": f"http://127.0.0.1:{free_port()}"},
            "FAIL  API, token, app: ",
            "-> FLY_FLAPS_BASE_URL: ",
        ),
    ]:
        code, said = await doctor({**well, **wrong})
        assert code == 1
        assert failure in said
        assert remedy in said, said
    assert await stop(fly.machines) == 0
