"""
JSON documents of the Machines API: machines, configs and leases. Its client decodes, its emulator encodes.

Decoding is lenient about unknown, null and missing fields, and strict about the fields that callers need.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from bfaas.machines.api import Lease, Machine, MachineConfig, State

WORKER_PORT = 8001


class DecodeError(Exception):
    """A document is not in the format of the Machines API."""


def encode_config(config: MachineConfig) -> dict[str, Any]:
    """
    Encode a machine's config.

    Only calls of the API start, stop or restart the machine; traffic and the end of its process do not. The
    service is the address at which the app's proxy reaches the machine. Compression is off, because the proxy
    holds back output that it compresses (https://fly.io/docs/reference/content-encoding).
    """
    http_options = {"compress": False, "idle_timeout": config.idle_timeout}
    return {
        "image": config.image,
        "env": dict(config.env),
        "metadata": dict(config.metadata),
        "guest": {"cpu_kind": "shared", "cpus": config.cpus, "memory_mb": config.memory_mb},
        "restart": {"policy": "no"},
        "auto_destroy": False,
        "stop_config": {"signal": "SIGKILL", "timeout": "1s"},
        "services": [
            {
                "protocol": "tcp",
                "internal_port": WORKER_PORT,
                "autostart": False,
                "autostop": "off",
                "ports": [{"port": 80, "handlers": ["http"], "http_options": http_options}],
            }
        ],
    }


def decode_config(document: object) -> MachineConfig:
    """Decode a machine's config. Only `image` is required. Raises `DecodeError`."""
    fields = _object(document)
    if not _text(fields.get("image")):
        raise DecodeError("config.image is required")
    guest = fields.get("guest") or {}
    env, metadata = fields.get("env") or {}, fields.get("metadata") or {}
    for values in (env, metadata):
        if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
            raise DecodeError("json: cannot unmarshal env or metadata: all values are strings")
    if not isinstance(guest, dict):
        raise DecodeError("json: cannot unmarshal guest")
    return MachineConfig(
        image=fields["image"],
        env=env,
        metadata=metadata,
        cpus=guest.get("cpus") or MachineConfig.cpus,
        memory_mb=guest.get("memory_mb") or MachineConfig.memory_mb,
        idle_timeout=_decode_idle_timeout(fields),
    )


def _decode_idle_timeout(config: dict[str, Any]) -> int:
    """Decode the idle timeout of the first port of the first service; the default is Fly's."""
    service, *_ = config.get("services") or [None]
    port, *_ = _object(service).get("ports") or [None]
    seconds = _object(_object(port).get("http_options")).get("idle_timeout")
    return seconds if isinstance(seconds, int) else MachineConfig.idle_timeout


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def decode_machine(document: object) -> Machine:
    """Decode a machine. Raises `DecodeError` if its id, name or state is missing."""
    fields = _object(document)
    config = _object(fields.get("config")) or _object(fields.get("incomplete_config"))
    if not (_text(fields.get("id")) and _text(fields.get("name")) and _text(fields.get("state"))):
        raise DecodeError("a machine without id, name or state")
    return Machine(
        id=fields["id"],
        name=fields["name"],
        state=State(fields["state"]),
        region=_text(fields.get("region")),
        image=_text(config.get("image")),
        metadata={key: _text(value) for key, value in _object(config.get("metadata")).items()},
        instance_id=_text(fields.get("instance_id")) or _text(fields.get("version")),
        created_at=_decode_time(fields.get("created_at")),
    )


def _decode_time(value: object) -> float:
    """Decode an RFC 3339 time to seconds since the epoch; 0 if it is invalid."""
    try:
        return datetime.fromisoformat(_text(value)).timestamp()
    except ValueError:
        return 0.0


def decode_created_machine(document: object) -> tuple[Machine, str]:
    """Decode the response to a create call: the machine, and the nonce of its lease. Raises `DecodeError`."""
    nonce = _text(_object(document).get("nonce"))
    if not nonce:
        raise DecodeError("a created machine without the nonce of its lease")
    return decode_machine(document), nonce


def decode_list(document: object) -> list[object]:
    """Decode an array of any items; null is an empty array. Raises `DecodeError`."""
    if document is None:
        return []
    if not isinstance(document, list):
        raise DecodeError("not an array")
    return document


def decode_object(document: object) -> dict[str, Any]:
    """Decode an object with any fields. Raises `DecodeError`."""
    if not isinstance(document, dict):
        raise DecodeError("not an object")
    return document


def decode_lease(document: object) -> Lease:
    """
    Decode a lease. Raises `DecodeError`.

    The API wraps it in an envelope with the fields `status` and `data`, which its published schema omits.
    """
    envelope = _object(document)
    fields = _object(envelope.get("data"))
    nonce, expires_at = fields.get("nonce"), fields.get("expires_at")
    if envelope.get("status") != "success" or not _text(nonce) or not isinstance(expires_at, int | float):
        raise DecodeError("not a lease")
    return Lease(_text(nonce), expires_at, _text(fields.get("owner")), _text(fields.get("description")))


def encode_machine(machine: Machine, config: MachineConfig | None) -> dict[str, Any]:
    """Encode a machine; without its config, in the short form of a summary."""
    created_at = _encode_time(machine.created_at)
    document: dict[str, Any] = {
        "id": machine.id,
        "name": machine.name,
        "state": machine.state,
        "region": machine.region,
        "instance_id": machine.instance_id,
        "version": machine.instance_id,
        "private_ip": "::1",
        "image_ref": {"registry": "", "repository": machine.image, "tag": "", "digest": ""},
        "created_at": created_at,
        "updated_at": created_at,
    }
    if config is not None:
        document |= {
            "config": {**encode_config(config), "metadata": dict(machine.metadata), "init": {}},
            "events": [],
            "checks": [],
            "host_status": "ok",
        }
    return document


def encode_lease(lease: Lease) -> dict[str, Any]:
    """Encode a lease in its envelope; see `decode_lease`."""
    data = {
        "nonce": lease.nonce,
        "expires_at": int(lease.expires_at),
        "owner": lease.owner or "local@tokens.fly.io",
        "description": lease.description,
    }
    return {"status": "success", "data": data}


def _encode_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
