"""The project's own code on faked CUDA tensors: no GPU, nothing is computed, and what would go wrong or wait on one is written down.

test_fake_cuda.py runs this file in a process of its own, since a guard of the device has to be loaded before PyTorch. By hand:

    python tests/fake_cuda.py GUARD.so "dit adaln-zero" …                 prints what it found as JSON; all cases by default
    python tests/fake_cuda.py GUARD.so --size XL/2 --batch-size 8         the same of a training step with these flags of train.py
"""
import ctypes
import sys

ctypes.CDLL(sys.argv[1])                                 # autograd asks it which device is the current one
import contextlib                                        # noqa: E402
import functools                                         # noqa: E402
import json                                              # noqa: E402
import tempfile                                          # noqa: E402
import traceback                                         # noqa: E402
import warnings                                          # noqa: E402
from collections import Counter                          # noqa: E402
from pathlib import Path                                 # noqa: E402

import numpy as np                                       # noqa: E402
import torch                                             # noqa: E402
import torch.nn.functional as F                          # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily      # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode                                        # noqa: E402
from torch.utils._pytree import tree_leaves              # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cascade                                           # noqa: E402
import checkpoint                                        # noqa: E402
import data                                              # noqa: E402
import ddpm                                              # noqa: E402
import dit                                               # noqa: E402
import features                                          # noqa: E402
import inception                                         # noqa: E402
import latents                                           # noqa: E402
import metrics                                           # noqa: E402
import models                                            # noqa: E402
import restoration                                       # noqa: E402
import sampling                                          # noqa: E402
import scoring                                           # noqa: E402
import settings                                          # noqa: E402
import text                                              # noqa: E402
import unet                                              # noqa: E402
import train                                             # noqa: E402

CUDA = torch.device("cuda", 0)
WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "_reshape_alias", "lift_fresh", "device")


def ours():
    """The line of the project, this file's left out, that is being run."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}" if frames else "elsewhere"


class Watch(TorchDispatchMode):
    """Sees every operation.  While it is .on it counts kernels, and keeps the faults: {(kind, line of code): how often}."""

    def __init__(self):
        super().__init__()
        self.on, self.batch, self.faults, self.kernels = False, (), Counter(), Counter()

    def fault(self, kind):
        if self.on:
            self.faults[kind, ours()] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if not self.on and name not in ("_local_scalar_dense", "index"):
            return func(*args, **kwargs)
        on_cuda = any(z.is_cuda for z in tree_leaves((args, kwargs)) if isinstance(z, torch.Tensor))
        if on_cuda and name in WAITING:
            self.fault("waits for the device")
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):
            return np.ones((), str(args[0].dtype).removeprefix("torch.")).item()         # whatever: no case depends on it
        if name in ("index", "index_put_", "_index_put_impl_"):
            args = (args[0], [self.index(i, on_cuda) for i in args[1]], *args[2:])
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            self.copied(args[0 if name == "_to_copy" else 1], out, kwargs)
        found = [z for z in tree_leaves(out) if isinstance(z, torch.Tensor)]
        if self.on and (on_cuda or any(z.is_cuda for z in found)) and not func.is_view and not name.startswith(NO_KERNEL):
            self.kernels[name] += launches(name, args)
        return out

    def index(self, index, on_cuda):
        """An index as it is, but for one of bools: how many rows it takes is not known, here it takes all."""
        if index is None or not on_cuda:
            return index
        if index.dtype == torch.bool:
            self.fault("waits for the device")
            return index.new_zeros(len(index), dtype=torch.long)
        if index.device.type == "cpu":
            self.fault("copies to the device")
        return index

    def copied(self, source, target, kwargs):
        """A copy between devices: only a batch's, not waited for, is none too many."""
        if source.is_cuda and target.device.type == "cpu":
            self.fault("waits for the device")
        elif source.device.type == "cpu" and target.is_cuda:
            if not (kwargs.get("non_blocking") and any(source is z for z in self.batch)):
                self.fault("copies to the device")


def launches(name, args):
    """Kernels of an operation: one; but one a tensor if a list of tensors has not the shapes and strides of the others."""
    lists = [z for z in args if isinstance(z, (list, tuple)) and z and isinstance(z[0], torch.Tensor)]
    alike = all(a.shape == b.shape and a.stride() == b.stride() for other in lists[1:] for a, b in zip(lists[0], other))
    return len(lists[0]) if name.startswith("_foreach_") and not alike else 1


MODE, WATCH = FakeTensorMode(allow_non_fake_inputs=True), Watch()


# What a PyTorch without CUDA lacks

def attention(q, k, v, attn_mask=None, **options):
    """F.scaled_dot_product_attention as CUDA computes it: one kernel each way, if each head's numbers lie side by side."""
    if not q.is_cuda:
        return math_attention(q, k, v, attn_mask, **options)
    if any(z.stride(-1) != 1 for z in (q, k, v)):
        WATCH.fault("attention without a fused kernel")
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (z.to(torch.bfloat16) for z in (q, k, v))
    if attn_mask is None and q.dtype != torch.float32 and q.shape[3] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    if attn_mask is not None:
        attn_mask = q.new_zeros(()).expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, q.requires_grad)[0]


def read(tensor, *options):
    """Tensor.numpy of a fake: zeros."""
    if not isinstance(tensor, FakeTensor):
        return tensor_numpy(tensor, *options)
    if tensor.is_cuda:
        raise TypeError("numpy() of a CUDA tensor")
    return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def real(function):
    """A function that computes as ever, on the CPU."""
    def computed(*args, **kwargs):
        with unset_fake_temporarily():
            return function(*args, **kwargs)
    return computed


math_attention, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attention
tensor_numpy, torch.Tensor.numpy = torch.Tensor.numpy, read
for owner, name in ((train, "build_network"), (text.TextEncoder, "tokenize"), (features, "load"), (checkpoint.Run, "build")):
    setattr(owner, name, real(getattr(owner, name)))
torch.cuda.is_bf16_supported = lambda *_: True
torch.cuda.amp.common.amp_definitely_not_available = lambda: False       # else autocast switches itself off
torch.utils._foreach_utils._foreach_supported_types.append(FakeTensor)
warnings.filterwarnings("ignore")
kernels = torch.library.Library("aten", "IMPL")
kernels.impl("silu_backward", lambda *_: None, "CUDA")                   # else it would be made of seven others; never called


# Training: the second step of the loop, since the first moves tables and makes AdamW's moments

STEP = {                                                 # train.py's flags
    **{f"dit {name}": f"--size Nano/16 --conditioning {name}" for name in ("adaln", "cross-attention", "in-context")},
    "dit adaln-zero": "--size Ti/8",
    "dit flips, shifts, two micro-batches, checkpointing":
        "--size Nano/16 --flip --shift 2 --accumulate 2 --checkpointing",
    "dit latents": f"--size Nano/4 --flip --vae {__file__}",
    "dit text": "--size Nano/16 --variance small --data shapes:one --text",
    "uvit": "--model uvit --size Nano/16",
    "uvit text": "--model uvit --size Nano/16 --data shapes:one --text",
    "unet": "--model unet --size Nano",                  # here with dropout
    "upsampler": "--model unet --size Ti-up",
    "vae": "--model vae --size Ti",
    "vit": "--model vit --size Nano/16",
    "vit hybrid": "--model vit --size Nano/16 --hybrid",
    "points": "--data swissroll",
}




def small_data(args, run, device):
    """The data of the flags; with --vae latents in place of what an autoencoder would have made of it."""
    pixels = data.load(args.data)
    if not args.vae:
        return pixels
    return latents.Latents(pixels, 4 * [np.zeros((len(pixels.images), 4, 8, 8), np.float32)], autoencoder())


def training_step(argv):
    """Run two steps of train.py, and watch the loop from one request for a batch to the next."""
    with tempfile.TemporaryDirectory() as folder:
        args, _ = settings.read_settings([*argv, "--out", f"{folder}/run.pt", "--cache", folder])
        args.precision = "bf16"
        training = train.Training(args, None, CUDA, 0, 1)
        data.ahead = two_batches
        training.run()


def two_batches(read, steps, device):
    """data.ahead, of two steps, without its thread."""
    for step in steps[:2]:
        WATCH.on, WATCH.batch = step > 0, read(step)
        yield WATCH.batch
    WATCH.on, WATCH.batch = False, ()


metrics.finite_rows, metrics.check_covariance = (lambda rows, *_: rows), lambda *_: None          # they read what is not there
dit.SIZES["Nano"] = dict(dim=192, depth=2, heads=4)
unet.SIZES["Nano"]["dropout"], train.gpu_memory = 0.1, lambda device: None
data.load, data.SHAPES, train.load_data, cascade.STEPS = functools.cache(data.load), 100, small_data, 3


# Sampling and scores

def network(model, size, side=32, channels=1, **options):
    """A network that only draws, on the device."""
    built = real(models.build)(models.describe(model, size, side, channels, 10, **options))
    return built.to(CUDA).eval().requires_grad_(False)


def process(prediction="x0", variance="small"):
    return ddpm.Diffusion(ddpm.cosine_betas(), prediction, variance)


def autoencoder():
    return network("vae", "Ti")


def drawing(sampler):
    """Draw with guidance in the first half of the times, three steps."""
    model, diffusion = network("dit", "Nano/16", learn_sigma=True), process("eps", "learned")
    return lambda: list(sampling.draw_images(model, diffusion, range(6), list(range(10)), batch_size=4, sampler=sampler, steps=3,
                                             eta=float(sampler == "ddim"), cfg_interval=(0, 500)))


def drawing_latents():
    model, decoder, diffusion = network("dit", "Nano/2", 8, 4), autoencoder(), process()
    return lambda: list(sampling.draw_images(model, diffusion, range(4), list(range(10)), autoencoder=decoder, steps=3))


def drawing_points():
    model, diffusion = network("mlp", "Ti"), process("v")
    return lambda: sampling.draw_points(model, diffusion, 8)


def restoring():
    """Fill in, enlarge, denoise."""
    model, diffusion = network("dit", "Nano/16"), process()
    x, y = torch.zeros(4, 1, 32, 32, device=CUDA), torch.zeros(4, dtype=torch.long, device=CUDA)

    def work():
        for degrade in (restoration.masked(x[:1]), restoration.pooled(4)):
            restoration.restore(diffusion, model, degrade[0](x), degrade, y, steps=3, repeats=2, seeds=range(4), clip=True)
        restoration.denoise(diffusion, model, x, 0.5, y, clip=True)
    return work


def restoring_latents():
    model, decoder, diffusion = network("dit", "Nano/2", 8, 4), autoencoder(), process()
    degrade, x = restoration.pooled(4), torch.zeros(4, 1, 32, 32, device=CUDA)
    y = torch.zeros(4, dtype=torch.long, device=CUDA)
    return lambda: restoration.restore_latents(diffusion, model, decoder, degrade[0](x), degrade, y, steps=2, seeds=range(4))


def enlarging():
    model, diffusion, low = network("unet", "Ti-up"), process(), torch.zeros(4, 1, 8, 8, device=CUDA)
    return lambda: cascade.enlarge(model, diffusion, low, torch.zeros(4, dtype=torch.long), 0, range(4))


def encoding():
    encoder = autoencoder()
    return lambda: latents.encode(encoder, torch.zeros(70, 32, 32, 1, dtype=torch.uint8))


def inception_space():
    return features.inception_space(real(inception.Inception)(), CUDA)


def judge_space():
    return features.vit_space(features.JUDGE, CUDA)


def measuring(make_space):
    """Measure two batches of a size, which are on the device as samples are."""
    space, images = make_space(), torch.zeros(8, 32, 32, 1, dtype=torch.uint8, device=CUDA)
    return lambda: features.measure(2 * [images], space)


def scoring_two(make_space):
    space, images = make_space(), torch.zeros(8, 32, 32, 1, dtype=torch.uint8, device=CUDA)
    fake, real = (features.measure([images], space) for _ in range(2))
    wanted = ["IS", "FD", "precision", "recall"] + ["sFD"] * (fake.spatial is not None)
    return lambda: scoring.scores(fake, real, wanted)


WORK = {
    **{f"drawn by {sampler}": functools.partial(drawing, sampler) for sampler in ddpm.SAMPLERS},
    "latents drawn and decoded": drawing_latents, "points drawn": drawing_points,
    "restored": restoring, "latents restored": restoring_latents, "a cascade": enlarging, "images encoded": encoding,
    "measured by Inception": functools.partial(measuring, inception_space),
    "measured by a judge": functools.partial(measuring, judge_space),
    "scores of Inception": functools.partial(scoring_two, inception_space),
    "scores of a judge": functools.partial(scoring_two, judge_space),
}


def watched(work):
    """What a case's work does: its faults, its kernels, and the error that ended it."""
    WATCH.faults, WATCH.kernels, error = Counter(), Counter(), None
    with MODE, WATCH:
        try:
            work()
        except Exception:
            error = traceback.format_exc()
        WATCH.on = False
    return {"error": error, "faults": [[kind, place, n] for (kind, place), n in WATCH.faults.items()],
            "kernels": WATCH.kernels.total(), "most": WATCH.kernels.most_common(12)}


def at_work(prepare):
    """Prepare, do the work once, as it moves tables, and watch it be done again."""
    work = prepare()
    for WATCH.on in (False, True):
        work()


def main(argv):
    if argv and argv[0].startswith("--"):
        return {" ".join(argv): watched(lambda: training_step(argv))}
    cases = {name: lambda flags=flags: training_step(["--batch-size", "8", *flags.split()]) for name, flags in STEP.items()}
    cases |= {name: lambda prepare=prepare: at_work(prepare) for name, prepare in WORK.items()}
    return {name: watched(cases[name]) for name in argv or cases}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        found = main(sys.argv[2:])
    print(json.dumps(found, indent=1))
