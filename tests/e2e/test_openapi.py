"""Compare docs/openapi.yaml with the requests and responses of a real coordinator."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import jsonschema
import openapi_spec_validator
import pytest
import pytest_twisted
import yaml
from twisted.internet.utils import getProcessOutputAndValue

from bfaas.protocol.formats import Exit, Format, OutputFailure, OutputProblem, Reason
from bfaas.protocol.request import InvalidRequestError, RunRequest
from tests.e2e.coordinator import Running, reactor, start_coordinator, stop
from tests.e2e.test_run_requests import ACCEPT_NDJSON, post, run_json
from tests.support.paths import ROOT

DOCUMENT_PATH = ROOT / "docs" / "openapi.yaml"
DOCUMENT: dict[str, Any] = yaml.safe_load(DOCUMENT_PATH.read_text())
RUN = DOCUMENT["paths"]["/run"]["post"]
SCHEMAS = DOCUMENT["components"]["schemas"]

with_twisted = pytest_twisted.ensureDeferred

INVALID_PATHS = ["", ".", "..", "/a", "a/", "a//b", "./a", "../a", "a/..", "a/./b", "a\nb", "a\0", "a\x7f"]

JSON_TYPES = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list}


def documented_response(status: int) -> dict[str, Any]:
    """Return the description of a status of `POST /run`, with its reference resolved."""
    response: dict[str, Any] = RUN["responses"][str(status)]
    if "$ref" not in response:
        return response
    resolved: dict[str, Any] = DOCUMENT["components"]["responses"][response["$ref"].rpartition("/")[2]]
    return resolved


def assert_matches(value: dict[str, Any], schema: dict[str, Any]) -> None:
    """Check the keys, types and enumerated values of an object; undocumented keys fail."""
    assert set(schema["required"]) <= set(value) <= set(schema["properties"]), value
    for name, item in value.items():
        described = schema["properties"][name]
        if "$ref" in described:
            described = SCHEMAS[described["$ref"].rpartition("/")[2]]
        if "properties" in described and isinstance(item, dict):
            assert_matches(item, described)
            continue
        assert type(item) is JSON_TYPES[described["type"]], (name, item)
        assert item in described.get("enum", [item]), (name, item)


def validate(value: object, name: str) -> None:
    """Raise `jsonschema.ValidationError` unless the value matches the named schema of the document."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


def test_the_document_is_valid() -> None:
    openapi_spec_validator.validate(DOCUMENT)


# Random bytes are no archives. And what is no string in a schema is one in a form.
HOOKS = """
import schemathesis
from hypothesis import strategies as st

schemathesis.openapi.format("tar", st.just("\\0" * 1024))

@schemathesis.hook
def filter_case(context, case):
    return case.media_type != "multipart/form-data" or case.meta.generation.mode.value == "positive"
"""


@with_twisted
async def test_schemathesis_finds_no_failure(tmp_path: Path) -> None:
    # `make api` sets more examples.
    examples = os.environ.get("BFAAS_EXAMPLES", "5")
    program = Path(sys.executable).parent / "schemathesis"
    coordinator = await start_coordinator(POOL_STANDBY="2", MAXPERCLIENT="100")
    url = f"http://127.0.0.1:{coordinator.port}"
    options = ["--checks", "all", "--max-examples", examples, "--no-color", "--generation-database", "none"]
    if examples == "5":
        options += ["--seed", "1"]
    arguments = ["run", str(DOCUMENT_PATH), "--url", url, *options]
    (tmp_path / "hooks.py").write_text(HOOKS)
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)}
    output, _, code = await getProcessOutputAndValue(
        str(program), arguments, env=environment, path=str(tmp_path), reactor=reactor
    )
    assert code == 0, output.decode()
    assert b"Tested: 5" in output
    assert await stop(coordinator) == 0


def test_the_schema_and_the_parser_reject_the_same_requests() -> None:
    requests: list[dict[str, Any]] = [
        {"script": "echo", "stdin": "", "env": {"A_1": ""}, "timeout": "1m2.5s"},
        {"script": "", "timeout": "0.5s"},
        {"script": "", "files": {"a": "", "d/.b": {"base64": "AA==", "mode": "0755"}, "...": "", "-": ""}},
        {"script": "", "stdin_base64": "AAAA", "outputs": ["**/*.[ch]", "a?"]},
    ]
    for request in requests:
        validate(request, "Request")
        RunRequest.from_json(json.dumps(request).encode())
    rejected: list[dict[str, Any]] = [
        {"script": "a\0b"},
        {"script": "\ufeffecho"},
        {"script": "", "env": {"1A": ""}},
        {"script": "", "env": {"A": "\0"}},
        {"script": "", "timeout": "0s"},
        {"script": "", "timeout": "5"},
        {"script": "", "timeout": "-1s"},
        {"script": "", "unknown": ""},
        {"stdin": ""},
        {"script": "", "stdin": "", "stdin_base64": ""},
        {"script": "", "stdin_base64": "A"},
        {"script": "", "files": {"a": {"base64": "A==="}}},
        {"script": "", "files": {"a": {}}},
        {"script": "", "files": {"a": {"base64": "", "mode": "755"}}},
        *({"script": "", "files": {path: ""}} for path in INVALID_PATHS),
        *({"script": "", "outputs": [path]} for path in [*INVALID_PATHS, "a\\b"]),
        {"script": "", "outputs": ["a"] * 21},
    ]
    for invalid in rejected:
        with pytest.raises(jsonschema.ValidationError):
            validate(invalid, "Request")
        with pytest.raises(InvalidRequestError):
            RunRequest.from_json(json.dumps(invalid).encode())


def test_exactly_the_keys_of_a_request_are_described() -> None:
    examples: dict[str, Any] = {
        "script": ":",
        "stdin": "x",
        "env": {"A": "b"},
        "timeout": "1s",
        "files": {"a": "x"},
        "outputs": ["a"],
        "stdin_base64": "AA==",
    }
    assert_matches(examples, SCHEMAS["Request"])
    assert examples.keys() == SCHEMAS["Request"]["properties"].keys()
    for name in ("stdin", "stdin_base64"):
        request = {key: value for key, value in examples.items() if key != name}
        RunRequest.from_json(json.dumps(request).encode())
    for name in examples:
        invalid = {"script": ":", name: 1}
        try:
            RunRequest.from_json(json.dumps(invalid).encode())
        except InvalidRequestError:
            continue
        raise AssertionError(f"{name} accepts a number")


def test_exactly_the_fields_and_reasons_of_an_exit_are_described() -> None:
    failures = [OutputFailure.of("a", problem) for problem in OutputProblem] * 2
    full = Exit(
        3, "SIGKILL", "timeout", 1, 2, 3, oom=True, truncated=True, dropped_bytes=1
    ).with_output_errors(failures)
    fields = json.loads(full.to_json())
    assert_matches(fields, SCHEMAS["Exit"])
    validate(fields, "Exit")
    assert {str(problem) for problem in OutputProblem} == set(
        SCHEMAS["OutputError"]["properties"]["error"]["enum"]
    )
    assert fields.keys() == SCHEMAS["Exit"]["properties"].keys()
    assert set(SCHEMAS["Exit"]["properties"]["reason"]["enum"]) == {str(reason) for reason in Reason}
    assert RUN["responses"]["200"]["content"].keys() == {format_.media_type for format_ in Format}


@with_twisted
async def test_responses_match_the_schema(coordinator: Running) -> None:
    script = "echo out; echo err >&2; echo 1 > a"
    *events, end = await run_json(coordinator, script=script, outputs=["a", "b"])
    assert "file" in [event["event"] for event in events]
    for event in events:
        assert_matches(event, SCHEMAS["Line"])
    assert end.pop("event") == "exit"
    assert_matches(end, SCHEMAS["Exit"])

    raw = await coordinator.run("echo out", "?raw=1")
    streamed = await coordinator.run("echo out")
    for response in (raw, streamed):
        assert response.headers["content-type"].partition(";")[0] in documented_response(200)["content"]
        assert {name.lower() for name in documented_response(200)["headers"]} <= response.headers.keys()
    for name, value in streamed.events:
        validate({"event": name, "data": json.dumps(value)}, "Event")
    validate(streamed.exit, "Exit")
    assert streamed.exit.keys() <= SCHEMAS["Exit"]["properties"].keys()


@with_twisted
async def test_status_and_metrics_match_the_schema(coordinator: Running) -> None:
    await coordinator.run("exit 3")
    await coordinator.get("/healthz")
    status = json.loads((await coordinator.get("/status")).body)
    assert_matches(status, SCHEMAS["Status"])
    for run in status["runs"]["recent"]:
        assert_matches(run, SCHEMAS["Run"])
    for path, methods in DOCUMENT["paths"].items():
        if "get" in methods:
            response = await coordinator.get(path)
            assert str(response.status) in methods["get"]["responses"]


@with_twisted
async def test_rejections_match_the_schema() -> None:
    coordinator = await start_coordinator(MAXBODY="100", MAXPERCLIENT="1", MAXWAIT="10ms", POOLSIZE="1")
    seen = set()
    for body, headers in [
        (b"{", {"Content_Type": "application/json"}),
        (b":", {"Content_Encoding": "gzip"}),
        (b":", {"Expect": "unsupported"}),
        (b":", {"Origin": "http://other.example"}),
        (b"x" * 101, {}),
        (b":", {}),  # no machine starts within MAXWAIT
    ]:
        status, content_type, text = await post(coordinator, body, **headers, **ACCEPT_NDJSON)
        assert content_type.partition(";")[0] in documented_response(status)["content"], text
        assert text.count("\n") == 1
        seen.add(status)
    assert seen == {400, 403, 413, 415, 417, 503}
    rejected = await coordinator.run(":")
    assert rejected.status == 503
    for name in documented_response(503)["headers"]:
        assert int(rejected.headers[name.lower()]) >= 1
    assert await stop(coordinator) == 0
