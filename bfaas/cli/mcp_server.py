"""
`bfaas mcp`: a server of the Model Context Protocol over standard input and output.

It gives AI agents a shell in a coordinator's sandbox, with the SDK of the protocol's authors
(https://modelcontextprotocol.io). Cancelling a call, or closing standard input, kills the script.
"""

from __future__ import annotations

import base64
import mimetypes
import signal
import sys
from typing import Annotated, Any
from urllib.parse import quote

import anyio
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import (
    BlobResourceContents,
    CallToolResult,
    ContentBlock,
    EmbeddedResource,
    ImageContent,
    TextContent,
    TextResourceContents,
    ToolAnnotations,
)
from pydantic import BaseModel, Field

from bfaas import __version__
from bfaas.client import (
    AsyncClient,
    BfaasError,
    BusyError,
    Exit,
    File,
    Output,
    OutputFile,
    RunOptions,
    Stream,
)
from bfaas.system.stdio import end_by_signal

_MAX_BINARY = 3 * 1024 * 1024
"""Bytes of a binary file that a call returns: in base64 below the common limit of 5 MB for images."""

_IMAGES = frozenset({"image/gif", "image/jpeg", "image/png", "image/webp"})

_PROGRESS_INTERVAL = 0.1
_SILENCE = 5.0
"""
Seconds without output after which progress is reported nevertheless: it can extend a client's time limit.
"""

_MAX_MESSAGE = 2000

_INSTRUCTIONS = """\
run_bash runs a bash script on a disposable Linux machine. Every call starts on a clean machine: nothing of an
earlier call is left. Pass what a script needs as files, and name the files to return in outputs. There is
usually no network. sandbox_status has the limits and the state of the sandbox.
"""


class Base64File(BaseModel):
    """A file with any content."""

    base64: str
    mode: Annotated[str, Field(pattern="^0[0-7]{3}$", description="permission bits, in octal")] = "0644"


class ReturnedFile(BaseModel):
    """A file that a script has made. Its content is a block of its own in the call's result."""

    name: str
    size: Annotated[int, Field(description="bytes")]
    mode: Annotated[str, Field(description="permission bits, in octal")]
    complete: Annotated[bool, Field(description="whether all of it is in the result")]


class MissingFile(BaseModel):
    """A file or a pattern in `outputs` that could not be returned."""

    name: str
    error: str


class RunResult(BaseModel):
    """The result of a run."""

    exit_code: Annotated[int, Field(description="of bash; 128+n after signal n; 124 after a timeout")]
    reason: Annotated[
        str | None, Field(description="why the run was ended: timeout, worker-lost, output-limit")
    ] = None
    signal: str | None = None
    stdout: str
    stderr: str
    truncated: Annotated[bool, Field(description="whether a part of the output is missing")]
    stdout_omitted: Annotated[int, Field(description="characters that are left out in the middle")]
    stderr_omitted: Annotated[int, Field(description="characters that are left out in the middle")]
    dropped_bytes: Annotated[int, Field(description="output beyond the sandbox's limit")]
    files: list[ReturnedFile]
    missing_files: list[MissingFile]
    missing_files_dropped: Annotated[int, Field(description="missing files that are not listed")]
    wall_ms: int | None = None
    cpu_ms: int | None = None
    max_rss_kb: int | None = None
    oom: Annotated[bool, Field(description="whether the exit code is 137 because memory ran out")] = False
    run_id: Annotated[str, Field(description="names the run in the coordinator's log")]


class SandboxStatus(BaseModel):
    """The limits and the state of the sandbox."""

    sandbox: Annotated[str, Field(description="what separates scripts from the host")]
    version: str
    max_run_seconds: float
    max_request_bytes: Annotated[int | None, Field(description="script, input and files together")]
    max_output_bytes: Annotated[int | None, Field(description="output and returned files together")]
    max_returned_characters: Annotated[int, Field(description="of each stream and text file, in a result")]
    machines: Annotated[dict[str, int], Field(description="the number of machines in each phase")]
    max_machines: int
    waiting_requests: int
    max_waiting_requests: int
    expected_wait_seconds: float
    shutting_down: bool


class _Excerpt:
    """Text with at most `limit` characters: its beginning and its end."""

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._head = ""
        self._tail = ""
        self.omitted = 0

    def add(self, text: str) -> None:
        room = self._half - len(self._head)
        self._head += text[:room]
        tail = self._tail + text[room:]
        cut = max(0, len(tail) - self._half)
        self.omitted += cut
        self._tail = tail[cut:]

    def __str__(self) -> str:
        gap = f"\n[{self.omitted} characters omitted]\n" if self.omitted else ""
        return self._head + gap + self._tail


class _Progress:
    """Reports output and the time since the call, which are few messages however much output there is."""

    def __init__(self, context: Context[Any, Any]) -> None:
        self._context = context
        self._started_at = anyio.current_time()
        self._text = ""
        self._changed = anyio.Event()
        self.state = "waiting for a machine"

    def add(self, text: str) -> None:
        self._text = (self._text + text)[-_MAX_MESSAGE:]
        self._changed.set()

    async def report(self) -> None:
        while True:
            with anyio.move_on_after(_SILENCE):
                await self._changed.wait()
            self._changed = anyio.Event()
            text, self._text = self._text, ""
            elapsed = anyio.current_time() - self._started_at
            await self._context.report_progress(elapsed, message=text or self.state)
            await anyio.sleep(_PROGRESS_INTERVAL)


class _Run:
    """One run of a call, and what it returns."""

    def __init__(self, max_output: int) -> None:
        self._max_output = max_output
        self._output = {stream: _Excerpt(max_output) for stream in Stream}
        self._files: list[ReturnedFile] = []
        self._contents: list[ContentBlock] = []

    async def run(
        self, client: AsyncClient, script: str, options: RunOptions, progress: _Progress
    ) -> CallToolResult:
        """Run a script, and return the call's result. Raises `BfaasError`, and `ValueError` for arguments."""
        async with client.stream(script, **options) as run:
            progress.state = "running"
            async for event in run:
                match event:
                    case Output(stream, text):
                        self._output[stream].add(text)
                        progress.add(text)
                    case OutputFile():
                        self._add_file(event, run.id)
                    case Exit():
                        exit_ = event
        return self._result(exit_, run.id)

    def _add_file(self, file: OutputFile, run_id: str) -> None:
        content, is_complete = self._content(file, f"bfaas://{run_id}/{quote(file.name)}")
        if content is not None:
            self._contents.append(content)
        self._files.append(
            ReturnedFile(name=file.name, size=len(file.data), mode=f"{file.mode:04o}", complete=is_complete)
        )

    def _content(self, file: OutputFile, uri: str) -> tuple[ContentBlock | None, bool]:
        """Return a file as a block of content, and whether all of it is in that."""
        media_type = mimetypes.guess_type(file.name)[0]
        if media_type not in _IMAGES:
            try:
                text = file.data.decode()
            except UnicodeDecodeError:
                pass
            else:
                excerpt = _Excerpt(self._max_output)
                excerpt.add(text)
                resource = TextResourceContents(
                    uri=uri, mime_type=media_type or "text/plain", text=str(excerpt)
                )
                return EmbeddedResource(type="resource", resource=resource), not excerpt.omitted
        if len(file.data) > _MAX_BINARY:
            return None, False
        data = base64.b64encode(file.data).decode()
        if media_type in _IMAGES:
            return ImageContent(type="image", data=data, mime_type=media_type), True
        blob = BlobResourceContents(uri=uri, mime_type=media_type or "application/octet-stream", blob=data)
        return EmbeddedResource(type="resource", resource=blob), True

    def _result(self, exit_: Exit, run_id: str) -> CallToolResult:
        stdout, stderr = self._output[Stream.STDOUT], self._output[Stream.STDERR]
        result = RunResult(
            exit_code=exit_.code,
            reason=exit_.reason,
            signal=exit_.signal,
            stdout=str(stdout),
            stderr=str(stderr),
            truncated=exit_.truncated or bool(stdout.omitted or stderr.omitted),
            stdout_omitted=stdout.omitted,
            stderr_omitted=stderr.omitted,
            dropped_bytes=exit_.dropped_bytes,
            files=self._files,
            missing_files=[MissingFile(name=each.name, error=each.error) for each in exit_.output_errors],
            missing_files_dropped=exit_.output_errors_dropped,
            wall_ms=exit_.wall_ms,
            cpu_ms=exit_.cpu_ms,
            max_rss_kb=exit_.max_rss_kb,
            oom=exit_.oom,
            run_id=run_id,
        )
        text = TextContent(type="text", text=_describe(result))
        return CallToolResult(
            content=[text, *self._contents], structured_content=result.model_dump(mode="json")
        )


def _describe(result: RunResult) -> str:
    """Return a result as text, for models that do not see the structured content."""
    parts = [result.stdout.rstrip("\n"), result.stderr and f"[stderr]\n{result.stderr}".rstrip("\n")]
    parts.append(" ".join(filter(None, [f"[exit {result.exit_code}", result.signal, result.reason])) + "]")
    if result.oom:
        parts.append("[out of memory]")
    if result.dropped_bytes:
        parts.append(f"[{result.dropped_bytes} bytes of output were dropped]")
    parts += [
        f"[file {file.name}: {file.size} bytes{'' if file.complete else ', not returned completely'}]"
        for file in result.files
    ]
    parts += [f"[file {missing.name}: {missing.error}]" for missing in result.missing_files]
    return "\n".join(filter(None, parts))


class BashTools:
    """The tools, for one coordinator. `max_output` is in characters."""

    def __init__(self, client: AsyncClient, max_output: int) -> None:
        self._client = client
        self._max_output = max_output

    async def run_bash(
        self,
        context: Context[Any, Any],
        script: Annotated[str, Field(description="the script for bash")],
        # Not optional: the SDK decodes text of optional strings that looks like JSON.
        stdin: Annotated[str, Field(description="standard input")] = "",
        env: Annotated[dict[str, str] | None, Field(description="environment variables")] = None,
        timeout_seconds: Annotated[
            float | None, Field(gt=0, description="a time limit below that of the sandbox")
        ] = None,
        files: Annotated[
            dict[str, str | Base64File] | None,
            Field(description="files in the working directory, by their relative paths: text, or base64"),
        ] = None,
        outputs: Annotated[
            list[str] | None,
            Field(description="patterns of files to return after the run, such as plot.png or out/*.csv"),
        ] = None,
    ) -> Annotated[CallToolResult, RunResult]:
        """
        Run a bash script on a disposable machine, and return its output, exit code and files.

        The machine is clean at the start of each call. Output is streamed as progress. Of long output the
        beginning and the end are returned: write it to a file, and select what you need.
        """
        options: RunOptions = {"stdin": stdin or None, "timeout": timeout_seconds}
        progress = _Progress(context)
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(progress.report)
            try:
                if env:
                    options["env"] = env
                if files:
                    options["files"] = {name: _file(content) for name, content in files.items()}
                if outputs:
                    options["outputs"] = outputs
                result = await _Run(self._max_output).run(self._client, script, options, progress)
            except (BfaasError, ValueError) as error:
                failure = error
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise ToolError(_explain(failure)) from failure
        return result

    async def sandbox_status(self) -> SandboxStatus:
        """Return the limits of the sandbox, and whether machines are free."""
        try:
            status = await self._client.status()
        except BfaasError as error:
            raise ToolError(_explain(error)) from error
        pool, queue = status["pool"], status["queue"]
        return SandboxStatus(
            sandbox=status["sandbox"],
            version=status["version"],
            max_run_seconds=status["max_req_time_ms"] / 1000,
            max_request_bytes=status.get("max_body_bytes"),
            max_output_bytes=status.get("max_output_bytes"),
            max_returned_characters=self._max_output,
            machines=pool["machines"],
            max_machines=pool["size"],
            waiting_requests=queue["waiting"],
            max_waiting_requests=queue["limit"],
            expected_wait_seconds=queue["expected_wait_ms"] / 1000,
            shutting_down=status["draining"],
        )


def _file(content: str | Base64File) -> str | File:
    if isinstance(content, str):
        return content
    return File(base64.b64decode(content.base64, validate=True), int(content.mode, 8))


def _explain(error: Exception) -> str:
    """Return an error's message, and what is known about the script."""
    if isinstance(error, BusyError):
        return f"{error} (the script was not started; try again in {error.retry_after} s)"
    if not isinstance(error, BfaasError):
        return str(error)
    return f"{error} ({'the script may have run' if error.may_have_run else 'the script was not started'})"


def make_server(client: AsyncClient, max_output: int) -> MCPServer[None]:
    """Return a server with the tools for a coordinator."""
    server: MCPServer[None] = MCPServer(
        "bfaas", instructions=_INSTRUCTIONS, version=__version__, log_level="WARNING", subscriptions=False
    )
    tools = BashTools(client, max_output)
    sandboxed = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=False)
    server.add_tool(tools.run_bash, title="Run a bash script", annotations=sandboxed)
    server.add_tool(
        tools.sandbox_status,
        title="Limits and state of the sandbox",
        annotations=ToolAnnotations(read_only_hint=True, open_world_hint=False),
    )
    return server


def serve(client: AsyncClient, max_output: int) -> int:
    """Serve until standard input ends, and return the exit code."""

    async def serve_and_close() -> None:
        async with client:
            await make_server(client, max_output).run_stdio_async()

    try:
        anyio.run(serve_and_close)
    except* BrokenPipeError:
        sys.stdout = None  # its flush at exit would fail again
        end_by_signal(signal.SIGPIPE)
    return 0
