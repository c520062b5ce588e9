"""Tests of bfaas, in the layout of the packages that they test."""

import signal

# Background jobs ignore SIGINT, and programs under nohup SIGHUP. What the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
