"""
Ways to break the product, each of which an episode must notice.

`python -m tests.simulation.mutants` applies them one by one, and tells how many seeds each one took. Given
names of modules, such as `line coord`, it applies those of these alone.
"""

from __future__ import annotations

import argparse
import gc
import importlib.abc
import importlib.util
import multiprocessing
import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.support.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType


SEEDS = 2000
"""Seeds within which a mutant must be noticed."""

_TIDY = 256  # episodes after which their garbage is collected


class Mutant(NamedTuple):
    """A change of one place of a module's source, and the defect that it is."""

    module: str
    old: str
    new: str
    defect: str


MUTANTS = [
    # The pool.
    Mutant("pool", "            del self._slots[slot]\n", "", "a failure keeps its place for ever"),
    Mutant(
        "pool",
        "        self._balance()\n        await self._lifecycle.stop(slot)\n",
        "        self._balance()\n",
        "a machine is used again without a stop",
    ),
    Mutant(
        "pool",
        "                await self._lifecycle.adopt(slot)\n                await self._lifecycle.stop(slot)\n",
        "                await self._lifecycle.adopt(slot)\n",
        "a reclaimed machine is used as it is",
    ),
    Mutant(
        "pool",
        "        if self._closing or slot.unusable:\n            return StandbyAction.RETIRE\n",
        "        if self._closing:\n            return StandbyAction.RETIRE\n",
        "a tampered machine serves",
    ),
    Mutant("pool", "                slot.unusable = True\n", "", "tampering is not remembered"),
    Mutant(
        "pool",
        "unusable = too_many or not fit",
        "unusable = too_many or False and fit",
        "a machine of another image is used",
    ),
    Mutant(
        "pool", "unusable = too_many or not fit", "unusable = not fit", "a pool that shrank keeps too many"
    ),
    Mutant("pool", "return self._reclaimed and not", "return not", "machines are made before it looked"),
    Mutant(
        "pool",
        "len(self._slots) < self._settings.size and",
        "len(self._slots) <= self._settings.size and",
        "one machine too many",
    ),
    Mutant(
        "pool",
        "            await self._lifecycle.destroy(slot)\n",
        "            pass\n",
        "a place is given up before its machine is gone",
    ),
    Mutant("pool", "- 2 * self._settings.max_req_time\n", "+ 1e6\n", "an idle machine outlives its lease"),
    Mutant(
        "pooling.backoff",
        "callLater(self._pause(self._failures), self._again)",
        "callLater(0.0, self._again)",
        "failing creations follow without a pause",
    ),
    Mutant(
        "pool",
        "            gone.callback(None)\n            self._balance()\n",
        "            gone.callback(None)\n",
        "a place that came free serves nobody",
    ),
    Mutant(
        "pool",
        "            slot.wake(wanted=False)\n        await DeferredList",
        "            pass\n        await DeferredList",
        "close waits for idle machines",
    ),
    Mutant(
        "pooling.reconciler",
        "            self._cleaning.cancel()\n",
        "            pass\n",
        "cleaning goes on after close",
    ),
    Mutant(
        "pooling.reconciler",
        "                failures += 1\n",
        "                return\n",
        "cleaning ends at its first failure",
    ),
    Mutant(
        "pool",
        "is_leased = self._is_leased(slot, self._settings.max_req_time)",
        "is_leased = True",
        "a lease that ran out in a pause is used",
    ),
    Mutant(
        "pool",
        "run(self._reconciler.destroy_all_own())",
        "run(DeferredList([]))",
        "destroy leaves machines",
    ),
    Mutant(
        "pool",
        "return self._reclaimed and not self._create_backoff.active",
        "return self._reclaimed",
        "requests that come do not wait for the pause after a failure",
    ),
    # The line, and each client's share.
    Mutant(
        "pooling.fair_queue",
        "Deferred(partial(self._leave, client))",
        "Deferred(lambda _: None)",
        "a machine is handed to one who left",
    ),
    Mutant("pooling.fair_queue", "self._next().errback(error())", "self._next()", "close forgets who waits"),
    Mutant(
        "pooling.fair_queue",
        "        self._length -= 1\n",
        "",
        "who has left is counted among those who wait",
    ),
    Mutant(
        "pooling.fair_queue",
        "        self._clients.move_to_end(client)\n",
        "",
        "a client has one turn after another",
    ),
    Mutant(
        "pooling.fair_queue",
        "        place: Deferred[T] =",
        '        client = "anybody"\n        place: Deferred[T] =',
        "first come, first served, whoever they are",
    ),
    Mutant(
        "pooling.fair_queue",
        "next(iter(places))",
        "next(reversed(places))",
        "a client's latest request is its next",
    ),
    Mutant(
        "coordinator.client_limits",
        ">= self._most",
        "> self._most",
        "a client has one request more than its share",
    ),
    Mutant(
        "coordinator.client_limits",
        "str(IPv6Network((int(ip) >> _HOST_BITS << _HOST_BITS, 128 - _HOST_BITS)))",
        "str(ip)",
        "each address of a network has a share of its own",
    ),
    Mutant(
        "coordinator.app",
        "on_fly=self._settings.fly is not None",
        "on_fly=False",
        "all clients of Fly's proxy are one",
    ),
    Mutant(
        "coordinator.app",
        "            self._shares.release(client)\n",
        "            if request.channel is not None:\n                self._shares.release(client)\n",
        "who leaves keeps a part of its share",
    ),
    Mutant(
        "coordinator.app",
        '            raise self._refusal(503, "too many requests are waiting", Refused.QUEUE_FULL)\n',
        "            self._shares.acquire(client)\n"
        '            raise self._refusal(503, "too many requests are waiting", Refused.QUEUE_FULL)\n',
        "who is refused keeps a part of its share",
    ),
    Mutant(
        "coordinator.app",
        "ceil(min(self._pool.expected_wait, longest))",
        "ceil(100 * self._pool.expected_wait)",
        "clients are sent away for good",
    ),
    Mutant(
        "pool",
        "short = len(self._queue) + (0 if holds_back else self._settings.standby) - ready",
        "short = max(len(self._queue), 0 if holds_back else self._settings.standby) - ready",
        "nobody stands by in place of a machine that is in use",
    ),
    Mutant(
        "pool",
        "        for slot in self._in_phase(Phase.READY)[: len(self._queue)]:\n",
        "        for slot in []:\n",
        "a machine that stands by does so for ever",
    ),
    Mutant(
        "pool",
        "if len(self._queue) > 0 or len(others) >= self._settings.standby:",
        "if len(self._queue) > 0:",
        "all machines stand by",
    ),
    # The steps of a machine's life.
    Mutant(
        "pooling.lifecycle",
        "                slot.create_unknown_since = self._clock.seconds()\n",
        "                raise\n",
        "a lost creation gives up its place",
    ),
    Mutant(
        "pooling.lifecycle",
        "                    slot.known_machine is not None\n",
        "                    True\n",
        "a refusal makes a lost creation forgotten",
    ),
    Mutant(
        "pooling.lifecycle",
        "refused = isinstance(error, RateLimitedError) and slot.create_unknown_since is None",
        "refused = isinstance(error, RateLimitedError)",
        "a limit makes a lost creation forgotten",
    ),
    Mutant(
        "pooling.lifecycle",
        "            if self._closing or slot.create_unknown_since is None:\n",
        "            if True:\n",
        "a creation that is done late is forgotten",
    ),
    Mutant(
        "pooling.lifecycle",
        "self._record_lease(slot, await self._within(self._timeouts.lease, acquire), asked)",
        "self._record_lease(slot, old, asked)",
        "a reclaimed machine is leased to nobody",
    ),
    Mutant(
        "pooling.lifecycle",
        "slot.lease_end = asked + self._settings.safe_lease_ttl",
        "slot.lease_end = asked + 1000 + self._settings.lease_ttl",
        "a lease is taken for longer than it is",
    ),
    Mutant(
        "pooling.lifecycle",
        "            await probing\n",
        "            pass\n",
        "a worker is used before it listens",
    ),
    Mutant(
        "pooling.lifecycle",
        "                probing.cancel()\n",
        "                pass\n",
        "a worker that has ended is probed on",
    ),
    Mutant(
        "pooling.lifecycle",
        "if await self._api.start(slot.machine.id, slot.nonce):\n",
        "if await self._api.start(slot.machine.id, slot.nonce) and False:\n",
        "a machine that migrated is waited for under its old version",
    ),
    Mutant(
        "machines.fly",
        "        if has_ended(machine.state, wanted):\n",
        "        if False:\n",
        "a machine that has ended is waited for",
    ),
    Mutant(
        "pooling.lifecycle",
        "            except NotFoundError:\n                break\n            except (MachinesError",
        "            except (MachinesError",
        "what is gone is destroyed for ever",
    ),
    Mutant(
        "pooling.lifecycle",
        "        return Deadline(self._clock, seconds).run(work)",
        "        return work",
        "a call without an answer is waited for",
    ),
    Mutant(
        "pooling.lifecycle",
        "                    nonce = await self._other_nonce(slot, nonce)\n",
        "                    pass\n",
        "a lease that nobody knows protects a machine for ever",
    ),
    Mutant(
        "pooling.lifecycle",
        "        await self._within(self._timeouts.lease, self._api.release_lease(machine_id, old.nonce))\n",
        "",
        "a machine is reclaimed without its lease",
    ),
    Mutant(
        "pooling.lifecycle",
        "found = await self._find(slot) if slot.create_unknown_since is not None else None",
        "found = None",
        "nobody looks for what a lost creation has made",
    ),
    Mutant(
        "pooling.lifecycle",
        "self._stops_within(slot, self._until_renewal(slot))",
        "self._stops_within(slot, self._settings.lease_ttl * 3)",
        "the lease of a machine that stands by runs out",
    ),
    Mutant(
        "pooling.lifecycle",
        "self._api.wait(slot.machine, State.STOPPED, deadline.remaining)",
        "Deferred()",
        "a machine that stands by stops, and nobody sees it",
    ),
    # Whose is what.
    Mutant(
        "pooling.config",
        "return pool_of(machine.name) == self.name",
        'return machine.metadata.get("pool_id", "").startswith(f"{self.name}//")',
        "metadata says whose a machine is",
    ),
    Mutant(
        "pooling.config",
        'pool, dash, unique = rest.rpartition("-")',
        'pool, dash, unique = rest.partition("-")',
        "the name p-1 is taken for p",
    ),
    Mutant(
        "pooling.config",
        "return all(machine.metadata.get(key) == value for key, value in self.metadata.items())",
        "return True",
        "metadata is not looked at",
    ),
    Mutant(
        "pooling.reconciler",
        "self._try(self._destroy_unleased(machine), machine)",
        "self._try(destroy_own(self._api, machine), machine)",
        "another's machine is destroyed under its lease",
    ),
    Mutant(
        "pooling.reconciler",
        "            await self._api.destroy(machine.id, None)\n",
        "            pass\n",
        "what is nobody's is left",
    ),
    Mutant(
        "pooling.reconciler",
        "            await deferLater(self._clock, self._SECOND_LOOK * self._settings.timeouts.lease)\n",
        "            pass\n",
        "a machine is destroyed while its lease changes hands",
    ),
    Mutant(
        "machines.fly",
        "{answer.status} {error}",
        "{answer.status} {answer.body!r}",
        "the log tells a nonce",
    ),
    # One request.
    Mutant(
        "coordinator.app",
        "            finally:\n                allocation.release()\n",
        "            except ZeroDivisionError:\n                pass\n"
        "            else:\n                allocation.release()\n",
        "a failing request keeps its machine",
    ),
    Mutant(
        "coordinator.app",
        "exit_ = await deadline.run(self._proxy.stream(",
        "exit_ = await (self._proxy.stream(",
        "a run has no deadline",
    ),
    Mutant(
        "coordinator.app",
        "await Deadline(self._clock, settings.max_wait).run(self._pool.allocate(client))",
        "await self._pool.allocate(client)",
        "a wait has no end",
    ),
    Mutant(
        "coordinator.app",
        "            answer.end(formats.Exit.forced(formats.Reason.TIMEOUT, self._since(started)))\n",
        "            answer.finish()\n",
        "a timeout is not told",
    ),
    Mutant(
        "coordinator.app",
        "            if not answer.started:\n",
        "            if True:\n",
        "an error page in the middle of a stream",
    ),
    Mutant(
        "protocol.response",
        "            self._heartbeat_timer.cancel()\n",
        "            pass\n",
        "a heart beats on for ever",
    ),
    Mutant(
        "coordinator.worker_client",
        "    if names is not None and names != [machine.id]:",
        "    if False:",
        "another machine's answer is taken",
    ),
    Mutant(
        "coordinator.worker_client",
        "    if response.code != 200:  # noqa: PLR2004 - OK",
        "    if False:",
        "any status is taken",
    ),
    Mutant(
        "coordinator.worker_client",
        "exit_ = exit_ or formats.Exit.forced(reason)",
        "exit_ = exit_ or formats.Exit(0)",
        "a success is invented",
    ),
    Mutant(
        "coordinator.worker_client",
        '            raise WorkerError(f"no answer: {error!r}") from error\n',
        '            response = await self._request("POST", machine, wire.RUN_PATH, request, script)\n',
        "a request is sent again",
    ),
    Mutant(
        "coordinator.worker_client",
        "        headers.setRawHeaders(formats.FORCE_INSTANCE, [machine.id])\n",
        "",
        "any machine may get a request",
    ),
    Mutant(
        "coordinator.worker_client",
        "allow_redirects=False",
        "allow_redirects=True",
        "a worker sends the coordinator elsewhere",
    ),
    Mutant(
        "coordinator.worker_client",
        "on_start=lambda producer: answer.start(producer, headers)",
        "on_start=lambda producer: answer.start(producer, {**headers, **{name.decode(): values[0].decode() "
        "for name, values in response.headers.getAllRawHeaders()}})",
        "a worker's headers are passed on",
    ),
    Mutant("protocol.parser", "kept = data[: self._room]", "kept = data", "raw output has no limit"),
    Mutant(
        "protocol.parser",
        '            raise OutputLimitError("more output than the limit")\n',
        "            pass\n",
        "output has no limit",
    ),
    Mutant(
        "protocol.parser",
        '            self.error = OutputLimitError("more output than the limit")\n',
        "            pass\n",
        "a limit is not told",
    ),
    Mutant(
        "http.client",
        "            self.transport.stopProducing()\n",
        "            pass\n",
        "a cancelled answer is read on",
    ),
    Mutant("deadline", "            task.cancel()\n", "            pass\n", "a deadline does nothing"),
]


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module of the product with a mutation in it."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant
        self._name = f"bfaas.{mutant.module}"
        self._path = ROOT / f"{self._name.replace('.', '/')}.py"

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_file_location(fullname, self._path, loader=self)

    def create_module(self, spec: Any) -> None:
        """Let Python make it."""

    def exec_module(self, module: ModuleType) -> None:
        source = self._path.read_text()
        assert source.count(self._mutant.old) == 1, self._mutant
        mutated = source.replace(self._mutant.old, self._mutant.new)
        exec(compile(mutated, str(self._path), "exec"), module.__dict__)


class Catch(NamedTuple):
    """What noticed a mutant: the seeds that it took, and the promise that was broken; or nothing."""

    mutant: Mutant
    seeds: int
    promise: str | None
    seconds: float


def hunt(mutant: Mutant, seeds: int) -> Catch:
    """Run episodes with a mutant until one notices it. Changes this process for good."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("bfaas", "tests")]:
        if name not in ("tests", "tests.simulation", __name__):
            del sys.modules[name]
    sys.meta_path.insert(0, _Importer(mutant))
    from tests.simulation.run import quiet  # noqa: PLC0415 - anew, with the mutant in it
    from tests.simulation.world import World  # noqa: PLC0415

    quiet()
    began = time.monotonic()
    for seed in range(seeds):
        if seed % _TIDY == 0:
            gc.unfreeze()
            gc.collect()
        try:
            World(seed).live()
        except Exception as error:  # noqa: BLE001 - a broken promise or a broken program: it is noticed
            return Catch(mutant, seed + 1, f"{error}".partition("\n")[0][:90], time.monotonic() - began)
    return Catch(mutant, seeds, None, time.monotonic() - began)


def hunt_all(mutants: list[Mutant], seeds: int) -> Iterator[Catch]:
    """Hunt each mutant in a process of its own."""
    context = multiprocessing.get_context("fork")
    with context.Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        yield from pool.imap(partial(hunt, seeds=seeds), mutants, chunksize=1)


def main() -> int:
    """Hunt, and tell; the exit code is 1 where one escapes that had all the seeds there are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if mutant.module in arguments.modules or not arguments.modules]
    escaped = 0
    for catch in hunt_all(chosen, arguments.seeds):
        escaped += catch.promise is None
        print(
            f"{catch.seeds:5} seeds {catch.seconds:6.1f} s  {catch.mutant.module:8} "
            f"{catch.mutant.defect}: {catch.promise}",
            flush=True,
        )
    print(f"{len(chosen) - escaped} of {len(chosen)} noticed")
    return 1 if escaped and arguments.seeds >= SEEDS else 0


if __name__ == "__main__":
    sys.exit(main())
