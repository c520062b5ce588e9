"""
Client of the workers: checks that they are ready, sends them runs, and streams their output to the client.

A script may have taken over its worker, so workers are not trusted. Only output in the requested format
reaches the client; the response's head and its exit are the coordinator's own.
"""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from itertools import count
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.http_headers import Headers

from bfaas.backoff import BackoffSchedule
from bfaas.deadline import Deadline
from bfaas.http.client import BodyReceiver, abort_body, send_request, single_use_agent
from bfaas.http.strict_agent import IncompleteResponseError
from bfaas.pooling.lifecycle import ReadinessProbe
from bfaas.protocol import formats
from bfaas.protocol.parser import OutputLimitError, run_reader
from bfaas.tokens import CLOCK_SKEW

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twisted.web.iweb import IAgent, IResponse

    from bfaas.machines.api import Machine
    from bfaas.protocol.request import RunRequest
    from bfaas.protocol.response import RunResponse


class WorkerError(Exception):
    """The worker sent no valid response head; nothing was sent to the client."""


class NotStartedError(WorkerError):
    """The worker reports that it could not start the script."""


class WorkerClient(ReadinessProbe):
    """
    HTTP client for the workers on machines.

    Requests to a machine without a URL of its own go to `worker_url`, the proxy of the workers' app, which
    the header `fly-force-instance-id` directs to the machine
    (https://fly.io/docs/networking/dynamic-request-routing/). `max_output` limits a run's output, in bytes.

    The memory that a response takes is bounded, whatever the worker sends: one piece as it was read (64 KiB),
    an unfinished line (`MAX_HEAD`) and an unfinished event (`MAX_EVENT`; nine times that while it is
    decoded).
    """

    _log = Logger()
    _PROBE_TIMEOUT = 2.0
    # Each delay is at most a fifth of: 25 ms plus the time waited so far. This bounds how late readiness is
    # noticed.
    _PROBE_BACKOFF = BackoffSchedule(initial=0.005, maximum=0.25, factor=1.2)
    _MAX_CLOCK_AHEAD = 30.0  # seconds that a worker's clock may be ahead: half of an auth token's lifetime

    def __init__(
        self,
        reactor: Any,
        worker_url: str | None,
        max_output: int,
        agent: IAgent | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._reactor = reactor
        self._wall_clock = wall_clock
        self._worker_url = worker_url
        self._max_output = max_output
        self._agent = agent or single_use_agent(reactor)
        self.scripts_only = False
        """
        Whether the workers are those of the Go original, which know no JSON requests, and would run one as a
        script. Set by the latest readiness probe, since all machines of a pool have the same image.
        """

    async def wait_until_ready(self, machine: Machine) -> None:
        """
        Wait until the worker responds. There is no time limit: cancel it to end the wait.

        Any status below 500 counts: workers of the Go original have no health check. A worker whose clock is
        so far off that it would reject an auth token, which happens briefly after a resume, is not ready. A
        response of another program, which has taken a local machine's port, does not count: it would get the
        script.
        """
        for failures in count():
            try:
                probe = self._request("GET", machine, formats.HEALTH_PATH, Headers(), None)
                response = await Deadline(self._reactor, self._PROBE_TIMEOUT).run(probe)
            except CancelledError:
                raise
            except Exception:  # noqa: BLE001, S110 - refused, reset, timed out: not ready
                pass
            else:
                abort_body(response)
                is_up = response.code < 500  # noqa: PLR2004 - a server's own errors
                if is_up and self._clock_ok(response) and _is_expected_machine(machine, response):
                    self.scripts_only = not response.headers.hasHeader(formats.WORKER)
                    return
            await deferLater(self._reactor, self._PROBE_BACKOFF.delay(failures))

    def _clock_ok(self, response: IResponse) -> bool:
        """Return whether a worker's `Date` is close enough to our time, or missing or invalid."""
        try:
            worker_time = parsedate_to_datetime(response.headers.getRawHeaders("date", [""])[0]).timestamp()
        except (ValueError, OverflowError):
            return True
        return -CLOCK_SKEW < worker_time - self._wall_clock() < self._MAX_CLOCK_AHEAD

    async def start_run(
        self,
        machine: Machine,
        auth_token: str,
        run_id: str,
        run_request: RunRequest,
        format_: formats.Format,
    ) -> IResponse:
        """
        Send a run to the machine's worker, once; return the response, whose head is valid, for `stream`.

        `format_` is the client's format. The worker logs `run_id`. Raise `WorkerError` if the worker sends no
        valid response head. Cancelling closes the connection.
        """
        # Workers write events or raw output; NDJSON is converted from events here.
        worker_format = formats.Format.RAW if format_ is formats.Format.RAW else formats.Format.EVENTS
        query = "?raw=1" if worker_format is formats.Format.RAW else ""
        headers = Headers({formats.AUTHORIZATION: [auth_token], formats.RUN_ID: [run_id]})
        if run_request.content_type is not None:
            headers.setRawHeaders("Content-Type", [run_request.content_type])
        try:
            response = await self._request(
                "POST", machine, formats.RUN_PATH + query, headers, run_request.body
            )
        except CancelledError:
            raise
        except Exception as error:
            raise WorkerError(f"no response: {error!r}") from error
        try:
            _check_head(response, machine, worker_format)
        except WorkerError:
            abort_body(response)
            raise
        return response

    async def stream(
        self,
        machine: Machine,
        run_id: str,
        worker_response: IResponse,
        format_: formats.Format,
        response: RunResponse,
        headers: dict[str, str],
        outputs: Sequence[str] = (),
    ) -> formats.Exit:
        """
        Stream the worker's output to the client, in `format_`; return the run's exit.

        Starts the client's response at once, with `headers`. `outputs` are the request's patterns of files.
        Any failure of the worker is logged, and is an exit with a reason. Cancelling closes the connection to
        the worker, and leaves the client's response to the caller.
        """
        reader = run_reader(format_, self._max_output, outputs)

        def forward(data: bytes) -> None:
            response.write(reader.feed(data))
            if reader.error is not None:
                raise reader.error

        body = BodyReceiver(forward, on_start=lambda producer: response.start(producer, headers))
        worker_response.deliverBody(body)
        error: Exception | None = None
        try:
            await body.done
        except CancelledError:
            raise
        except Exception as failure:  # noqa: BLE001 - any failure means that the worker is lost
            error = failure
        # An exit event is final even if the body is incomplete. A raw run's exit line is not: the script may
        # have written it.
        is_final = error is None or (isinstance(error, IncompleteResponseError) and not reader.forwards_exit)
        exit_ = reader.exit if is_final else None
        if exit_ is not None and reader.forwards_exit:
            response.finish()
            return exit_
        if exit_ is None:
            reason = formats.Reason.OUTPUT_LIMIT
            if not isinstance(error, OutputLimitError):
                reason = formats.Reason.WORKER_LOST
                self._log.warn(
                    "run {run}: lost the worker on {machine}: {error}",
                    run=run_id,
                    machine=machine.id,
                    error="no exit" if error is None else repr(error),
                )
            exit_ = formats.Exit.forced(reason)
        response.end(exit_)
        return exit_

    async def _request(
        self, method: str, machine: Machine, path: str, headers: Headers, body: bytes | None
    ) -> IResponse:
        """Send one request to a machine's worker."""
        base = machine.url or self._worker_url
        if base is None:
            raise WorkerError(f"machine {machine.id} has no URL")
        headers.setRawHeaders(formats.FORCE_INSTANCE, [machine.id])
        return await send_request(self._agent, method, base, path, headers, body)


def _is_expected_machine(machine: Machine, response: IResponse) -> bool:
    """Return whether the machine sent a response: local workers name it; on Fly the proxy has directed it."""
    return machine.url is None or response.headers.getRawHeaders(formats.WORKER) == [machine.id]


def _check_head(response: IResponse, machine: Machine, format_: formats.Format) -> None:
    """Raise `WorkerError` unless a response's head is valid for a run on this machine in this format."""
    if response.code == 500:  # noqa: PLR2004 - the status of a worker that could not start bash
        raise NotStartedError("it could not start the script (status 500): see its log")
    if response.code != 200:  # noqa: PLR2004 - OK
        raise WorkerError(f"status {response.code}")
    content_types = response.headers.getRawHeaders("content-type", [""])
    if [value.partition(";")[0].strip().lower() for value in content_types] != [format_.media_type]:
        raise WorkerError("unexpected content type")
    workers = response.headers.getRawHeaders(formats.WORKER)
    if workers is not None and workers != [machine.id]:
        raise WorkerError("response from another machine")
