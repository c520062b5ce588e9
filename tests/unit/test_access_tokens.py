"""Tests of access tokens, of their digests, and of the lines of the setting."""

from __future__ import annotations

import hashlib
import hmac
import subprocess

from twisted.trial.unittest import SynchronousTestCase

from bfaas.access_tokens import AccessToken, AccessTokens, check_token, generate_token

A, B = "a" * 64, "b" * 64


class TokenTests(SynchronousTestCase):
    def test_tokens_differ_and_fit_into_a_header(self) -> None:
        tokens = {generate_token() for _ in range(100)}
        self.assertEqual(100, len(tokens))
        for token in tokens:
            self.assertRegex(token, "^bfaas_[A-Za-z0-9_-]{43}$")
            self.assertEqual(token, check_token(token))

    def test_the_digest_is_that_of_sha256sum(self) -> None:
        token = generate_token()
        done = subprocess.run(["sha256sum"], input=token.encode(), capture_output=True, check=True)
        self.assertEqual(f"ci:{done.stdout.split()[0].decode()}", str(AccessToken.of("ci", token)))

    def test_names_are_short_and_plain(self) -> None:
        for name in ("a", "alice", "a.b-c_d", "0", "x" * 63):
            self.assertEqual(name, AccessToken.of(name, "t").name)
        for name in ("", "x" * 64, "a b", "a:b", "a,b", "ö", "a\n", "a/b", "#a"):
            self.assertRaises(ValueError, AccessToken.of, name, "t")

    def test_text_that_no_header_can_contain_is_rejected_and_not_shown(self) -> None:
        for text in ("", "a b", "a\n", "ö", "=", "a=b", "a,b", '"a"'):
            error = self.assertRaises(ValueError, check_token, text)
            self.assertEqual("the access token contains characters that no token has", str(error))

    def test_representation_does_not_show_the_digest(self) -> None:
        tokens, _ = AccessTokens.parse(f"alice:{A}")
        self.assertNotIn("aaaaaaaa", repr(tokens))
        self.assertNotIn(repr(bytes.fromhex(A)), repr(tokens))


class LineTests(SynchronousTestCase):
    def test_lines_are_separated_by_commas_or_line_breaks(self) -> None:
        for text in (
            f"alice:{A},bob:{B}",
            f"alice:{A}\nbob:{B}\n",
            f"\r\n # people\n\n alice:{A} \r\n,, bob:{B} ,\n# carol:{'c' * 64}",
        ):
            tokens, problems = AccessTokens.parse(text)
            self.assertEqual((), problems)
            self.assertEqual([f"alice:{A}", f"bob:{B}"], list(map(str, tokens.entries)))

    def test_invalid_lines_are_skipped_and_reported_by_their_number(self) -> None:
        for line in (
            "alice",
            f":{A}",
            "alice:",
            f"alice:{A[1:]}",
            f"alice:{A}0",
            f"alice:{'A' * 64}",
            f"alice: {A}",
            f"alice:{'g' * 64}",
            f"a b:{A}",
            f"alice={A}",
            f"alice:bob:{A}",
            generate_token(),
            f"\0:{A}",
        ):
            tokens, problems = AccessTokens.parse(f"#\n{line}\nbob:{B}")
            self.assertEqual([f"bob:{B}"], list(map(str, tokens.entries)), line)
            self.assertEqual(("line 2 is not NAME:DIGEST, as `bfaas token NAME` prints it",), problems)

    def test_two_names_cannot_have_the_same_token(self) -> None:
        tokens, problems = AccessTokens.parse(f"alice:{A}\nbob:{A}")
        self.assertEqual(["alice"], [entry.name for entry in tokens.entries])
        self.assertEqual(("line 2 has the same digest as a line before it",), problems)


class FindTests(SynchronousTestCase):
    def test_each_token_has_its_name_and_no_other_text_has_one(self) -> None:
        named = [("alice", "t1"), ("bob", "t2"), ("alice", "t3")]
        tokens = AccessTokens(tuple(AccessToken.of(name, token) for name, token in named))
        for name, token in named:
            self.assertEqual(name, tokens.find(token))
        for text in ("", "t", "t11", "T1", "t1 ", "\xff", hashlib.sha256(b"t1").hexdigest()):
            self.assertIsNone(tokens.find(text))
        self.assertIsNone(AccessTokens(()).find("t1"))

    def test_every_digest_is_compared_whichever_matches(self) -> None:
        compared: list[bytes] = []

        def record(known: bytes, received: bytes) -> bool:
            compared.append(known)
            return known == received

        tokens = AccessTokens(tuple(AccessToken.of(f"n{number}", f"t{number}") for number in range(5)))
        self.patch(hmac, "compare_digest", record)
        for number in (0, 2, 4, 9):
            compared.clear()
            tokens.find(f"t{number}")
            self.assertEqual([entry.digest for entry in tokens.entries], compared)
