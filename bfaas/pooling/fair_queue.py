"""
The line of requests that wait: clients take turns, and each client's requests are served as they came.

So whoever joins waits for one request at the most of each other client that waits, however many those have.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Generic, TypeVar

from twisted.internet.defer import Deferred, fail

T = TypeVar("T")


class FairQueue(Generic[T]):
    """
    Places in line, by client; its length is how many there are. Each step takes the same time at any length.

    The client who is next stands first. After its turn it stands last, if it has more places; whoever is new
    stands last as well.
    """

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[Deferred[T], None]] = OrderedDict()
        self._length = 0
        self._closed: type[Exception] | None = None

    def __len__(self) -> int:
        return self._length

    def enqueue(self, client: str) -> Deferred[T]:
        """
        Take a place, which fires when it is served. Cancelling it leaves the line.

        Fails as `close` says, now or later, when the line is closed.
        """
        if self._closed is not None:
            return fail(self._closed())
        place: Deferred[T] = Deferred(partial(self._leave, client))
        self._clients.setdefault(client, OrderedDict())[place] = None
        self._length += 1
        return place

    def assign(self, thing: T) -> None:
        """Give something to the one who is next; there must be one."""
        self._next().callback(thing)

    def close(self, error: type[Exception]) -> None:
        """Let all places fail, and all that are still asked for."""
        self._closed = error
        while self._clients:
            self._next().errback(error())

    def _next(self) -> Deferred[T]:
        """Take the first place of the client whose turn it is, and let the next client have its turn."""
        client, places = next(iter(self._clients.items()))
        place = next(iter(places))
        self._clients.move_to_end(client)
        self._leave(client, place)
        return place

    def _leave(self, client: str, place: Deferred[T]) -> None:
        places = self._clients[client]
        del places[place]
        self._length -= 1
        if not places:
            del self._clients[client]
