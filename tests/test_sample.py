"""sample.py: image i of a seed is one image, however it is drawn; and what is written is what was drawn."""
import subprocess
import sys
import threading
from argparse import Namespace
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder

import checkpoint
import data
import ddpm
import dit
import evaluate
import features
import files
import models
import sample
import sampling
import vae

ROOT = Path(__file__).parents[1]


def drawn(tmp_path, run, *argv):
    """arr_0 and arr_1 of a sample.py command."""
    npz = tmp_path / "drawn.npz"
    sample.main(["--ckpt", str(run), "--steps", "3", "--npz", str(npz), "--out", str(tmp_path / "drawn.png"), *argv])
    with np.load(npz) as archive:
        return archive["arr_0"], archive["arr_1"]


def assert_close(a, b):
    """Equal within one grey level: matrix products of another batch size may round differently."""
    assert a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1


@pytest.mark.parametrize("sampler", ddpm.SAMPLERS)
def test_an_image_is_the_same_alone_or_in_a_batch(tmp_path, tiny_run, sampler):
    argv = ["--n", "5", "--sampler", sampler, *(["--eta", "0.7"] if sampler == "ddim" else [])]
    together, _ = drawn(tmp_path, tiny_run, *argv)
    alone, _ = drawn(tmp_path, tiny_run, *argv, "--batch-size", "1")
    assert_close(together, alone)
    assert len({image.tobytes() for image in together}) == 5


def test_drawing_in_bfloat16_changes_an_image_little(tmp_path, tiny_run):
    exact, rounded = (drawn(tmp_path, tiny_run, "--n", "5", "--precision", precision)[0] for precision in ("fp32", "bf16"))
    apart = np.abs(exact.astype(int) - rounded.astype(int))
    assert 0 < apart.mean() < 0.02 * exact.std()         # see RESULTS.md: bfloat16 rounds to 1/256 at every product


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_threads_draw_parts_of_a_batch_at_once_and_what_one_draws(tmp_path, tiny_run, monkeypatch, two_threads, precision):
    argv, original, both, sizes = ["--n", "6", "--precision", precision], ddpm.sample, threading.Barrier(2, timeout=60), []

    def meet(diffusion, model, shape, *args, **options):
        sizes.append((shape[0], torch.get_num_threads()))
        both.wait()                                      # for the part beside it
        return original(diffusion, model, shape, *args, **options)
    torch.set_num_threads(1)
    one, labels = drawn(tmp_path, tiny_run, *argv, "--batch-size", "3")
    torch.set_num_threads(2)
    monkeypatch.setattr(ddpm, "sample", meet)
    two, again = drawn(tmp_path, tiny_run, *argv)
    assert (one == two).all() and (labels == again).all() and sizes == [(3, 1)] * 2


@pytest.mark.parametrize("broken", [0, 1])
def test_a_part_ends_soon_after_the_one_beside_it_failed(tiny_run, monkeypatch, two_threads, broken):
    network, diffusion = checkpoint.load(tiny_run).build()
    steps, began = [], threading.Event()

    def failing(x, t, y):
        if y[0] == broken:
            began.wait(60)
            raise ValueError("broken")
        steps.append(t)
        began.set()
        return torch.zeros_like(x)
    monkeypatch.setattr(network, "forward", failing)
    with pytest.raises(ValueError, match="broken"):
        list(sample.draw(network, diffusion, range(4), [0, 0, 1, 1], sampler="ddpm", steps=1000))
    assert 0 < len(steps) < 1000


def test_drawing_leaves_the_number_of_threads_as_it_was(tiny_run, two_threads):
    network, diffusion = checkpoint.load(tiny_run).build()
    batches, found = sample.draw(network, diffusion, range(8), [0], batch_size=4, steps=1), []
    for _ in range(2):                                   # after the first round, and once nobody wants the next
        next(batches)
        another = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        another.start()
        another.join()
        batches.close() if found[1:] else None
    assert found == [2, 2] and torch.get_num_threads() == 2


def test_a_compiled_network_and_a_callback_see_one_batch_after_the_other(tiny_run, monkeypatch, two_threads):
    network, diffusion = checkpoint.load(tiny_run).build()
    monkeypatch.setattr(sampling, "side_by_side", None)
    assert len(list(sample.draw(network, diffusion, range(8), [0], batch_size=4, steps=1, callback=print))) == 2
    network.compile(backend="eager")
    assert len(list(sample.draw(network, diffusion, range(8), [0], batch_size=4, steps=1))) == 2


def test_two_processes_draw_what_one_draws(tmp_path, tiny_run):
    one, labels = drawn(tmp_path, tiny_run, "--n", "5")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", str(ROOT / "sample.py"),
               "--ckpt", str(tiny_run), "--steps", "3", "--n", "5", "--out", f"{tmp_path}/d/"]
    subprocess.run([*command, "--npz", str(tmp_path / "two.npz")], check=True, capture_output=True)
    with np.load(tmp_path / "two.npz") as archive:
        assert_close(one, archive["arr_0"])
        assert (archive["arr_1"] == labels).all()
    assert len(list((tmp_path / "d").glob("*.png"))) == 5


@pytest.mark.parametrize("command, argv", [
    (sample, "--n 2 --out drawn.png"), (sample, "--upscale digit.png --factor 2 --n 1 --out large.png"),
    (evaluate, f"--n 4 --reference digits.npz --features {features.JUDGE} --metrics FD --cache cache")])
def test_what_draws_compiles_its_network_when_it_is_told_to(tmp_path, tiny_run, monkeypatch, command, argv):
    monkeypatch.chdir(tmp_path)
    np.savez("digits.npz", arr_0=data.load().images[:4])
    Image.new("L", (16, 16)).save("digit.png")
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "of which this backend has no use")
    torch._dynamo.reset()
    counters.clear()
    command.main(["--ckpt", str(tiny_run), "--steps", "2", *argv.split(), "--compile"])
    assert counters["stats"]["unique_graphs"] == 1       # of all six blocks


def test_seeds_give_other_images_and_the_same_seed_the_same(tmp_path, tiny_run):
    first, again, other = (drawn(tmp_path, tiny_run, "--n", "3", "--seed", seed)[0] for seed in ("1", "1", "2"))
    assert (first == again).all() and (first != other).any()


def test_labels_cycle_through_the_classes_by_number_or_name(tmp_path, tiny_run):
    images, labels = drawn(tmp_path, tiny_run, "--n", "5", "--classes", "3,7")
    assert labels.tolist() == [3, 7, 3, 7, 3] and images.shape == (5, 32, 32, 1) and images.dtype == np.uint8
    assert drawn(tmp_path, tiny_run)[1].tolist() == list(range(10)) * 4
    assert sample.parse_classes("dog,0", ["cat", "dog"], 2) == [1, 0]
    assert sample.parse_classes("big, cat", ["big, cat", "dog"], 2) == [0]


def test_guidance_and_its_interval_change_the_image_and_scale_one_does_not(tmp_path, tiny_run):
    plain, guided, nowhere, late = (drawn(tmp_path, tiny_run, "--n", "2", *argv)[0] for argv in (
        ["--cfg-scale", "1"], ["--cfg-scale", "5"], ["--cfg-scale", "5", "--cfg-interval", "5000,6000"],
        ["--cfg-scale", "5", "--cfg-interval", "0,500"]))
    assert_close(plain, nowhere)
    assert (plain != guided).any() and (guided != late).any() and (plain != late).any()


def test_the_grid_shows_each_image_in_its_place(tmp_path, tiny_run):
    images, _ = drawn(tmp_path, tiny_run, "--n", "4", "--classes", "0,1")
    canvas = np.asarray(Image.open(tmp_path / "drawn.png"))
    assert canvas.shape == (2 * 66 + 2, 2 * 66 + 2)
    assert (canvas[2:66:2, 2:66:2] == images[0, ..., 0]).all() and (canvas[68:132:2, 68:132:2] == images[3, ..., 0]).all()


def test_a_folder_holds_one_png_an_image(tmp_path, tiny_run):
    images, _ = drawn(tmp_path, tiny_run, "--n", "3", "--out", str(tmp_path / "many") + "/")
    files = sorted((tmp_path / "many").iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    assert all((np.asarray(Image.open(file)) == image[..., 0]).all() for file, image in zip(files, images))


def test_the_trajectory_has_a_frame_a_step_from_noise_to_image(tmp_path, tiny_run):
    drawn(tmp_path, tiny_run, "--n", "4", "--classes", "0,1", "--trajectory", str(tmp_path / "way.gif"))
    with Image.open(tmp_path / "way.gif") as gif:
        assert gif.n_frames == 3
        gif.seek(2)
        last = np.asarray(gif.convert("L")).astype(int)
    assert np.abs(last - np.asarray(Image.open(tmp_path / "drawn.png")).astype(int)).max() <= 1


def test_a_batch_that_memory_does_not_hold_is_halved(tiny_run, monkeypatch):
    network, diffusion = checkpoint.load(tiny_run).build()
    sizes, original = [], ddpm.sample

    def narrow(diffusion, model, shape, *args, **options):
        sizes.append(shape[0])
        if shape[0] > 2:
            raise torch.OutOfMemoryError("no more")
        return original(diffusion, model, shape, *args, **options)
    monkeypatch.setattr(ddpm, "sample", narrow)
    parts = [part for part, _ in sample.draw(network, diffusion, range(5), [0, 1], batch_size=5, steps=2)]
    assert parts == [range(0, 2), range(2, 4), range(4, 5)] and sizes == [5, 2, 2, 1]


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """A folder with dit.pt, a DiT of 4x8x8 latents in Meta's names, nudged so that its output is not zero; and vae.pt, f = 4."""
    folder = tmp_path_factory.mktemp("latent")
    torch.manual_seed(0)
    network = dit.DiT(8, 2, 4, 96, 2, heads=1, num_classes=20)           # 96 wide: one head, by the table's default
    for value in network.parameters():
        value.data += 0.05 * torch.randn_like(value)
    torch.save(network.state_dict(), folder / "dit.pt")
    torch.save(vae.AutoencoderKL(**vae.SIZES["Ti"]).state_dict(), folder / "vae.pt")
    return folder


LATENT = ["--classes", "7,19", "--n", "3", "--cfg-scale", "4", "--cfg-channels", "3", "--steps", "2"]


def test_a_latent_model_draws_what_its_autoencoder_decodes(latent, tmp_path, capsys):
    argv = ["--ckpt", str(latent / "dit.pt"), *LATENT]
    sample.main([*argv, "--out", str(tmp_path / "latents.png")])
    assert "latents" in capsys.readouterr().out and not (tmp_path / "latents.png").exists()
    sample.main([*argv, "--out", str(tmp_path / "images.png"), "--npz", str(tmp_path / "images.npz"), "--vae",
                 str(latent / "vae.pt")])
    assert "latents" not in capsys.readouterr().out
    with np.load(tmp_path / "latents.npz") as latents, np.load(tmp_path / "images.npz") as images, torch.no_grad():
        z = torch.from_numpy(latents["arr_0"]) / 0.18215                 # Stable Diffusion's scale, which Meta trained with
        expected = data.to_uint8(checkpoint.load_autoencoder(latent / "vae.pt").decode(z)).numpy()
        assert_close(images["arr_0"], expected)
        assert expected.shape == (3, 32, 32, 3) and len(np.unique(expected)) > 50 and images["arr_1"].tolist() == [7, 19, 7]
    assert Image.open(tmp_path / "images.png").mode == "RGB"


def test_latents_are_decoded_a_few_at_a_time_and_fewer_where_memory_does_not_hold_them(latent, monkeypatch):
    autoencoder, sizes = checkpoint.load_autoencoder(latent / "vae.pt"), []
    z, original = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0)), autoencoder.decode
    with torch.no_grad():
        expected = original(z / autoencoder.scale)

    def narrow(z):
        sizes.append(len(z))
        if len(z) > 2:
            raise torch.OutOfMemoryError("no more")
        return original(z)
    monkeypatch.setattr(autoencoder, "decode", narrow)
    torch.testing.assert_close(sample.decode(autoencoder, z, batch_size=4), expected, rtol=1e-4, atol=1e-4)
    assert sizes == [4, 2, 2, 1]


@pytest.mark.parametrize("ckpt, change, said", [
    ("dit.pt", dict(latent_channels=3), "its latents have 3 channels, those of the network 4"),
    ("run.pt", {}, "the network works on pixels")])
def test_an_autoencoder_that_does_not_fit_is_refused(latent, tiny_run, tmp_path, capsys, ckpt, change, said):
    torch.save(vae.AutoencoderKL(**vae.SIZES["Ti"] | change).state_dict(), tmp_path / "vae.pt")
    path = tiny_run if ckpt == "run.pt" else latent / ckpt
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(path), "--vae", str(tmp_path / "vae.pt"), "--out", str(tmp_path / "samples.png")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and said in error


def test_a_latent_models_images_are_scored_with_its_autoencoder_and_not_without(latent, tmp_path, capsys):
    argv = ["--ckpt", str(latent / "dit.pt"), "--n", "6", "--steps", "2", "--reference", str(tmp_path / "real.npz"), "--cache",
            str(tmp_path), "--results", str(tmp_path / "results.csv"), "--metrics", "FD", "--features", str(tmp_path / "colour.pt")]
    np.savez(tmp_path / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    run = checkpoint.load(features.JUDGE)                                # a judge of colour images, untaught
    run.network["arguments"]["channels"] = run.data.channels = 3
    run.ema = run.model = models.build(run.network).state_dict()
    checkpoint.save(tmp_path / "colour.pt", run)
    with pytest.raises(SystemExit):
        evaluate.main(argv)
    assert "--vae FILE names the one that decodes them" in capsys.readouterr().err
    evaluate.main([*argv, "--vae", str(latent / "vae.pt")])
    assert "6 of" in capsys.readouterr().out


def test_a_released_latent_model_writes_its_latents_and_says_so(latent, tmp_path, capsys):
    sample.main(["--ckpt", str(latent / "dit.pt"), *LATENT, "--out", str(tmp_path / "samples.png")])
    assert "latents" in capsys.readouterr().out
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].shape == (3, 4, 8, 8) and archive["arr_0"].dtype == np.float32
        assert archive["arr_1"].tolist() == [7, 19, 7]


# Which autoencoder decodes: --vae's, or the run's own, in it or beside it

def run_with(kept, folder=None):
    """A run whose record of its autoencoder is this one; folder: where its file lies."""
    data = checkpoint.Data("mnist", None, None, 4, 8)
    run = checkpoint.Run(checkpoint.VERSION, 1, {}, {}, checkpoint.Process("linear", 9, "eps", "small"), data, {}, {}, vae=kept)
    run.file = folder and folder / "run.pt"
    return run


def on_latents(folder=None, **kept):
    """What `sample.decoder` reads of a checkpoint: a run that was trained on latents scaled by 0.5."""
    return run_with(checkpoint.Autoencoder(0.5, **kept), folder)


FOUR = Namespace(channels=4)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The file of an autoencoder of train.py, and it as `checkpoint.load_autoencoder` gives it."""
    path = tmp_path_factory.mktemp("own") / "vae.pt"
    torch.manual_seed(1)
    network = {"class": "AutoencoderKL", "arguments": dict(channels=1, dim=32, multipliers=(1, 2), res_blocks=1)}
    state = models.build(network).state_dict()
    checkpoint.save(path, checkpoint.Run(checkpoint.VERSION, 3, {}, network, None, checkpoint.Data("mnist", None, None, 1, 8), state,
                                         state, vae=checkpoint.Autoencoder(0.7)))
    return path, checkpoint.load_autoencoder(path)


def assert_decodes_alike(a, b):
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(a.decode(z), b.decode(z))


def test_without_a_file_an_embedded_autoencoder_decodes_else_that_beside_the_run_else_none(own, tmp_path):
    path, autoencoder = own
    assert autoencoder.scale == autoencoder.origin.scale == 0.7
    elsewhere = replace(autoencoder.origin, scale=0.5, path=str(tmp_path / "gone.pt"))
    embedded = sample.decoder(None, run_with(elsewhere), FOUR)
    outside = dict(path="elsewhere/vae.pt", sha256=autoencoder.origin.sha256)        # and moved since, with the run
    for found in (embedded, sample.decoder(None, on_latents(path.parent, **outside), FOUR)):
        assert_decodes_alike(found, autoencoder)
        assert found.scale == 0.5 and not found.training # the run's, which may differ from the file's
    with pytest.raises(ValueError, match="put it there, or name it by --vae FILE"):  # what lies elsewhere is not even read
        sample.decoder(None, on_latents(tmp_path, **{**outside, "path": str(path)}), FOUR)
    assert sample.decoder(None, on_latents(), FOUR) is None               # released weights name no autoencoder
    assert sample.decoder(None, run_with(None), FOUR) is None


def test_a_file_must_be_the_autoencoder_of_the_run_and_any_will_do_for_released_weights(own, latent):
    path, autoencoder = own
    other = latent / "vae.pt"
    assert_decodes_alike(sample.decoder(str(path), run_with(autoencoder.origin), FOUR), autoencoder)
    found = sample.decoder(str(other), on_latents(), FOUR)
    assert found.scale == 0.5 and found.channels == 3
    for kept in (autoencoder.origin, replace(autoencoder.origin, network=None, model=None)):
        with pytest.raises(ValueError, match="vae.pt is another autoencoder than the network was trained with"):
            sample.decoder(str(other), run_with(kept), FOUR)
    with pytest.raises(ValueError, match="another autoencoder"):         # another file stands where it was
        sample.decoder(None, on_latents(latent, path=str(other), sha256=autoencoder.origin.sha256), FOUR)
    with pytest.raises(ValueError, match="there is nothing to decode"):
        sample.decoder(str(path), run_with(None), FOUR)


def test_decoding_divides_by_the_scale(own):
    _, autoencoder = own
    z = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(sample.decode(autoencoder, 0.7 * z, batch_size=3), autoencoder.decode(z), rtol=1e-4, atol=1e-4)


def test_an_autoencoders_run_is_not_sampled_and_told_what_it_is(own, tmp_path, capsys):
    path, _ = own
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(path), "--out", str(tmp_path / "samples.png")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert "holds a AutoencoderKL, which encodes and decodes: a network trained on its latents samples" in error


@pytest.mark.parametrize("size, embedded", [(1, False), (2 ** 40, True)])
def test_only_an_autoencoder_of_ours_below_the_limit_is_carried(own, latent, monkeypatch, size, embedded):
    path, autoencoder = own
    monkeypatch.setattr(checkpoint, "EMBEDDED", size)
    assert (checkpoint.load_autoencoder(path).origin.model is not None) == embedded
    released, path = checkpoint.load_autoencoder(latent / "vae.pt"), latent / "vae.pt"
    assert released.scale == 0.18215 and released.origin == checkpoint.Autoencoder(0.18215, str(path), files.sha256_of(path))
