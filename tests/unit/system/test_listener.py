"""Tests of the service that listens on an endpoint."""

from __future__ import annotations

import socket

from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource

from bfaas.http.server import BoundedSite
from bfaas.system.listener import Listener
from bfaas.system.startup import StartError
from tests.support.waiting import reactor

REJECTED_ENDPOINTS = {
    "tcp:foo": "--listen tcp:foo: invalid literal",
    "nosuch:1": "--listen nosuch:1: Unknown endpoint type: 'nosuch'",
    "tcp:99999": "--listen tcp:99999: .*0-65535",
    "tcp:0:interface=203.0.113.7": "Couldn't listen on 203.0.113.7:0: .*Cannot assign",
    "tcp:0:colour=red": "--listen tcp:0:colour=red: TypeError: .*colour",
    "unix:/nonexistent/socket": "--listen unix:/nonexistent/socket: .*No such file",
    "ssl:0:privateKey=/nonexistent": "--listen ssl:.*No such file",
    "systemd:domain=INET:index=0": "--listen systemd:",
    "haproxy:tcp:foo": "--listen haproxy:tcp:foo: invalid literal",
    "stdio:": "--listen stdio:: the endpoint does not accept connections",
}
"""Endpoints that cannot be listened on, and the message for each."""


class ListenerTests(SynchronousTestCase):
    def message(self, endpoint: str) -> str:
        """Listen; return the message of the error."""
        with self.assertRaises(StartError) as raised:
            site = BoundedSite(reactor, Resource(), 0)
            Listener(reactor, "--listen", endpoint, site).privilegedStartService()
        return str(raised.exception)

    def test_each_endpoint_that_cannot_be_listened_on_is_one_line(self) -> None:
        for endpoint, expected in REJECTED_ENDPOINTS.items():
            message = self.message(endpoint)
            self.assertRegex(message, f"^{expected}")
            self.assertEqual(1, len(message.splitlines()))

    def test_a_port_in_use_is_named(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as used:
            port = used.getsockname()[1]
            message = self.message(f"tcp:{port}:interface=127.0.0.1")

        self.assertRegex(message, f"^Couldn't listen on 127.0.0.1:{port}: .*Address already in use")
