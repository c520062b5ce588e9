"""The end of programs that tests and benchmarks start."""

from __future__ import annotations

import subprocess


def end_process(process: subprocess.Popen[bytes], timeout: float) -> None:
    """Terminate a process, kill it if it has not ended after `timeout` seconds, and wait for its end."""
    process.terminate()
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
