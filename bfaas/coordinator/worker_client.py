"""
One exchange, streamed from a worker to a client.

A worker may be in the hands of the script it ran. Nothing it says reaches the client but output in the
format that was asked for; head, status and ending are our own.
"""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from itertools import count
from typing import TYPE_CHECKING, Any

from treq.client import HTTPClient
from twisted.internet.defer import CancelledError
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.http_headers import Headers

from bfaas.backoff import BackoffSchedule
from bfaas.deadline import Deadline
from bfaas.http.client import (
    BodyReceiver,
    BytesProducer,
    Towards,
    abort_body,
    single_use_agent,
    wait_for_response,
)
from bfaas.http.strict_agent import IncompleteResponseError
from bfaas.protocol import formats
from bfaas.protocol.parser import OutputLimitError, run_reader
from bfaas.tokens import CLOCK_SKEW

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.web.iweb import IAgent, IResponse

    from bfaas.machines.api import Machine
    from bfaas.protocol.request import RunRequest
    from bfaas.protocol.response import RunResponse


class WorkerError(Exception):
    """The worker did not begin to answer as a worker does; nothing was sent to the client."""


class NotStartedError(WorkerError):
    """The worker reports that it could not start the script."""


class WorkerClient:
    """
    Reaches the workers on machines.

    A machine that has no address of its own is reached at `worker_url`, through the proxy of its app,
    which the header `fly-force-instance-id` tells where to go
    (https://fly.io/docs/networking/dynamic-request-routing/).

    What a worker can make this hold is one piece as it was read (64 KiB), an unfinished line (`MAX_HEAD`)
    and an unfinished event (`MAX_EVENT`; nine times that for the moment in which it is decoded).
    """

    _log = Logger()
    _PROBE_LIMIT = 2.0
    # A worker that becomes ready is noticed at most a fifth of the time waited so far later.
    _PROBE_BACKOFF = BackoffSchedule(initial=0.005, maximum=0.25, factor=1.2)
    _MAX_CLOCK_AHEAD = 30.0  # seconds that a worker's clock may be ahead: half of a ticket's life

    def __init__(
        self,
        reactor: Any,
        worker_url: str | None,
        max_output: int,
        agent: IAgent | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._reactor = reactor
        self._wall = wall
        self._worker_url = worker_url
        self._max_output = max_output
        self._agent = agent or single_use_agent(reactor)

    async def wait_until_ready(self, machine: Machine) -> None:
        """
        Wait until the worker answers; only cancelling ends the wait otherwise.

        Any answer below 500 will do: workers of the Go original have no such path. But one whose clock is
        so far off that it would refuse a ticket, as it may be for a moment after it was thawed, is not ready;
        nor is whoever has taken a local machine's port, and would get its script.
        """
        for failures in count():
            try:
                probe = self._request("GET", machine, formats.HEALTH_PATH, Headers(), None)
                response = await Deadline(self._reactor, self._PROBE_LIMIT).run(probe)
            except CancelledError:
                raise
            except Exception:  # noqa: BLE001, S110 - refused, reset, silent: not ready, whichever
                pass
            else:
                abort_body(response)
                is_up = response.code < 500  # noqa: PLR2004 - a server's own errors
                if is_up and self._clock_ok(response) and _is_expected_machine(machine, response):
                    return
            await deferLater(self._reactor, self._PROBE_BACKOFF.delay(failures))

    def _clock_ok(self, response: IResponse) -> bool:
        """Tell whether a worker's clock, as far as it tells it, is near enough to ours."""
        try:
            told = parsedate_to_datetime(response.headers.getRawHeaders("date", [""])[0]).timestamp()
        except (ValueError, OverflowError):
            return True
        return -CLOCK_SKEW < told - self._wall() < self._MAX_CLOCK_AHEAD

    async def begin(
        self, machine: Machine, ticket: str, run_id: str, ask: RunRequest, format_: formats.Format
    ) -> IResponse:
        """
        Send a run to the machine's worker, once; return the head of the worker's answer, for `stream`.

        The worker gets the run's id for its log. Raises `WorkerError` if the worker does not answer as a
        worker does. Cancelling closes the connection.
        """
        # Workers write events or raw runs; lines are made here.
        written = formats.Format.RAW if format_ is formats.Format.RAW else formats.Format.EVENTS
        query = "?raw=1" if written is formats.Format.RAW else ""
        request = Headers({formats.AUTHORIZATION: [ticket], formats.RUN_ID: [run_id]})
        if ask.content_type is not None:
            request.setRawHeaders("Content-Type", [ask.content_type])
        try:
            response = await self._request("POST", machine, formats.RUN_PATH + query, request, ask.body)
        except CancelledError:
            raise
        except Exception as error:
            raise WorkerError(f"no answer: {error!r}") from error
        try:
            _check_head(response, machine, written)
        except WorkerError:
            abort_body(response)
            raise
        return response

    async def stream(
        self, response: IResponse, format_: formats.Format, answer: RunResponse, headers: dict[str, str]
    ) -> formats.Exit:
        """
        Answer the client with what the worker sends; return how the run ended.

        Begins the answer at once, with what has come by then. Every failure of the worker is an exit.
        Cancelling closes the connection to the worker, and leaves the answer to the caller.
        """
        reader = run_reader(format_, self._max_output)

        def pass_on(data: bytes) -> None:
            answer.write(reader.feed(data))
            if reader.error is not None:
                raise reader.error

        body = BodyReceiver(pass_on, on_start=lambda producer: answer.start(producer, headers))
        response.deliverBody(body)
        exit_: formats.Exit | None = None
        reason = formats.Reason.WORKER_LOST
        try:
            await body.done
            exit_ = reader.exit
        except CancelledError:
            raise
        except OutputLimitError:
            reason = formats.Reason.OUTPUT_LIMIT
        except Exception as error:  # noqa: BLE001 - however it broke off, it is lost
            # But an exit event is an end by itself. (A raw run's last line may be the script's.)
            if isinstance(error, IncompleteResponseError) and not reader.forwards_exit:
                exit_ = reader.exit
            if exit_ is None:
                self._log.warn("lost a worker: {error!r}", error=error)
        if exit_ is not None and reader.forwards_exit:
            answer.finish()
            return exit_
        exit_ = exit_ or formats.Exit.forced(reason)
        answer.end(exit_)
        return exit_

    async def _request(
        self, method: str, machine: Machine, path: str, headers: Headers, body: bytes | None
    ) -> IResponse:
        """Send one request, with a client of its own: no cookies, no redirects, no connection kept."""
        base = machine.url or self._worker_url
        if base is None:
            raise WorkerError(f"machine {machine.id} has no address")
        headers.setRawHeaders(formats.FORCE_INSTANCE, [machine.id])
        client = HTTPClient(Towards(self._agent, base), data_to_body_producer=BytesProducer)
        sent = client.request(
            method, Towards.ANYWHERE + path, headers=headers, data=body,
            allow_redirects=False, unbuffered=True, reactor=self._reactor,
        )  # fmt: skip
        response: IResponse = await wait_for_response(sent)
        return response


def _is_expected_machine(machine: Machine, response: IResponse) -> bool:
    """Tell whether an answer is from the machine; on Fly the proxy has seen to that, elsewhere it says so."""
    return machine.url is None or response.headers.getRawHeaders(formats.WORKER) == [machine.id]


def _check_head(response: IResponse, machine: Machine, format_: formats.Format) -> None:
    """Raise `WorkerError` unless this is the head of a run's answer, from that machine, in that format."""
    if response.code == 500:  # noqa: PLR2004 - what a worker answers then
        raise NotStartedError("it could not start the script (status 500): its log tells why")
    if response.code != 200:  # noqa: PLR2004 - OK
        raise WorkerError(f"status {response.code}")
    kinds = response.headers.getRawHeaders("content-type", [""])
    if [kind.partition(";")[0].strip().lower() for kind in kinds] != [format_.media_type]:
        raise WorkerError("an answer of another content type")
    names = response.headers.getRawHeaders(formats.WORKER)
    if names is not None and names != [machine.id]:
        raise WorkerError("an answer from another machine")
