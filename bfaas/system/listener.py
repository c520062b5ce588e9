"""The service that listens on the endpoint of a `--listen` or `--metrics` option."""

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
"""Twisted's prefix for endpoints whose connections start with a PROXY protocol header."""


class Listener(Service):
    """Listens on an endpoint from the privileged start of the service until it stops."""

    def __init__(self, reactor: Any, option: str, description: str, site: BoundedSite) -> None:
        """
        Parse an endpoint description, the value of `option`.

        Raises `StartError` if it is invalid.
        """
        self._site = site
        self._name = f"{option} {description}"
        self._listening: Deferred[IListeningPort | None] | None = None
        site.proxied = description.startswith(_PROXIED)
        try:
            self._endpoint = serverFromString(reactor, description.removeprefix(_PROXIED))
        except Exception as error:  # noqa: BLE001 - endpoints are plugins, which may raise anything
            raise StartError(f"{self._name}: {in_one_line(error)}") from None
        if isinstance(self._endpoint, StandardIOEndpoint):
            raise StartError(f"{self._name}: the endpoint does not accept connections")

    def privilegedStartService(self) -> None:
        """Listen. Raises `StartError`, because Twisted's endpoints report failures immediately."""
        failures: list[Failure] = []
        self._listening = maybeDeferred(self._endpoint.listen, self._site).addErrback(failures.append)
        for failure in failures:
            text = in_one_line(failure.value)
            raise StartError(text if failure.check(CannotListenError) else f"{self._name}: {text}")

    def startService(self) -> None:
        """Listen, unless the privileged start has done so."""
        super().startService()
        if self._listening is None:
            self.privilegedStartService()

    def stopService(self) -> Deferred[None]:
        """Stop listening."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        super().stopService()
        if self._listening is not None:
            self._listening.cancel()
            port = await self._listening
            if port is not None:
                await maybeDeferred(port.stopListening)
