"""How stages end."""

import signal
import subprocess
import sys

import pytest

STOP = """
import os, signal
from pipeline.runtime.process import StopRequest
stop = StopRequest()
for number in {numbers}:
    os.kill(os.getpid(), number)
print(stop.requested)
"""
RAISE = """
from pipeline.errors import Stopped, UserError
from pipeline.runtime.process import run_stage
class OutOfMemoryError(RuntimeError): pass
def main(): raise {error}
run_stage(main)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_any_number_of_sigterms_is_one_request_and_a_second_ctrl_c_acts_at_once() -> None:
    done = python(STOP.format(numbers=[int(signal.SIGTERM)] * 3))
    assert (done.returncode, done.stdout) == (0, "True\n")
    assert python(STOP.format(numbers=[int(signal.SIGINT)])).stdout == "True\n"
    assert "KeyboardInterrupt" in python(STOP.format(numbers=[int(signal.SIGINT)] * 2)).stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("UserError('what is wrong')", 2, "error: what is wrong\n"),
        ("Stopped('at 3')", 75, "stopped: at 3\n"),
        ("KeyboardInterrupt", 130, ""),
        ("OutOfMemoryError('2 GiB')", 2, "error: out of GPU memory (2 GiB): set PIPELINE_MICRO_BATCH"),
        ("ValueError('ours')", 1, "Traceback"),
    ],
)
def test_an_exception_is_a_line_and_an_exit_code(error: str, code: int, said: str) -> None:
    done = python(RAISE.format(error=error))
    assert done.returncode == code
    assert done.stderr.startswith(said), done.stderr
    assert ("Traceback" in done.stderr) is (code == 1)
