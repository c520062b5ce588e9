"""Where a program of ours listens: a Twisted endpoint string, checked, and what is against it in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.endpoints import StandardIOEndpoint, serverFromString
from twisted.internet.error import CannotListenError

from bfaas.system.startup import StartError, in_one_line

if TYPE_CHECKING:
    from twisted.internet.interfaces import IListeningPort
    from twisted.python.failure import Failure

    from bfaas.http.server import BoundedSite

_PROXIED = "haproxy:"
"""Twisted's prefix of endpoints whose connections begin with a header of the PROXY protocol."""


class Listener(Service):
    """Listens on an endpoint from the service's privileged start to its end."""

    def __init__(self, reactor: Any, option: str, description: str, site: BoundedSite) -> None:
        """Read an endpoint's description, the value of `option`; raise `StartError` if it is invalid."""
        self._site = site
        self._name = f"{option} {description}"
        self._listening: Deferred[IListeningPort | None] | None = None
        site.proxied = description.startswith(_PROXIED)
        try:
            self._endpoint = serverFromString(reactor, description.removeprefix(_PROXIED))
        except Exception as error:  # noqa: BLE001 - endpoints are plugins, and raise what they like
            raise StartError(f"{self._name}: {in_one_line(error)}") from None
        if isinstance(self._endpoint, StandardIOEndpoint):
            raise StartError(f"{self._name}: not an endpoint that takes connections")

    def privilegedStartService(self) -> None:
        """Listen, or raise `StartError`. Twisted's own endpoints fail at once, or not at all."""
        failures: list[Failure] = []
        self._listening = maybeDeferred(self._endpoint.listen, self._site).addErrback(failures.append)
        for failure in failures:
            text = in_one_line(failure.value)
            raise StartError(text if failure.check(CannotListenError) else f"{self._name}: {text}")

    def startService(self) -> None:
        """Listen, unless the privileged start did."""
        super().startService()
        if self._listening is None:
            self.privilegedStartService()

    def stopService(self) -> Deferred[None]:
        """Listen no more."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        super().stopService()
        if self._listening is not None:
            self._listening.cancel()
            port = await self._listening
            if port is not None:
                await maybeDeferred(port.stopListening)
