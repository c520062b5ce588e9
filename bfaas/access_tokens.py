"""
Access tokens: what clients of a coordinator send as `Authorization: Bearer TOKEN` (RFC 6750).

A coordinator knows them by digest alone, as lines `NAME:DIGEST`. A digest is the SHA-256 of a token in hex:
tokens are random, so that nothing slower is needed to protect them.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass, field
from hashlib import sha256

_PREFIX = "bfaas_"
"""Begins each token, so that people and scanners for leaked secrets recognize it."""

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # b64token of RFC 6750, section 2.1
_NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def generate_token() -> str:
    """Return a new token, with 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def check_token(text: str) -> str:
    """Return a token that a header can contain. Raise `ValueError`, whose message does not contain it."""
    if not _TOKEN.fullmatch(text):
        raise ValueError("the access token contains characters that no token has")
    return text


@dataclass(frozen=True)
class AccessToken:
    """A token's name, which is that of its client, and its digest (32 bytes)."""

    name: str
    digest: bytes = field(repr=False)

    @classmethod
    def of(cls, name: str, token: str) -> AccessToken:
        """Return what a coordinator knows of a token. Raise `ValueError` if the name is invalid."""
        if not _NAME.fullmatch(name):
            raise ValueError("a name has 1 to 63 letters, digits, dots, dashes and underscores")
        return cls(name, _digest(token))

    def __str__(self) -> str:
        """Return the line for the setting: `NAME:DIGEST`."""
        return f"{self.name}:{self.digest.hex()}"


@dataclass(frozen=True)
class AccessTokens:
    """The tokens that a coordinator accepts. Several can have the same name."""

    entries: tuple[AccessToken, ...]

    @classmethod
    def parse(cls, text: str) -> tuple[AccessTokens, tuple[str, ...]]:
        """
        Parse lines `NAME:DIGEST`, separated by line breaks or commas.

        Empty lines and those that begin with # are skipped. Also return the problems, one for each line that
        is skipped because it is invalid. They do not quote lines, which may contain a token by mistake.
        """
        entries: dict[bytes, AccessToken] = {}
        problems: list[str] = []
        for number, line in enumerate(re.split(r"[\n,]", text), 1):
            stripped = line.strip()
            if not stripped or stripped.startswith("#"):
                continue
            name, _, digest = stripped.partition(":")
            if not _NAME.fullmatch(name) or not _DIGEST.fullmatch(digest):
                problems.append(f"line {number} is not NAME:DIGEST, as `bfaas token NAME` prints it")
            elif bytes.fromhex(digest) in entries:
                problems.append(f"line {number} has the same digest as a line before it")
            else:
                entries[bytes.fromhex(digest)] = AccessToken(name, bytes.fromhex(digest))
        return cls(tuple(entries.values())), tuple(problems)

    def find(self, token: str) -> str | None:
        """
        Return the name of a token, or None.

        The time that this takes depends on the number of tokens alone.
        """
        digest, found = _digest(token), None
        for entry in self.entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry.name
        return found


def _digest(token: str) -> bytes:
    return sha256(token.encode()).digest()
