"""
Defects that the simulation must notice, and a program that tries them.

`python -m tests.simulation.mutants` applies each mutant and runs episodes until one fails; it prints how
many episodes each took. Names of modules, such as `pool pooling.lifecycle`, select the mutants of these.
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

from tests.simulation.mutation import Mutation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType


SEEDS = 4000
"""Episodes within which a mutant must be noticed."""

_COLLECT_EVERY = 256  # episodes between two garbage collections


MUTANTS = [
    # The pool.
    Mutation(
        "pool:Pool._begin.remove", "del self._slots[slot]", "", "a failed machine keeps its slot forever"
    ),
    Mutation(
        "pool:Pool._serve", "await self._lifecycle.stop(slot)", "", "a machine is reused without a stop"
    ),
    Mutation(
        "pool:Pool._run_lifecycle",
        "await self._lifecycle.stop(slot)",
        "",
        "an adopted machine is used without a stop",
    ),
    Mutation(
        "pool:Pool.next_action",
        "self._closing or slot.unusable",
        "self._closing",
        "a tampered machine serves",
    ),
    Mutation("pool:Pool.reconcile", "slot.unusable = True", "", "tampering is not remembered"),
    Mutation("pool:Pool.reconcile", "surplus or _1", "surplus", "a machine of another image is used"),
    Mutation("pool:Pool.reconcile", "surplus or _1", "_1", "a pool that shrank keeps surplus machines"),
    Mutation(
        "pooling.plan:_max_creations",
        "not constraints.machines_known or _1",
        "_1",
        "machines are created before the first reconciliation",
    ),
    Mutation(
        "pooling.plan:_max_creations",
        "config.size - len(slots)",
        "config.size + 1 - len(slots)",
        "one machine too many",
    ),
    Mutation(
        "pool:Pool._retire",
        "await self._lifecycle.destroy(slot)",
        "pass",
        "a slot is freed before its machine is gone",
    ),
    Mutation(
        "pool:Pool._wait_until_wanted",
        "_1 - 2 * self._config.max_req_time",
        "_1 + 1e6",
        "a stopped machine outlives its lease",
    ),
    Mutation(
        "pooling.backoff:Backoff.failed",
        "self._clock.callLater(_1, _2)",
        "self._clock.callLater(0.0, _2)",
        "failing creations are retried without a delay",
    ),
    Mutation(
        "pool:Pool._begin.remove",
        "self.rebalance()",
        "pass",
        "a free slot serves no queued request",
    ),
    Mutation("pool:Pool.close", "slot.wake(wanted=False)", "pass", "close waits for stopped machines"),
    Mutation(
        "pooling.reconciler:Reconciler.close",
        "self._loop.cancel()",
        "pass",
        "reconciliation continues after close",
    ),
    Mutation(
        "pooling.reconciler:Reconciler._run",
        "failures += 1",
        "return",
        "reconciliation ends at its first failure",
    ),
    Mutation(
        "pool:Pool._serve",
        "self._is_leased(slot, self._config.max_req_time)",
        "True",
        "a lease that expired during a pause is used",
    ),
    Mutation(
        "pool:Pool.destroy",
        "self._destroying = True",
        "return await self.close()",
        "destroy leaves machines",
    ),
    Mutation(
        "pooling.plan:_max_creations",
        "_1 or constraints.create_backoff",
        "_1",
        "new requests create machines during the backoff",
    ),
    # The queue, and each client's quota.
    Mutation(
        "pooling.fair_queue:FairQueue.enqueue",
        "Deferred(_1)",
        "Deferred(lambda _: None)",
        "a machine is given to a cancelled request",
    ),
    Mutation(
        "pooling.fair_queue:FairQueue.close",
        "self._next().errback(_1)",
        "self._next()",
        "close does not answer queued requests",
    ),
    Mutation(
        "pooling.fair_queue:FairQueue._remove",
        "self._length -= 1",
        "",
        "cancelled requests are counted as queued",
    ),
    Mutation(
        "pooling.fair_queue:FairQueue._next",
        "self._clients.move_to_end(client)",
        "",
        "a client has several turns in a row",
    ),
    Mutation(
        "pooling.fair_queue:FairQueue.enqueue",
        "_1: _2 = Deferred(_3)",
        'client = "anybody"\n_1: _2 = Deferred(_3)',
        "first come, first served, regardless of the client",
    ),
    Mutation(
        "pooling.fair_queue:FairQueue._next",
        "next(iter(entries))",
        "next(reversed(entries))",
        "a client's latest request is served first",
    ),
    Mutation(
        "coordinator.client_limits:ConcurrencyLimiter.acquire",
        "_1 >= self._limit",
        "_1 > self._limit",
        "a client has one request more than its quota",
    ),
    Mutation(
        "http.client_address:address_key",
        "str(IPv6Network(_1))",
        "str(ip)",
        "each address of a network has a quota of its own",
    ),
    Mutation(
        "coordinator.app:Coordinator._identify",
        "on_fly = self._settings.fly is not None",
        "on_fly = False",
        "all clients of Fly's proxy are one client",
    ),
    Mutation(
        "coordinator.app:Coordinator._run",
        "self._limiter.release(client.key)",
        "if request.channel is not None:\n    self._limiter.release(client.key)",
        "a disconnected client keeps a part of its quota",
    ),
    Mutation(
        "coordinator.app:Coordinator._allocate",
        "raise self._rejection(_1, _2, OutcomeKind.QUEUE_FULL)",
        "self._limiter.acquire(run.client.key)\nraise self._rejection(_1, _2, OutcomeKind.QUEUE_FULL)",
        "a rejected client keeps a part of its quota",
    ),
    Mutation(
        "coordinator.app:Coordinator._retry_after",
        "min(self._pool.expected_wait, _1)",
        "100 * self._pool.expected_wait",
        "Retry-After is far too long",
    ),
    Mutation(
        "pooling.plan:plan",
        "queue_length + (_1 if paused else _2) - available",
        "max(queue_length, _1 if paused else _2) - available",
        "a warm standby that is in use is not replaced",
    ),
    Mutation(
        "pooling.plan:plan",
        "_in_phase(slots, Phase.READY)[:queue_length]",
        "[]",
        "a warm standby never serves",
    ),
    Mutation(
        "pool:Pool.next_action",
        "len(self._queue) > 0 or _1",
        "len(self._queue) > 0",
        "all machines are warm standbys",
    ),
    # The lifecycle of a machine.
    Mutation(
        "pooling.lifecycle:MachineLifecycle.create",
        "slot.create_unknown_since = self._clock.seconds()",
        "raise",
        "a create without a response frees its slot",
    ),
    Mutation(
        "pooling.lifecycle:MachineLifecycle.create",
        "slot.known_machine is not None",
        "True",
        "after an error response an earlier lost create is forgotten",
    ),
    Mutation(
        "pooling.lifecycle:MachineLifecycle.create",
        "isinstance(_1, RateLimitedError) and slot.create_unknown_since is None",
        "isinstance(_1, RateLimitedError)",
        "after a rate limit an earlier lost create is forgotten",
    ),
    Mutation(
        "pooling.lifecycle:MachineLifecycle.destroy",
        "self._closing or slot.create_unknown_since is None",
        "True",
        "a create that takes effect late is forgotten",
    ),
    Mutation(
        "pooling.lifecycle:MachineLifecycle.adopt",
        "self._record_lease(slot, await _1, _2)",
        "self._record_lease(slot, old, _2)",
        "an adopted machine is not leased",
    ),
    Mutation(
        "pooling.lifecycle:MachineLifecycle._record_lease",
        "slot.lease_end = _1 + self._config.safe_lease_ttl",
        "slot.lease_end = _1 + 1000 + self._config.lease_ttl",
        "a lease is trusted beyond its end",
    ),
    Mutation(
        "pooling.lifecycle:MachineLifecycle._wait_for_worker",
        "await probing",
        "pass",
        "a worker is used before it listens",
    ),
    Mutation(
        "pooling.lifecycle:MachineLifecycle._wait_for_worker.give_up",
        "probing.cancel()",
        "pass",
        "a worker that has exited is still probed",
    ),
    Mutation(
        "pooling.lifecycle:MachineLifecycle._call_start",
        "await self._api.start(_1, _2)",
        "await self._api.start(_1, _2) and False",
        "a migrated machine is waited for under its old version",
    ),
    Mutation(
        "machines.fly:FlyMachines._inspect",
        "has_ended(_1, _2)",
        "False",
        "a machine that has ended is waited for",
    ),
    Mutation(
        "pooling.lifecycle:MachineLifecycle._destroy",
        "NotFoundError",
        "ZeroDivisionError",
        "a machine that is gone is destroyed forever",
    ),
    Mutation(
        "pooling.lifecycle:MachineLifecycle._within",
        "Deadline(self._clock, seconds).run(work)",
        "work",
        "a call without a response is waited for",
    ),
    Mutation(
        "pooling.lifecycle:MachineLifecycle._destroy",
        "nonce = await self._other_nonce(_1, _2)",
        "pass",
        "a lease with an unknown nonce protects a machine forever",
    ),
    Mutation(
        "pooling.lifecycle:MachineLifecycle.adopt",
        "await self._within(_1, self._api.release_lease(_2, _3))",
        "",
        "a machine is adopted without releasing its lease",
    ),
    Mutation(
        "pooling.lifecycle:MachineLifecycle._try_to_create",
        "await self._find(slot) if slot.create_unknown_since is not None else None",
        "None",
        "the machine of a lost create is not looked for",
    ),
    Mutation(
        "pooling.lifecycle:MachineLifecycle._monitor",
        "self._until_renewal(slot)",
        "self._config.lease_ttl * 3",
        "the lease of a warm standby expires",
    ),
    Mutation(
        "pooling.lifecycle:MachineLifecycle._stops_within",
        "self._api.wait(_1, State.STOPPED, _2)",
        "Deferred()",
        "a warm standby that stops is not noticed",
    ),
    # Ownership.
    Mutation(
        "pooling.config:PoolConfig.owns",
        "pool_of(machine.name) == self.name",
        'machine.metadata.get("pool_id", "").startswith(f"{self.name}//")',
        "metadata decides which pool owns a machine",
    ),
    Mutation(
        "pooling.config:pool_of",
        '_1.rpartition("-")',
        '_1.partition("-")',
        "a machine of p-1 is taken for one of p",
    ),
    Mutation(
        "pooling.config:PoolConfig.metadata_matches",
        "all(_1)",
        "True",
        "metadata is not checked",
    ),
    Mutation(
        "pooling.reconciler:Reconciler.reconcile_once",
        "self._destroy_unleased(_1)",
        "destroy_own(self._api, _1)",
        "another pool's machine is destroyed in spite of its lease",
    ),
    Mutation(
        "pooling.reconciler:Reconciler._destroy_unleased",
        "await self._api.destroy(_1, None)",
        "pass",
        "orphaned machines are left",
    ),
    Mutation(
        "pooling.reconciler:Reconciler.reconcile_once",
        "await deferLater(self._clock, _1)",
        "pass",
        "a machine is destroyed between two leases",
    ),
    Mutation(
        "machines.fly:FlyMachines._call_once",
        'f"{_1} {_2}: {response.status} {_3}"',
        'f"{_1} {_2}: {response.status} {response.body!r}"',
        "a nonce is logged",
    ),
    # One request.
    Mutation(
        "coordinator.app:Coordinator._run",
        "try:\n    _1\nfinally:\n    allocation.release()",
        "_1\nallocation.release()",
        "a failed request keeps its machine",
    ),
    Mutation(
        "coordinator.app:Coordinator._run_on",
        "deadline.run(client.stream(_1, _2, _3, _4, _5, _6, _7))",
        "client.stream(_1, _2, _3, _4, _5, _6, _7)",
        "a run has no deadline",
    ),
    Mutation(
        "coordinator.app:Coordinator._allocate",
        "Deadline(self._clock, _1).run(run.queue_entry)",
        "run.queue_entry",
        "a request is queued forever",
    ),
    Mutation(
        "coordinator.app:Coordinator._run_on",
        "response.end(formats.Exit.forced(formats.Reason.TIMEOUT, _1))",
        "response.finish()",
        "a timeout is not reported",
    ),
    Mutation(
        "coordinator.app:Coordinator._run_on",
        "not response.started",
        "True",
        "an error page in the middle of a stream",
    ),
    Mutation(
        "protocol.response:RunResponse.close",
        "self._heartbeat_timer.cancel()",
        "pass",
        "heartbeats continue after the response",
    ),
    Mutation(
        "coordinator.worker_client:_check_head",
        "workers is not None and workers != [machine.id]",
        "False",
        "a response of another machine is accepted",
    ),
    Mutation(
        "coordinator.worker_client:_check_head",
        "response.code != 200",
        "False",
        "any status is accepted",
    ),
    Mutation(
        "coordinator.worker_client:WorkerClient.stream",
        "formats.Exit.forced(reason)",
        "formats.Exit(0)",
        "a success is invented",
    ),
    Mutation(
        "coordinator.worker_client:WorkerClient.start_run",
        "try:\n    response = _1\nexcept CancelledError:\n    raise\nexcept Exception as error:\n    _2",
        "try:\n    response = _1\nexcept CancelledError:\n    raise\nexcept Exception:\n    response = _1",
        "a request is sent twice",
    ),
    Mutation(
        "coordinator.worker_client:WorkerClient._request",
        "headers.setRawHeaders(formats.FORCE_INSTANCE, [machine.id])",
        "",
        "a request may reach any machine",
    ),
    Mutation(
        "http.client:_FixedURLAgent.request",
        "self._agent.request(method, self._url, headers, bodyProducer)",
        "self._agent.request(method, uri, headers, bodyProducer)",
        "requests are not sent to their URL",
    ),
    Mutation(
        "coordinator.worker_client:WorkerClient.stream",
        "response.start(_1, headers)",
        "response.start(_1, {**headers, **{name.decode(): values[0].decode() "
        "for name, values in worker_response.headers.getAllRawHeaders()}})",
        "a worker's headers are forwarded",
    ),
    Mutation("protocol.parser:RawReader.feed", "data[: self._left]", "data", "raw output has no limit"),
    Mutation(
        "protocol.parser:EventReader._count", "raise OutputLimitError(_1)", "pass", "output has no limit"
    ),
    Mutation(
        "protocol.parser:RawReader.feed",
        "self.error = OutputLimitError(_1)",
        "pass",
        "an exceeded limit is not reported",
    ),
    Mutation(
        "http.client:BodyReceiver.close",
        "self.transport.stopProducing()",
        "pass",
        "a cancelled response is read further",
    ),
    Mutation("deadline:Deadline.run.expire", "task.cancel()", "pass", "a deadline does nothing"),
]


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module of the product with a mutant in it."""

    def __init__(self, mutant: Mutation) -> None:
        self._mutant = mutant
        self._name = f"bfaas.{mutant.module}"
        self._path = mutant.path

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_file_location(fullname, self._path, loader=self)

    def create_module(self, spec: Any) -> None:
        """Use Python's default."""

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._mutant.apply(), str(self._path), "exec"), module.__dict__)


class Result(NamedTuple):
    """The number of episodes that a mutant took, and the failure that ended them, if any."""

    mutant: Mutation
    episodes: int
    failure: str | None
    seconds: float


def run_mutant(mutant: Mutation, seeds: int) -> Result:
    """Run episodes with a mutant until one fails. Changes this process for good."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("bfaas", "tests")]:
        if name not in ("tests", "tests.simulation", Mutation.__module__, __name__):
            del sys.modules[name]
    sys.meta_path.insert(0, _Importer(mutant))
    from tests.simulation.run import prepare_process  # noqa: PLC0415 - imports the product with the mutant in it
    from tests.simulation.world import World  # noqa: PLC0415

    prepare_process()
    started_at = time.monotonic()
    for seed in range(seeds):
        if seed % _COLLECT_EVERY == 0:
            gc.unfreeze()
            gc.collect()
        try:
            World(seed).run_episode()
        except Exception as error:  # noqa: BLE001 - a violated invariant or any other error
            failure = f"{error}".partition("\n")[0][:90]
            return Result(mutant, seed + 1, failure, time.monotonic() - started_at)
    return Result(mutant, seeds, None, time.monotonic() - started_at)


def run_mutants(mutants: list[Mutation], seeds: int) -> Iterator[Result]:
    """Run each mutant in a process of its own."""
    context = multiprocessing.get_context("fork")
    with context.Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        yield from pool.imap(partial(run_mutant, seeds=seeds), mutants, chunksize=1)


def main() -> int:
    """Run mutants, print the results; return 1 if one was not noticed within `SEEDS` episodes or more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if mutant.module in arguments.modules or not arguments.modules]
    survivors = 0
    for result in run_mutants(chosen, arguments.seeds):
        survivors += result.failure is None
        print(
            f"{result.episodes:5} seeds {result.seconds:6.1f} s  {result.mutant.module:8} "
            f"{result.mutant.defect}: {result.failure}",
            flush=True,
        )
    print(f"{len(chosen) - survivors} of {len(chosen)} noticed")
    return 1 if survivors and arguments.seeds >= SEEDS else 0


if __name__ == "__main__":
    sys.exit(main())
