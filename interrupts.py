"""Ctrl-C and SIGTERM while a command still imports PyTorch, which takes seconds: one line, and the status of later ones.

Commands import this module first. From `cli.one_line_errors` on, that decides. Programs that import a command are left alone.
"""
import os
import signal
import sys
from pathlib import Path


def end(number, frame):
    """End the process: so early there is nothing to clean up."""
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    os.write(2, f"{Path(sys.argv[0]).name}: stopped by {name}\n".encode())
    os._exit(128 + number)


if Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve().parent == Path(__file__).resolve().parent:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:   # as of a command in a shell's background
            signal.signal(number, end)
