"""Checks that one coordinator serves its clients in turn and within their quotas."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.simulation.client import Client
    from tests.simulation.nodes import Node
    from tests.simulation.world import World


class FairnessChecker:
    """
    Follows the queue of one coordinator, by client address.

    `_may_precede` holds, for each queued address, the addresses that may have one request served before it.
    """

    def __init__(self, world: World, node: Node) -> None:
        self._world = world
        self._node = node
        self._waiting: dict[Client, None] = {}
        self._may_precede: dict[str, set[str]] = {}

    def on_queued(self, client: Client) -> None:
        """Record a request that is about to be sent."""
        self._may_precede.setdefault(client.address, set(self._may_precede))
        self._waiting[client] = None

    def on_accepted(self, client: Client, in_progress: int) -> None:
        """Check a request that was accepted or rejected while its address had `in_progress` others."""
        quota = self._node.settings.max_per_client
        if client.outcome is None and in_progress >= quota:
            self._world.oracle.report(f"20: {client.address} has {in_progress + 1} requests in progress")
        if client.outcome == "429" and in_progress < quota:
            self._world.oracle.report(f"20: {client.address} is rejected with {in_progress} in progress")

    def on_served(self, client: Client) -> None:
        """Check that a served request is its address's oldest, and that it is the address's turn."""
        if client not in self._waiting:
            return
        address = client.address
        first = next(other for other in self._waiting if other.address == address)
        if first is not client:
            self._world.oracle.report(f"19: {client.script.request} is served before {first.script.request}")
        for other, preceding in self._may_precede.items():
            if other != address and address not in preceding:
                self._world.oracle.report(f"19: {address} is served again before {other}")
        self._record_turn(address)
        self.on_left_queue(client)
        if address in self._may_precede:
            self._may_precede[address] = set(self._may_precede) - {address}

    def on_left_queue(self, client: Client) -> None:
        """Record a request that has left the queue."""
        if self._waiting.pop(client, client) is None and all(
            other.address != client.address for other in self._waiting
        ):
            del self._may_precede[client.address]
            self._record_turn(client.address)

    def _record_turn(self, address: str) -> None:
        for preceding in self._may_precede.values():
            preceding.discard(address)
