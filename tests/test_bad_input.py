"""What a user can get wrong ends in one line that says so, exit status 2, no traceback, and nothing overwritten.

One table: a case is the files it lays out in a folder, a command run there, and words of the line it must get. There lie already
run.pt, the judge as judge.pt, real.npz of 20 digits, fake.npz of 9, and stats.npz, the statistics of real.npz alone.
"""
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config
from PIL import Image
from torch.utils import _triton

import checkpoint
import cli
import data
import dit
import features
import files
import inception
import models
import text
import train
import uvit
from cli import check_compiler
from refusals import refusal

ROOT = Path(__file__).parents[1]
JUDGE = str(features.JUDGE)


class Evil:
    """A pickle of it would make a file named "pwned" in the current folder."""

    def __reduce__(self):
        return open, ("pwned", "w")


def image(path, size=(40, 40)):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def images_of_two_classes():
    for i in range(6):
        image(f"photos/{'cat' if i % 2 else 'dog'}/{i}.png")


def corrupt_image():
    images_of_two_classes()
    Path("photos/cat/torn.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(50))


def npz(name="images.npz", **arrays):
    return lambda: np.savez(name, **arrays)


def bytes_of(name, content):
    return lambda: Path(name).write_bytes(content)


def cut_off(name):
    """The first half of a file that lies there."""
    def make():
        content = Path(name).read_bytes()
        os.unlink(name)                                  # run.pt is one file for all cases
        Path(name).write_bytes(content[:len(content) // 2])
    return make


def edited(change, source="run.pt", name="run.pt"):
    """A run with something in it changed."""
    def make():
        run = torch.load(source, weights_only=True)
        change(run)
        Path(name).unlink(missing_ok=True)               # likewise
        torch.save(run, name)
    return make


def pickled(name):
    def make():
        with open(name, "wb") as file:
            pickle.dump({"model": Evil()}, file)
    return make


def official_without_null_class():
    torch.save(dit.DiT(8, 4, 4, 64, 1, 1, num_classes=1000, null_class=False).state_dict(), "official.pt")


def without_labels(run):
    run["network"]["arguments"] |= dict(num_classes=None)
    run["data"] |= dict(classes=None, num_classes=None)
    for weights in (run["model"], run["ema"]):
        del weights["y_embedder.embedding_table.weight"]


def with_network(network, **config):
    """A change of a run: another network, freshly initialised, and other flags."""
    def change(run):
        state = models.build(network).state_dict()
        run |= dict(network=network, model=state, ema=state, config=run["config"] | config)
        run["diffusion"] = None if network["class"] == "ViT" else run["diffusion"]
    return change


VIT = {"class": "ViT", "arguments": dict(image_size=8, patch_size=4, channels=1, dim=16, depth=1, heads=2, num_classes=10)}
READER = {"class": "UViT", "text": dict(dim=16, length=6, depth=1, heads=2), "arguments": dict(
    image_size=8, patch_size=4, channels=1, dim=16, depth=2, heads=2, context_dim=16, context_tokens=6)}
classifiers_run = edited(with_network(VIT), name="vit.pt")
text_run = edited(with_network(READER), name="text.pt")
text_run_without_dropped_captions = edited(with_network(READER, cfg_drop=0.0), name="text.pt")
unlabelled_run = edited(without_labels)


def released_text_network():
    torch.save(uvit.UViT(8, 2, 4, dim=64, depth=2, heads=1, context_dim=8).state_dict(), "released.pt")


def clip_without_vocabulary():
    os.mkdir("clip")
    torch.save(text.CLIPTextEncoder(vocab=714, length=20, dim=64, depth=1, heads=1).state_dict(), "clip/pytorch_model.bin")


def coco_without_images():
    os.mkdir("coco")
    annotations = dict(images=[dict(id=i, file_name=f"{i}.jpg") for i in range(2)], annotations=[])
    Path("coco/captions_train2017.json").write_text(json.dumps(annotations))


def pixels(*shape):
    return np.zeros(shape, np.uint8)


def statistics_of(features, **changes):
    """stats.npz, said to be of other features or otherwise changed."""
    def make():
        with np.load("stats.npz") as archive:
            tables = dict(archive, features=features) | changes
        np.savez("stats.npz", **tables)
    return make


def nothing():
    """No file but the folder's own."""


TRAIN = "train.py --size Ti/16 --batch-size 4 --steps 2 --device cpu --cache cache --out new.pt"
SAMPLE = "sample.py --ckpt run.pt --n 2 --steps 2 --device cpu"
FAKE = "evaluate.py --samples fake.npz"
PAIR, STATS = (f"{FAKE} --reference {reference}.npz --features judge.pt" for reference in ("real", "stats"))
RUN = "evaluate.py --ckpt run.pt --features judge.pt --steps 2"
WEIGHTS = features.sha256_of(JUDGE)[:8]
CASES = [
    # name, files, command, words of the line
    ("a missing checkpoint", nothing, "sample.py --ckpt none.pt", "none.pt: there is no such file"),
    ("a checkpoint that is a folder", lambda: os.mkdir("d.pt"), "sample.py --ckpt d.pt", "d.pt is a folder"),
    ("a pickle that would run code", pickled("p.pt"), "sample.py --ckpt p.pt", "code"),
    ("a checkpoint of another format", edited(lambda run: run.update(version=99)), SAMPLE, "version 99"),
    ("an autoencoder that is not there", nothing, f"{TRAIN} --vae nowhere.pt", "--vae nowhere.pt: there is no such file"),
    ("checkpointing of an autoencoder", nothing, "train.py --model vae --checkpointing --out new.pt", "use --accumulate"),
    ("how to score, but not when", nothing, f"{TRAIN} --eval-n 100",
     "--eval-n: it says how to score, which only --eval-every does"),
    ("too few samples to score", nothing, f"{TRAIN} --eval-every 2 --eval-n 3", "need at least 4 samples and images, not 3"),
    ("a slim run over a file that is there", nothing, "checkpoint.py run.pt --slim run.pt", "would replace it"),
    ("a data set of another kind", lambda: np.save("a.npy", pixels(5, 32, 32, 3)), f"{TRAIN} --data a.npy",
     "a.npy is a file of another kind: data is mnist"),
    ("an unknown data set", nothing, f"{TRAIN} --data nowhere", "no data set 'nowhere'"),
    ("a folder without a size", images_of_two_classes, f"{TRAIN} --data photos", "--image-size"),
    ("a missing .npz", nothing, f"{TRAIN} --data images.npz", "images.npz: there is no such file"),
    ("one image", npz(arr_0=pixels(1, 32, 32, 3)), f"{TRAIN} --data images.npz", "too few"),
    ("a size the patch does not divide", npz(arr_0=pixels(5, 30, 30, 3)), f"{TRAIN} --data images.npz", "use 16 or 32"),
    ("an unknown size", nothing, f"{TRAIN} --size XXL/2", "S, B, L, XL and a patch size"),
    ("a weight of errors of x0 that is not predicted", nothing, f"{TRAIN} --prediction v --max-weight 2",
     "--max-weight: it weights the errors of --prediction x0"),
    ("a size without a patch", nothing, f"{TRAIN} --size S", "B/4"),
    ("a U-Net with a patch", nothing, f"{TRAIN} --model unet --size S/2", "without a patch"),
    ("a size that a U-Net cannot halve", npz(arr_0=pixels(5, 30, 30, 3)), f"{TRAIN} --model unet --size Ti --data images.npz",
     "use 28 or 32"),
    ("an upsampler of latents", lambda: torch.save({}, "vae.pt"), f"{TRAIN} --model unet --size Ti-up --vae vae.pt",
     "--vae: --size Ti-up enlarges the pixels"),
    ("scores of an upsampler", nothing, f"{TRAIN} --model unet --size Ti-up --eval-every 2", "--eval-every: --size Ti-up enlarges"),
    ("an upsampler whose small image has no whole sides", npz(arr_0=pixels(5, 30, 30, 3)),
     f"{TRAIN} --model unet --size Ti-up --data images.npz", "use 28 or 32"),
    ("a cascade without an upsampler", nothing, f"{SAMPLE} --cascade run.pt", "holds a DiT, which enlarges nothing"),
    ("a U-Net that reads text", nothing, f"{TRAIN} --model unet --size ldm-4", "give --text"),
    ("a variance that a U-ViT has not", nothing, f"{TRAIN} --model uvit --variance learned", "small or large"),
    ("a block design of a U-Net", nothing, f"{TRAIN} --model unet --size Ti --conditioning adaln", "DiT's, not of unet"),
    ("a hybrid DiT", nothing, f"{TRAIN} --hybrid", "ViT's, not of dit"),
    ("a hybrid whose patch 4 does not divide", nothing, f"{TRAIN} --model vit --size Ti/2 --hybrid", "multiple of 4"),
    ("a classifier without labels", npz(arr_0=pixels(5, 32, 32, 3)), f"{TRAIN} --model vit --data images.npz", "has none"),
    ("a schedule for a classifier", nothing, f"{TRAIN} --model vit --schedule cosine", "does not denoise"),
    ("a batch that the micro-batches do not divide", nothing, f"{TRAIN} --accumulate 3", "not a multiple"),
    ("a batch of nothing", nothing, f"{TRAIN} --batch-size 0", "from 1 on"),
    ("a learning rate that is no number", nothing, f"{TRAIN} --lr nan", "nan is not a number"),
    ("dropping every label", nothing, f"{TRAIN} --cfg-drop 1", "must lie in [0, 1)"),
    ("an unknown flag", nothing, f"{TRAIN} --momentum 3", "--momentum"),
    ("a run that exists", nothing, "train.py --steps 2", "run.pt exists: --resume"),
    ("--resume without a run", nothing, "train.py --resume --out none.pt", "none.pt"),
    ("--resume against its settings", nothing, "train.py --resume --seed 1 --steps 9", "--seed is 0 there, not 1"),
    ("--resume of another backbone", nothing, "train.py --resume --model unet --steps 9", "--model is dit there, not unet"),
    ("--resume whose log is damaged", edited(lambda run: run.update(log=torch.zeros(3))), "train.py --resume --steps 9",
     "not a run of train.py"),
    ("--resume of a finished run", nothing, "train.py --resume", "step 4 of 4"),
    ("--resume of a run that lacks a tensor", edited(lambda run: run["model"].popitem()), "train.py --resume --steps 9", "damaged"),
    ("--resume of a run without its optimizer", edited(lambda run: run.update(optimizer={})), "train.py --resume --steps 9",
     "damaged"),
    ("--resume of released weights", official_without_null_class, "train.py --resume --out official.pt", "not a run"),
    ("--out in a folder that does not exist", nothing, f"{TRAIN} --out no/where.pt", "does not exist"),
    ("--out without its ending", nothing, f"{TRAIN} --out model", ".pt"),
    ("a class out of range", nothing, f"{SAMPLE} --classes 3,10", "'10' is not a class"),
    ("classes of a run without labels", unlabelled_run, f"{SAMPLE} --classes 3", "without labels"),
    ("guidance of a run without labels", unlabelled_run, f"{SAMPLE} --cfg-scale 2", "no unconditional input"),
    ("guidance without a null class", official_without_null_class, "sample.py --ckpt official.pt --cfg-scale 4",
     "no unconditional input"),
    ("more steps than there are", nothing, f"{SAMPLE} --steps 1001", "--steps 1001"),
    ("an interval of one number", nothing, f"{SAMPLE} --cfg-interval 5", "LOW,HIGH"),
    ("an interval backwards", nothing, f"{SAMPLE} --cfg-interval 500,100", "after the last"),
    ("guidance on more channels than there are", nothing, f"{SAMPLE} --cfg-channels 2", "guidance on 2 channels"),
    ("eta with another sampler", nothing, f"{SAMPLE} --eta 1", "eta is a setting of ddim"),
    ("samples into a folder that does not exist", nothing, f"{SAMPLE} --out no/samples.png", "does not exist"),
    ("a trajectory into a folder that does not exist", nothing, f"{SAMPLE} --trajectory no/way.gif", "does not exist"),
    ("timing a single step", nothing, "bench.py train --steps 1", "from 2 on"),
    ("samples of a classifier", classifiers_run, "sample.py --ckpt vit.pt", "a ViT, which classifies"),
    ("released weights that read text without CLIP", released_text_network, "sample.py --ckpt released.pt --prompt cat",
     "--clip DIR names"),
    ("a run that reads text without a prompt", text_run, "sample.py --ckpt text.pt", "--prompt"),
    ("classes for a run that reads text", text_run, "sample.py --ckpt text.pt --prompt cat --classes 3", "without labels"),
    ("a CLIP for a run with an encoder of its own", text_run, "sample.py --ckpt text.pt --prompt cat --clip clip", "of its own"),
    ("a CLIP for a run without text", nothing, f"{SAMPLE} --clip clip", "not trained with texts"),
    ("guidance where no caption was dropped", text_run_without_dropped_captions,
     "sample.py --ckpt text.pt --prompt cat --cfg-scale 2", "no unconditional input"),
    ("a prompt for a run without text", nothing, f"{SAMPLE} --prompt cat", "not trained with texts; --classes"),
    ("a CLIP that is not there", nothing, f"{TRAIN} --data shapes --clip nowhere", "--clip nowhere: there is no such folder"),
    ("a CLIP without its weights", lambda: os.mkdir("clip"), f"{TRAIN} --data shapes --clip clip",
     "clip/model.safetensors: there is no such file"),
    ("a CLIP without its vocabulary", clip_without_vocabulary, f"{TRAIN} --data shapes --clip clip", "no merges clip"),
    ("captions of digits", nothing, f"{TRAIN} --text", "mnist has no captions"),
    ("a text for a classifier", nothing, "train.py --model vit --text --out new.pt", "--text: a ViT classifies"),
    ("a scale of no latents", nothing, f"{TRAIN} --latent-scale 2",
     "--latent-scale: it is a number above 0, of the latents of --vae"),
    ("MS-COCO without its captions", lambda: os.mkdir("coco"), f"{TRAIN} --data coco:coco --image-size 32", "it has none"),
    ("MS-COCO without its images", coco_without_images, f"{TRAIN} --data coco:coco --image-size 32", "2 of 2 images"),
    ("an image too large to be counted", nothing, "gflops.py --model dit --size S/2 --image-size 100000000",
     "too large to be counted"),
    ("a negative number of classes", nothing, "gflops.py --model dit --size S/2 --num-classes -5", "from 0 on"),
    ("the cost of a model without a size", nothing, "gflops.py --model dit", "both --model and --size"),
    ("the cost at a size that the stride does not divide", nothing, "gflops.py --model unet --size adm-64 --image-size 36",
     "use 32 or 40"),
    ("no subcommand", nothing, "bench.py", "command"),
    ("an unknown study", nothing, "study.py colours", "'first', 'blocks', 'guidance'"),

    ("nothing to score", nothing, "evaluate.py", "--ckpt or --samples"),
    ("one sample", nothing, f"{PAIR} --n 1 --metrics FD", "at least two"),
    ("one sample of a run", nothing, f"{RUN} --n 1", "at least two"),
    ("one real image", npz("one.npz", arr_0=pixels(1, 32, 32, 1)), f"{FAKE} --reference one.npz --features judge.pt",
     "at least two"),
    ("too few samples for neighbours", nothing, f"{PAIR} --n 3 --metrics recall", "needs 4 images on both sides, and there are 3"),
    ("samples of another size", npz("small.npz", arr_0=pixels(9, 28, 28, 1)),
     "evaluate.py --samples small.npz --reference real.npz", "unequal sizes: the samples have 28x28 pixels, the reference 32x32"),
    ("an empty folder of samples", lambda: os.mkdir("none"), "evaluate.py --samples none --reference real.npz",
     "none holds no image"),
    ("a folder of unequal images", lambda: [image(f"photos/{side}.png", (side, side)) for side in (8, 9)],
     "evaluate.py --samples photos --reference real.npz", "squares of one size"),
    ("features that are not finite",
     edited(lambda run: next(iter(run["ema"].values())).fill_(float("nan")), "judge.pt", "nan.pt"),
     f"{FAKE} --reference real.npz --features nan.pt", "NaN or infinite"),
    ("statistics of another ViT", statistics_of("vit-pets"), STATS,
     f"statistics of vit-pets (weights {WEIGHTS}), the features asked for are vit-mnist (weights {WEIGHTS})"),
    ("statistics of other weights", statistics_of("vit-mnist", features_sha256=64 * "a"), STATS, "vit-mnist (weights aaaaaaaa)"),
    ("statistics of an unknown ViT", statistics_of("vit-pets", features_sha256="a"), f"{FAKE} --reference stats.npz",
     "name that file with --features"),
    ("ADM's statistics and a ViT", npz("adm.npz", mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(3), sigma_s=np.eye(3)),
     f"{FAKE} --reference adm.npz --features judge.pt", f"statistics of inception (weights {inception.SHA256[:8]})"),
    ("statistics of fewer features", statistics_of("vit-mnist", mu=np.zeros(3), sigma=np.eye(3)), STATS, "of one feature space"),
    ("Inception's weights with another hash", lambda: torch.save({"Mixed_5b.branch1x1.conv.weight": torch.zeros(2)}, "w.pth"),
     f"{FAKE} --reference real.npz --features w.pth", f"expected {inception.SHA256}"),
    ("precision without real images", nothing, f"{STATS} --metrics FD,precision",
     "precision[vit-mnist] cannot be had: the reference is statistics without images"),
    ("recall of statistics", nothing,
     "evaluate.py --samples stats.npz --reference real.npz --features judge.pt --metrics recall",
     "the samples are statistics without images"),
    ("accuracy without labels", npz(arr_0=pixels(9, 32, 32, 1)),
     "evaluate.py --samples images.npz --reference real.npz --features judge.pt --metrics accuracy", "samples with labels"),
    ("spatial features of a ViT", nothing, f"{PAIR} --metrics sFD", "sFD[vit-mnist] cannot be had: it needs spatial features"),
    ("an unknown metric", nothing, f"{PAIR} --metrics FD,KID", "'KID' is none of IS, FD, sFD, precision, recall, accuracy"),
    ("results with other columns", bytes_of("results.csv", b"step,loss\n1,2\n"), PAIR, "other columns"),
    ("a reference into a folder that does not exist", nothing, f"{PAIR} --save-reference no/where.npz", "does not exist"),
    ("a reference that would replace the samples", nothing, f"{PAIR} --save-reference fake.npz", "would replace"),
    ("a reference that could not be read again", nothing, f"{PAIR} --save-reference saved", ".npz"),
    ("a reference without images to save", nothing,
     "evaluate.py --reference stats.npz --features judge.pt --save-reference new.npz", "stats.npz holds no images"),
    ("more samples than there are", nothing, f"{PAIR} --n 10", "--n 10: fake.npz has 9 images"),
    ("some samples of statistics", nothing, "evaluate.py --samples stats.npz --reference real.npz --features judge.pt --n 9",
     "--n 9"),
    ("images of a size that the ViT was not taught", npz("small.npz", arr_0=pixels(9, 28, 28, 1)),
     "evaluate.py --samples small.npz --reference small.npz --features judge.pt", "28 x 28 x 1, where the ViT in"),
    ("features of a DiT", nothing, f"{FAKE} --reference real.npz --features run.pt", "holds a DiT"),
    ("features that do not exist", nothing, f"{FAKE} --reference real.npz --features none.pt", "none.pt"),
    ("damaged samples", cut_off("fake.npz"), PAIR, "cannot use fake.npz"),
    ("a missing reference", nothing, f"{FAKE} --features judge.pt", "--reference"),
    ("a run of unknown data", edited(lambda run: run["data"].update(spec=None)),
     "evaluate.py --ckpt run.pt --features judge.pt", "does not say what it was trained on"),
]
if not torch.cuda.is_available():
    CASES.append(("a GPU where there is none", nothing, f"{TRAIN} --device cuda", "CUDA"))


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder of real.npz, fake.npz and stats.npz."""
    folder, space = tmp_path_factory.mktemp("scored"), features.space_of(JUDGE, torch.device("cpu"))
    for name, split, n in (("real", "train", 20), ("fake", "test", 9)):
        images, labels = data.load(split=split).batch(np.arange(n))
        np.savez(folder / f"{name}.npz", arr_0=images.numpy(), arr_1=labels.numpy())
    measured = features.measure([torch.from_numpy(np.load(folder / "real.npz")["arr_0"])], space)
    tables = dict(mu=measured.pool.mu, sigma=measured.pool.sigma, n=20, features=space.name, features_sha256=space.sha256)
    np.savez(folder / "stats.npz", **tables)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_run, scored):
    """A folder of these files and the run, to work in."""
    shutil.copytree(scored, tmp_path, dirs_exist_ok=True)
    shutil.copy(JUDGE, tmp_path / "judge.pt")
    os.link(tiny_run, tmp_path / "run.pt")               # large
    shutil.copy(tiny_run.with_suffix(".csv"), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def contents():
    """The files here, and what would change if one were written to or replaced."""
    states = {path: path.stat() for path in Path().rglob("*") if path.is_file() and "cache" not in path.parts}
    return {path: (state.st_ino, state.st_size, state.st_mtime_ns) for path, state in states.items()}


def refused(status, err, words):
    assert status == 2 and len(err.strip().splitlines()) == 1 and words in err, err


@pytest.mark.parametrize("make, command, words", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_gets_one_line_and_status_2_and_nothing_is_overwritten(here, capfd, make, command, words):
    make()
    before = contents()
    program, *argv = command.split()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(program.removesuffix(".py")).main(argv)
    refused(stop.value.code, capfd.readouterr().err, words)
    assert contents() == before


@pytest.mark.parametrize("name", ["a pickle that would run code", "--resume against its settings"])
def test_bad_input_in_a_process_of_its_own(here, name):
    _, make, command, words = next(case for case in CASES if case[0] == name)
    make()
    program, *argv = command.split()
    done = subprocess.run([sys.executable, str(ROOT / program), *argv], capture_output=True, text=True)
    refused(done.returncode, done.stderr, words)
    assert not Path("pwned").exists()


def trained(*argv):
    train.main([*TRAIN.split()[1:], *argv])


def test_skip_bad_goes_on_and_counts(here, capfd):
    corrupt_image()
    trained("--data", "photos", "--image-size", "32", "--skip-bad")
    said = capfd.readouterr()
    assert "left out: 1 of 7 image files, the first: " in said.out
    assert checkpoint.load("new.pt").data.summary == said.out.splitlines()[0]


@pytest.mark.parametrize("command", [TRAIN, "sample.py --ckpt run.pt --out new.png", "evaluate.py --ckpt run.pt",
                                     "sample.py --ckpt run.pt --upscale image.png --factor 2 --out new.png"])
def test_compile_without_a_compiler_is_one_line_before_the_work(here, capfd, command):
    image("image.png", (16, 16))
    before, (program, *argv) = contents(), command.split()
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(SystemExit) as stop:
        importlib.import_module(program.removesuffix(".py")).main([*argv, "--compile", "--device", "cpu"])
    refused(stop.value.code, capfd.readouterr().err, "--compile: PyTorch needs a C++ compiler, and there is none: install g++")
    assert contents() == before


def test_compile_on_a_gpu_without_triton_or_its_compiler_is_refused(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    for there, said in ((False, "pip install triton"), (True, "install gcc")):
        monkeypatch.setattr(_triton, "has_triton", lambda: there)
        refusal(lambda: check_compiler("cuda"), "--compile: PyTorch needs", said)


@pytest.fixture
def gpu(monkeypatch):
    """One GPU, as far as PyTorch is asked about it: a function that says whether it computes in bfloat16."""
    def give(half):
        for name, answer in dict(is_available=True, device_count=1, set_device=None, get_device_name="Card 1",
                                 is_bf16_supported=half).items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    with features.full_precision():                      # which puts back what a command sets
        yield give


@pytest.mark.parametrize("half, rank, command, words", [
    (False, "0", f"{TRAIN} --device cuda --precision bf16", "Card 1 does not compute in bfloat16: take tf32 or fp32"),
    (False, "0", f"{SAMPLE} --device cuda --precision bf16", "Card 1 does not compute in bfloat16: take tf32 or fp32"),
    (True, "1", f"{TRAIN} --device cuda", "process 1 has no GPU: this machine has 1"),
    (True, "0", f"{TRAIN} --precision tf32", "--precision tf32 is a GPU's")])
def test_what_the_gpu_lacks_gets_one_line(here, capfd, monkeypatch, gpu, half, rank, command, words):
    gpu(half)
    monkeypatch.setenv("LOCAL_RANK", rank)
    program, *argv = command.split()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(program.removesuffix(".py")).main(argv)
    refused(stop.value.code, capfd.readouterr().err, words)


@pytest.mark.parametrize("half, asked, found", [(True, None, "bf16"), (False, None, "tf32"), (True, "tf32", "tf32"),
                                                (True, "fp32", "fp32")])
def test_a_gpu_computes_in_the_precision_asked_for_or_in_its_best(gpu, capfd, half, asked, found):
    gpu(half)
    device, *_ = cli.processes("cuda", precision=asked)
    assert cli.precision_on(device, asked) == found
    assert torch.get_float32_matmul_precision() == ("highest" if found == "fp32" else "high")
    assert torch.backends.cudnn.allow_tf32 == (found != "fp32")
    assert capfd.readouterr().err.count("Card 1 does not compute in bfloat16: --precision is tf32") == (not half)


def test_a_second_run_on_the_same_file_is_refused(here, capfd):
    with files.sole_writer("new.pt"), pytest.raises(SystemExit) as stop:
        trained()
    refused(stop.value.code, capfd.readouterr().err, "another run")
    assert not Path("new.pt").exists() and not Path("new.csv").exists()


def test_gradients_that_are_not_finite_stop_the_run_and_the_line_says_what_to_do(here, capfd):
    with pytest.raises(SystemExit) as stop:
        trained("--steps", "14", "--lr", "1e20", "--warmup", "0", "--clip-grad", "0")
    refused(stop.value.code, capfd.readouterr().err, "lower --lr")
