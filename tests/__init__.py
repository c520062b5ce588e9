"""Tests of bfaas, in the layout of the packages that they test."""

import signal

# A shell starts background jobs with SIGINT ignored, and programs that the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
