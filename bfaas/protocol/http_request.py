"""`POST /run` as the coordinator and the worker receive it: from an HTTP request to a `RunRequest`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bfaas.http.errors import HTTPError
from bfaas.http.media_type import body_type
from bfaas.http.server import read_body
from bfaas.protocol.formats import Format, requested_format
from bfaas.protocol.request import InvalidRequestError, RunRequest

if TYPE_CHECKING:
    from twisted.web.server import Request


def parse_run_request(request: Request, *, max_unpacked: int | None = None) -> RunRequest:
    """
    Parse the body of an HTTP request by its headers.

    `max_unpacked` limits what a compressed archive in a form contains, in bytes. If it is None, as for
    workers, forms are rejected.

    Raises `HTTPError`: 400 for an invalid or ambiguous request, 415 for an unsupported type or encoding.
    """
    body = read_body(request)
    type_ = body_type(request.requestHeaders, body, multipart=max_unpacked is not None)
    try:
        if type_.boundary is not None and max_unpacked is not None:
            # Not at module level: workers parse no forms.
            from bfaas.protocol.form import parse_form  # noqa: PLC0415

            run_request = parse_form(body, type_.boundary, max_unpacked)
        else:
            run_request = RunRequest.from_json(body) if type_.is_json else RunRequest.plain(body)
    except InvalidRequestError as error:
        raise HTTPError(400, str(error)) from None
    if run_request.outputs and response_format(request) is Format.RAW:
        raise HTTPError(400, "a raw response cannot contain outputs: request events or NDJSON")
    return run_request


def response_format(request: Request) -> Format:
    """Return the response format that an HTTP request selects. Repeated `Accept` headers are one list."""
    return requested_format(request.args, ",".join(request.requestHeaders.getRawHeaders("Accept", [])))
