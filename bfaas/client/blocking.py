"""The client that blocks."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Self, Unpack

import httpx

from bfaas.client.errors import CancelledRunError, ResponseLostError
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
    from collections.abc import Iterator, Sequence
    from types import TracebackType


class Run:
    """
    A run that has begun: an iterator over its events, which ends after its `Exit`.

    `id` names the run in the logs of coordinator and worker, `machine` the machine that runs it. `exit` is
    None until the run has ended.
    """

    def __init__(self, response: httpx.Response, outputs: Sequence[str]) -> None:
        self.id = response.headers.get(formats.RUN_ID, "")
        self.machine = response.headers.get(formats.WORKER, "")
        self._response = response
        self._decoder = EventDecoder(outputs)
        self._events = self._receive()
        self._lock = threading.Lock()
        self._cancelled = False
        self._finished = False

    @property
    def exit(self) -> formats.Exit | None:
        """How the run ended; None as long as it has not."""
        return self._decoder.exit

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def _receive(self) -> Iterator[Event]:
        try:
            with response_errors():
                for data in self._response.iter_raw():
                    events = self._decoder.feed(data)
                    if self.exit is not None:
                        self._finish()
                    yield from events
            self._decoder.end()
        except ResponseLostError:
            if self._cancelled:
                raise CancelledRunError("the run was cancelled") from None
            raise

    def cancel(self) -> None:
        """
        Kill the script, also from another thread; then the iterator raises `CancelledRunError`.

        Nothing happens if the run has ended.
        """
        with self._lock:
            if self._finished:
                return
            self._cancelled = True
            stream = self._response.extensions.get("network_stream")
            if stream is not None:
                with suppress(OSError):
                    # Closing it would not wake a thread that reads from it.
                    socket.socket.shutdown(stream.get_extra_info("socket"), socket.SHUT_RDWR)

    def _finish(self) -> None:
        # Afterwards, the connection may carry another request.
        with self._lock:
            self._finished = True

    def close(self) -> None:
        """Close the response; the script is killed if it still runs. Leaving `Client.stream` does this."""
        self._finish()
        self._response.close()


class Client:
    """
    Runs scripts at a coordinator, and blocks meanwhile. Can be shared by threads.

    Close it with `close`, or use it in a `with` statement.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        max_wait: float = 60.0,
        silence: float = 300.0,
        http: httpx.Client | None = None,
    ) -> None:
        """
        Make a client for the coordinator at `url`; default: `$BFAAS_URL`, or http://127.0.0.1:8000.

        `token` is an access token; default: `$BFAAS_TOKEN`, if set. While the coordinator is busy (429 or 503
        with `Retry-After`), the client waits as it says and sends the request again, for up to `max_wait`
        seconds; then it raises `BusyError`. In all other cases a request is sent once.

        After `silence` seconds without any data the connection counts as lost. It must be longer than the
        coordinator's `MAXWAIT`; afterwards there is a heartbeat every 15 s.

        `http` is an httpx client for other TLS or proxy settings, which the caller closes.
        """
        self._coordinator = Coordinator(url, token, silence)
        self._http = httpx.Client(limits=NO_CONNECTION_LIMIT) if http is None else http
        self._owns_http = http is None
        self.max_wait = max_wait

    def run(self, script: str | bytes, **options: Unpack[RunOptions]) -> Result:
        """
        Run a script to its end, and return its output. `options` are those of `RunOptions`.

        An exit code other than 0 is no error; see `Result.check`. Raises `BfaasError`.
        """
        with self.stream(script, **options) as run:
            result = ResultBuilder(run.id, run.machine)
            for event in run:
                result.add(event)
        return result.build()

    @contextmanager
    def stream(self, script: str | bytes, **options: Unpack[RunOptions]) -> Iterator[Run]:
        """
        Run a script; the context is its `Run`. `options` are those of `RunOptions`.

        The block begins when the script has been sent to a machine. The script is killed if the block ends
        before it does. Raises `BfaasError`.
        """
        run = Run(self._send(RunBody(script, options)), options.get("outputs", ()))
        try:
            yield run
        finally:
            run.close()

    def status(self) -> dict[str, Any]:
        """Return the coordinator's `/status`. Raises `BfaasError`."""
        with no_response_errors():
            response = self._http.send(self._coordinator.status_request(self._http))
        return decode_status(response)

    def _send(self, body: RunBody) -> httpx.Response:
        budget = RetryBudget(self.max_wait)
        while True:
            request = self._coordinator.run_request(self._http, body)
            with no_response_errors():
                response = self._http.send(request, stream=True, follow_redirects=False)
            if response.status_code == OK:
                return response
            text = b""
            try:
                with suppress(httpx.TransportError):  # the status is sufficient
                    text = next(response.iter_raw(MAX_ERROR_SIZE), b"")
            finally:
                response.close()
            time.sleep(budget.pause(rejection(response, text)))

    def close(self) -> None:
        """Close all connections; scripts that run on them are killed."""
        if self._owns_http:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
