"""Whatever a file holds and whatever a command line says ends in a result or in one line and status 2, in bounded time and memory.

Files are honest ones with a little changed, by a generator of a fixed seed, and some made by hand; command lines are drawn from the
flags that the parsers know and a pool of good and bad values. Networks are of a hundredth of the usual size, and what would compute
for long or load from the network is left out. A small part of both runs each time, all of it where `slow` has time for it.
"""
import argparse
import contextlib
import gzip
import importlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import tarfile
import time
import traceback
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import checkpoint
import cli
import data
import dit
import evaluate
import features
import files
import gflops
import image_files
import models
import plot
import sampling
import settings
import text
import train
import uvit
import vit
from refusals import refusal
from test_train import SMALLER, saved_autoencoder

DIT = dict(image_size=8, patch_size=4, channels=1, dim=32, depth=1, heads=2, num_classes=10, learn_sigma=False)
UNET = dict(image_size=8, channels=1, out_channels=1, dim=32, res_blocks=1, multipliers=[1, 2], num_classes=10)
CLIP = dict(vocab=514 + 3, length=8, dim=64, depth=1, heads=1)
RUN = train.Training.run
TRAIN = "train --size Ti/4 --batch-size 2 --steps 1 --device cpu --cache cache --out new.pt"


def a_run(path, network, seed=0, T=50, **more):
    """A run as train.py writes one, of an untrained network."""
    torch.manual_seed(seed)
    state = models.build(network).state_dict()
    arguments = network["arguments"]
    data = checkpoint.Data("mnist", [str(i) for i in range(10)], 10, arguments["channels"], [8, 8])
    config = {**settings.COMMON, **settings.LAPTOP, "size": "Ti/4", "image_size": 8, "out": str(path)}
    process = checkpoint.Process("cosine", T, "x0", "small")
    checkpoint.save(path, checkpoint.Run(1, 1, config, network, None if network["class"] == "ViT" else process, data, state, state,
                                         **more))


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A folder with an honest file of each kind."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        here = tmp_path_factory.mktemp("honest")
        patch.chdir(here)
        generator = np.random.default_rng(0)
        pixels = generator.integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
        np.savez("real.npz", arr_0=pixels, arr_1=np.arange(12) % 3)
        np.savez_compressed("packed.npz", images=pixels, labels=np.arange(12) % 3)
        for module in (dit, uvit, vit):
            patch.setitem(module.SIZES, "Ti", SMALLER)
        train.main(f"{TRAIN} --data real.npz --out run.pt --steps 2".split()[1:])
        a_run("dit.pt", {"class": "DiT", "arguments": DIT})
        a_run("unet.pt", {"class": "UNet", "arguments": UNET})
        a_run("vit.pt", {"class": "ViT", "arguments": dict(image_size=8, patch_size=4, channels=1, dim=32, depth=1, heads=2,
                                                           num_classes=10)})
        saved_autoencoder("vae.pt")
        kept = checkpoint.load_autoencoder("vae.pt").origin
        a_run("latent.pt", {"class": "DiT", "arguments": {**DIT, "image_size": 4, "channels": 4, "patch_size": 2}}, vae=kept)
        torch.save(vit.ViT(8, 4, 1, dim=32, depth=1, heads=2, num_classes=10).state_dict(), "plain.pth",
                   _use_new_zipfile_serialization=False)
        state = dit.DiT(**{**DIT, "num_classes": 1000, "null_class": True}).state_dict()
        header, body = {}, b""
        for name, value in state.items():
            raw = value.numpy().tobytes()
            header[name] = dict(dtype="F32", shape=list(value.shape), data_offsets=[len(body), len(body) + len(raw)])
            body += raw
        content = json.dumps(header).encode()
        Path("dit.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + body)
        for name, options in (("image.png", {}), ("image.jpg", {}), ("image.gif", {}), ("image.bmp", {}), ("image.webp", {}),
                              ("image.tif", dict(compression="tiff_deflate"))):
            Image.fromarray(pixels[0, ..., 0]).resize((40, 40)).save(name, **options)
        os.mkdir("photos")
        for name in "ab":
            shutil.copy("image.png", f"photos/{name}.png")
            Path(f"photos/{name}.txt").write_text("a cat\na small cat\n")
        annotations = dict(images=[dict(id=i, file_name=f"image.{kind}") for i, kind in enumerate(("png", "jpg", "gif", "bmp"))],
                           annotations=[dict(image_id=i, caption=f"number {i}") for i in range(4)])
        Path("captions_train.json").write_text(json.dumps(annotations))
        records = generator.integers(0, 10, (6, 3073), dtype=np.uint8).tobytes()
        with tarfile.open("cifar-10-binary.tar.gz", "w:gz") as tar:
            for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
                entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                entry.size = len(records)
                tar.addfile(entry, io.BytesIO(records))
        with gzip.open(text.MERGES_FILE, "wt") as file:
            file.write("#version\na t</w>\nc at</w>\nd o\n")
        encoder = text.CLIPTextEncoder(**CLIP)
        torch.save(encoder.state_dict(), "pytorch_model.bin")
        kept = checkpoint.Clip(str(here), files.sha256_of("pytorch_model.bin"), encoder(torch.zeros(1, 8, dtype=torch.long))[0].detach())
        a_run("text.pt", {"class": "UViT", "arguments": dict(image_size=8, patch_size=4, channels=1, dim=32, depth=2, heads=2,
                                                             context_dim=64, context_tokens=8)}, text=kept)
    return here


# A command, and how it ends

def ended(words, seconds=None):
    """How a command ends that is called in this process: "" of one that does what it was asked for, else its one line."""
    program, *argv = words
    said, began = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            status = importlib.import_module(program).main(argv)
        except SystemExit as stop:
            status = stop.code
    if seconds is not None:
        seconds.append((time.perf_counter() - began, words))
    line = said.getvalue().strip().rpartition("\n")[2]
    assert status in (None, 0) or status == 2 and line.startswith(f"{program}.py"), (status, said.getvalue())
    return line if status else ""


def check(case, count):
    """Check how the commands end that case(i) gives for i = 0 … count - 1, after it has gone to a folder of its own."""
    seconds, wrong, refused = [], [], 0
    for i in range(count):
        words = case(i)
        try:
            refused += bool(ended(words, seconds))
        except BaseException as error:                   # a traceback of the command
            wrong.append(f"case {i}, {' '.join(words)}: {traceback.format_exc(limit=-2) if count > 100 else error}")
    print(f"{refused} of {count} refused; the slowest took {max(seconds)}; peak of memory so far "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def folders(honest, tmp_path, monkeypatch):
    """A function that makes a folder of the honest files, and goes there; small networks; no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (dit, uvit, vit):
        for size in module.SIZES:
            monkeypatch.setitem(module.SIZES, size, SMALLER)
    for name in ("network_cost", "network_memory"):      # which remember what sizes cost
        monkeypatch.setattr(gflops, name, getattr(gflops, name).__wrapped__)
    for module, name, value in ((evaluate, "QUICK", 8), (evaluate, "FULL", 8), (sampling, "STEPS", 2),
                                (train.Training, "run", lambda training: training.start)):
        monkeypatch.setattr(module, name, value)

    def unreachable(*args, **options):
        raise OSError("no network")
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    count = iter(range(10 ** 6))

    def make():
        image_files.allow_pixels(None)                   # of this process, which the command before may have set
        folder = tmp_path / str(next(count))
        shutil.copytree(honest, folder, copy_function=os.link)
        monkeypatch.chdir(folder)
        return folder
    return make


NESTED = [0]                                             # 2^40 zeros in 41 lists
for _ in range(40):
    NESTED = [NESTED, NESTED]
DRAW = "--n 2 --steps 2 --device cpu"
USE_CLIP = "sample --ckpt text.pt --clip . --prompt cat --n 1 --steps 2"


# What is refused before anything is made of it

def edited(change, source="dit.pt"):
    """A function that writes bad.pt: a run with something in it changed."""
    def make():
        run = torch.load(source, weights_only=True)
        change(run)
        torch.save(run, "bad.pt")
    return make


def argument(source="dit.pt", **changes):
    return edited(lambda run: run["network"]["arguments"].update(changes), source)


def pickled(content):
    """A function that writes a checkpoint of pickled bytes."""
    def make():
        torch.save({"a": torch.zeros(1)}, "honest.pt")
        with zipfile.ZipFile("honest.pt") as old, zipfile.ZipFile("bad.pt", "w") as new:
            for name in old.namelist():
                new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return make


class Large:
    def __reduce__(self):
        return bytearray, (10 ** 12,)


def key_of_tuples(levels=40):
    """A pickle of a dict whose key is a tuple that holds the one before it twice, which holds the one before that …"""
    key = b"K\x01\x85q\x00" + b"".join(b"h%c\x86q%c" % (level, level + 1) for level in range(levels))
    return b"\x80\x02}(" + key + b"K\x05u."


def zeros_in(name, megabytes=140):
    """A function that writes a compressed file of zeros, as an .npz, a .gz or a .tar.gz."""
    def make():
        Path(name).unlink(missing_ok=True)
        zeros = bytes(10 ** 6)
        if name.endswith(".npz"):
            with zipfile.ZipFile(name, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open("arr_0.npy", "w") as file:
                np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(megabytes, 1000, 1000)))
                for _ in range(megabytes):
                    file.write(zeros)
        else:
            with gzip.open(name, "w", 1) as file:
                for _ in range(megabytes):
                    file.write(zeros)
    return make


def sparse_tar():
    """A tar of CIFAR-10 whose batches are holes."""
    Path("cifar-10-binary.tar.gz").unlink()
    with tarfile.open("cifar-10-binary.tar.gz", "w:gz") as tar:
        for i in range(1, 6):
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i}.bin")
            entry.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(10 ** 12)}
            tar.addfile(entry)


def pipe(name):
    def make():
        Path(name).unlink(missing_ok=True)
        os.mkfifo(name)
    return make


BAD = f"sample --ckpt bad.pt {DRAW}"
BOUNDS = {                                               # what it is: how it is made, a command, words of its line
    "a billion blocks": (argument(depth=10 ** 9), BAD, "depth is 1000000000"),
    "a million blocks": (argument(depth=10 ** 6), BAD, "1000000 blocks for sides of 8 pixels"),
    "a million blocks in a U-Net": (argument("unet.pt", res_blocks=10 ** 6), BAD, "2000000 blocks"),
    "a width without end": (argument(dim=10 ** 12), BAD, "dim is 1000000000000"),
    "a width that the file does not hold": (argument(dim=10 ** 6), BAD, "is (1, 4, 32) and should be (1, 4, 1000000)"),
    "an image without end": (argument("unet.pt", image_size=10 ** 6), BAD, "sides of 1000000 pixels"),
    "classes that the file does not hold": (argument(num_classes=10 ** 6), BAD, "embedding_table.weight is (11, 32)"),
    "heads that are no whole number": (argument(heads=2.0), BAD, "heads is 2.0"),
    "no heads": (argument(heads=0), BAD, "heads is 0"),
    "nested arguments": (argument(dim=NESTED), "checkpoint bad.pt", "it is nested"),
    "a trillion steps": (edited(lambda run: run["diffusion"].update(T=10 ** 12)), BAD, "a process of 1000000000000 steps"),
    "times without end": (edited(lambda run: run["diffusion"].update(time=[float("inf"), 0])), BAD, "its time is none"),
    "a step beyond 64 bits": (edited(lambda run: run.update(step=10 ** 30)), BAD, "its step is 1"),
    "names of other classes": (edited(lambda run: run["data"].update(classes=["a"])), BAD, "it names 1 classes"),
    "flags that are lists": (edited(lambda run: run["config"].update(data=[1])), "checkpoint bad.pt", "its config is none"),
    "latents of no scale": (edited(lambda run: run["vae"].update(scale=0.0), "latent.pt"), BAD, "its scale is none"),
    "a tensor larger than its file": (edited(lambda run: run["ema"].update(a=torch.zeros(1).expand(10 ** 5, 10 ** 6))), BAD,
                                      "for which it is too small"),
    "a classifier that denoises": (edited(lambda run: run.update(diffusion=dict(schedule="linear", T=9, prediction="eps",
                                                                                variance="small")), "vit.pt"), BAD, "denoises nothing"),
    "an autoencoder that is a DiT": (edited(lambda run: run["vae"].update(network=run["network"]), "latent.pt"), BAD,
                                     "its autoencoder is none"),
    "a sparse tensor": (edited(lambda run: run["ema"].update(a=torch.zeros(9, 9).to_sparse())), BAD, "sparse"),
    "memory for nothing": (pickled(pickle.dumps(Large(), 2)), BAD, "it asks for memory"),
    "a key that takes years to follow": (pickled(key_of_tuples()), BAD, "its tuples lie in one another"),
    "an .npz of zeros": (zeros_in("real.npz"), f"{TRAIN} --data real.npz", "it becomes more than 134,217,728 bytes"),
    "a reference of zeros": (zeros_in("real.npz"), "evaluate --samples packed.npz --reference real.npz", "it becomes more than"),
    "a tar of zeros": (zeros_in("cifar-10-binary.tar.gz"), f"{TRAIN} --data cifar10:.", "it becomes more than"),
    "a tar that says it holds a terabyte": (sparse_tar, f"{TRAIN} --data cifar10:.", "holds more bytes than it does"),
    "a vocabulary of zeros": (zeros_in(text.MERGES_FILE), USE_CLIP, "it becomes more than"),
    "captions nested without end": (lambda: (os.unlink("captions_train.json"), Path("captions_train.json").write_text("[" * 10 ** 5)),
                                    f"{TRAIN} --data coco:. --image-size 8", "no captions of MS-COCO"),
    "a cell of a table that is too long": (lambda: Path("long.csv").write_text("step,loss\n1," + "9" * 200_000), "plot long.csv",
                                           "field larger than field limit"),
    "a seed beyond 64 bits": (lambda: None, f"{TRAIN} --seed 1{30 * '0'}", "or is too large"),
    "images beyond 64 bits": (lambda: None, f"{BAD} --n {2 ** 63}", "or is too large"),
    "one cell of several lines": (lambda: None, [*TRAIN.split(), "--steps", "1\n2"], "--steps"),
    **{f"a pipe for {flag}": (pipe("pipe"), command, "is a pipe, a socket or a device") for flag, command in {
        "--ckpt": "sample --ckpt pipe", "--vae": "sample --ckpt latent.pt --vae pipe", "--mask":
        "sample --ckpt dit.pt --inpaint image.png --mask pipe", "--upscale": "sample --ckpt dit.pt --upscale pipe --factor 2",
        "a log": "plot pipe", "--features": "evaluate --samples real.npz --reference real.npz --features pipe",
        "--report": "companion --report pipe"}.items()},
    "a device for --ckpt": (lambda: None, "checkpoint /dev/zero", "is a pipe, a socket or a device"),
    "a pipe for an .npz": (pipe("real.npz"), f"{TRAIN} --data real.npz", "is a pipe"),
    "a pipe for captions": (pipe("captions_train.json"), f"{TRAIN} --data coco:. --image-size 8", "is a pipe"),
    "a pipe for a vocabulary": (pipe(text.MERGES_FILE), USE_CLIP, "is a pipe"),
    "a pipe in CIFAR-10": (lambda: [pipe(f"{part}.bin")() for part in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6)))],
                           f"{TRAIN} --data cifar10:.", "is a pipe"),
    "a pipe for a log": (pipe("run.csv"), "train --resume --out run.pt --steps 3", "no regular file"),
}


@pytest.mark.parametrize("case", BOUNDS)
def test_what_is_out_of_bounds_is_refused_by_name_before_anything_is_made_of_it(folders, case):
    folders()
    make, command, words = BOUNDS[case]
    make()
    assert words in ended(command.split() if isinstance(command, str) else command)


# A run of somebody else decides nothing about this machine

FOREIGN = {                                              # a place that a run names: the command that would use it, words of its line
    "the autoencoder": (lambda run, place: run["vae"].update(path=f"{place}/vae.pt", model=None, network=None), "latent.pt", BAD,
                        "put it there, or name it by --vae FILE"),
    "the text encoder": (lambda run, place: run["text"].update(path=place), "text.pt", f"{BAD} --prompt cat", "name it by --clip DIR"),
    "the data": (lambda run, place: run["data"].update(spec=f"{place}/real.npz"), "dit.pt",
                 f"evaluate --ckpt bad.pt --features vit.pt {DRAW}", "name real images by --reference"),
    "the data of MS-COCO": (lambda run, place: run["data"].update(spec=f"coco:{place}"), "dit.pt",
                            f"evaluate --ckpt bad.pt --features vit.pt {DRAW}", "name real images by --reference"),
    "data to train on": (lambda run, place: run["config"].update(data=f"{place}/real.npz"), "run.pt",
                         "train --resume --out bad.pt --steps 3", "--data says that it may be read"),
    "a cache": (lambda run, place: run["config"].update(cache=f"{place}/cache"), "run.pt", "train --resume --out bad.pt --steps 3",
                "--cache says that it may be used"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_run_of_somebody_else_names_no_place_that_is_read_or_written(folders, case):
    change, source, command, words = FOREIGN[case]
    victim, _ = folders(), folders()
    before = sorted(victim.rglob("*"))
    for name in ("vae.pt", "real.npz"):                  # which would be found beside the run
        os.rename(name, f"moved-{name}")
    edited(lambda run: change(run, str(victim)), source)()
    assert words in ended(command.split())
    assert sorted(victim.rglob("*")) == before


def test_scores_of_a_run_use_neither_its_cache_nor_its_image_size(folders):
    victim, _ = folders(), folders()
    edited(lambda run: run["config"].update(cache=f"{victim}/cache", image_size=10 ** 6))()
    assert ended(f"evaluate --ckpt bad.pt --features vit.pt --metrics FD {DRAW}".split()) == ""
    assert not (victim / "cache").exists()


def test_what_lies_beside_a_run_is_found_wherever_both_are(folders):
    folders()
    os.mkdir("clip")
    for name in ("pytorch_model.bin", text.MERGES_FILE):
        os.rename(name, f"clip/{name}")
    edited(lambda run: run["text"].update(path="/long/ago/clip"), "text.pt")()
    assert ended(f"{BAD} --prompt cat".split()) == ""
    edited(lambda run: run["data"].update(spec="/long/ago/real.npz"), "dit.pt")()
    assert ended(f"evaluate --ckpt bad.pt --features vit.pt --metrics FD {DRAW}".split()) == ""


def test_a_users_own_run_goes_on_without_flags_and_on_another_machine_with_them(folders, monkeypatch):
    elsewhere, here = folders(), folders()
    run = f"{TRAIN} --cache {elsewhere}/kept --data {elsewhere}/real.npz".replace("--cache cache ", "")
    monkeypatch.setattr(train.Training, "run", RUN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "home"))
    resume = "train --resume --out new.pt --device cpu --steps"
    for words in (run, f"{resume} 2"):
        assert ended(words.split()) == ""
    shutil.rmtree(here / "home")                         # or its key is not there
    assert "--data says that it may be read" in ended(f"{resume} 3".split())
    assert ended(f"{resume} 3 --data {elsewhere}/real.npz --cache {elsewhere}/kept".split()) == ""


# Words

def test_a_user_without_a_home_is_told_to_name_a_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])       # of a container whose user nobody knows
    refusal(files.cache_folder, "--cache DIR", kind=OSError)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))                   # one that cannot be written
    refusal(files.cache_folder, "--cache DIR", kind=OSError)


def test_torchrun_ends_its_report_with_our_line_which_one_process_prints(monkeypatch, tmp_path, capsys):
    report = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    for rank, said in (("0", "train.py: no such thing\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit), cli.one_line_errors("train.py"):
            raise ValueError("no such\nthing")
        assert capsys.readouterr().err == said and json.loads(report.read_text())["message"] == "train.py: no such thing"


def test_a_distance_of_nothing_has_no_sign(folders, capsys):
    folders()
    evaluate.main("--samples real.npz --reference packed.npz --features vit.pt --metrics FD".split())
    assert " 0.000" in (said := capsys.readouterr().out) and "-0.000" not in said


# Files

RUNS = ("checkpoint FILE", f"sample --ckpt FILE {DRAW}")
USES = {                                                 # commands that read a file
    "run.pt": (*RUNS, "train --resume --out FILE --steps 3 --cache cache", "plot guidance --ckpt FILE", "checkpoint FILE --slim s.pt",
               f"evaluate --ckpt FILE --reference real.npz --features vit.pt --metrics FD {DRAW.replace('2', '4')}"),
    "dit.pt": RUNS, "unet.pt": RUNS, "plain.pth": RUNS[:1], "dit.safetensors": RUNS, "latent.pt": RUNS,
    "vit.pt": ("evaluate --samples real.npz --reference packed.npz --features FILE",),
    "vae.pt": ("train --model dit --size Ti/2 --data real.npz --vae FILE --steps 1 --batch-size 2 --device cpu --cache cache --out x.pt",
               "sample --ckpt latent.pt --vae FILE --n 2 --steps 2"),
    **dict.fromkeys(("real.npz", "packed.npz"), (
        f"{TRAIN} --data FILE", "evaluate --samples FILE --reference real.npz --features vit.pt",
        "evaluate --samples real.npz --reference FILE --features vit.pt", f"sample --ckpt dit.pt {DRAW} --npz FILE")),
    **{f"image.{kind}": ("sample --ckpt dit.pt --inpaint FILE --mask image.png --n 1 --steps 2",
                         "sample --ckpt dit.pt --upscale FILE --factor 2 --n 1 --steps 2",
                         f"{TRAIN} --data coco:. --image-size 8") for kind in ("png", "jpg", "gif", "bmp", "webp", "tif")},
    "photos/a.txt": (f"{TRAIN} --data photos --image-size 8 --text",),
    "captions_train.json": (f"{TRAIN} --data coco:. --image-size 8",),
    "run.csv": ("plot FILE --out x.png", "train --resume --out run.pt --steps 3 --cache cache",
                "evaluate --samples real.npz --reference packed.npz --features vit.pt --results FILE"),
    "cifar-10-binary.tar.gz": (f"{TRAIN} --data cifar10:.",),
    "bpe_simple_vocab_16e6.txt.gz": (USE_CLIP,),
    "pytorch_model.bin": (USE_CLIP,),
}
VALUES = [None, True, -1, 0, 3, 10 ** 9, 10 ** 12, 2 ** 63, 10 ** 30, 0.5, float("nan"), float("inf"), 1e308, "", "x", "../../x", [],
          {}, [10 ** 9] * 2, [0] * 5, ["a"], {"a": 1}, [[1]], NESTED, "9" * 5000]
TENSORS = [torch.zeros(0), torch.full((2, 2), float("nan")), torch.zeros(1).expand(10 ** 5, 10 ** 5), torch.zeros(3, 3).to_sparse(),
           torch.zeros(2, dtype=torch.complex64), torch.tensor(5), torch.zeros(2, 2, dtype=torch.bool), torch.zeros([1] * 60)]
ARRAYS = [np.zeros(0), np.zeros((0, 8, 8, 1), np.uint8), np.full((12, 8, 8, 1), np.nan), np.full((12, 8, 8, 1), 1e300), np.array("x"),
          np.zeros((12, 8, 8, 2), np.uint8), np.zeros(12, "M8[s]"), np.zeros(12, [("a", "i4")]), np.arange(12) * 10 ** 17,
          np.arange(12) - 5, np.full((12, 8, 8), 2 ** 63, np.uint64), np.zeros((12, 8, 8, 1), np.complex64), np.zeros((2, 2)),
          np.zeros((12, 1, 1, 3), np.uint8), np.zeros((3, 70_000), bool), np.array(["a"] * 12), np.zeros((12,) + (1,) * 20)]


def with_another(generator, content, values):
    """Nested dicts and lists with one part, anywhere in them, replaced by one of some values."""
    keys = [*content] if isinstance(content, dict) else [*range(len(content))]
    if not keys:
        return content
    key, changed = generator.choice(keys), content.copy()
    part = content[key]
    if isinstance(part, (dict, list)) and part and generator.random() < 0.8:
        changed[key] = with_another(generator, part, values)
    elif generator.random() < 0.1:
        del changed[key]
    else:
        changed[key] = generator.choice(values)
    return changed


def scratched(generator, raw):
    """Bytes with some changed, left out, doubled or added."""
    raw = bytearray(raw)
    start = generator.randrange(len(raw) + 1)
    stop = min(len(raw), start + generator.choice((1, 4, 100, 10_000)))
    match generator.randrange(6):
        case 0:
            del raw[start:]
        case 1:
            raw[start:stop] = generator.randbytes(stop - start)
        case 2:
            raw[start:start] = raw[start:stop]
        case 3:
            raw[start:stop] = bytes(stop - start)
        case 4:
            raw += generator.randbytes(1000)
        case _:
            for _ in range(5):
                raw[generator.randrange(len(raw))] = generator.randrange(256)
    return bytes(raw)


def npy(shape, descr="|u1"):
    """An array's file whose header claims any shape, and 100 bytes."""
    header = str(dict(descr=descr, fortran_order=False, shape=shape)).encode() + b" " * 10 + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(100)


def spoilt(generator, path):
    """Replace a file by one that is nearly it: changed in its bytes, or within its format."""
    raw, within = path.read_bytes(), generator.random() < 0.6
    path.unlink()                                        # others link to it
    if within and path.suffix in (".pt", ".bin") or path.name == "plain.pth" and within:
        content = torch.load(io.BytesIO(raw), weights_only=True)
        torch.save(with_another(generator, dict(content), VALUES + TENSORS), path)
    elif within and path.suffix == ".npz":
        arrays = dict(np.load(io.BytesIO(raw)))
        if generator.random() < 0.7:
            arrays[generator.choice([*arrays])] = generator.choice(ARRAYS)
            np.savez_compressed(path, **arrays)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                shape = generator.choice([(10 ** 12,), (12, 10 ** 6, 10 ** 6, 3), (-1,), (2 ** 63,), (0,) * 40, "x"])
                archive.writestr("arr_0.npy", npy(shape, generator.choice(["|u1", "<f8", "|O", "|V8", "x"])))
    elif within and path.suffix == ".json":
        path.write_text(json.dumps(with_another(generator, json.loads(raw), VALUES[:-2])))
    elif within and path.suffix == ".safetensors":
        length = int.from_bytes(raw[:8], "little")
        header = json.dumps(with_another(generator, json.loads(raw[8:8 + length]), VALUES[:-2])).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length:])
    elif within and path.suffix == ".gz":
        path.write_bytes(gzip.compress(scratched(generator, gzip.decompress(raw)), 1))
    elif within and path.suffix in (".csv", ".txt"):
        junk = generator.choice([b"\0", b"\xff\xfe", b'"', b"9" * 200_000, b"\n" * 1000, "\u2028".encode(), b"nan", b"-1,", b";", b"\r"])
        start = generator.randrange(len(raw) + 1)
        path.write_bytes(raw[:start] + junk + raw[start:])
    else:
        path.write_bytes(scratched(generator, raw))


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_a_damaged_or_hostile_file_ends_in_a_result_or_one_line(folders, count):
    def case(i):
        generator = random.Random(i)
        name = generator.choice([*USES])
        spoilt(generator, folders() / name)
        return generator.choice(USES[name]).replace("FILE", name).split()
    check(case, count)


# Command lines

WORDS = {                                                # good values of flags, besides those of numbers
    "ckpt": "run.pt dit.pt unet.pt latent.pt text.pt vit.pt dit.safetensors", "data": "mnist real.npz packed.npz shapes shapes:one "
    "swissroll coco:. cifar10:. photos", "samples": "real.npz photos mnist", "reference": "packed.npz photos mnist", "vae": "vae.pt",
    "clip": ".", "features": "vit.pt", "cascade": "unet.pt", "size": "Ti/4 Ti/8 Ti Nano S/2 B/4 SD", "out": "new.pt new.png run.pt "
    "new/ new.html", "npz": "new.npz", "trajectory": "new.gif", "gif": "new.gif", "csv": "run.csv", "report": "none.md",
    "file": "run.pt dit.pt vae.pt dit.safetensors plain.pth", "slim": "new.pt", "save_reference": "new.npz", "results": "new.csv",
    "classes": "1,2 3 cat", "prompt": "cat", "inpaint": "image.png image.gif", "mask": "image.png", "upscale": "image.jpg",
    "denoise": "image.bmp", "cfg_interval": "1,9", "metrics": "FD IS,FD recall", "cache": "cache",
}
NUMBERS = ["1", "2", "4", "8", "0.5", "0"]
STRANGE = ["", " ", "-1", "nan", "inf", "1e400", str(10 ** 30), str(2 ** 63), "9" * 5000, "0x10", "²", "1_0", "a,b", ",", "../..", "run.pt",
           "/dev/null", "pipe", "photos", "none.pt", "x" * 300, "\udcff", "a\nb", "-", "--", "*", "~", "%s{}", "coco:", "cifar10:x", "1,2,3"]
SEVERAL = {"checkpoint": 1, "train": 6, "sample": 6, "evaluate": 6, "gflops": 3, "plot": 2, "bench": 2, "companion": 1}


def words_of(generator, action, good):
    """What stands on a command line for one of its parser's actions; good: the chance of each value to be one."""
    words = [generator.choice(action.option_strings)] if action.option_strings else []
    if action.nargs == 0:
        return words
    for _ in range(generator.choice((1, 1, 2)) if action.nargs == "+" else 1):
        known = [*action.choices] if action.choices else WORDS.get(action.dest, "").split() or NUMBERS
        words.append(str(generator.choice(known if generator.random() < good else STRANGE)))
    return words


def command_line(generator):
    """A command and its arguments, drawn from the flags that its parser knows."""
    program = generator.choices([*SEVERAL], [*SEVERAL.values()])[0]
    actions, words = (settings if program == "train" else importlib.import_module(program)).flags()._actions, [program]
    chosen = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    for action in chosen:                                # of plot.py and bench.py
        words.append(generator.choice([*action.choices]))
        actions = action.choices[words[-1]]._actions
    good = generator.choice((0.5, 0.95, 1))
    wanted = [action for action in actions if action.required or not action.option_strings]
    others = [action for action in actions[1:] if action not in wanted and action not in chosen]     # the first is --help
    for action in wanted * (generator.random() < 0.95) + generator.sample(others, generator.randint(0, min(6, len(others)))):
        words += words_of(generator, action, good)
    return words


@pytest.mark.parametrize("count", [150, pytest.param(8000, marks=pytest.mark.slow)])
def test_any_command_line_ends_in_a_result_or_one_line(folders, monkeypatch, count):
    def digits(side, images=data.load("mnist").images[:60]):
        return data._resized(data.Dataset("mnist", images, np.arange(60) % 10, "0123456789"), side)

    for module, name, value in ((data, "SHAPES", 60), (data, "_mnist", digits), (features, "JUDGE", "vit.pt"),
                                (gflops, "show", lambda tables: None)):
        monkeypatch.setattr(module, name, value)
    for table in (bench.MEASUREMENTS, plot.COMMANDS):    # what takes long
        for name in {*table} - {"curves", "cost", "quality"}:
            monkeypatch.setitem(table, name, lambda args: (np.zeros((9, 9, 3), np.uint8), "drawn"))

    def case(i):
        folders()
        os.mkfifo("pipe")
        return command_line(random.Random(i))
    check(case, count)
