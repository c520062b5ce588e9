"""
How the Machines API writes machines, configs and leases: read by its client, written by its stand-in.

Reading is lenient where fields are unknown, null or missing, and strict where we rely on them.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from bfaas.machines.api import Lease, Machine, MachineConfig, State

WORKER_PORT = 8001


class DecodeError(Exception):
    """Something is not as the API writes it."""


def encode_config(config: MachineConfig) -> dict[str, Any]:
    """
    Write a machine's config.

    It is never started, stopped or restarted but by us: not by traffic, not at its end. The service is
    what the app's proxy reaches it by; the proxy would hold back what it compresses
    (https://fly.io/docs/reference/content-encoding).
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


def decode_config(told: object) -> MachineConfig:
    """Read what a machine is to be made from; only its image is needed."""
    if not isinstance(told, dict) or not isinstance(told.get("image"), str) or not told["image"]:
        raise DecodeError("config.image is required")
    guest = told.get("guest") or {}
    env, metadata = told.get("env") or {}, told.get("metadata") or {}
    for values in (env, metadata):
        if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
            raise DecodeError("json: cannot unmarshal env or metadata: all values are strings")
    if not isinstance(guest, dict):
        raise DecodeError("json: cannot unmarshal guest")
    cpus, memory_mb = guest.get("cpus") or 1, guest.get("memory_mb") or 256
    return MachineConfig(told["image"], env, metadata, cpus, memory_mb, _idle_timeout(told))


def _idle_timeout(config: dict[str, Any]) -> int:
    """Read the idle timeout of the first port of the first service; Fly's default where there is none."""
    service, *_ = config.get("services") or [None]
    port, *_ = _object(service).get("ports") or [None]
    seconds = _object(_object(port).get("http_options")).get("idle_timeout")
    return seconds if isinstance(seconds, int) else MachineConfig.idle_timeout


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def decode_machine(told: object) -> Machine:
    """Read a machine. Raises `DecodeError` where id, name or state is missing."""
    fields = _object(told)
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
        created_at=_read_moment(fields.get("created_at")),
    )


def _read_moment(told: object) -> float:
    """Read an RFC 3339 time as seconds since the epoch; 0 where it is none."""
    try:
        return datetime.fromisoformat(_text(told)).timestamp()
    except ValueError:
        return 0.0


def decode_created_machine(told: object) -> tuple[Machine, str]:
    """Read the answer to a creation: the machine, and the nonce of its lease."""
    nonce = _text(_object(told).get("nonce"))
    if not nonce:
        raise DecodeError("a machine was created, but its nonce is not told")
    return decode_machine(told), nonce


def decode_list(told: object) -> list[object]:
    """Read an array, of which anything may be an item; null is an empty one."""
    if told is None:
        return []
    if not isinstance(told, list):
        raise DecodeError("not an array")
    return told


def decode_object(told: object) -> dict[str, Any]:
    """Read an object, of which nothing is known."""
    if not isinstance(told, dict):
        raise DecodeError("not an object")
    return told


def decode_lease(told: object) -> Lease:
    """Read a lease, which is wrapped in `data` (the published schema shows it without)."""
    envelope = _object(told)
    fields = _object(envelope.get("data"))
    nonce, expires_at = fields.get("nonce"), fields.get("expires_at")
    if envelope.get("status") != "success" or not _text(nonce) or not isinstance(expires_at, int | float):
        raise DecodeError("an answer that is no lease")
    return Lease(_text(nonce), expires_at, _text(fields.get("owner")), _text(fields.get("description")))


def encode_machine(machine: Machine, config: MachineConfig | None) -> dict[str, Any]:
    """Write a machine; without its config, in the short form of a summary."""
    created = _moment(machine.created_at)
    told: dict[str, Any] = {
        "id": machine.id,
        "name": machine.name,
        "state": machine.state,
        "region": machine.region,
        "instance_id": machine.instance_id,
        "version": machine.instance_id,
        "private_ip": "::1",
        "image_ref": {"registry": "", "repository": machine.image, "tag": "", "digest": ""},
        "created_at": created,
        "updated_at": created,
    }
    if config is not None:
        echo = {**encode_config(config), "metadata": dict(machine.metadata), "init": {}}
        told |= {"config": echo, "events": [], "checks": [], "host_status": "ok"}
    return told


def encode_lease(lease: Lease) -> dict[str, Any]:
    """Write a lease, wrapped as it is on the wire."""
    data = {
        "nonce": lease.nonce,
        "expires_at": int(lease.expires_at),
        "owner": lease.owner or "local@tokens.fly.io",
        "description": lease.description,
    }
    return {"status": "success", "data": data}


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
