"""The client for asyncio."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Self, Unpack

import httpx

from bfaas.client.events import Event, EventDecoder, Result, ResultBuilder
from bfaas.client.exchange import (
    MAX_ERROR_SIZE,
    NO_CONNECTION_LIMIT,
    OK,
    Coordinator,
    RetryBudget,
    RunBody,
    RunOptions,
    decode_status,
    no_response_errors,
    rejection,
    response_errors,
)
from bfaas.protocol import formats

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence
    from types import TracebackType


class AsyncRun:
    """
    A run that has begun: an asynchronous iterator over its events, which ends after its `Exit`.

    The attributes are those of `Run`. To kill the script, leave the block of `AsyncClient.stream`, or cancel
    the task.
    """

    def __init__(self, response: httpx.Response, outputs: Sequence[str]) -> None:
        self.id = response.headers.get(formats.RUN_ID, "")
        self.machine = response.headers.get(formats.WORKER, "")
        self._response = response
        self._decoder = EventDecoder(outputs)
        self._events = self._receive()

    @property
    def exit(self) -> formats.Exit | None:
        """How the run ended; None as long as it has not."""
        return self._decoder.exit

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def _receive(self) -> AsyncGenerator[Event, None]:
        with response_errors():
            async for data in self._response.aiter_raw():
                for event in self._decoder.feed(data):
                    yield event
        self._decoder.end()

    async def close(self) -> None:
        """Close the response; the script is killed if it still runs. Leaving the block does this."""
        try:
            await self._events.aclose()
        finally:
            await self._response.aclose()


class AsyncClient:
    r"""
    Runs scripts at a coordinator, from asyncio code. Cancelling a task kills the script that it waits for.

    Close it with `close`, or use it in an `async with` statement.

    >>> import asyncio
    >>> from bfaas.client import AsyncClient
    >>> async def squares() -> list[str]:
    ...     async with AsyncClient() as client:
    ...         runs = [client.run(f"echo $(({n} * {n}))") for n in (2, 3)]
    ...         return [result.stdout for result in await asyncio.gather(*runs)]
    >>> asyncio.run(squares())
    ['4\n', '9\n']
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        max_wait: float = 60.0,
        silence: float = 300.0,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        """Make a client; the arguments are those of `Client`."""
        self._coordinator = Coordinator(url, token, silence)
        self._http = httpx.AsyncClient(limits=NO_CONNECTION_LIMIT) if http is None else http
        self._owns_http = http is None
        self.max_wait = max_wait

    async def run(self, script: str | bytes, **options: Unpack[RunOptions]) -> Result:
        """Run a script to its end; see `Client.run`."""
        async with self.stream(script, **options) as run:
            result = ResultBuilder(run.id, run.machine)
            async for event in run:
                result.add(event)
        return result.build()

    @asynccontextmanager
    async def stream(self, script: str | bytes, **options: Unpack[RunOptions]) -> AsyncIterator[AsyncRun]:
        """Run a script; the context is its `AsyncRun`. See `Client.stream`."""
        run = AsyncRun(await self._send(RunBody(script, options)), options.get("outputs", ()))
        try:
            yield run
        finally:
            await run.close()

    async def status(self) -> dict[str, Any]:
        """Return the coordinator's `/status`. Raises `BfaasError`."""
        with no_response_errors():
            response = await self._http.send(self._coordinator.status_request(self._http))
        return decode_status(response)

    async def _send(self, body: RunBody) -> httpx.Response:
        budget = RetryBudget(self.max_wait)
        while True:
            request = self._coordinator.run_request(self._http, body)
            with no_response_errors():
                response = await self._http.send(request, stream=True, follow_redirects=False)
            if response.status_code == OK:
                return response
            text = b""
            try:
                with suppress(httpx.TransportError):  # the status is sufficient
                    text = await anext(response.aiter_raw(MAX_ERROR_SIZE), b"")
            finally:
                await response.aclose()
            await asyncio.sleep(budget.pause(rejection(response, text)))

    async def close(self) -> None:
        """Close all connections; scripts that run on them are killed."""
        if self._owns_http:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
