"""
Ed25519 keys, and the auth tokens with which a coordinator authenticates its requests to a worker.

An auth token is a NaCl signed message (https://nacl.cr.yp.to/sign.html) in lower-case hex: a signature of 64
bytes, then the message `UNIX_SECONDS,MACHINE_ID`. The formats of tokens and keys are those of `auth/lib.go`
in https://github.com/superfly/bfaas, so that either side can be that program.
"""

from __future__ import annotations

import binascii
import hmac
import math
import re
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

CLOCK_SKEW = 5
"""Seconds that a token may be received before its time, because the clocks of two machines differ."""

_LIFETIME = 60
"""Seconds after its time during which a token is valid."""

_MAX_LENGTH = 1024
"""Characters of a token."""

_KEY_SIZE = 32
_SIGNATURE_SIZE = 64

# Each number has only one spelling.
_MESSAGE = re.compile(rb"(0|[1-9][0-9]{0,19}),(.*)", re.DOTALL)


class KeyFormatError(ValueError):
    """A key is malformed. The message is one line and never contains the key."""


class AuthError(Exception):
    """An auth token is invalid. The message is the reason, for the log only, never for the response."""


@dataclass(frozen=True)
class KeyPair:
    """A public key (32 bytes in hex) and its private key (64 bytes in hex: seed, then public key)."""

    public: str
    private: str = field(repr=False)


def genkey() -> KeyPair:
    """Generate a key pair."""
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw().hex()
    return KeyPair(public=public, private=key.private_bytes_raw().hex() + public)


class Signer:
    """
    Signs auth tokens with a private key: 64 bytes in hex, in either case.

    Raises `KeyFormatError` if the key is malformed, or if its public half does not match its seed.
    """

    def __init__(self, private: str) -> None:
        raw = _unhex(private, 2 * _KEY_SIZE)
        self._key = Ed25519PrivateKey.from_private_bytes(raw[:_KEY_SIZE])
        public = self._key.public_key().public_bytes_raw()
        if public != raw[_KEY_SIZE:]:
            raise KeyFormatError("the public half does not match the seed")
        self._public = public.hex()

    def __repr__(self) -> str:
        return f"Signer(public={self._public})"

    @property
    def public(self) -> str:
        """The public key that verifies the tokens, in hex."""
        return self._public

    def sign(self, machine_id: str, now: float) -> str:
        """Return an auth token for a machine. `now` is the time in Unix seconds."""
        message = b"%d,%b" % (math.floor(now), _encode(machine_id))
        return (self._key.sign(message) + message).hex()


class Verifier:
    """
    Verifies auth tokens with public keys: 32 bytes each, in hex of either case, separated by commas.

    A token of any of the keys is valid, so that keys can be rotated without interruption. Raises
    `KeyFormatError` if a key is malformed or there is none.
    """

    def __init__(self, public: str) -> None:
        self._keys = tuple(
            Ed25519PublicKey.from_public_bytes(_unhex(key, _KEY_SIZE)) for key in public.split(",")
        )

    def verify(self, token: str, machine_id: str, now: float) -> None:
        """Verify a token for a machine. `now` is the time in Unix seconds. Raises `AuthError`."""
        signed = _signed_bytes(token)
        signature, message = signed[:_SIGNATURE_SIZE], signed[_SIGNATURE_SIZE:]
        if not any(_is_signed(key, signature, message) for key in self._keys):
            raise AuthError("bad signature")
        match = _MESSAGE.fullmatch(message)
        if match is None:
            raise AuthError("malformed message")
        if not hmac.compare_digest(match[2], _encode(machine_id)):
            raise AuthError("for another machine")
        issued = int(match[1])
        if now < issued - CLOCK_SKEW:
            raise AuthError("too early")
        if now > issued + _LIFETIME:
            raise AuthError("too late")


def _unhex(text: str, size: int) -> bytes:
    """Decode a key of `size` bytes, which may be surrounded by whitespace."""
    try:
        raw = binascii.unhexlify(text.strip())
    except ValueError:
        raw = b""
    if len(raw) != size:
        raise KeyFormatError(f"not a key of {size} bytes in hex")
    return raw


def _signed_bytes(token: str) -> bytes:
    """Decode a token, which must be lower-case hex. Raises `AuthError`."""
    if len(token) > _MAX_LENGTH:
        raise AuthError("too long")
    try:
        signed = bytes.fromhex(token)
    except ValueError:
        raise AuthError("not hex") from None
    if signed.hex() != token:
        raise AuthError("not canonical hex")
    if len(signed) <= _SIGNATURE_SIZE:
        raise AuthError("too short")
    return signed


def _is_signed(key: Ed25519PublicKey, signature: bytes, message: bytes) -> bool:
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _encode(machine_id: str) -> bytes:
    # Names from the environment may contain surrogates, which plain UTF-8 rejects.
    return machine_id.encode(errors="surrogatepass")
