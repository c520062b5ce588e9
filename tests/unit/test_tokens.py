"""Keys, and auth tokens: valid ones, and all kinds of invalid ones."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from bfaas.tokens import AuthError, KeyFormatError, Signer, Verifier, genkey

SEED = bytes(range(32))
PUBLIC = "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
PRIVATE = SEED.hex() + PUBLIC

NOW = 1_700_000_000
MACHINE = "worker-1"
TOKEN = (
    "d125fa9272fcbbda95280dc6cf651c637ce57ec36968ae19c2a4353356cab70b"
    "34c4a650e8d3514202ed0e41b33c2d4a7348f84d90f0ec34531f1840278da90d"
    "313730303030303030302c776f726b65722d31"
)
ORDER = 2**252 + 27742317777372353535851937790883648493


def sign_message(message: bytes) -> str:
    return (Ed25519PrivateKey.from_private_bytes(SEED).sign(message) + message).hex()


class SignerTests(SynchronousTestCase):
    def test_token_is_compatible_with_the_go_original(self) -> None:
        self.assertEqual(TOKEN, Signer(PRIVATE).sign(MACHINE, NOW + 0.9))

    def test_public_key_is_that_of_the_private_key(self) -> None:
        self.assertEqual(PUBLIC, Signer(PRIVATE).public)

    def test_key_may_be_upper_case_and_surrounded_by_whitespace(self) -> None:
        self.assertEqual(TOKEN, Signer(f" {PRIVATE.upper()}\n").sign(MACHINE, NOW))

    def test_malformed_key_is_an_error_that_does_not_show_it(self) -> None:
        bad = [
            "", " ", "x", "é" * 128, PRIVATE[:-1], PRIVATE[:-2], PRIVATE + "00", PUBLIC, "g" + PRIVATE[1:],
            PRIVATE[:64] + " " + PRIVATE[64:], "0x" + PRIVATE[2:], PRIVATE[:-1] + "9", PUBLIC + SEED.hex(),
        ]  # fmt: skip
        for key in bad:
            error = self.assertRaises(KeyFormatError, Signer, key)
            self.assertNotIn(PRIVATE[4:20], str(error))
            self.assertNotIn("\n", str(error))
            self.assertIsInstance(error, ValueError)

    def test_repr_shows_only_the_public_key(self) -> None:
        self.assertEqual(f"Signer(public={PUBLIC})", repr(Signer(PRIVATE)))


class GenkeyTests(SynchronousTestCase):
    def test_generated_keys_sign_and_verify(self) -> None:
        pair = genkey()
        signer = Signer(pair.private)

        self.assertEqual(pair.public, signer.public)
        Verifier(pair.public).verify(signer.sign(MACHINE, NOW), MACHINE, NOW)

    def test_generated_keys_differ(self) -> None:
        self.assertNotEqual(genkey(), genkey())

    def test_repr_of_keys_does_not_show_the_private_key(self) -> None:
        pair = genkey()

        self.assertEqual(f"KeyPair(public='{pair.public}')", repr(pair))


class VerifierTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.verifier = Verifier(PUBLIC)

    def refusal(self, token: str, now: float = NOW, machine: str = MACHINE) -> str:
        reason = str(self.assertRaises(AuthError, self.verifier.verify, token, machine, now))
        if token:
            self.assertNotIn(token, reason)
        return reason

    def test_token_is_valid_from_five_seconds_before_its_time_to_sixty_after(self) -> None:
        for good in (NOW - 5, NOW, NOW + 0.5, NOW + 60):
            self.verifier.verify(TOKEN, MACHINE, good)

        self.assertEqual("too early", self.refusal(TOKEN, now=NOW - 5.001))
        self.assertEqual("too late", self.refusal(TOKEN, now=NOW + 60.001))

    def test_token_is_valid_only_on_its_machine(self) -> None:
        for machine in ("", "worker-2", "worker-", "worker-11", "WORKER-1", "wörker-1", "\ud800"):
            self.assertEqual("for another machine", self.refusal(TOKEN, machine=machine))

    def test_machine_id_may_be_any_text(self) -> None:
        signer = Signer(PRIVATE)
        for machine in ("", "a,b", "1,", "wörker", "a\nb", "\x00", "\udcff"):
            self.verifier.verify(signer.sign(machine, NOW), machine, NOW)

    def test_rejects_a_changed_bit_in_any_byte(self) -> None:
        raw = bytes.fromhex(TOKEN)
        for index in range(len(raw)):
            changed = raw[:index] + bytes([raw[index] ^ 1]) + raw[index + 1 :]
            self.assertEqual("bad signature", self.refusal(changed.hex()))

    def test_rejects_another_spelling_of_the_signature(self) -> None:
        raw = bytes.fromhex(TOKEN)
        scalar = int.from_bytes(raw[32:64], "little")
        malleable = raw[:32] + (scalar + ORDER).to_bytes(32, "little") + raw[64:]

        self.assertEqual("bad signature", self.refusal(malleable.hex()))

    def test_rejects_another_spelling_of_the_hex(self) -> None:
        spellings = (TOKEN.upper(), f" {TOKEN}", f"{TOKEN}\n", f"{TOKEN[:8]} {TOKEN[8:]}")
        self.assertEqual({"not canonical hex"}, {self.refusal(token) for token in spellings})

    def test_rejects_text_that_is_not_hex(self) -> None:
        bad = (TOKEN[:-1], f"0x{TOKEN}", f"Bearer {TOKEN}", TOKEN[:-1] + "g", "٣٣", "\ud800", "\x00")
        self.assertEqual({"not hex"}, {self.refusal(token) for token in bad})

    def test_rejects_a_token_without_a_message(self) -> None:
        self.assertEqual({"too short"}, {self.refusal(token) for token in ("", "00", TOKEN[:128])})

    def test_token_has_at_most_1024_characters(self) -> None:
        signer = Signer(PRIVATE)
        longest = "m" * (512 - 64 - len(f"{NOW},"))
        self.verifier.verify(signer.sign(longest, NOW), longest, NOW)

        self.assertEqual("too long", self.refusal(signer.sign(f"{longest}m", NOW), machine=f"{longest}m"))

    def test_rejects_tokens_of_another_key(self) -> None:
        token = Signer(genkey().private).sign(MACHINE, NOW)

        self.assertEqual("bad signature", self.refusal(token))

    def test_rejects_signed_but_malformed_messages(self) -> None:
        times = ("", "+1", "-1", "01", "00", " 1", "1 ", "1.0", "1e9", "1_0", "0x1", "\u0663", "1" * 21)
        messages = [f"{time},{MACHINE}".encode() for time in times]
        messages += [b"\xff", b"1", b"1700000000", b"1700000000;worker-1", b"\n1700000000,worker-1"]
        self.assertEqual(
            dict.fromkeys(messages, "malformed message"),
            {message: self.refusal(sign_message(message)) for message in messages},
        )

    def test_time_has_at_most_twenty_digits(self) -> None:
        self.assertEqual("too early", self.refusal(sign_message(b"9" * 20 + b",worker-1")))
        self.assertEqual("too late", self.refusal(sign_message(b"0,worker-1")))

    def test_verifies_the_signature_before_parsing_the_message(self) -> None:
        forged = bytes(64) + b"not a message"

        self.assertEqual("bad signature", self.refusal(forged.hex()))

    def test_accepts_tokens_of_each_of_several_keys(self) -> None:
        old, new = genkey(), genkey()
        verifier = Verifier(f" {old.public.upper()} ,\t{new.public}\n")

        for pair in (old, new):
            verifier.verify(Signer(pair.private).sign(MACHINE, NOW), MACHINE, NOW)
        self.assertRaises(AuthError, verifier.verify, TOKEN, MACHINE, NOW)

    def test_malformed_key_is_an_error_that_does_not_show_it(self) -> None:
        bad = (
            "", " ", ",", f"{PUBLIC},", f",{PUBLIC}", f"{PUBLIC},,{PUBLIC}", f"{PUBLIC} {PUBLIC}",
            PUBLIC[:-1], PUBLIC[:-2], PRIVATE, "g" + PUBLIC[1:], "é" * 64,
        )  # fmt: skip
        for key in bad:
            error = self.assertRaises(KeyFormatError, Verifier, key)
            self.assertNotIn(PUBLIC[4:20], str(error))
            self.assertNotIn("\n", str(error))

    @settings(deadline=None)
    @given(token=st.text() | st.binary(max_size=600).map(bytes.hex), machine=st.text())
    def test_any_text_is_an_invalid_token(self, token: str, machine: str) -> None:
        self.assertRaises(AuthError, Verifier(PUBLIC).verify, token, machine, NOW)

    @settings(deadline=None)
    @given(message=st.binary(max_size=600) | st.from_regex(rb"\A[0-9]{0,25},.*\Z"), machine=st.text())
    def test_any_signed_message_is_valid_or_an_auth_error(self, message: bytes, machine: str) -> None:
        try:
            Verifier(PUBLIC).verify(sign_message(message), machine, NOW)
        except AuthError:
            pass
        else:
            self.assertTrue(message.endswith(b"," + machine.encode()))

    @settings(deadline=None)
    @given(machine=st.text(max_size=100), now=st.floats(0, 2**53), age=st.floats(-4, 59))
    def test_signed_tokens_are_valid(self, machine: str, now: float, age: float) -> None:
        Verifier(PUBLIC).verify(Signer(PRIVATE).sign(machine, now), machine, now + age)
