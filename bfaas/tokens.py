"""
Ed25519 keys, and the one header by which a worker knows its coordinator.

A header is lower-case hex of a NaCl signed message (https://nacl.cr.yp.to/sign.html): a 64-byte
signature, then the message `UNIX_SECONDS,MACHINE_ID`. Both it and the keys are those of `auth/lib.go`
in https://github.com/superfly/bfaas, so either side may be that program.
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
"""Seconds that a header may come before its time: two machines' clocks differ."""

_LIFETIME = 60  # seconds after its time that a header is good for
_MAX_HEADER = 1024  # characters

_KEY_SIZE = 32
_SIGNATURE_SIZE = 64

# One spelling for each number, so that a message has one meaning.
_MESSAGE = re.compile(rb"(0|[1-9][0-9]{0,19}),(.*)", re.DOTALL)


class KeyFormatError(ValueError):
    """A key is malformed. The message is one line and never holds the key."""


class AuthError(Exception):
    """A header is refused. The message is the reason: it is for the log, never for the answer."""


@dataclass(frozen=True)
class KeyPair:
    """A public key (32 bytes in hex) and its private key (64 bytes in hex: seed, then public key)."""

    public: str
    private: str = field(repr=False)


def genkey() -> KeyPair:
    """Make a new pair."""
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw().hex()
    return KeyPair(public=public, private=key.private_bytes_raw().hex() + public)


class Signer:
    """
    Signs headers with a private key, 64 bytes in hex of either case.

    Raises `KeyFormatError` for anything else, and where the public half is not that of the seed.
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
        """The public key that headers are checked with, in hex."""
        return self._public

    def sign(self, machine_id: str, now: float) -> str:
        """Write the header for a machine, at a time in Unix seconds."""
        message = b"%d,%b" % (math.floor(now), _encode(machine_id))
        return (self._key.sign(message) + message).hex()


class Verifier:
    """
    Checks headers against public keys, each 32 bytes in hex of either case, separated by commas.

    Any one of them will do, so that a key can be replaced without a pause. Raises `KeyFormatError`
    where one is malformed or there is none.
    """

    def __init__(self, public: str) -> None:
        self._keys = tuple(
            Ed25519PublicKey.from_public_bytes(_unhex(key, _KEY_SIZE)) for key in public.split(",")
        )

    def verify(self, header: str, machine_id: str, now: float) -> None:
        """Check a header that came to a machine at a time in Unix seconds; raise `AuthError` if it is bad."""
        signed = _signed_bytes(header)
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
    """Read a key of `size` bytes, with whitespace around it."""
    try:
        raw = binascii.unhexlify(text.strip())
    except ValueError:
        raw = b""
    if len(raw) != size:
        raise KeyFormatError(f"not a key of {size} bytes in hex")
    return raw


def _signed_bytes(header: str) -> bytes:
    """Read a header's hex, in the one spelling that it may have."""
    if len(header) > _MAX_HEADER:
        raise AuthError("too long")
    try:
        signed = bytes.fromhex(header)
    except ValueError:
        raise AuthError("not hex") from None
    if signed.hex() != header:
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
    # Total, unlike plain UTF-8: a name out of the environment may hold surrogates.
    return machine_id.encode(errors="surrogatepass")
