"""docs/openapi.yaml against a real coordinator: what it says of requests and answers is so."""

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

from bfaas.protocol.formats import Exit, Format, Reason
from bfaas.protocol.request import InvalidRequestError, RunRequest
from tests.e2e.coordinator import Running, reactor, start_coordinator, stop
from tests.e2e.test_ask import LINES, ask, post
from tests.support.paths import ROOT

DOCUMENT = ROOT / "docs" / "openapi.yaml"
TOLD: dict[str, Any] = yaml.safe_load(DOCUMENT.read_text())
RUN = TOLD["paths"]["/run"]["post"]
SCHEMAS = TOLD["components"]["schemas"]

with_twisted = pytest_twisted.ensureDeferred

KINDS = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list}


def documented(status: int) -> dict[str, Any]:
    answer: dict[str, Any] = RUN["responses"][str(status)]
    return TOLD["components"]["responses"][answer["$ref"].rpartition("/")[2]] if "$ref" in answer else answer


def assert_fits(value: dict[str, Any], schema: dict[str, Any]) -> None:
    assert set(schema["required"]) <= set(value) <= set(schema["properties"]), value
    for name, item in value.items():
        told = schema["properties"][name]
        if "$ref" in told:
            told = SCHEMAS[told["$ref"].rpartition("/")[2]]
        if "properties" in told:
            assert_fits(item, told)
            continue
        assert type(item) is KINDS[told["type"]], (name, item)
        assert item in told.get("enum", [item]), (name, item)


def validate(value: object, name: str) -> None:
    """Raise `jsonschema.ValidationError` unless the value is as the document's schema of this name has it."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": TOLD["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


def test_the_document_is_valid() -> None:
    openapi_spec_validator.validate(TOLD)


@with_twisted
async def test_schemathesis_finds_no_failure(tmp_path: Path) -> None:
    # The long form: make api.
    examples = os.environ.get("BFAAS_EXAMPLES", "5")
    program = Path(sys.executable).parent / "schemathesis"
    coordinator = await start_coordinator(POOL_STANDBY="2", MAXPERCLIENT="100")
    url = f"http://127.0.0.1:{coordinator.port}"
    options = ["--checks", "all", "--max-examples", examples, "--no-color", "--generation-database", "none"]
    if examples == "5":
        options += ["--seed", "1"]
    arguments = ["run", str(DOCUMENT), "--url", url, *options]
    output, _, code = await getProcessOutputAndValue(
        str(program), arguments, env=os.environ, path=str(tmp_path), reactor=reactor
    )
    assert code == 0, output.decode()
    assert b"Tested: 5" in output
    assert await stop(coordinator) == 0


def test_the_schema_and_the_parser_reject_the_same_requests() -> None:
    for request in (
        {"script": "echo", "stdin": "", "env": {"A_1": ""}, "timeout": "1m2.5s"},
        {"script": "", "timeout": "0.5s"},
    ):
        validate(request, "Request")
        RunRequest.from_json(json.dumps(request).encode())
    for wrong in (
        {"script": "a\0b"},
        {"script": "\ufeffecho"},
        {"script": "", "env": {"1A": ""}},
        {"script": "", "env": {"A": "\0"}},
        {"script": "", "timeout": "0s"},
        {"script": "", "timeout": "5"},
        {"script": "", "timeout": "-1s"},
        {"script": "", "more": ""},
        {"stdin": ""},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validate(wrong, "Request")
        with pytest.raises(InvalidRequestError):
            RunRequest.from_json(json.dumps(wrong).encode())


def test_exactly_the_keys_of_a_request_are_described() -> None:
    examples: dict[str, Any] = {"script": ":", "stdin": "x", "env": {"A": "b"}, "timeout": "1s"}
    assert_fits(examples, SCHEMAS["Request"])
    assert examples.keys() == SCHEMAS["Request"]["properties"].keys()
    RunRequest.from_json(json.dumps(examples).encode())
    for name in examples:
        wrong = {"script": ":", name: 1}
        try:
            RunRequest.from_json(json.dumps(wrong).encode())
        except InvalidRequestError:
            continue
        raise AssertionError(f"{name} takes a number")


def test_exactly_the_fields_and_reasons_of_an_exit_are_described() -> None:
    full = Exit(3, "SIGKILL", "timeout", 1, 2, 3, truncated=True, dropped_bytes=1)
    told = json.loads(full.to_json())
    assert_fits(told, SCHEMAS["Exit"])
    assert told.keys() == SCHEMAS["Exit"]["properties"].keys()
    assert set(SCHEMAS["Exit"]["properties"]["reason"]["enum"]) == {str(reason) for reason in Reason}
    assert RUN["responses"]["200"]["content"].keys() == {format_.media_type for format_ in Format}


@with_twisted
async def test_responses_match_the_schema(coordinator: Running) -> None:
    *lines, end = await ask(coordinator, script="echo out; echo err >&2")
    for line in lines:
        assert_fits(line, SCHEMAS["Line"])
    assert end.pop("event") == "exit"
    assert_fits(end, SCHEMAS["Exit"])

    raw = await coordinator.run("echo out", "?raw=1")
    events = await coordinator.run("echo out")
    for answer in (raw, events):
        assert answer.headers["content-type"].partition(";")[0] in documented(200)["content"]
        assert {name.lower() for name in documented(200)["headers"]} <= answer.headers.keys()
    for name, told in events.events:
        validate({"event": name, "data": json.dumps(told)}, "Event")
    validate(events.exit, "Exit")
    assert events.exit.keys() <= SCHEMAS["Exit"]["properties"].keys()


@with_twisted
async def test_status_and_metrics_match_the_schema(coordinator: Running) -> None:
    await coordinator.run("exit 3")
    await coordinator.get("/healthz")
    status = json.loads((await coordinator.get("/status")).body)
    assert_fits(status, SCHEMAS["Status"])
    for run in status["runs"]["recent"]:
        assert_fits(run, SCHEMAS["Run"])
    for path, told in TOLD["paths"].items():
        if "get" in told:
            answer = await coordinator.get(path)
            assert str(answer.status) in told["get"]["responses"]


@with_twisted
async def test_rejections_match_the_schema() -> None:
    strict = await start_coordinator(MAXBODY="100", MAXPERCLIENT="1", MAXWAIT="10ms", POOLSIZE="1")
    seen = set()
    for body, headers in [
        (b"{", {"Content_Type": "application/json"}),
        (b":", {"Content_Encoding": "gzip"}),
        (b":", {"Expect": "a-miracle"}),
        (b":", {"Origin": "http://elsewhere.example"}),
        (b"x" * 101, {}),
        (b":", {}),  # no machine starts in ten milliseconds
    ]:
        status, kind, text = await post(strict, body, **headers, **LINES)
        assert kind.partition(";")[0] in documented(status)["content"], text
        assert text.count("\n") == 1
        seen.add(status)
    assert seen == {400, 403, 413, 415, 417, 503}
    refused = await strict.run(":")
    assert refused.status == 503
    for name in documented(503)["headers"]:
        assert int(refused.headers[name.lower()]) >= 1
    assert await stop(strict) == 0
