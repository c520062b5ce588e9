"""Real crashes: coordinators, workers and the Machines API are killed and stopped under load, in rounds."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest_twisted

from tests.e2e.chaos import SIZES, Chaos, start_chaos
from tests.e2e.faults import Fault, deal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

# `make chaos` runs a hundred.
ROUNDS = int(os.environ.get("BFAAS_ROUNDS", "4"))
SEED = int(os.environ.get("BFAAS_SEED", "1"))

with_twisted = pytest_twisted.ensureDeferred


@pytest_twisted.async_yield_fixture
async def chaos(tmp_path: Path) -> AsyncIterator[Chaos]:
    chaos = await start_chaos(random.Random(SEED), tmp_path)
    try:
        yield chaos
    finally:
        await chaos.close()


@with_twisted
async def test_guarantees_hold_under_crashes_and_pauses(chaos: Chaos) -> None:
    faults = deal(random.Random(SEED))
    try:
        for pool, size in SIZES.items():
            await chaos.start_coordinator(pool, size)
        for number in range(ROUNDS):
            kinds = [next(faults), next(faults)]
            print(f"\n{number + 1}:", " and ".join(kind.value for kind in kinds), end="", flush=True)
            await chaos.round(kinds)
        late = await chaos.abandon()
    except AssertionError as error:
        error.add_note(chaos.history_and_output())
        raise

    assert set(chaos.faults) == set(Fault)
    print(f"\n{ROUNDS} rounds, seed {SEED}", chaos.summary(), sep="\n")
    print(f"the last machine was gone {late:.1f} s after its lease's end")
