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
HEADER = (
    "d125fa9272fcbbda95280dc6cf651c637ce57ec36968ae19c2a4353356cab70b"
    "34c4a650e8d3514202ed0e41b33c2d4a7348f84d90f0ec34531f1840278da90d"
    "313730303030303030302c776f726b65722d31"
)
ORDER = 2**252 + 27742317777372353535851937790883648493


def sign_message(message: bytes) -> str:
    return (Ed25519PrivateKey.from_private_bytes(SEED).sign(message) + message).hex()


class SignerTests(SynchronousTestCase):
    def test_a_header_is_what_it_has_always_been(self) -> None:
        self.assertEqual(HEADER, Signer(PRIVATE).sign(MACHINE, NOW + 0.9))

    def test_the_public_key_is_the_private_keys_own(self) -> None:
        self.assertEqual(PUBLIC, Signer(PRIVATE).public)

    def test_a_key_may_be_upper_case_and_have_whitespace_around_it(self) -> None:
        self.assertEqual(HEADER, Signer(f" {PRIVATE.upper()}\n").sign(MACHINE, NOW))

    def test_a_malformed_key_is_refused_and_not_shown(self) -> None:
        bad = [
            "", " ", "x", "é" * 128, PRIVATE[:-1], PRIVATE[:-2], PRIVATE + "00", PUBLIC, "g" + PRIVATE[1:],
            PRIVATE[:64] + " " + PRIVATE[64:], "0x" + PRIVATE[2:], PRIVATE[:-1] + "9", PUBLIC + SEED.hex(),
        ]  # fmt: skip
        for key in bad:
            error = self.assertRaises(KeyFormatError, Signer, key)
            self.assertNotIn(PRIVATE[4:20], str(error))
            self.assertNotIn("\n", str(error))
            self.assertIsInstance(error, ValueError)

    def test_its_repr_shows_the_public_key_alone(self) -> None:
        self.assertEqual(f"Signer(public={PUBLIC})", repr(Signer(PRIVATE)))


class GenkeyTests(SynchronousTestCase):
    def test_a_new_pair_signs_and_verifies(self) -> None:
        pair = genkey()
        signer = Signer(pair.private)

        self.assertEqual(pair.public, signer.public)
        Verifier(pair.public).verify(signer.sign(MACHINE, NOW), MACHINE, NOW)

    def test_no_two_pairs_are_alike(self) -> None:
        self.assertNotEqual(genkey(), genkey())

    def test_a_pairs_repr_does_not_show_its_private_key(self) -> None:
        pair = genkey()

        self.assertEqual(f"KeyPair(public='{pair.public}')", repr(pair))


class VerifierTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.verifier = Verifier(PUBLIC)

    def refusal(self, header: str, now: float = NOW, machine: str = MACHINE) -> str:
        reason = str(self.assertRaises(AuthError, self.verifier.verify, header, machine, now))
        if header:
            self.assertNotIn(header, reason)
        return reason

    def test_a_header_is_good_from_five_seconds_before_its_time_to_sixty_after(self) -> None:
        for good in (NOW - 5, NOW, NOW + 0.5, NOW + 60):
            self.verifier.verify(HEADER, MACHINE, good)

        self.assertEqual("too early", self.refusal(HEADER, now=NOW - 5.001))
        self.assertEqual("too late", self.refusal(HEADER, now=NOW + 60.001))

    def test_a_header_is_good_on_the_machine_it_names_alone(self) -> None:
        for machine in ("", "worker-2", "worker-", "worker-11", "WORKER-1", "wörker-1", "\ud800"):
            self.assertEqual("for another machine", self.refusal(HEADER, machine=machine))

    def test_a_machines_name_may_be_any_text(self) -> None:
        signer = Signer(PRIVATE)
        for machine in ("", "a,b", "1,", "wörker", "a\nb", "\x00", "\udcff"):
            self.verifier.verify(signer.sign(machine, NOW), machine, NOW)

    def test_one_bit_changed_in_any_byte_is_refused(self) -> None:
        raw = bytes.fromhex(HEADER)
        for index in range(len(raw)):
            changed = raw[:index] + bytes([raw[index] ^ 1]) + raw[index + 1 :]
            self.assertEqual("bad signature", self.refusal(changed.hex()))

    def test_another_spelling_of_the_signature_is_refused(self) -> None:
        raw = bytes.fromhex(HEADER)
        scalar = int.from_bytes(raw[32:64], "little")
        malleable = raw[:32] + (scalar + ORDER).to_bytes(32, "little") + raw[64:]

        self.assertEqual("bad signature", self.refusal(malleable.hex()))

    def test_another_spelling_of_the_hex_is_refused(self) -> None:
        spellings = (HEADER.upper(), f" {HEADER}", f"{HEADER}\n", f"{HEADER[:8]} {HEADER[8:]}")
        self.assertEqual({"not canonical hex"}, {self.refusal(header) for header in spellings})

    def test_what_is_not_hex_is_refused(self) -> None:
        bad = (HEADER[:-1], f"0x{HEADER}", f"Bearer {HEADER}", HEADER[:-1] + "g", "٣٣", "\ud800", "\x00")
        self.assertEqual({"not hex"}, {self.refusal(header) for header in bad})

    def test_a_header_without_a_message_is_refused(self) -> None:
        self.assertEqual({"too short"}, {self.refusal(header) for header in ("", "00", HEADER[:128])})

    def test_a_header_may_have_1024_characters(self) -> None:
        signer = Signer(PRIVATE)
        longest = "m" * (512 - 64 - len(f"{NOW},"))
        self.verifier.verify(signer.sign(longest, NOW), longest, NOW)

        self.assertEqual("too long", self.refusal(signer.sign(f"{longest}m", NOW), machine=f"{longest}m"))

    def test_another_key_is_refused(self) -> None:
        header = Signer(genkey().private).sign(MACHINE, NOW)

        self.assertEqual("bad signature", self.refusal(header))

    def test_a_malformed_message_is_refused_though_it_is_signed(self) -> None:
        times = ("", "+1", "-1", "01", "00", " 1", "1 ", "1.0", "1e9", "1_0", "0x1", "\u0663", "1" * 21)
        messages = [f"{time},{MACHINE}".encode() for time in times]
        messages += [b"\xff", b"1", b"1700000000", b"1700000000;worker-1", b"\n1700000000,worker-1"]
        self.assertEqual(
            dict.fromkeys(messages, "malformed message"),
            {message: self.refusal(sign_message(message)) for message in messages},
        )

    def test_a_time_has_at_most_twenty_digits(self) -> None:
        self.assertEqual("too early", self.refusal(sign_message(b"9" * 20 + b",worker-1")))
        self.assertEqual("too late", self.refusal(sign_message(b"0,worker-1")))

    def test_the_signature_is_checked_before_the_message_is_read(self) -> None:
        forged = bytes(64) + b"not a message"

        self.assertEqual("bad signature", self.refusal(forged.hex()))

    def test_any_of_several_keys_will_do(self) -> None:
        old, new = genkey(), genkey()
        verifier = Verifier(f" {old.public.upper()} ,\t{new.public}\n")

        for pair in (old, new):
            verifier.verify(Signer(pair.private).sign(MACHINE, NOW), MACHINE, NOW)
        self.assertRaises(AuthError, verifier.verify, HEADER, MACHINE, NOW)

    def test_a_malformed_key_is_refused_and_not_shown(self) -> None:
        bad = (
            "", " ", ",", f"{PUBLIC},", f",{PUBLIC}", f"{PUBLIC},,{PUBLIC}", f"{PUBLIC} {PUBLIC}",
            PUBLIC[:-1], PUBLIC[:-2], PRIVATE, "g" + PUBLIC[1:], "é" * 64,
        )  # fmt: skip
        for key in bad:
            error = self.assertRaises(KeyFormatError, Verifier, key)
            self.assertNotIn(PUBLIC[4:20], str(error))
            self.assertNotIn("\n", str(error))

    @settings(deadline=None)
    @given(header=st.text() | st.binary(max_size=600).map(bytes.hex), machine=st.text())
    def test_whatever_the_header_the_answer_is_a_refusal(self, header: str, machine: str) -> None:
        self.assertRaises(AuthError, Verifier(PUBLIC).verify, header, machine, NOW)

    @settings(deadline=None)
    @given(message=st.binary(max_size=600) | st.from_regex(rb"\A[0-9]{0,25},.*\Z"), machine=st.text())
    def test_whatever_was_signed_nothing_but_a_refusal_is_raised(self, message: bytes, machine: str) -> None:
        try:
            Verifier(PUBLIC).verify(sign_message(message), machine, NOW)
        except AuthError:
            pass
        else:
            self.assertTrue(message.endswith(b"," + machine.encode()))

    @settings(deadline=None)
    @given(machine=st.text(max_size=100), now=st.floats(0, 2**53), age=st.floats(-4, 59))
    def test_what_is_signed_verifies(self, machine: str, now: float, age: float) -> None:
        Verifier(PUBLIC).verify(Signer(PRIVATE).sign(machine, now), machine, now + age)
