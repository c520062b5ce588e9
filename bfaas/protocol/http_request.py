"""`POST /run` as the coordinator and the worker receive it: from an HTTP request to a `RunRequest`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bfaas.http.errors import HTTPError
from bfaas.http.media_type import body_is_json
from bfaas.http.server import read_body
from bfaas.protocol.formats import Format, requested_format
from bfaas.protocol.request import InvalidRequestError, RunRequest

if TYPE_CHECKING:
    from twisted.web.server import Request


def parse_run_request(request: Request) -> RunRequest:
    """
    Parse the body of an HTTP request by its headers.

    Raises `HTTPError`: 400 for an invalid or ambiguous request, 415 for an unsupported type or encoding.
    """
    body = read_body(request)
    is_json = body_is_json(request.requestHeaders, body)
    try:
        return RunRequest.from_json(body) if is_json else RunRequest.plain(body)
    except InvalidRequestError as error:
        raise HTTPError(400, str(error)) from None


def response_format(request: Request) -> Format:
    """Return the response format that an HTTP request selects. Repeated `Accept` headers are one list."""
    return requested_format(request.args, ",".join(request.requestHeaders.getRawHeaders("Accept", [])))
