"""What the commands share: flags, errors in one line, devices, processes and signals."""
import argparse
import json
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import interrupts

tqdm.set_lock(threading.RLock())                 # its own is shared with forks, and one that is killed would keep it


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr and exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


class Terminated(BaseException):
    """SIGTERM came."""


def raise_terminated(number, frame):
    """A handler of SIGTERM: what is under way ends as by Ctrl-C, its children and temporary files with it."""
    raise Terminated


def message_of(error):
    """The one line that a user reads of an error, and the exit status; None and 0 of an error that is a bug of ours."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory on the device: lower --batch-size, or raise train.py's --accumulate", 2
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return f"this machine's memory is full: lower --batch-size, --n or --image-size ({error or 'MemoryError'})", 2
    if isinstance(error, RuntimeError) and re.search("by peer|remote process exited", str(error)):
        return "another process ended, which says why", 2
    if isinstance(error, (ValueError, OSError)):         # with which this code answers what a user can cause
        return str(error), 2
    return {KeyboardInterrupt: ("stopped by Ctrl-C", 130), Terminated: ("stopped by SIGTERM", 143)}.get(type(error), (None, 0))


def say_last(line):
    """Print the line of an error on stderr; under torchrun the first process of a machine does.

    After it torchrun prints sixty lines of its own, which end with what a process left in a file: the line, once more.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(report).write_text(json.dumps(dict(message=line, timestamp=int(time.time()))))


@contextmanager
def one_line_errors(command):
    """Turn what a user can cause into one line on stderr and an exit status, see `message_of`; a bug keeps its traceback."""
    in_main, old = threading.current_thread() is threading.main_thread(), {}
    if in_main:
        old[signal.SIGTERM] = signal.signal(signal.SIGTERM, raise_terminated)
        if signal.getsignal(signal.SIGINT) == interrupts.end:            # else Python's own, or nobody's in a background
            old[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except BaseException as error:
        message, status = message_of(error)
        if message is None:
            raise
        say_last(f"{command}: {' '.join(message.split())}")
        sys.exit(status)
    else:
        if dist.is_initialized() and dist.get_rank() > 0:
            sys.stdout.flush()                           # torch 2.13 now and then aborts while such a process ends, its work
            os._exit(0)                                  # done, and torchrun would report a failure: end without it
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def add_overwrite_flag(parser):
    """The flag of all commands that write."""
    parser.add_argument("--overwrite", action="store_true", help="replace what is there, whoever wrote it; but nothing that this "
                        "command reads, and no run of train.py (default: only what an earlier call wrote for the same purpose)")


def at_least(least, kind):
    """An argparse type: a finite number of a kind, int of 64 bits or float, from `least` on."""
    def number(text):
        if not least <= kind(text) < (2 ** 63 if kind is int else float("inf")):
            raise argparse.ArgumentTypeError(f"{text} is not a {'whole ' * (kind is int)}number from {least} on, or is too large")
        return kind(text)
    return number


positive, natural, not_negative = at_least(1, int), at_least(0, int), at_least(0, float)


def processes(device="auto"):
    """Join torchrun's process group, if there is one -> device, rank, number of processes.  ValueError if there is no GPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here")
    world, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    backend = "gloo"
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"process {local_rank} has no GPU: this machine has {torch.cuda.device_count()}")
        torch.set_float32_matmul_precision("high")                       # TF32
        device, backend = f"cuda:{local_rank}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    if world > 1:                                        # others may wait for hours while the first decodes a data set
        dist.init_process_group(backend, timeout=timedelta(days=1))
    return torch.device(device), *place()


def place():
    """The rank of this process, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def first_in_turn():
    """The first process runs what is inside, such as a download, before all others, who then find its result in the cache."""
    rank, world = place()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def share(n):
    """This process's part of n things, a range."""
    rank, world = place()
    return range(rank * n // world, (rank + 1) * n // world)


def gathered(value):
    """The values of all processes, a list in the order of their ranks, on the first process; [] on the others."""
    rank, world = place()
    if world == 1:
        return [value]
    everyone = [None] * world if rank == 0 else None
    dist.gather_object(value, everyone)
    return everyone or []


def progress_bar(name, n):
    """A bar over this process's share of n images, shown by the first process on a terminal."""
    mine = share(n)
    return tqdm(total=len(mine), desc=name, unit="image", disable=mine.start > 0 or not sys.stderr.isatty())


def ignore_signals(worker):
    """In a worker of the DataLoader: the main process decides when to stop."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


@contextmanager
def stop_signals():
    """A list that fills when Ctrl-C or SIGTERM comes; the loop looks at it between steps."""
    received = []
    old = {name: signal.signal(name, lambda number, frame: received.append(number)) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)


def total(tensor, world):
    """The sum of a tensor over all processes, as a new tensor."""
    tensor = tensor.clone()
    if world > 1:
        dist.all_reduce(tensor)
    return tensor


INPUTS = ("ckpt", "vae", "clip", "inpaint", "mask", "upscale", "denoise", "cascade", "samples", "reference", "features", "data",
          "csv", "report", "file")     # the flags and arguments of all commands that name a file to read


def rule_of(args):
    """What `files.check_output` has to know of a command line: the files that it reads, and --overwrite.

    overwrite is None where there is no such flag.
    """
    named = [getattr(args, name, None) for name in INPUTS]
    inputs = [path for entry in named if entry for path in (entry if isinstance(entry, list) else [entry])]
    return dict(inputs=inputs, overwrite=getattr(args, "overwrite", None))


def parent_of(path):
    """ValueError, before the work and not after it, if a file's folder does not exist."""
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{path}: the folder {Path(path).absolute().parent} does not exist")
