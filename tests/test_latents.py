"""latents.py: what is on the disk is what the encoder gives, once, for these data and this autoencoder, whatever interrupts it."""
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import latents
import vae
from test_files import forked

SMALL = dict(channels=1, dim=32, multipliers=(1, 2), res_blocks=1)           # f = 2
NAMES = ("mean.npy", "std.npy", "flipped_mean.npy", "flipped_std.npy")


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return vae.AutoencoderKL(**SMALL).eval()


def images(path, seed=0, shape=(24, 8, 8, 1), labels=np.arange(24) % 3):
    """The path of an .npz of random images."""
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    np.savez(path, arr_0=pixels, **({} if labels is None else dict(arr_1=labels)))
    return str(path)


@pytest.fixture
def pixels(tmp_path):
    """22 images for training, 24 without the two held out."""
    return data.load(images(tmp_path / "images.npz"))


@pytest.fixture
def encoded(monkeypatch, autoencoder):
    """How many images each call of the encoder was given."""
    sizes, original = [], autoencoder.encode

    def recorded(x):
        sizes.append(len(x))
        return original(x)
    monkeypatch.setattr(autoencoder, "encode", recorded)
    return sizes


def folders(cache):
    return sorted(Path(cache).glob("latents-*"))


def tables(folder):
    return [np.load(folder / name) for name in NAMES if (folder / name).exists()]


def assert_close(a, b):
    """A few hundred float32 products a number, in another order: within 1e-5 of numbers around 1."""
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-5, atol=1e-5)


# What is kept

@pytest.mark.parametrize("flip", [False, True])
def test_means_and_deviations_on_the_disk_are_the_encoders(tmp_path, autoencoder, pixels, flip):
    latents.latents(pixels, autoencoder, "a", flip, tmp_path)
    x = data.to_float(pixels.batch(np.arange(22))[0])
    with torch.no_grad():
        moments = [autoencoder.encode(x), *([autoencoder.encode(x.flip(3))] if flip else [])]
    found = tables(*folders(tmp_path))
    assert len(found) == 2 * len(moments) and all(table.dtype == np.float32 for table in found)
    for i, (mean, log_variance) in enumerate(moments):
        assert_close(found[2 * i], mean)
        assert_close(found[2 * i + 1], log_variance.exp().sqrt())
    assert not flip or np.abs(found[0] - found[2]).max() > 0.1           # a mirror image is another one


def test_latents_in_bfloat16_are_float32_numbers_near_the_exact_ones_and_kept_beside_them(tmp_path, autoencoder, pixels):
    exact = latents.latents(pixels, autoencoder, "a", False, tmp_path).moments[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = latents.latents(pixels, autoencoder, "a", False, tmp_path).moments[0]
        z = torch.from_numpy(np.array(exact))
        image = autoencoder.decode(z).detach()
    assert len(folders(tmp_path)) == 2 and rounded.dtype == np.float32 and image.dtype == torch.float32
    # a dozen layers, of which each rounds to 8 bits: 12^0.5 / 512 = 0.7 % of the deviation; allow four times that
    assert 0 < np.abs(rounded - exact).mean() < 0.028 * exact.std()
    decoded = autoencoder.decode(z).detach()
    assert 0 < (image - decoded).abs().mean() < 0.028 * decoded.std()


def test_a_batch_holds_moments_of_the_image_and_its_mirror_image_with_the_labels_of_the_split(tmp_path, autoencoder, pixels):
    dataset, chosen = latents.latents(pixels, autoencoder, "a", True, tmp_path), np.array([21, 0, 5])
    moments, labels = dataset.batch(chosen)
    assert moments.shape == (3, 2, 2, 4, 4, 4)                           # (n, F, mean and deviation, c, h, w)
    found = tables(*folders(tmp_path))
    for kind in range(4):
        assert np.array_equal(moments[:, kind // 2, kind % 2], found[kind][chosen])
    assert torch.equal(labels, pixels.batch(chosen)[1]) and labels.dtype == torch.int64
    assert (dataset.channels, dataset.image_size, len(dataset), dataset.num_classes) == (4, (4, 4), 22, 3)


def test_labels_on_the_disk_are_those_of_the_rows_of_the_split(tmp_path, autoencoder, pixels):
    latents.latents(pixels, autoencoder, "a", False, tmp_path)
    held_out = set(range(24)) - set(pixels.rows.tolist())
    assert len(held_out) == 2 and np.load(folders(tmp_path)[0] / "labels.npy").tolist() == [
        row % 3 for row in range(24) if row not in held_out]


def test_images_without_labels_have_latents_without_labels(tmp_path, autoencoder):
    dataset = latents.latents(data.load(images(tmp_path / "images.npz", labels=None)), autoencoder, "a", False, tmp_path)
    assert dataset.batch(np.arange(3))[1] is None and dataset.num_classes is None
    assert not (folders(tmp_path)[0] / "labels.npy").exists()


def test_latents_are_mapped_from_files_that_reading_does_not_change(tmp_path, autoencoder, pixels):
    dataset = latents.latents(pixels, autoencoder, "a", False, tmp_path)
    assert all(isinstance(table, np.memmap) and table.mode == "r" for table in dataset.moments)
    moments, _ = dataset.batch(np.arange(3))
    before = tables(*folders(tmp_path))
    moments.zero_()                                      # a batch is a copy
    assert all(np.array_equal(a, b) for a, b in zip(before, tables(*folders(tmp_path)), strict=True))


# Once

def test_a_second_call_encodes_nothing(tmp_path, autoencoder, pixels, encoded):
    first = latents.latents(pixels, autoencoder, "a", True, tmp_path)
    assert encoded == [1, 22, 22]                        # the first image shows the shape
    encoded.clear()
    again = latents.latents(pixels, autoencoder, "a", True, tmp_path)
    assert encoded == [1]
    assert torch.equal(first.batch(np.arange(22))[0], again.batch(np.arange(22))[0])


@pytest.mark.parametrize("call, done", [(1, 0), (2, 0), (7, 6), (11, 10)])
def test_a_kill_in_mid_encoding_is_gone_on_from_and_gives_the_same_files(
        tmp_path, monkeypatch, autoencoder, pixels, encoded, call, done):
    monkeypatch.setattr(latents, "BATCH", 2)             # each of two is encoded, then its mirror image
    monkeypatch.setattr("tables.SECONDS", 0)
    latents.latents(pixels, autoencoder, "a", True, tmp_path / "whole")

    def until_killed():
        original = autoencoder.encode
        autoencoder.encode = lambda x: original(x) if len(encoded) < call else os.kill(os.getpid(), signal.SIGKILL)
        latents.latents(pixels, autoencoder, "a", True, tmp_path / "cut")
    encoded.clear()
    assert forked(until_killed) == [-signal.SIGKILL]
    latents.latents(pixels, autoencoder, "a", True, tmp_path / "cut")
    assert sum(encoded) == 1 + 2 * (22 - done)
    cut, whole = (tables(*folders(tmp_path / name)) for name in ("cut", "whole"))
    assert all(np.array_equal(a, b) for a, b in zip(cut, whole, strict=True))


def test_other_data_another_split_another_autoencoder_and_flips_have_folders_of_their_own(tmp_path, autoencoder):
    one = images(tmp_path / "one.npz")
    latents.latents(data.load(one), autoencoder, "a", False, tmp_path)
    for n, (dataset, sha256, flip) in enumerate([
            (data.load(one), "b", False), (data.load(one), "a", True), (data.load(one, split="all"), "a", False),
            (data.load(images(tmp_path / "two.npz", seed=1)), "a", False)], 2):
        before = [tables(folder) for folder in folders(tmp_path)]
        latents.latents(dataset, autoencoder, sha256, flip, tmp_path)
        assert len(folders(tmp_path)) == n
        kept = [tables(folder) for folder in folders(tmp_path)]
        assert all(any(np.array_equal(old[0], new[0]) for new in kept) for old in before)
    images(tmp_path / "one.npz", labels=np.arange(24) % 2)               # the file's images are the same, its labels others
    latents.latents(data.load(one), autoencoder, "a", False, tmp_path)
    images(tmp_path / "one.npz", seed=2)
    latents.latents(data.load(one), autoencoder, "a", False, tmp_path)
    assert len(folders(tmp_path)) == 7


# What does not fit

@pytest.mark.parametrize("shape, said", [
    ((24, 8, 8, 3), "--vae: the autoencoder takes images of 1 channels, .*images.npz has 3"),
    ((24, 9, 8, 1), "image size 9 is not a multiple of the autoencoder's factor 2: use 8 or 10"),
    ((24, 8, 1, 1), "image size 1 is not a multiple of the autoencoder's factor 2: use 2")])
def test_images_that_the_autoencoder_does_not_take_are_refused_before_anything_is_written(tmp_path, autoencoder, shape, said):
    pixels = data.load(images(tmp_path / "images.npz", shape=shape))
    with pytest.raises(ValueError, match=said):
        latents.latents(pixels, autoencoder, "a", False, tmp_path)
    assert folders(tmp_path) == []


def test_a_batch_that_memory_does_not_hold_is_encoded_in_pieces(tmp_path, pixels, autoencoder, monkeypatch):
    latents.latents(pixels, autoencoder, "a", cache=tmp_path / "whole")
    sizes, original = [], autoencoder.encode

    def narrow(x):
        sizes.append(len(x))
        if len(x) > 6:
            raise torch.OutOfMemoryError("no more")
        return original(x)
    monkeypatch.setattr(autoencoder, "encode", narrow)
    latents.latents(pixels, autoencoder, "a", cache=tmp_path / "pieces")
    assert sizes == [1, 22, 11, 5, 5, 5, 5, 2]           # one image to see the shape; all, halves of them until they fit
    whole, pieces = (tables(*folders(tmp_path / name)) for name in ("whole", "pieces"))
    for a, b in zip(whole, pieces, strict=True):                         # other sums of float32 of some hundred terms of size 1
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
