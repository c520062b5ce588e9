"""
The worker's HTTP application: runs one authenticated script and streams its output.

A worker loads this module, and klein with it, after its first health check response (see `bfaas.basher`).
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from klein import Klein
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.logger import Logger
from zope.interface import implementer

from bfaas.deadline import Deadline, DeadlineExceededError
from bfaas.http.errors import HTTPError
from bfaas.http.server import register_error_handlers, text_response
from bfaas.protocol import formats
from bfaas.protocol.http_request import parse_run_request, response_format
from bfaas.protocol.request import RunRequest
from bfaas.protocol.response import RunResponse
from bfaas.tokens import AuthError
from bfaas.worker.bash_process import BashRun, script_environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from twisted.web.server import Request

    from bfaas.settings import BasherSettings
    from bfaas.system.confinement import Confinement
    from bfaas.worker.bash_process import BashReactor


class WorkerApp:
    """
    The worker's routes.

    `wall_clock` returns the seconds since the epoch, which auth tokens are checked against. `on_finished` is
    called once, when the worker's only run has ended and its response has been written.
    `used` is whether that run has started.
    """

    app = Klein()
    register_error_handlers(app)
    _log = Logger()
    _LOGGED_REJECTIONS = 3

    def __init__(
        self,
        reactor: BashReactor,
        settings: BasherSettings,
        confinement: Confinement,
        wall_clock: Callable[[], float],
        on_finished: Callable[[], None],
    ) -> None:
        self._reactor = reactor
        self._settings = settings
        self._confinement = confinement
        self._wall_clock = wall_clock
        self._on_finished = on_finished
        self._rejections = 0
        self.used = False
        self._processes = _Processes()

    @app.route(formats.HEALTH_PATH, methods=["GET"])
    def healthz(self, request: Request) -> bytes:
        """Return 200 with the machine's id: the worker listens."""
        request.setHeader(formats.WORKER, self._settings.machine_id)
        return text_response(request, "ok")

    @app.route(formats.RUN_PATH, methods=["POST"])
    async def run(self, request: Request) -> None:
        """Run the script in the body and stream its output."""
        self._authenticate(request)
        if self.used:
            raise HTTPError(409, "this worker has already run a script")
        run_request = parse_run_request(request)
        format_ = response_format(request)
        response = RunResponse(request, format_, self._reactor)
        run_id = _run_id(request)
        self.used = True
        try:
            exit_ = await self._wait(run_request, response, merge_output=format_ is formats.Format.RAW)
            self._log.info("run {run}: {exit}", run=run_id, exit=exit_)
            if exit_.reason == formats.Reason.NOT_STARTED:
                raise self._start_error(self._processes.startup_errors)
            self._start_response(response)  # a run may be killed before its script starts
            response.end(exit_)
        except CancelledError:
            self._log.info("run {run}: the client disconnected", run=run_id)
            raise
        finally:
            response.close()
            self._on_finished()

    def _authenticate(self, request: Request) -> None:
        """Verify the auth token. Raises `HTTPError` with 401, without the reason, which is only logged."""
        token = request.getHeader(formats.AUTHORIZATION) or ""
        try:
            self._settings.verifier.verify(token, self._settings.machine_id, self._wall_clock())
        except AuthError as error:
            self._log_rejection(str(error))
            raise HTTPError(401, "unauthorized") from None

    def _log_rejection(self, reason: str) -> None:
        """Log only the first few rejections: a script can send its own worker any number of requests."""
        self._rejections += 1
        if self._rejections <= self._LOGGED_REJECTIONS:
            is_last = self._rejections == self._LOGGED_REJECTIONS
            note = " (further rejections are not logged)" if is_last else ""
            self._log.warn("rejected a request: {reason}{note}", reason=reason, note=note)

    def _start(
        self,
        request: RunRequest,
        on_output: Callable[[formats.Stream, bytes], None],
        max_output: int,
        *,
        merge_output: bool = False,
    ) -> BashRun:
        """Start bash. Raises `HTTPError`."""
        settings = self._settings
        with suppress(OSError):
            os.chdir(settings.home)  # the directory may have been replaced since the worker started
        environment = script_environment(
            settings.home, settings.machine_id, settings.region, self._confinement
        )
        run = BashRun(self._reactor, on_output, max_output)
        try:
            run.start(request, environment, self._confinement, merge_output=merge_output)
        except OSError as error:
            raise self._start_error(str(error)) from None
        self._processes.add(run)
        return run

    def _start_error(self, reason: str) -> HTTPError:
        """Log why bash did not start, and return the error response."""
        reason = reason or "no message; a SANDBOX must not close inherited descriptors"
        self._log.error("bash cannot be started: {reason}", reason=reason)
        return HTTPError(500, "bash cannot be started")

    def _start_response(self, response: RunResponse) -> None:
        if not response.started:
            response.start(self._processes, {formats.WORKER: self._settings.machine_id})

    def _time_limit(self, request: RunRequest) -> float | None:
        """Return the requested timeout, at most that of the settings, in seconds; None means no limit."""
        maximum = self._settings.max_req_time
        return request.timeout if maximum is None else request.effective_timeout(maximum)

    async def _wait(self, request: RunRequest, response: RunResponse, *, merge_output: bool) -> formats.Exit:
        """
        Run the script, within the time limit, and return its exit.

        Kills all processes at the time limit, or when this is cancelled because the client has disconnected.
        """
        limit = self._time_limit(request)
        started_at = self._reactor.seconds()
        # Started before the time limit begins: a run without files has all of it for its script.
        work = Deferred.fromCoroutine(self._execute(request, response, merge_output=merge_output))
        try:
            if limit is None:
                return await work
            try:
                return await Deadline(self._reactor, limit).run(work)
            except DeadlineExceededError:
                self._processes.kill(formats.Reason.TIMEOUT)
                exit_ = await self._processes.wait_ended()
                if self._processes.script_runs:
                    return exit_
                elapsed_ms = round(1000 * (self._reactor.seconds() - started_at))
                return formats.Exit.forced(formats.Reason.TIMEOUT, elapsed_ms)
        finally:
            self._processes.kill()

    async def _execute(
        self, request: RunRequest, response: RunResponse, *, merge_output: bool
    ) -> formats.Exit:
        """
        Write the request's files, run the script, send the files that it wants back.

        Starts the response once the script has started.
        """
        if request.files:
            exit_ = await self._write_files(request)
            if exit_.reason is not None:
                return exit_
        output_left = self._settings.max_output

        def on_output(stream: formats.Stream, data: bytes) -> None:
            nonlocal output_left
            output_left -= len(data)
            response.output(stream, data)

        run = self._start(request, on_output, self._settings.max_output, merge_output=merge_output)
        self._processes.script_runs = True
        if await run.wait_started():
            self._start_response(response)
        exit_ = await run.wait_ended()
        if request.outputs and exit_.reason is None:
            self._processes.script_runs = False
            return await self._read_files(request, exit_, output_left, response)
        return exit_

    async def _write_files(self, request: RunRequest) -> formats.Exit:
        """Return the exit of the process that writes the files. Raises `HTTPError`."""
        from bfaas.worker.files import FilesNotWrittenError, write_files  # noqa: PLC0415 - few runs have any

        try:
            return await write_files(self._run_program, request.files)
        except FilesNotWrittenError as error:
            raise self._start_error(str(error)) from None

    async def _read_files(
        self, request: RunRequest, exit_: formats.Exit, max_size: int, response: RunResponse
    ) -> formats.Exit:
        """Return the script's exit with the failures; that of the reading process if it has a reason."""
        from bfaas.worker.files import read_files  # noqa: PLC0415 - few runs have any

        response.flush_output()
        last, failures = await read_files(self._run_program, request.outputs, max_size, response.file)
        return exit_.with_output_errors(failures) if last.reason is None else last

    async def _run_program(
        self, command: bytes, stdin: bytes, on_output: Callable[[formats.Stream, bytes], None]
    ) -> formats.Exit:
        """Run a command, confined as the script is, without the request's variables."""
        request = replace(RunRequest.plain(command), stdin=stdin)
        return await self._start(request, on_output, _UNLIMITED).wait_ended()

    async def stop(self) -> None:
        """Kill the run, if any, and wait until it has ended."""
        if self._processes.any:
            self._processes.kill(formats.Reason.WORKER_LOST)
            await self._processes.wait_ended()


@implementer(IPushProducer)
class _Processes:
    """
    The processes of a run, one at a time, as the producer of its response.

    Besides the script these are the programs that write its files before and read them after it.
    `script_runs` tells whether the script is the current one.
    """

    def __init__(self) -> None:
        self._current: BashRun | None = None
        self._paused = False
        self.script_runs = False

    @property
    def any(self) -> bool:
        """Whether a process was started."""
        return self._current is not None

    @property
    def startup_errors(self) -> str:
        """Those of the current process; see `BashRun`."""
        return self._current.startup_errors if self._current is not None else ""

    def add(self, run: BashRun) -> None:
        """Make a process the current one; the one before has ended."""
        self._current = run
        if self._paused:
            run.pauseProducing()

    def kill(self, reason: formats.Reason | None = None) -> None:
        """Kill the current process; see `BashRun.kill`."""
        if self._current is not None:
            self._current.kill(reason)

    async def wait_ended(self) -> formats.Exit:
        """Wait until the current process has ended."""
        assert self._current is not None  # noqa: S101 - callers know that there is one
        return await self._current.wait_ended()

    def pauseProducing(self) -> None:
        """Pause the output of this and later processes."""
        self._paused = True
        if self._current is not None:
            self._current.pauseProducing()

    def resumeProducing(self) -> None:
        """Resume the output."""
        self._paused = False
        if self._current is not None:
            self._current.resumeProducing()

    def stopProducing(self) -> None:
        """Kill the current process, whose client has disconnected."""
        self.kill()


_UNLIMITED = 1 << 62
"""Bytes of output of the programs that read and write files: they are limited by what is requested."""


def _run_id(request: Request) -> str:
    """Return the coordinator's id of the run. Other values of the header are not logged."""
    run_id = request.getHeader(formats.RUN_ID) or ""
    return run_id if re.fullmatch("[0-9a-f]{16}", run_id) else "without an id"
