"""checkpoint.py: a run survives the disk bit for bit, released weights load by name, a hostile file is refused in one line.

Networks are tiny and have formula weights. A released DiT or U-ViT is its official state dict written to a file: names, shapes
and the expected output come from golden/. Published U-Nets are known by their shapes, on the meta device; where a file is needed,
the table of configurations holds small ones under the same names. A .safetensors file is written by hand, so that the reader is
not checked against itself.
"""
import functools
import io
import json
import os
import pickle
import resource
import signal
import struct
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from refusals import refusal
from tensor_files import read, read_safetensors
from torch.testing import assert_close

import checkpoint
import ddpm
import dit
import models
import sample
import tensor_files
import train
import unet
import uvit
import vit
from checkpoint import (Autoencoder, Clip, Data, Process, Run, load, load_network, main, plain, save,
                        summary, typed)
from ddpm import cosine_betas
from dit import DiT
from formula import fill, formula_weight, golden, golden_json
from models import HEADS, infer, released_process, released_scale
from unet import ADM, UNet
from uvit import UViT
from vit import ViT

ROOT = Path(__file__).parent.parent
SMALL = dict(image_size=8, patch_size=2, channels=3, dim=16, depth=2, heads=1, num_classes=5)
every_design = pytest.mark.parametrize("conditioning", dit.BLOCKS)


def network(**changes):
    return fill(DiT(**SMALL | changes), computed=["pos_embed"])


def outputs(model, n=3):
    """What a DiT makes of some images, steps and classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, model.channels, *model.image_size, generator=generator)
    with torch.no_grad():
        return model(x, torch.arange(n) * 400, None if model.num_classes is None else torch.arange(n))


def a_run(**changes):
    """A run as train.py saves it, of a network after one step of AdamW; ema and model differ."""
    model, ema = network(), network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3, 8, 8), torch.tensor([5]), torch.tensor([2])).square().mean().backward()
    optimizer.step()
    run = Run(version=checkpoint.VERSION, step=1, config=dict(lr=0.1, seed=0, flip=True, shift=None, data="mnist"),
              network={"class": "DiT", "arguments": SMALL}, diffusion=Process("cosine", 50, "v", "learned"),
              data=Data("mnist", list("abcde"), 5, 3, [8, 8]), model=model.state_dict(), ema=ema.state_dict(),
              optimizer=optimizer.state_dict(), log=torch.arange(8, dtype=torch.float64).reshape(2, 4), norm=0.5)
    return replace(run, **changes)


def classifiers_run():
    """A run of a ViT, as train.py saves it: nothing is denoised."""
    arguments = dict(image_size=8, patch_size=2, channels=3, dim=16, depth=1, heads=2, num_classes=5)
    state = fill(ViT(**arguments)).state_dict()
    return a_run(network={"class": "ViT", "arguments": arguments}, diffusion=None, model=state, ema=state)


def saved(path, content):
    torch.save(content, path)
    return path


def identical(a, b):
    """Whether two nests of records, dicts, lists and tensors are the same bit for bit."""
    if isinstance(a, Run) and isinstance(b, Run):
        return identical(plain(a), plain(b))
    if torch.is_tensor(a):
        # repr tells -0.0 from 0.0, and NaN is NaN
        return a.dtype == b.dtype and a.shape == b.shape and repr(a.tolist()) == repr(b.tolist())
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(identical, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


# A run, there and back

LATENT = dict(vae=Autoencoder(0.5, "vae.pt", "ab", {"class": "AutoencoderKL"}, {"w": torch.ones(2)}),
              text=Clip("clip", "cd", torch.ones(3, 4)))
ODD = dict(log=torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.4e38]), norm=float("nan"), step=2 ** 60)


@pytest.mark.parametrize("changes", [{}, LATENT, ODD], ids=["pixels", "latents", "odd numbers"])
def test_a_run_survives_the_disk_bit_for_bit(tmp_path, changes):
    run = a_run(**changes)
    save(tmp_path / "run.pt", run)
    loaded = load(tmp_path / "run.pt")
    assert identical(loaded, run) and identical(typed(Run, plain(run)), run)
    assert [type(part) for part in (loaded.diffusion, loaded.data, loaded.vae, loaded.text)] == [
        Process, Data, *((Autoencoder, Clip) if changes is LATENT else (type(None), type(None)))]


def test_a_loaded_run_builds_the_networks_that_were_saved_in_eval_mode(tmp_path):
    save(tmp_path / "run.pt", run := a_run())
    expected, loaded = network(), load(tmp_path / "run.pt")
    assert all(outputs(built).equal(outputs(expected)) for built in (loaded.build()[0], load_network(tmp_path / "run.pt")))
    expected.load_state_dict(run.model)
    assert outputs(loaded.build("model")[0]).equal(outputs(expected)) and not loaded.build()[0].training


def test_a_run_describes_its_diffusion_the_times_its_network_is_told_and_the_ends_of_its_schedule(tmp_path):
    _, diffusion = a_run().build()
    assert (diffusion.T, diffusion.prediction, diffusion.variance) == (50, "v", "learned")
    np.testing.assert_allclose(diffusion.alpha_bars, np.cumprod(1 - cosine_betas(50)))
    save(tmp_path / "run.pt", a_run(diffusion=Process("linear", 50, "eps", "small", range=(0.1, 0.2), time=(0.25, 1))))
    _, diffusion = load(tmp_path / "run.pt").build()
    assert diffusion.original(torch.tensor([0, 1, 49])).tolist() == [1, 1.25, 13.25]
    np.testing.assert_allclose(diffusion.betas, np.linspace(0.1, 0.2, 50))


def test_a_classifiers_run_loads_builds_and_is_described_without_a_diffusion(tmp_path):
    path, run = tmp_path / "run.pt", classifiers_run()
    save(path, run)
    network, diffusion = load(path).build()
    assert diffusion is None and isinstance(network, ViT) and identical(dict(network.state_dict()), dict(run.ema))
    said = "\n".join(summary(path))
    assert "a run at step 1" in said and "ViT" in said and "num_classes=5" in said and "diffusion" not in said


def test_saves_in_the_background_are_of_the_moment_they_began_one_at_a_time_and_all_done_however_it_ends(tmp_path, monkeypatch):
    go_on, writing, run, honest = threading.Event(), [], a_run(), checkpoint.save
    expected = a_run()

    def held(path, run):
        writing.append(run.step)
        assert go_on.wait(60)
        honest(path, run)
        writing.remove(run.step)
    monkeypatch.setattr(checkpoint, "save", held)
    with pytest.raises(RuntimeError, match="stopped"), checkpoint.Saves() as saves:
        saves.begin(tmp_path / "run.pt", run)
        for part in (run.model, run.ema, run.optimizer["state"]):        # training goes on
            for tensor in tensor_files.tensors_in(part):
                tensor.fill_(7)
        saves.check()                                    # does not wait
        threading.Timer(0.1, go_on.set).start()
        saves.begin(tmp_path / "next.pt", replace(run, step=2))          # waits for the first
        assert 1 not in writing and identical(load(tmp_path / "run.pt"), expected)
        raise RuntimeError("stopped")
    assert not writing and load(tmp_path / "next.pt").step == 2 and saves.thread._shutdown


@pytest.mark.parametrize("noticed", ["begin", "check", "wait", "__exit__"])
def test_a_save_that_failed_in_the_background_is_an_error_of_the_next_call(tmp_path, noticed):
    saves, path = checkpoint.Saves(), tmp_path / "gone" / "run.pt"
    saves.begin(path, a_run())
    while not saves.last.done():
        time.sleep(0.01)
    more = (path, a_run()) if noticed == "begin" else ()
    refusal(lambda: getattr(saves, noticed)(*more), f"cannot write {path}", kind=OSError)
    saves.__exit__()


# Files that are not a run

@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999, 0.99999])
def test_a_cut_off_run_is_refused(tmp_path, share):
    save(tmp_path / "run.pt", a_run())
    content = (tmp_path / "run.pt").read_bytes()
    (tmp_path / "run.pt").write_bytes(content[:int(share * len(content))])
    refusal(lambda: load(tmp_path / "run.pt"), tmp_path / "run.pt")


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def script():
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.ones(1)), file)
    return file.getvalue()


OTHER_FILES = {"text": lambda: b"import os\n", "zeros": lambda: bytes(100), "zip": lambda: zipped(text="text"),
               "zip with a folder": lambda: zipped(**{"archive/data.txt": "text", "archive/version": "3"}),
               "pickle": lambda: pickle.dumps({"step": 1}, protocol=4), "half a pickle": lambda: b"\x80\x04}",
               "array": lambda: b"\x93NUMPY\x01\x00", "script": script}


@pytest.mark.parametrize("kind", OTHER_FILES)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_file_of_another_kind_is_refused_without_a_warning(tmp_path, recwarn, kind):
    content = OTHER_FILES[kind]()
    (tmp_path / "run.pt").write_bytes(content)
    recwarn.clear()
    refusal(lambda: load(tmp_path / "run.pt"), tmp_path / "run.pt")
    assert not recwarn.list


@given(fraction=st.floats(0, 1), byte=st.none() | st.integers(0, 255), zipped=st.booleans())
@settings(max_examples=200)
def test_a_damaged_file_loads_or_is_refused(tmp_path_factory, fraction, byte, zipped):
    path, file = tmp_path_factory.getbasetemp() / "damaged.pt", io.BytesIO()
    torch.save({"a": torch.ones(3), "b": [1, "x", 2.5]}, file, _use_new_zipfile_serialization=zipped)
    content = file.getvalue()
    place = int(fraction * (len(content) - 1))
    path.write_bytes(content[:place] if byte is None else content[:place] + bytes([byte]) + content[place + 1:])
    try:
        read(path)
    except ValueError as error:
        assert str(path) in str(error)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


PICKLES = {
    "a zip archive": lambda path, content: torch.save(content, path),
    "torch's old format": lambda path, content: torch.save(content, path, _use_new_zipfile_serialization=False),
    "a bare pickle": lambda path, content: path.write_bytes(pickle.dumps(content)),
    "an old bare pickle": lambda path, content: path.write_bytes(pickle.dumps(content, protocol=0)),
}


@pytest.mark.parametrize("form", PICKLES)
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, form):
    path, payload = tmp_path / "run.pt", Payload(tmp_path / "marker")
    PICKLES[form](path, plain(a_run(config={"lr": payload})))
    refusal(lambda: load(path), path, "could run code")
    assert not (tmp_path / "marker").exists()
    pickle.loads(pickle.dumps(payload))                  # where it is trusted it does run
    assert (tmp_path / "marker").exists()


NEEDED = ["step", "config", "diffusion", "data", "model", "ema"]         # besides version and network, by which a run is known


@pytest.mark.parametrize("key", [*NEEDED, "data.channels", "diffusion.T", "vae.scale", "text.empty"])
def test_a_run_that_lacks_something_is_refused_by_its_name(tmp_path, key):
    content = plain(a_run(**LATENT))
    *within, last = key.split(".")
    del (content[within[0]] if within else content)[last]
    refusal(lambda: load(saved(tmp_path / "run.pt", content)), tmp_path / "run.pt", f"lacks '{last}'")


@pytest.mark.parametrize("key", [*NEEDED, "network", "vae", "text", "optimizer", "bad_steps", "log", "norm", "data.image_size",
                                 "diffusion.schedule", "vae.scale", "text.sha256"])
def test_a_run_that_holds_something_else_is_refused_by_its_name(tmp_path, key):
    content = plain(a_run(**LATENT))
    *within, last = key.split(".")
    (content[within[0]] if within else content)[last] = {"something"}
    refusal(lambda: load(saved(tmp_path / "run.pt", content)), tmp_path / "run.pt", f"its {last} is a set")


def test_an_older_run_lacks_what_has_a_default(tmp_path):
    content = plain(a_run())
    del content["norm"], content["bad_steps"], content["vae"], content["diffusion"]["time"]
    run = load(saved(tmp_path / "run.pt", content))
    assert np.isnan(run.norm) and (run.bad_steps, run.vae, run.diffusion.time) == (0, None, (1, 0))


def changed(**arguments):
    return dict(network={"class": "DiT", "arguments": SMALL | arguments})


def process(**changes):
    return dict(diffusion=replace(Process("linear", 50, "v", "small"), **changes))


MISFITS = {
    "another width": changed(dim=32), "another depth": changed(depth=1), "no heads": changed(heads=0),
    "a patch of nothing": changed(patch_size=0), "an unknown argument": changed(layers=3), "text for a number": changed(depth="2"),
    "an unknown class": dict(network={"class": "GAN", "arguments": SMALL}),
    "another network's class": dict(network={"class": "UNet", "arguments": SMALL}), "no class": dict(network={}),
    "no weights": dict(ema={}), "weights that are none": dict(ema={name: 1 for name in network().state_dict()}),
    "an unknown schedule": process(schedule="sigmoid"), "an unknown prediction": process(prediction="score"),
    "no steps": process(T=0), "three ends": process(range=(0.1, 0.2, 0.3)), "an end beyond 1": process(range=(0.1, 2)),
    "times of text": process(time=("a", "b")), "three times": process(time=(1, 2, 3)),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_run_that_does_not_describe_its_network_is_refused(case):
    refusal(lambda: a_run(**MISFITS[case]).build())


UNSHOWABLE = {"no class": dict(network={}), "no arguments": dict(network={"class": "DiT", "arguments": None}),
              "weights that are none": dict(model={"a": 1}), "numbers for flags": dict(config={1: 2}),
              "a version that is no number": dict(version=torch.ones(2))}


@pytest.mark.parametrize("case", UNSHOWABLE)
def test_a_run_that_cannot_be_shown_is_refused(tmp_path, case):
    path = saved(tmp_path / "run.pt", plain(a_run(**UNSHOWABLE[case])))
    refusal(lambda: summary(path), path)


# Writing

def test_a_full_disk_is_one_line_and_leaves_the_old_run_whole(tmp_path):
    run, limits = a_run(), resource.getrlimit(resource.RLIMIT_FSIZE)
    save(tmp_path / "run.pt", run)
    whole = (tmp_path / "run.pt").stat().st_size
    try:
        for limit in range(0, whole, whole // 40):       # a write beyond it fails, as Python ignores the signal
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            refusal(lambda: save(tmp_path / "run.pt", run), f"cannot write {tmp_path / 'run.pt'}: File too large", kind=OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert identical(load(tmp_path / "run.pt"), run) and os.listdir(tmp_path) == ["run.pt"]


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_run_whole(tmp_path):
    save(tmp_path / "run.pt", run := a_run())
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)    # a write beyond the limit kills the process there and then
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
        save(tmp_path / "run.pt", a_run(log=torch.zeros(1_000_000)))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ
    left, = tmp_path.glob(".run.pt.*.tmp")
    assert left.stat().st_size == 2_000_000              # of 4 MB
    assert identical(load(tmp_path / "run.pt"), run)


def test_a_save_after_a_kill_clears_what_it_left(tmp_path):
    (tmp_path / ".run.pt.0123abcd.diffusion-transformers.tmp").write_bytes(b"half a run")
    save(tmp_path / "run.pt", a_run())
    assert os.listdir(tmp_path) == ["run.pt"] and load(tmp_path / "run.pt").step == 1


def test_what_cannot_be_saved_leaves_the_old_run_whole(tmp_path):
    save(tmp_path / "run.pt", run := a_run())
    with pytest.raises(Exception):
        save(tmp_path / "run.pt", a_run(config=lambda: None))
    assert identical(load(tmp_path / "run.pt"), run) and os.listdir(tmp_path) == ["run.pt"]


# Released weights

def official(name):
    """The state dict of a golden file's network in the release's names and order, and the golden file."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as file:
        keys = json.loads(str(file["keys"]))
    data, meta = golden(name)
    state = {key: formula_weight(key, shape) for key, shape in keys}
    if "pos_embed" in meta.get("computed_keys", ()):
        state["pos_embed"] = data["out_pos_embed"]
    return state, data, meta


@pytest.mark.parametrize("write", [lambda folder, state: saved(folder / "DiT.pt", state),
                                   lambda folder, state: written(folder / "DiT.safetensors", state)])
def test_a_released_dit_loads_by_name_and_repeats_metas_output(tmp_path, write):
    state, data, meta = official("dit_small")
    path = write(tmp_path, state)
    model = load_network(path, config={"heads": 4})                      # no width of the paper's: heads are in no table
    with torch.no_grad():
        assert_close(model(data["in_x"], data["in_t"], data["in_y"]), data["out"], **meta["tolerance"])


def test_the_shapes_of_dit_s8_say_everything():
    shapes = golden_json("dit_s8_keys")["keys"]
    assert infer({name: torch.empty(shape, device="meta") for name, shape in shapes}) == {
        "class": "DiT", "arguments": dict(image_size=32, patch_size=8, channels=4, **dit.SIZES["S"], num_classes=1000,
                                          null_class=True, learn_sigma=True, conditioning="adaln-zero")}


SIZES = [
    *((DiT, dict(image_size=image_size, patch_size=patch_size, channels=4, **size, num_classes=1000, null_class=True,
                 learn_sigma=True, conditioning="adaln-zero"))
      for size in dit.SIZES.values() for image_size, patch_size in ((32, 2), (64, 8))),
    *((ViT, dict(image_size=224, patch_size=16, channels=3, **size, num_classes=1000)) for size in vit.SIZES.values()),
    *((UViT, dict(image_size=32, patch_size=4, channels=3, num_classes=10, null_class=True, mlp_time_embed=False, skip=True,
                  conv=True) | {name: size[name] for name in size if name != "dit_init"})
      for size in uvit.SIZES.values()),
]


@pytest.mark.parametrize("kind, arguments", SIZES)
def test_every_published_size_is_known_by_its_shapes(kind, arguments):
    with torch.device("meta"):
        state = kind(**arguments).state_dict()
    assert infer(state) == {"class": kind.__name__, "arguments": arguments}


@given(st.sampled_from(list(dit.BLOCKS)), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 3, 4]), st.integers(1, 3),
       st.integers(1, 2), st.none() | st.integers(2, 9), st.booleans())
def test_every_argument_of_a_dit_is_read_off_its_shapes(conditioning, tokens, patch, channels, heads, depth, classes, learned):
    arguments = dict(image_size=tokens * patch, patch_size=patch, channels=channels, dim=64 * heads, depth=depth, heads=heads,
                     num_classes=classes, null_class=classes is not None, learn_sigma=learned, conditioning=conditioning)
    with torch.device("meta"):
        state = DiT(**arguments).state_dict()
    assert infer(state)["arguments"] == arguments


@every_design
def test_every_design_gives_the_same_output_after_the_disk(tmp_path, conditioning):
    model = network(conditioning=conditioning)
    for path in saved(tmp_path / "DiT.pt", model.state_dict()), written(tmp_path / "DiT.safetensors", model.state_dict()):
        again = load_network(path)
        assert again.conditioning == conditioning and outputs(again).equal(outputs(model))


@pytest.mark.parametrize("written, config, classes, null_label", [
    (dict(num_classes=5), {}, 5, 5), (dict(num_classes=1000, null_class=False), {}, 1000, None),         # ImageNet's, alone
    (dict(num_classes=5), {"num_classes": 6}, 6, None), (dict(num_classes=5), {"num_classes": 5}, 5, 5)])
def test_the_last_row_of_a_label_table_is_the_null_class_unless_all_are_classes(tmp_path, written, config, classes, null_label):
    run = load(saved(tmp_path / "DiT.pt", network(**written).state_dict()), config)
    assert run.network["arguments"]["num_classes"] == run.data.num_classes == classes and run.build()[0].null_label == null_label


def test_more_classes_than_rows_are_refused(tmp_path):
    path = saved(tmp_path / "DiT.pt", network(num_classes=5).state_dict())
    refusal(lambda: load_network(path, config={"num_classes": 7}), "embedding_table")


def test_an_oblong_network_needs_its_image_size(tmp_path):
    model = network(image_size=(4, 12))
    path = saved(tmp_path / "DiT.pt", model.state_dict())
    refusal(lambda: load(path), path, "12 position rows", "image_size")
    assert outputs(load_network(path, config={"image_size": (4, 12)})).equal(outputs(model))


@pytest.mark.parametrize("arguments, variance, vae", [
    (dict(channels=4), "learned", Autoencoder(0.18215)),                 # Stable Diffusion's latents
    (dict(channels=3), "learned", None), (dict(channels=1), "learned", None), (dict(learn_sigma=False), "small", None)])
def test_released_weights_come_with_the_papers_diffusion(tmp_path, arguments, variance, vae):
    run = load(saved(tmp_path / "DiT.pt", network(**arguments).state_dict()))
    assert run.diffusion == Process("linear", 1000, "eps", variance) and run.vae == vae and run.optimizer is run.step is None


NO_NETWORKS = {
    "unknown names": {"conv.weight": torch.ones(1)},
    "no names": {},
    "half the names": {"x_embedder.proj.weight": torch.ones(16, 3, 2, 2)},
    "no positions": {name: value for name, value in network().state_dict().items() if name != "pos_embed"},
    "flat patches": network().state_dict() | {"x_embedder.proj.weight": torch.ones(16, 12)},
    "numbers for names": {1: torch.ones(1)},
    "no tensors": {"x_embedder.proj.weight": "text"},
    "a list": [torch.ones(1)],
    "a tensor": torch.ones(3),
    "a number": 7,
    "nothing": None,
}


@pytest.mark.parametrize("case", NO_NETWORKS)
def test_what_is_no_network_known_here_is_refused(tmp_path, case):
    path = saved(tmp_path / "weights.pt", NO_NETWORKS[case])
    refusal(lambda: load(path), f"cannot use {path}")


@pytest.mark.parametrize("change", [{"final_layer.linear.bias": None}, {"blocks.1.extra": torch.ones(1)},
                                    {"blocks.0.mlp.fc1.bias": torch.ones(3)}])
def test_a_state_dict_that_does_not_fit_strictly_is_refused(tmp_path, change):
    state = {name: value for name, value in (network().state_dict() | change).items() if value is not None}
    refusal(lambda: load_network(saved(tmp_path / "DiT.pt", state)), *change)


def test_a_file_that_wraps_itself_without_end_is_refused(tmp_path):
    endless = {}
    endless["ema"] = endless
    path = saved(tmp_path / "weights.pt", endless)
    refusal(lambda: load(path), path)


# Released U-ViTs

@pytest.mark.parametrize("write", [lambda path, state: saved(path / "uvit.pt", state),
                                   lambda path, state: written(path / "uvit.safetensors", state)], ids=["pt", "safetensors"])
@pytest.mark.parametrize("name, config", [("uvit_small_unconditional", dict(heads=4)), ("uvit_small_class", dict(heads=3)),
                                          ("uvit_small_text", dict(heads=4, context_tokens=7)), ("vit_small", dict(heads=3))])
def test_a_released_uvit_or_vit_loads_by_name_and_repeats_its_authors_output(tmp_path, name, config, write):
    state, data, meta = official(name)
    model = load_network(write(tmp_path, state), config)
    with torch.no_grad():
        inputs = [data[f"in_{key}"] for key in ("x", "timesteps", "y", "context") if f"in_{key}" in data]
        assert_close(model(*inputs), data.get("out", data.get("out_logits")), **meta["tolerance"])


UVITS = golden_json("complexity_transformers")["uvit"]


def published_uvit(name):
    """The arguments of a published U-ViT; its authors count the null class among the classes, and -1 is none."""
    config = UVITS[name]["config"]
    condition = ({"context_dim": 768, "context_tokens": 77, "num_classes": None, "null_class": False} if "clip_dim" in config else
                 {"num_classes": None if config["num_classes"] < 0 else 1000, "null_class": config["num_classes"] == 1001})
    return dict(image_size=config["img_size"], patch_size=config["patch_size"], channels=config["in_chans"],
                dim=config["embed_dim"], depth=config["depth"], heads=config["num_heads"], conv=config["conv"],
                mlp_time_embed=config["mlp_time_embed"], skip=True, **condition)


@pytest.mark.parametrize("name", UVITS)
def test_every_published_uvit_is_known_by_its_shapes(name):
    with torch.device("meta"):
        state = UViT(**published_uvit(name)).state_dict()
    assert infer(state) == {"class": "UViT", "arguments": published_uvit(name)}


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 3, 4]), st.integers(1, 3), st.integers(1, 2),
       st.none() | st.integers(2, 9) | st.just("text"), st.booleans(), st.booleans(), st.booleans())
def test_every_argument_of_a_uvit_is_read_off_its_shapes(tokens, patch, channels, heads, half, condition, mlp, conv, skip):
    dim, depth = 64 * heads, 2 * half
    arguments = dict(image_size=tokens * patch, patch_size=patch, channels=channels, dim=dim, depth=depth,
                     heads=HEADS.get((dim, depth), heads),    # of a named size, else 64 numbers each
                     num_classes=condition, null_class=condition is not None, mlp_time_embed=mlp, conv=conv, skip=skip)
    if condition == "text":
        arguments |= dict(num_classes=None, null_class=False, context_dim=5, context_tokens=77)
    with torch.device("meta"):
        state = UViT(**arguments).state_dict()
    assert infer(state)["arguments"] == arguments


# Released U-Nets

THOUSAND, LEARNED = dict(num_classes=1000), dict(out_channels=6)
UNETS = {                                    # of the releases: whatever differs from 3 channels in and out and no classes
    "ddpm-cifar10": {}, "ddpm-256": {}, "iddpm-cifar10": LEARNED, "iddpm-64": LEARNED, "adm-64": LEARNED | THOUSAND,
    "adm-128": LEARNED | THOUSAND, "adm-256": LEARNED | THOUSAND, "adm-512": LEARNED | THOUSAND,
    "adm-64-256": LEARNED | THOUSAND, "adm-128-512": LEARNED | THOUSAND, "ldm-4": {}, "ldm-8": dict(channels=4, out_channels=4)}
every_unet = pytest.mark.parametrize("name", UNETS)


def unet_description(name):
    """Of a release."""
    network, fixed = models.named("unet", name)
    released = dict(channels=3, out_channels=3, num_classes=None, null_class=False) | UNETS[name]
    return {"class": network.__name__, "arguments": fixed | released}


@functools.cache
def unet_state(name):
    """The names and shapes of a release."""
    with torch.device("meta"):
        return models.build(unet_description(name)).state_dict()


@every_unet
def test_every_published_unet_is_known_by_its_shapes_and_by_its_name(name):
    state = unet_state(name)
    assert infer(state) == infer(state, name) == unet_description(name)


def test_an_unconditional_adm_is_known_by_its_shapes():
    unconditional = {"class": "UNet", "arguments": unet_description("adm-256")["arguments"] | dict(num_classes=None)}
    with torch.device("meta"):
        state = models.build(unconditional).state_dict()
    assert infer(state) == unconditional


FEW = dict(image_size=8, dim=32, res_blocks=1, multipliers=(1,), attention_ds=(), scale_shift=False, updown=False,
           context_dim=None)
SMALL_UNETS = {"ddpm-cifar10": FEW, "iddpm-cifar10": FEW | dict(scale_shift=True), "adm-64": FEW | ADM | dict(multipliers=(1, 1)),
               "adm-256": FEW | ADM | dict(attention_ds=(1,)), "adm-64-256": FEW | ADM | dict(multipliers=(1, 2)),
               "ldm-4": FEW | dict(context_dim=8)}


@pytest.fixture
def small_unets(monkeypatch):
    """Released U-Nets have hundreds of megabytes: here are all configurations, under their names, with half a megabyte each."""
    for name in list(reversed(unet.SIZES)):              # put back in their order afterwards
        monkeypatch.delitem(unet.SIZES, name)
    for name, size in SMALL_UNETS.items():
        monkeypatch.setitem(unet.SIZES, name, size)


def released_unet(name):
    """A small network under a release's name, with formula weights."""
    return fill(models.build(unet_description(name)))


def unet_inputs(network):
    """Three images, times, and what else it asks for."""
    x, t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 400, 800])
    if network.context_dim is not None:
        return x, t, torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(1))
    y = None if network.num_classes is None else torch.tensor([0, 5, 999])
    return (x, t, y, x[..., ::4, ::4]) if isinstance(network, unet.SuperResUNet) else (x, t, y)


@pytest.mark.parametrize("name", SMALL_UNETS)
def test_a_released_unet_gives_the_same_output_after_the_disk(tmp_path, small_unets, name):
    model = released_unet(name)
    for path in saved(tmp_path / "unet.pt", model.state_dict()), written(tmp_path / "unet.safetensors", model.state_dict()):
        again = load_network(path)
        with torch.no_grad():
            assert again(*unet_inputs(model)).equal(model(*unet_inputs(model)))


def lightning(state, averaged=None):
    """A checkpoint of latent diffusion: the U-Net among other networks; averaged weights under names without dots."""
    content = {"first_stage_model.encoder.conv_in.weight": torch.ones(2), "cond_stage_model.embedding.weight": torch.ones(2),
               "betas": torch.ones(2), **{f"model.diffusion_model.{name}": value for name, value in state.items()}}
    if averaged:
        content |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
        content |= {f"model_ema.diffusion_model{name.replace('.', '')}": value for name, value in averaged.items()}
    return {"epoch": 5, "global_step": 9, "state_dict": content}


@pytest.mark.parametrize("has_average", [False, True])
def test_a_lightning_checkpoint_of_latent_diffusion_gives_its_unets_averaged_weights(tmp_path, small_unets, has_average):
    state = released_unet("ldm-4").state_dict()
    averaged = {name: value + 1 for name, value in state.items()} if has_average else None
    run = load(saved(tmp_path / "ldm.ckpt", lightning(state, averaged)))
    assert run.network == unet_description("ldm-4") and run.vae
    assert identical(run.model, averaged or state) and identical(run.ema, averaged or state)
    tensors = lightning(state, averaged)["state_dict"]   # of other networks too, which are passed over
    assert identical(load(written(tmp_path / "ldm.safetensors", tensors)).ema, averaged or state)


OTHER_UNET = FEW | dict(channels=3, out_channels=3, multipliers=(1, 3), attention_ds=(2,), heads=4, head_dim=None)


def test_a_unet_of_no_known_configuration_is_refused_unless_all_its_arguments_are_given(tmp_path):
    path = saved(tmp_path / "unet.pt", fill(UNet(**OTHER_UNET)).state_dict())
    refusal(lambda: load(path), path, "no configuration known here", "heads", "given with all other arguments")
    assert OTHER_UNET.items() <= load(path, OTHER_UNET).network["arguments"].items()


def test_a_unet_that_is_not_what_it_should_be_is_refused(tmp_path, small_unets):
    path, state = tmp_path / "unet.pt", released_unet("adm-256").state_dict()
    refusal(lambda: load(saved(path, state), "adm-64"), path, "not those of adm-64")
    refusal(lambda: load(path, "adm-1024"), path, "'adm-1024'", ", ".join(SMALL_UNETS))
    refusal(lambda: load(saved(path, network().state_dict()), "adm-64"), path, "not the U-Net adm-64")
    for change in ({}, {"out.2.bias": torch.ones(7)}):   # a tensor is missing, or has another shape
        saved(path, {name: value for name, value in state.items() if name != "out.2.bias"} | change)
        refusal(lambda: load(path), path, "no configuration known here")


def test_a_released_unet_may_be_built_for_another_image_size():
    given = dict(image_size=(48, 80))                    # legal for it, though not for every configuration before it
    assert infer(unet_state("iddpm-64"), given)["arguments"] == unet_description("iddpm-64")["arguments"] | given


@pytest.mark.parametrize("name", ["iddpm-cifar10", "adm-64", "ldm-4"])
def test_a_released_unet_at_another_image_size_keeps_its_process(tmp_path, small_unets, name):
    path = saved(tmp_path / "unet.pt", released_unet(name).state_dict())
    at_size, at_another = load(path), load(path, dict(image_size=16))
    assert at_another.diffusion == at_size.diffusion and at_another.vae == at_size.vae


# What released networks were trained on

LINEAR = dict(schedule="linear", T=1000, prediction="eps")
COSINE, SCALED = LINEAR | dict(schedule="cosine"), LINEAR | dict(schedule="scaled-linear", variance="small")
OF_UNETS = {
    **dict.fromkeys(("ddpm-cifar10", "ddpm-256"), LINEAR | dict(variance="large")),
    **dict.fromkeys(("iddpm-cifar10", "iddpm-64"), COSINE | dict(T=4000, variance="learned", time=(0.25, 0))),
    "adm-64": COSINE | dict(variance="learned"),
    **dict.fromkeys(("adm-128", "adm-256", "adm-512", "adm-64-256", "adm-128-512"), LINEAR | dict(variance="learned")),
    **dict.fromkeys(("ldm-4", "ldm-8"), SCALED | dict(range=(0.0015, 0.0195))),
}


@every_unet
def test_a_released_unet_comes_with_its_papers_process(name):
    assert released_process(unet_description(name)) == OF_UNETS[name]


@pytest.mark.parametrize("name, change", [("iddpm-64", dict(dropout=0.1)), ("iddpm-64", dict(heads=8)),
                                          ("adm-64", dict(dropout=0.0)), ("ldm-8", dict(head_dim=128))])
def test_a_release_with_heads_or_dropout_overridden_keeps_its_process(name, change):
    changed = infer(unet_state(name), change)
    assert change.items() <= changed["arguments"].items() and released_process(changed) == OF_UNETS[name]


@pytest.mark.parametrize("name", UVITS)
def test_the_huge_and_the_text_uvits_count_discrete_time_and_the_others_a_continuous_one(name):
    expected = SCALED | dict(time=(1, 1)) if "huge" in name or "mscoco" in name else None
    assert released_process({"class": "UViT", "arguments": published_uvit(name)}) == expected


@pytest.mark.parametrize("description, scale", [
    *((unet_description(name), 1.0 if name.startswith("ldm") else None) for name in UNETS),
    *(({"class": "UViT", "arguments": published_uvit(name)},
       0.2301 if "mscoco" in name else 0.18215 if "256" in name or "512" in name else None) for name in UVITS)])
def test_latents_of_a_release_have_the_scale_that_it_was_trained_on(description, scale):
    assert released_scale(description) == scale


def small_uvit(**changes):
    return fill(UViT(**dict(image_size=8, patch_size=2, channels=4, dim=64, depth=2, heads=1) | changes))


OF_LATENTS = np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2                    # Stable Diffusion's
TOLD = {           # network, betas, and what it is told at steps 0, 1, 2 and the last one
    "DiT": (network, np.linspace(1e-4, 0.02, 1000), [0, 1, 2, 999]),
    "U-ViT-H": (lambda: small_uvit(num_classes=5, conv=False), OF_LATENTS, [1, 2, 3, 1000]),
    "U-ViT text": (lambda: small_uvit(context_dim=8), OF_LATENTS, [1, 2, 3, 1000]),
    "ddpm-cifar10": (None, np.linspace(1e-4, 0.02, 1000), [0, 1, 2, 999]),
    "iddpm-cifar10": (None, cosine_betas(4000), [0, 0.25, 0.5, 999.75]),
    "adm-64": (None, cosine_betas(1000), [0, 1, 2, 999]),
    "adm-256": (None, np.linspace(1e-4, 0.02, 1000), [0, 1, 2, 999]),
    "ldm-4": (None, np.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, 1000) ** 2, [0, 1, 2, 999]),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_released_network_is_told_the_time_that_it_was_trained_with(tmp_path, small_unets, name):
    make, betas, told = TOLD[name]
    model = make() if make else released_unet(name)
    _, diffusion = load(saved(tmp_path / "released.pt", model.state_dict())).build()
    np.testing.assert_allclose(diffusion.betas, betas, rtol=1e-12)
    assert diffusion.original(torch.tensor([0, 1, 2, len(betas) - 1])).tolist() == told


@pytest.mark.parametrize("sampler, steps", [("ddim", [0, 1000, 2000, 2999, 3999]), ("ddpm", [0, 1000, 2000, 2999, 3999]),
                                            ("dpm++", [160, 640, 1440, 2559, 3999])])
def test_a_respaced_process_tells_the_network_its_own_scale_of_time(tmp_path, small_unets, sampler, steps):
    model, diffusion = load(saved(tmp_path / "iddpm.pt", released_unet("iddpm-cifar10").state_dict())).build()
    told = []
    model.register_forward_pre_hook(lambda module, inputs: told.append(inputs[1].tolist()))
    x = ddpm.sample(diffusion, model, (2, 3, 8, 8), sampler=sampler, steps=5, seeds=[0, 1])
    assert told == [[step / 4] * 2 for step in reversed(steps)] and x.isfinite().all()


UNSAMPLED = {
    "continuous time, pixels": (lambda: small_uvit(channels=3).state_dict(), "trained in continuous time"),
    "continuous time, latents": (lambda: small_uvit(num_classes=5).state_dict(), "trained in continuous time"),
    "continuous time, ablated": (lambda: small_uvit(channels=3, conv=False).state_dict(), "trained in continuous time"),
    "an upsampler": (lambda: released_unet("adm-64-256").state_dict(), "needs small ones"),
    "a released ViT": (lambda: classifiers_run().ema, "classifies"),
    "a class as a token": (lambda: released_unet("ldm-4").state_dict(), "LDM's class"),
}


@pytest.mark.parametrize("case", UNSAMPLED)
def test_what_cannot_be_sampled_here_is_refused_in_one_line(tmp_path, small_unets, capsys, case):
    make, said = UNSAMPLED[case]
    path = saved(tmp_path / "released.pt", make())
    with pytest.raises(SystemExit) as exit:
        sample.main(["--ckpt", str(path), "--n", "1", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "out.png")])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1 and said in err
    assert os.listdir(tmp_path) == ["released.pt"]


# .safetensors

CODES = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B", "BOOL": "<?"}


def raw(path, header, content=b"", length=None):
    """Write a .safetensors file by hand: the header as it stands, or of what JSON is made."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + content)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def written(path, tensors):
    """Write float32 tensors by hand."""
    header, content = {}, b""
    for name, tensor in tensors.items():
        data = tensor.numpy().astype("<f4").tobytes()
        header[name] = entry("F32", list(tensor.shape), len(content), len(content) + len(data))
        content += data
    return raw(path, header, content)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize("code", CODES)
def test_each_type_of_number_is_read(path, code):
    numbers = {"BOOL": [True, False, True]}.get(code, [0, 1, 2 ** 7 - 1] if code in ("I8", "U8") else [-1, 0, 1000])
    numbers = [float(number) for number in numbers] if code.startswith("F") else numbers
    content = b"".join(struct.pack(CODES[code], number) for number in numbers)
    tensor = read_safetensors(raw(path, {"a": entry(code, [3], 0, len(content))}, content))["a"]
    assert tensor.tolist() == numbers and type(tensor.tolist()[0]) is type(numbers[0])
    assert tensor.element_size() == struct.calcsize(CODES[code])


def test_bfloat16_is_the_upper_half_of_float32(path):
    numbers = [1.0, -2.5, 3.0e38]
    content = b"".join(struct.pack("<f", number)[2:] for number in numbers)
    tensor = read_safetensors(raw(path, {"a": entry("BF16", [3], 0, 6)}, content))["a"]
    assert tensor.dtype == torch.bfloat16
    assert_close(tensor.tolist(), numbers, rtol=2 ** -7, atol=0)         # seven bits of mantissa, cut


@given(st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=6), st.randoms())
def test_tensors_of_every_shape_come_back_in_their_order(tmp_path_factory, shapes, random):
    path = tmp_path_factory.getbasetemp() / "shapes.safetensors"
    names = [f"{i}" for i in range(len(shapes))]
    random.shuffle(names)                                # names need not be sorted as their places are
    tensors = {name: formula_weight(name, shape) for name, shape in zip(names, shapes)}
    assert identical({name: read(written(path, tensors))[name] for name in names}, tensors)


def test_the_header_may_list_tensors_at_any_place_in_any_order_with_metadata_and_padding(path):
    header = {"c": entry("F64", [1], 2, 10), "__metadata__": {"format": "pt"}, "b": entry("U8", [1], 1, 2),
              "a": entry("U8", [], 0, 1), "d": entry("U8", [0], 2, 2)}
    tensors = read_safetensors(raw(path, json.dumps(header).encode() + b"     ", b"\x07\x08" + struct.pack("<d", 2.5)))
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"a": 7, "b": [8], "c": [2.5], "d": []}


def test_tensors_outlive_the_name_of_their_file_which_no_change_reaches(path):
    content, other = written(path, {"a": torch.arange(5.0)}).read_bytes(), path.with_name("other")
    os.link(path, other)
    tensor = read_safetensors(path)["a"]
    path.unlink()
    tensor += 1
    assert tensor.tolist() == [1, 2, 3, 4, 5] and other.read_bytes() == content


TWO = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 8, 16)}
HEADERS = {                                  # each over 16 bytes of content
    "no JSON": b"{'a': 1}", "no text": b"\xff\xfe\x00", "a list": ["a"], "a number": 7, "text for a tensor": {"a": "b"},
    "null for a tensor": {"a": None}, "no type": {"a": {"shape": [4], "data_offsets": [0, 16]}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 16]}}, "no place": {"a": {"dtype": "F32", "shape": [4]}},
    "an unknown type": {"a": entry("F7", [4], 0, 16)}, "a list for a type": {"a": entry(["F32"], [4], 0, 16)},
    "another type": {"a": entry("F64", [4], 0, 16)}, "a number for a shape": {"a": entry("F32", 4, 0, 16)},
    "a place of one number": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16]}},
    "a place of three numbers": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 32]}},
    "an end outside the file": TWO | {"b": entry("F32", [3], 8, 20)}, "a place outside the file": {"a": entry("F32", [2], 16, 24)},
    "a giant": {"a": entry("F32", [2 ** 61], 0, 2 ** 63)}, "an overlap": TWO | {"b": entry("F32", [2], 4, 12)},
    "the same place twice": TWO | {"b": entry("F32", [2], 0, 8)},
    "a gap": {"a": entry("F32", [1], 0, 4), "b": entry("F32", [2], 8, 16)}, "a gap at the front": {"b": entry("F32", [2], 8, 16)},
    "an empty tensor off its place": TWO | {"b": entry("F32", [0], 9, 9)},
    "too few bytes for the shape": {"a": entry("F32", [5], 0, 16)}, "too many bytes for the shape": {"a": entry("F32", [3], 0, 16)},
    "too many bytes for a scalar": {"a": entry("F32", [], 0, 16)}, "an end before the begin": {"a": entry("F32", [4], 16, 0)},
    "a negative place": {"a": entry("F32", [4], -16, 0)}, "a negative shape": {"a": entry("F32", [-4], 0, 16)},
    "two negative sides": {"a": entry("F32", [-1, -4], 0, 16)}, "a fractional place": {"a": entry("F32", [4], 0, 16.0)},
    "a fractional shape": {"a": entry("F32", [4.0], 0, 16)}, "true for a place": {"a": entry("U8", [1], 0, True)},
    "true for a side": {"a": entry("U8", [16, True], 0, 16)}, "text for a place": {"a": entry("F32", [4], "0", "16")},
    "not a number": b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 16]}}',
    "text that would be long": {"a": entry("F32", ["a", 10 ** 12], 0, 16)},
    "sides beyond 64 bits": {"a": entry("F32", [0, 2 ** 64], 0, 0)},
    "too many elements for none": {"a": entry("F32", [2 ** 32, 2 ** 32, 0], 0, 0)},
    "a number of 5000 digits": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 16]}}',
    "a product of millions of digits": {"a": entry("F32", [10 ** 18] * 200_000, 0, 16)},
    "a million sides": {"a": entry("F32", [7] * 10 ** 6, 0, 16)},
    "a name twice": b'{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, '
                    b'"a": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}}',
    "a place twice": b'{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8], "data_offsets": [0, 8]}}',
    "deep nesting": b"[" * 100_000 + b"]" * 100_000, "deep nesting in a name": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_hostile_header_is_refused_at_once(path, case):
    raw(path, HEADERS[case], bytes(16))
    began = time.process_time()
    refusal(lambda: read(path), path)
    assert time.process_time() - began < 1               # multiplying what is meant to take long would take minutes


VALID = {"__metadata__": {"format": "pt"}, "scalar": entry("F32", [], 0, 4), "a": entry("BF16", [2, 3], 4, 16),
         "empty": entry("F32", [0, 3], 16, 16), "b": entry("I64", [1], 16, 24)}


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3), st.floats(0, 1) | st.just(1.0))
@settings(max_examples=300)
def test_a_damaged_safetensors_file_loads_or_is_refused(tmp_path_factory, flips, kept):
    path = raw(tmp_path_factory.getbasetemp() / "damaged.safetensors", VALID, bytes(range(24)))
    content = bytearray(path.read_bytes())
    for place, byte in flips:
        content[int(place * (len(content) - 1))] = byte
    path.write_bytes(content[:round(kept * len(content))])
    try:
        assert all(torch.is_tensor(tensor) for tensor in read(path).values())
    except ValueError as error:
        assert str(path) in str(error)


def test_every_cut_of_a_safetensors_file_is_refused_and_a_header_that_would_end_elsewhere(path):
    for length in (1, 19, 2 ** 63, 2 ** 64 - 1):
        refusal(lambda: read(raw(path, b"{}", bytes(16), length)), path)
    content = raw(path, VALID, bytes(24)).read_bytes()
    for kept in range(len(content)):
        path.write_bytes(content[:kept])
        refusal(lambda: read(path), path)


# python checkpoint.py FILE

def test_the_command_prints_what_a_run_holds_and_its_flags_as_they_were_given(tmp_path, capsys):
    config = dict(batch_size=32, seed=0, flip=True, resume=False, shift=None, data="mnist")
    run = a_run(step=1234, config=config)
    run.data.summary = "mnist: 9,000 images; no captions"
    save(tmp_path / "run.pt", run)
    main([str(tmp_path / "run.pt")])
    title, *rows = capsys.readouterr().out.splitlines()
    said, numbers = dict(row.split(maxsplit=1) for row in rows), sum(value.numel() for value in network().state_dict().values())
    assert title.endswith("a run at step 1234") and said["network"].startswith("DiT image_size=8, patch_size=2")
    assert said["parameters"] == f"{numbers:,}" and said["flags"] == "--batch-size 32 --seed 0 --flip --data mnist"
    assert said["diffusion"] == "schedule=cosine, T=50, prediction=v, variance=learned" and "classes=['a'" in said["data"]
    assert said["found"] == run.data.summary and "9,000" not in said["data"]


def test_what_released_weights_hold_is_described(tmp_path):
    said = "\n".join(summary(saved(tmp_path / "DiT.pt", network(channels=4).state_dict())))
    for part in ("official weights", "DiT", "conditioning=adaln-zero", "num_classes=5", "linear", "learned", "0.18215"):
        assert part in said, part


def test_a_slim_run_is_a_tenth_of_the_size_and_draws_nearly_the_same(tiny_run, tmp_path, capsys):
    slim = tmp_path / "slim.pt"
    main([str(tiny_run), "--slim", str(slim)])
    assert capsys.readouterr().out.startswith(f"{slim}: a run at step 4") and slim.stat().st_size < 0.13 * tiny_run.stat().st_size
    (first, process), (second, other) = (load(path).build() for path in (tiny_run, slim))
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():                                                # half precision rounds weights to 2^-11 of their size
        assert_close(*(model(x, torch.tensor([7, 900]), torch.tensor([1, 10])) for model in (first, second)), rtol=0, atol=2e-2)
    assert np.array_equal(process.betas, other.betas) and load(slim).data == load(tiny_run).data


def test_a_slim_run_cannot_be_trained_on(tiny_run, tmp_path, capsys):
    main([str(tiny_run), "--slim", str(tmp_path / "slim.pt")])
    with pytest.raises(SystemExit) as stopped:
        train.main(["--resume", "--out", str(tmp_path / "slim.pt")])
    assert stopped.value.code == 2 and "is not a run of train.py" in capsys.readouterr().err
