"""
The queue of requests: round-robin by client, first in, first out within a client.

A new entry therefore waits for at most one request of each other client, however many that one has queued.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Generic, TypeVar

from twisted.internet.defer import Deferred, fail

T = TypeVar("T")


class FairQueue(Generic[T]):
    """
    Queue entries, grouped by client. All operations but `position` take constant time.

    The next client is the first one in `_clients`. When one of its entries gets a resource, the client moves
    to the end if it has more entries. A client without entries is appended when it enqueues one.
    """

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[Deferred[T], None]] = OrderedDict()
        self._length = 0
        self._closed: type[Exception] | None = None

    def __len__(self) -> int:
        return self._length

    def enqueue(self, client: str) -> Deferred[T]:
        """
        Add an entry: a Deferred that fires with the assigned resource. Cancellation removes it.

        When the queue is closed, now or later, the entry fails with the exception passed to `close`.
        """
        if self._closed is not None:
            return fail(self._closed())
        entry: Deferred[T] = Deferred(partial(self._remove, client))
        self._clients.setdefault(client, OrderedDict())[entry] = None
        self._length += 1
        return entry

    def position(self, client: str, entry: Deferred[T]) -> int:
        """Return 1 for the next entry, 2 for the one after it, and so on. The entry must be queued."""
        turn = list(self._clients[client]).index(entry) + 1
        behind = False
        position = 0
        for other, queued in self._clients.items():
            # Clients behind this one have had one turn less when its turn comes.
            position += min(len(queued), turn - behind)
            behind = behind or other == client
        return position

    def assign(self, resource: T) -> None:
        """Assign a resource to the next entry. The queue must not be empty."""
        self._next().callback(resource)

    def close(self, error: type[Exception]) -> None:
        """Make all entries fail with `error`, later ones too."""
        self._closed = error
        while self._clients:
            self._next().errback(error())

    def _next(self) -> Deferred[T]:
        """Remove and return the first entry of the next client, and move the client to the end."""
        client, entries = next(iter(self._clients.items()))
        entry = next(iter(entries))
        self._clients.move_to_end(client)
        self._remove(client, entry)
        return entry

    def _remove(self, client: str, entry: Deferred[T]) -> None:
        entries = self._clients[client]
        del entries[entry]
        self._length -= 1
        if not entries:
            del self._clients[client]
