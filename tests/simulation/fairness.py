"""Whether one coordinator lets its clients take turns, and holds each to its share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.simulation.client import Client
    from tests.simulation.nodes import Node
    from tests.simulation.world import World


class Fairness:
    """
    What the clients of a coordinator see of each other, told by address.

    `_ahead` are, for each address that waits, those that may have one request served before its next.
    """

    def __init__(self, world: World, node: Node) -> None:
        self._world = world
        self._node = node
        self._waiting: dict[Client, None] = {}
        self._ahead: dict[str, set[str]] = {}

    def joins(self, client: Client) -> None:
        """Note a request that is about to be sent."""
        self._ahead.setdefault(client.address, set(self._ahead))
        self._waiting[client] = None

    def is_taken(self, client: Client, under_way: int) -> None:
        """Check a request that was taken or refused, while its address had so many others under way."""
        most = self._node.settings.max_per_client
        if client.ending is None and under_way >= most:
            self._world.ledger.broken(f"20: {client.address} has {under_way + 1} requests under way")
        if client.ending == "429" and under_way < most:
            self._world.ledger.broken(f"20: {client.address} is refused with {under_way} under way")

    def is_served(self, client: Client) -> None:
        """Check a request that gets a machine: it is its client's first, and has not overtaken another's."""
        if client not in self._waiting:
            return
        address = client.address
        first = next(other for other in self._waiting if other.address == address)
        if first is not client:
            self._world.ledger.broken(f"19: {client.script.request} is served before {first.script.request}")
        for other, ahead in self._ahead.items():
            if other != address and address not in ahead:
                self._world.ledger.broken(f"19: {address} is served again before {other}")
        self._has_had_its_turn(address)
        self.leaves(client)
        if address in self._ahead:
            self._ahead[address] = set(self._ahead) - {address}

    def leaves(self, client: Client) -> None:
        """Note a request that does not wait any more."""
        if self._waiting.pop(client, client) is None and all(
            other.address != client.address for other in self._waiting
        ):
            del self._ahead[client.address]
            self._has_had_its_turn(client.address)

    def _has_had_its_turn(self, address: str) -> None:
        for ahead in self._ahead.values():
            ahead.discard(address)
