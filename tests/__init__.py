"""Tests of bfaas, in the layout of the packages that they test."""

import signal

# Background jobs ignore SIGINT and SIGQUIT, and programs under nohup SIGHUP. Programs
# that the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)
