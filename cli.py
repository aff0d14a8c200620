"""What the commands share: flags, errors in one line, devices, processes and signals."""
import argparse
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
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
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not report or os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    if report:
        with suppress(OSError):
            Path(report).write_text(json.dumps(dict(message=line, timestamp=int(time.time()))))


@contextmanager
def one_line_errors(command):
    """Turn what a user can cause into one line on stderr and an exit status, see `message_of`; a bug keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):              # a file's name may hold bytes that are no text
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
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


def check_compiler(device):
    """ValueError if torch.compile lacks what it needs on a device: its own error, at the first step, has a hundred lines."""
    from torch._inductor import cpp_builder, exc         # here, as it takes seconds
    from torch.utils import _triton
    lacks = None
    if device == "cuda" and not _triton.has_triton():
        lacks = "Triton, which this GPU or this machine does not have: pip install triton"
    elif device == "cuda":                               # Triton compiles what calls its kernels
        if not any(map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang"))):
            lacks = "a C compiler, and there is none: install gcc, name another by CC="
    else:
        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            lacks = "a C++ compiler, and there is none: install g++, name another by CXX="
    if lacks:
        raise ValueError(f"--compile: PyTorch needs {lacks}, or leave --compile out, on --resume by --no-compile")


PRECISIONS = ("bf16", "tf32", "fp32")           # of products: bfloat16 by autocast; CUDA's float32 of 10 bits; float32


def precision_on(device, asked=None):
    """The precision asked for; by default bf16 on CUDA, tf32 on a GPU without it, fp32 on the CPU.  ValueError if there is none."""
    cuda = device.type == "cuda"
    half = not cuda or torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "bf16" and not half:
        raise ValueError(f"--precision bf16: {torch.cuda.get_device_name(device)} does not compute in bfloat16: take tf32 or fp32")
    if asked == "tf32" and not cuda:
        raise ValueError("--precision tf32 is a GPU's: the CPU computes in fp32 or bf16")
    return asked or ("fp32" if not cuda else "bf16" if half else "tf32")


def autocast(device, precision=None):
    """The context in which networks compute in a precision, by default the device's: products in bfloat16 if it is bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=(precision or precision_on(device)) == "bf16")


def processes(device="auto", compiles=False, precision=None):
    """Join torchrun's process group, if there is one -> device, rank, number of processes.

    ValueError if there is no GPU, not the precision, or where the command compiles no compiler.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here")
    if compiles:
        check_compiler(device)
    world, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    backend = "gloo"
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"process {local_rank} has no GPU: this machine has {torch.cuda.device_count()}")
        device, backend = f"cuda:{local_rank}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    device = torch.device(device)
    found = precision_on(device, precision)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if found == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = found != "fp32"
        if precision is None and found == "tf32" and local_rank == 0:
            print(f"{torch.cuda.get_device_name(device)} does not compute in bfloat16: --precision is tf32", file=sys.stderr)
    if world > 1:                                        # others may wait for hours while the first decodes a data set
        dist.init_process_group(backend, timeout=timedelta(days=1))
    return device, *place()


def gpu_memory(device):
    """Bytes of a GPU's memory; None of the CPU."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None


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


LEAST = 16                       # images for a thread of its own


def threads_for(network, n):
    """How many Python threads may share n images between them: PyTorch's number, if each has `LEAST` of them.

    One on a GPU, and of a compiled network, which threads must not call together.
    """
    if next(network.parameters()).device.type != "cpu" or any(module._compiled_call_impl for module in network.modules()):
        return 1
    return max(1, min(torch.get_num_threads(), n // LEAST))


class Stopped(Exception):
    """What ends a part in another thread once nobody waits for it."""


@cache
def pool_of(workers, process):
    """Threads of a process, for as long as it lasts: new ones would set up their libraries again, at each step of training."""
    return ThreadPoolExecutor(workers)


def side_by_side(function, parts, workers):
    """Yield function(part, go_on) of each part, in order, computed by so many Python threads at once, each with its share of
    PyTorch's; by the calling one, where it is one.

    Threads that share each operation wait for each other after it: for as long as a small one takes, and on a busy machine for
    many times that. The function calls go_on now and then, which raises `Stopped` once its result is not wanted any more.
    """
    threads, half, ended = torch.get_num_threads(), torch.is_autocast_enabled("cpu"), threading.Event()
    learns = torch.is_grad_enabled()

    def go_on(*_):
        if ended.is_set():
            raise Stopped

    def alone(part):
        torch.set_num_threads(threads // workers)
        with torch.set_grad_enabled(learns), torch.autocast("cpu", torch.bfloat16, enabled=half):    # threads inherit neither
            return function(part, go_on)
    if workers == 1:
        yield from (function(part, go_on) for part in parts)
        return
    for i in range(0, len(parts), workers):
        jobs = [pool_of(workers, os.getpid()).submit(alone, part) for part in parts[i:i + workers]]
        try:
            for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                job.result()                             # raises an error as soon as it is there
        except BaseException:
            ended.set()                                  # for the others, which have the pool until they end
            wait(jobs)
            raise
        finally:
            torch.set_num_threads(threads)               # the default of new threads, which the workers changed
        yield from (job.result() for job in jobs)


def total(tensor, world):
    """The sum of a tensor over all processes, as a new tensor."""
    tensor = tensor.clone()
    if world > 1:
        dist.all_reduce(tensor)
    return tensor


def smallest(number):
    """The smallest of all processes' whole numbers."""
    number = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MIN)
    return number.item()


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
