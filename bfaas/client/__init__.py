r"""
A client for Python programs: run scripts at a coordinator, from ordinary or asyncio code.

`Client` blocks, `AsyncClient` is for asyncio; both have the same methods. They need httpx, which the extra
`bfaas[client]` installs.

>>> from bfaas.client import Client, Exit, Output
>>> with Client() as client:
...     result = client.run("tr a-z A-Z; exit $CODE", stdin="hello\n", env={"CODE": "3"})
>>> result.stdout, result.stderr, result.exit.code
('HELLO\n', '', 3)

`files` are written before the script starts; `outputs` are patterns of files to return:

>>> with Client() as client:
...     result = client.run("sort in.txt > out.txt", files={"in.txt": "b\na\n"}, outputs=["*.txt"])
>>> result.files["out.txt"].data
b'a\nb\n'

`stream` returns the output while the script runs. The script is killed if the block ends before it does:

>>> with Client() as client, client.stream("echo out; sleep 60") as run:
...     for event in run:
...         match event:
...             case Output(stream, text):
...                 print(stream, repr(text))
...                 break
...             case Exit(code):
...                 print("exit", code)
stdout 'out\n'

A script is sent at most once, unless the coordinator has answered that it was not started (see
`Client.max_wait`). `BfaasError.may_have_run` tells whether a failed request may have run its script.
"""

from __future__ import annotations

try:
    import httpx as _httpx  # noqa: F401 - checked here, for an error that names the extra
except ModuleNotFoundError as _error:  # pragma: no cover - tests have httpx
    raise ImportError("bfaas.client requires httpx: pip install 'bfaas[client]'") from _error

from bfaas.client.asynchronous import AsyncClient, AsyncRun
from bfaas.client.blocking import Client, Run
from bfaas.client.errors import (
    BfaasError,
    BusyError,
    CancelledRunError,
    NoResponseError,
    RejectedError,
    ResponseLostError,
    ScriptFailedError,
)
from bfaas.client.events import Event, Output, OutputFile, Result
from bfaas.client.exchange import RunOptions
from bfaas.protocol.files import File
from bfaas.protocol.formats import Exit, OutputFailure, Stream

__all__ = [
    "AsyncClient",
    "AsyncRun",
    "BfaasError",
    "BusyError",
    "CancelledRunError",
    "Client",
    "Event",
    "Exit",
    "File",
    "NoResponseError",
    "Output",
    "OutputFailure",
    "OutputFile",
    "RejectedError",
    "ResponseLostError",
    "Result",
    "Run",
    "RunOptions",
    "ScriptFailedError",
    "Stream",
]
