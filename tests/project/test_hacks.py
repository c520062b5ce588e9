"""Check that the private parts of Twisted and Python that bfaas depends on are as it expects them."""

from __future__ import annotations

import subprocess
import sys
from json.encoder import encode_basestring

from OpenSSL.SSL import X509VerificationCodes
from twisted.internet.process import Process, ProcessReader
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.protocols.basic import LineReceiver
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http import HTTPChannel
from twisted.web.resource import Resource
from twisted.web.server import Site

# Set the wall clock back by an hour between the scheduling of a call and its time.
CLOCK = """
import time
from twisted.internet import reactor
from bfaas.system.runtime import configure_reactor
configure_reactor(reactor)
reactor.callLater(0.2, reactor.stop)
wall = time.time
time.time = lambda: wall() - 3600
reactor.run()
print("fired")
"""


class HackTests(SynchronousTestCase):
    def test_wall_clock_does_not_delay_calls(self) -> None:
        done = subprocess.run([sys.executable, "-c", CLOCK], capture_output=True, timeout=60, check=False)
        self.assertEqual((b"fired\n", b""), (done.stdout, done.stderr))

    def test_http_channel_has_the_attributes_that_are_used(self) -> None:
        channel = Site(Resource(), reactor=Clock()).buildProtocol(None)
        channel.makeConnection(StringTransport())
        self.assertTrue(callable(HTTPChannel._respondToBadRequestAndDisconnect))
        self.assertIn(LineReceiver, HTTPChannel.__mro__)
        channel.dataReceived(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.assertIsInstance(channel._channel._transferDecoder._maxTrailerHeadersSize, int)

    def test_processes_read_their_pipes_through_a_dictionary(self) -> None:
        self.assertIn("pipes", Process.__init__.__code__.co_names)
        self.assertTrue(callable(ProcessReader.doRead))

    def test_tls_reports_why_verification_failed(self) -> None:
        self.assertTrue(callable(TLSMemoryBIOProtocol.failVerification))
        self.assertIn("ERR_CERT_HAS_EXPIRED", vars(X509VerificationCodes))

    def test_json_strings_keep_utf_8(self) -> None:
        self.assertEqual('"\u00fc\\n"', encode_basestring("\u00fc\n"))
