"""cascade.py: an upsampler learns from images and their own small, noisy means; what it draws in a cascade depends on (seed, i)."""
import os
from argparse import Namespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

import cascade
import checkpoint
import data
import ddpm
import dit
import models
import sample
import sampling
import train
import unet
from formula import fill
from objectives import Denoising, Pixels, Randomness, SuperResolution
from refusals import refusal
from reports import upsampling_report
from test_objectives import bytes_of
from test_train import SMALLER, saved_autoencoder

CPU = torch.device("cpu")
WHOLE = slice(0, 8)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def repeated(low):
    """Each pixel 4 x 4 times: the simplest image that shrinks to low."""
    return low.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


class Perfect(torch.nn.Module):
    """An upsampler that knows x0: its prediction is low, enlarged. It notes what it is given."""

    factor = 4

    def __init__(self, image_size=(8, 12), channels=1, num_classes=None, room=10 ** 9):
        super().__init__()
        self.image_size, self.channels, self.num_classes, self.null_label, self.room = image_size, channels, num_classes, None, room
        self.seen = []

    def forward(self, x, t, y, low):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("no more")
        self.seen.append((x, y))
        return repeated(low)


PROCESS = ddpm.Diffusion(ddpm.cosine_betas(100), "x0", "small")


# What a step draws

def upsampling(batch_size=8, flip=False, shift=0):
    inputs = Pixels(Randomness(0, batch_size, slice(0, batch_size), CPU), flip, shift)
    return SuperResolution(ddpm.Diffusion(ddpm.linear_betas(), "x0"), inputs, 10, cfg_drop=0.5)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_the_small_image_is_the_mean_of_four_by_four_pixels(h, w, channels):
    images = np.random.default_rng(h * w).integers(0, 256, (3, 4 * h, 4 * w, channels), dtype=np.uint8)
    found = cascade.shrink(data.to_float(torch.from_numpy(images)))
    expected = images.reshape(3, h, 4, w, 4, channels).mean(axis=(2, 4)).transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(found, expected, atol=1e-6)               # 16 numbers below 1 in float32


def test_low_is_the_image_that_is_learned_and_not_the_one_before_its_flip(monkeypatch):
    monkeypatch.setattr(cascade, "MAX_SIGMA", 0.0)
    x0, *_, low = upsampling(flip=True, shift=2).draw(3, bytes_of(8, 8, 8, 1), torch.arange(8))
    torch.testing.assert_close(low, x0.reshape(8, 1, 2, 4, 2, 4).mean(dim=(3, 5)), rtol=0, atol=1e-6)


def test_lows_noise_is_normal_and_its_amount_uniform_up_to_the_largest():
    x0, *_, low = upsampling(64).draw(3, bytes_of(64, 128, 128, 1), torch.arange(64) % 10)
    noise = (low - cascade.shrink(x0)).flatten(1) / cascade.MAX_SIGMA    # 1024 numbers an image: its deviation is known to 2 %
    sigma = noise.std(dim=1)
    assert sigma.max() < 1.1 and sigma.min() < 0.1
    assert abs(sigma.mean() - 0.5) < 4 * 0.289 / 8       # four standard errors of a uniform number's mean over 64
    standard = noise / sigma.unsqueeze(1)
    assert abs(standard.mean()) < 4 / 256 and abs(standard.pow(4).mean() - 3) < 0.15         # sqrt(96 / 65536) = 0.04


def test_what_an_upsampler_draws_besides_low_is_what_any_denoiser_draws():
    images, labels, objective = bytes_of(8, 8, 8, 1), torch.arange(8), upsampling()
    plain = Denoising(objective.diffusion, objective.inputs, 10, cfg_drop=0.5).draw(3, images, labels)
    assert all(map(torch.equal, plain, objective.draw(3, images, labels)[:4]))


def test_the_loss_of_a_network_that_enlarges_low_is_what_the_enlarged_image_misses():
    objective, x0, low = upsampling(), normal(5, 1, 8, 8), normal(5, 1, 2, 2, seed=1)
    t, y = torch.tensor([0, 249, 250, 500, 999]), torch.arange(5)
    network = Perfect((8, 8))
    losses, groups = objective.loss(network, x0, t, y, normal(5, 1, 8, 8, seed=2), low)
    torch.testing.assert_close(losses, (repeated(low) - x0).square().mean(dim=(1, 2, 3)))
    assert groups.tolist() == [0, 0, 1, 2, 3] and torch.equal(network.seen[0][1], y)


def test_the_picture_shows_small_drawn_and_original_of_the_same_held_out_images(tmp_path):
    held_out = data.load(split="test")
    upsampling_report(held_out, PROCESS, 0, CPU, Perfect((32, 32)), tmp_path / "run.png")
    picture = np.asarray(Image.open(tmp_path / "run.png"))
    assert picture.shape == (9 * 66 + 2, 10 * 66 + 2)
    tiles = picture[2:, 2:].reshape(9, 66, 10, 66)[:, :64:2, :, :64:2].transpose(0, 2, 1, 3)         # magnified twice
    originals = held_out.images[held_out.rows[:30], ..., 0].reshape(3, 10, 32, 32)
    small = originals.reshape(3, 10, 8, 4, 8, 4).mean(axis=(3, 5)).repeat(4, axis=2).repeat(4, axis=3)
    assert np.array_equal(tiles[2::3], originals)
    for rows in (tiles[::3], tiles[1::3]):
        assert np.abs(rows - small).max() <= 1.01        # a grey level is cut off, not rounded


# What an upsampler draws

shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@given(shapes, st.integers(0, 1000), st.integers(1, 40), st.integers(1, 4))
def test_a_perfect_upsampler_keeps_the_small_image(shape, seed, T, room):
    n, channels, h, w = shape
    low, process = normal(*shape, seed=seed).clamp(-1, 1), ddpm.Diffusion(ddpm.cosine_betas(T), "x0", "small")
    drawn = cascade.enlarge(Perfect((4 * h, 4 * w), channels, room=room), process, low, None, seed, range(n))
    assert drawn.shape == (n, channels, 4 * h, 4 * w)
    torch.testing.assert_close(cascade.shrink(drawn), low, rtol=0, atol=1e-5)


def test_what_lies_beyond_black_and_white_is_clamped_before_the_upsampler_sees_it_and_after():
    seen = []

    class Excessive(Perfect):
        def forward(self, x, t, y, low):
            seen.append(low)
            return 3 * repeated(low)
    drawn = cascade.enlarge(Excessive((4, 4)), PROCESS, torch.tensor([-3.0, 0.5]).reshape(2, 1, 1, 1), None, 0, [0, 1])
    assert seen[0].flatten().tolist() == [-1, 0.5] and set(drawn.flatten().tolist()) == {-1, 1}


def first_noise(seed, indices, room=10 ** 9):
    """The noise that an upsampler starts from, for images of a seed."""
    network, n = Perfect((4, 4), room=room), len(indices)
    cascade.enlarge(network, PROCESS, torch.zeros(n, 1, 1, 1), None, seed, indices)
    return torch.cat([x for x, _ in network.seen[::cascade.STEPS]])


def test_an_images_noise_depends_on_its_seed_and_number_alone_however_the_batch_is_cut():
    whole = first_noise(3, range(7))
    assert torch.equal(whole, first_noise(3, range(7), room=2)) and torch.equal(whole[4:6], first_noise(3, [4, 5]))
    assert len({row.numpy().tobytes() for row in (*whole, *first_noise(4, range(7)))}) == 14


def test_the_upsamplers_noise_is_not_the_bases():
    base = torch.stack([torch.randn(16, generator=ddpm.keyed_generator((3, i))) for i in range(7)])
    correlation = np.corrcoef(base, first_noise(3, range(7)).flatten(1))[:7, 7:]
    assert np.abs(correlation).max() < 0.95              # 16 numbers: 0.25 a standard error, and 49 pairs


def test_labels_reach_an_upsampler_that_has_classes_and_no_other():
    for num_classes, expected in ((10, [3, 1, 2]), (None, None)):
        network = Perfect(num_classes=num_classes, room=2)
        cascade.enlarge(network, PROCESS, torch.zeros(3, 1, 2, 3), torch.tensor([3, 1, 2]), 0, range(3))
        labels = [y for _, y in network.seen[::cascade.STEPS]]
        assert (torch.cat(labels).tolist() if expected else labels[0]) == expected


# The commands, on images of 8 x 8 pixels from 2 x 2

@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny_run):
    """Small DiTs; a folder with images.npz, 24 images in three classes; flags that train on it."""
    folder = tmp_path_factory.mktemp("small")
    np.savez(folder / "images.npz", arr_0=np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8),
             arr_1=np.arange(24) % 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dit.SIZES, "Ti", SMALLER)
        patch.setattr(sampling, "STEPS", 2)
        yield folder, ["--data", str(folder / "images.npz"), "--batch-size", "8", "--device", "cpu", "--sample-every", "2"]


UP = ["--model", "unet", "--size", "Ti-up"]


@pytest.fixture(scope="module")
def runs(small):
    """base.pt and sr.pt of train.py, nudged after two steps, so that noise, class and low show."""
    folder, argv = small
    train.main([*argv, "--image-size", "2", "--size", "Ti/1", "--steps", "2", "--out", str(folder / "base.pt")])
    train.main([*argv, *UP, "--steps", "2", "--out", str(folder / "sr.pt")])
    for name in ("base.pt", "sr.pt"):
        run, generator = checkpoint.load(folder / name), torch.Generator().manual_seed(0)
        for value in run.ema.values():
            value += 0.05 * torch.randn(value.shape, generator=generator)
        checkpoint.save(folder / name, run)
    return folder


def drawn(tmp_path, folder, *argv, upsampler="sr.pt"):
    """arr_0 and arr_1 of a cascade."""
    npz = tmp_path / "drawn.npz"
    sample.main(["--ckpt", str(folder / "base.pt"), "--cascade", str(folder / upsampler), "--steps", "2", "--npz", str(npz),
                 "--out", str(tmp_path / "drawn.png"), *argv])
    with np.load(npz) as archive:
        return archive["arr_0"], archive["arr_1"]


def assert_close(a, b):
    """Equal within one grey level: products of another batch size may round differently."""
    assert a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1


@pytest.mark.slow
def test_an_upsampler_learns_to_believe_the_small_image(tmp_path):
    pixels = repeated(torch.randint(0, 256, (64, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    np.savez(tmp_path / "images.npz", arr_0=pixels[:, 0].numpy())
    train.main([*UP, "--data", str(tmp_path / "images.npz"), "--steps", "40", "--batch-size", "8", "--warmup", "5", "--ema", "0.9",
                "--device", "cpu", "--sample-every", "100", "--out", str(tmp_path / "sr.pt")])
    low = data.to_float(torch.tensor([[[[10], [200]], [[250], [90]]]], dtype=torch.uint8))
    found = cascade.enlarge(*checkpoint.load(tmp_path / "sr.pt").build(), low, None, 0, [0])
    # two random images differ by 0.8 in the mean of a quarter, the mean of all images from one by 0.5
    assert (cascade.shrink(found) - low).abs().mean() < 0.25


def test_a_cascade_draws_images_of_the_upsamplers_size_with_the_bases_labels(tmp_path, runs):
    images, labels = drawn(tmp_path, runs, "--n", "5", "--classes", "2,0")
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8 and labels.tolist() == [2, 0, 2, 0, 2]
    assert len({image.tobytes() for image in images}) == 5
    with Image.open(tmp_path / "drawn.png") as picture:
        assert picture.size == (2 * 66 + 2, 3 * 66 + 2)


def test_a_cascade_is_the_upsampler_on_what_the_base_draws(tmp_path, runs):
    images, labels = drawn(tmp_path, runs, "--n", "4", "--seed", "5", "--cfg-scale", "2", "--batch-size", "3")
    base, upsampler = (checkpoint.load(runs / name).build() for name in ("base.pt", "sr.pt"))
    (_, low), = sample.draw(*base, range(4), [0, 1, 2], 5, steps=2, cfg_scale=2, clip=True)
    assert low.shape == (4, 1, 2, 2)
    expected = data.to_uint8(cascade.enlarge(*upsampler, low, torch.from_numpy(labels), 5, range(4))).numpy()
    assert_close(images, expected)


def saved(path, model="unet", size="Ti-up", side=8, channels=1, classes=None, names=None, **options):
    """A run of an untrained network, as train.py writes it."""
    torch.manual_seed(0)
    described = models.describe(model, size, side, channels, classes, **options)
    state = models.build(described).state_dict()
    checkpoint.save(path, checkpoint.Run(
        checkpoint.VERSION, 1, {}, described, checkpoint.Process("cosine", 1000, "x0", "small"),
        checkpoint.Data("mnist", names, classes, channels, side), state, state))
    return str(path)


def test_latents_are_decoded_and_then_enlarged(tmp_path, small):
    folder, argv = small
    autoencoder = saved_autoencoder(tmp_path / "vae.pt")
    train.main([*argv, "--vae", autoencoder, "--size", "Ti/2", "--steps", "1", "--cache", str(tmp_path), "--out",
                str(tmp_path / "base.pt")])
    saved(tmp_path / "sr.pt", side=32, classes=3)
    assert drawn(tmp_path, tmp_path, "--n", "2")[0].shape == (2, 32, 32, 1)          # 4 x 4 latents, 8 x 8 pixels
    run = checkpoint.load(tmp_path / "base.pt")
    run.vae = checkpoint.Autoencoder(0.5)
    checkpoint.save(tmp_path / "base.pt", run)
    os.remove(autoencoder)
    flags = ["--ckpt", tmp_path / "base.pt", "--cascade", tmp_path / "sr.pt", "--out", tmp_path / "x.png"]
    refusal(lambda: sample.draw_and_write(sample.flags().parse_args(list(map(str, flags)))), "latents", "--vae FILE")


def test_adms_released_upsampler_enlarges_what_adms_released_base_draws(tmp_path, monkeypatch):
    for name in list(reversed(unet.SIZES)):              # put back in their order afterwards
        monkeypatch.delitem(unet.SIZES, name)
    few = dict(dim=32, res_blocks=1, attention_ds=(), **unet.ADM)        # small ones under their names
    monkeypatch.setitem(unet.SIZES, "adm-64", dict(image_size=4, multipliers=(1, 1), **few))
    monkeypatch.setitem(unet.SIZES, "adm-64-256", dict(image_size=16, multipliers=(1, 2), **few))
    for name in unet.SIZES:
        size = unet.SIZES[name]
        described = models.describe("unet", name, size["image_size"], 3, 1000, null_class=False, learn_sigma=True)
        torch.save(fill(models.build(described)).state_dict(), tmp_path / f"{name}.pt")
    (tmp_path / "adm-64.pt").rename(tmp_path / "base.pt")
    images, labels = drawn(tmp_path, tmp_path, "--n", "3", "--classes", "7,388", upsampler="adm-64-256.pt")
    assert images.shape == (3, 16, 16, 3) and labels.tolist() == [7, 388, 7] and len(np.unique(images)) > 50


# What does not fit

def run_of(classes):
    """What an upsampler must fit: the run of a base, with these classes."""
    return Namespace(data=Namespace(classes=classes))


FITS = dict(base=run_of(["a", "b", "c"]), labelled=3, shape=(2, 2, 1))


def test_classes_of_base_and_upsampler_must_be_the_same_or_missing(tmp_path):
    with_null = saved(tmp_path / "null.pt", classes=3, names=["a", "b", "c"])
    without, none = saved(tmp_path / "without.pt", classes=3, null_class=False), saved(tmp_path / "none.pt")
    unlabelled = FITS | dict(base=run_of(None), labelled=None)
    for path, how in ((with_null, FITS), (without, FITS), (none, FITS), (none, unlabelled), (with_null, unlabelled)):
        network, process = sampling.load_upsampler(path, **how)
        assert isinstance(network, unet.SuperResUNet) and process.prediction == "x0"
    said = "was trained with 3 classes, which are not those of --ckpt"
    for path, how in ((without, unlabelled), (with_null, FITS | dict(labelled=4)),
                      (with_null, FITS | dict(base=run_of(["a", "c", "b"])))):
        refusal(lambda: sampling.load_upsampler(path, **how), path, said)


@pytest.mark.parametrize("shape", [(4, 2, 1), (2, 4, 1), (2, 2, 3), (8, 8, 1)])
def test_an_upsampler_of_another_size_or_other_channels_is_refused(tmp_path, shape):
    path = saved(tmp_path / "sr.pt")
    refusal(lambda: sampling.load_upsampler(path, **FITS | dict(shape=shape)), "enlarges 2x2 pixels of 1 channels",
            "{}x{} of {}".format(*shape))

