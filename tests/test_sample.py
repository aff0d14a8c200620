"""sample.py: image i of a seed is one image, however it is drawn; and what is written is what was drawn."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import ddpm
import dit
import sample

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


def test_two_processes_draw_what_one_draws(tmp_path, tiny_run):
    one, labels = drawn(tmp_path, tiny_run, "--n", "5")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", str(ROOT / "sample.py"),
               "--ckpt", str(tiny_run), "--steps", "3", "--n", "5", "--npz", str(tmp_path / "two.npz"), "--out", f"{tmp_path}/d/"]
    subprocess.run(command, check=True, capture_output=True)
    with np.load(tmp_path / "two.npz") as archive:
        assert_close(one, archive["arr_0"])
        assert (archive["arr_1"] == labels).all()
    assert len(list((tmp_path / "d").glob("*.png"))) == 5
    done = subprocess.run([word for word in command if word not in ("--npz", str(tmp_path / "two.npz"))], capture_output=True)
    assert done.returncode == 0                          # nothing to gather, nothing to fail on


def test_seeds_give_other_images_and_the_same_seed_the_same(tmp_path, tiny_run):
    first, again, other = (drawn(tmp_path, tiny_run, "--n", "3", "--seed", seed)[0] for seed in ("1", "1", "2"))
    assert (first == again).all() and (first != other).any()


def test_labels_cycle_through_the_classes_by_number_or_name(tmp_path, tiny_run):
    images, labels = drawn(tmp_path, tiny_run, "--n", "5", "--classes", "3,7")
    assert labels.tolist() == [3, 7, 3, 7, 3] and images.shape == (5, 32, 32, 1) and images.dtype == np.uint8
    assert drawn(tmp_path, tiny_run)[1].tolist() == list(range(10)) * 4
    assert sample.parse_classes("dog,0", ["cat", "dog"], 2) == [1, 0]


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
    network, diffusion = checkpoint.build(checkpoint.load(tiny_run))
    sizes, original = [], ddpm.sample

    def narrow(diffusion, model, shape, *args, **options):
        sizes.append(shape[0])
        if shape[0] > 2:
            raise torch.OutOfMemoryError("no more")
        return original(diffusion, model, shape, *args, **options)
    monkeypatch.setattr(ddpm, "sample", narrow)
    parts = [part for part, _ in sample.draw(network, diffusion, range(5), [0, 1], batch_size=5, steps=2)]
    assert parts == [range(0, 2), range(2, 4), range(4, 5)] and sizes == [5, 2, 2, 1]


def test_a_released_latent_model_writes_its_latents_and_says_so(tmp_path, capsys):
    torch.manual_seed(0)
    network = dit.DiT(8, 2, 4, 96, 2, heads=1, num_classes=20)           # 96 wide: one head, by the table's default
    torch.save(network.state_dict(), tmp_path / "DiT-small.pt")
    sample.main(["--ckpt", str(tmp_path / "DiT-small.pt"), "--classes", "7,19", "--n", "3", "--cfg-scale", "4", "--cfg-channels", "3",
                 "--steps", "2", "--out", str(tmp_path / "samples.png")])
    assert "latents" in capsys.readouterr().out
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].shape == (3, 4, 8, 8) and archive["arr_0"].dtype == np.float32
        assert archive["arr_1"].tolist() == [7, 19, 7]
