"""data.py: bytes survive, every image is read once an epoch, image files come out right, and what is damaged is refused.

Most images here are of one colour, which no crop or scaling changes: so an image is known again by its level. Nothing leaves
the machine: CIFAR-10 is a few records in the official layout, served by a web server in the test.
"""
import functools
import gc
import hashlib
import http.server
import io
import os
import signal
import struct
import tarfile
import threading
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

import arrays
import data
import tables
import image_files
from data import Batches, Dataset, ahead, augment, load, to_float, to_uint8
from folders import side_of
from image_files import center_crop
from refusals import refusal
from test_files import forked


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def numbered(n, rows=None):
    """A data set of n images of one pixel; the pixel and the label are the image's number."""
    return Dataset("numbered", np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1), np.arange(n), range(n), rows)


def solid(path, level, side=4):
    """Write an image of one level, grey, or one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if isinstance(level, tuple) else "L", (side, side), level).save(path)
    return path


def photos(folder, levels, **options):
    """A folder of one image a level: 00.png, 01.png, ... -> the folder."""
    for i, level in enumerate(levels):
        solid(folder / f"{i:02d}.png", level, **options)
    return folder


def load_folder(folder, size=4, **options):
    return load(str(folder), size, cache=folder.parent / "cache", **options)


def levels(dataset):
    """The first value of each of its images, those of the other split included."""
    return dataset.images[:, 0, 0, 0].tolist()


# Bytes and pixels

def test_every_byte_survives_the_way_to_floats_and_back():
    images = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 16, 1)
    assert to_uint8(to_float(images)).equal(images)


def test_black_is_minus_one_and_white_is_one():
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 2, 1)).flatten().tolist() == [-1, 1]


@pytest.mark.parametrize("away", [-0.49, 0.49])
def test_pixels_between_two_levels_go_to_the_nearer(away):
    images = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 16, 1)
    assert to_uint8(to_float(images) + away / 127.5).equal(images)


def test_pixels_out_of_range_are_clamped():
    assert to_uint8(torch.tensor([-7.0, -1.01, 1.01, 7.0]).reshape(1, 1, 1, 4)).flatten().tolist() == [0, 0, 255, 255]


def test_networks_see_channels_first_and_files_hold_them_last():
    images = torch.from_numpy(noise(2, 4, 5, 3))
    x = to_float(images)
    assert x.shape == (2, 3, 4, 5) and x.dtype == torch.float32
    assert x[1, 2, 3, 0] == images[1, 3, 0, 2] / 127.5 - 1


# Flip and shift

def picture(n=3, height=4, width=5):
    return torch.arange(n * 2 * height * width, dtype=torch.float32).reshape(n, 2, height, width)


def test_flipping_twice_changes_nothing():
    flip = torch.tensor([True, False, True])
    assert augment(augment(picture(), flip), flip).equal(picture())


def test_a_flip_mirrors_left_and_right_of_its_own_image_only():
    x = augment(picture(), torch.tensor([False, True, False]))
    assert x[[0, 2]].equal(picture()[[0, 2]])
    np.testing.assert_array_equal(x[1], picture().numpy()[1, :, :, ::-1])


def test_an_offset_of_zero_changes_nothing():
    assert augment(picture(), offset=torch.zeros(3, 2, dtype=torch.long)).equal(picture())


def test_an_offset_moves_a_dot_down_and_right():
    x = torch.zeros(1, 1, 6, 7)
    x[0, 0, 1, 2] = 1
    assert augment(x, offset=torch.tensor([[2, 3]])).nonzero().tolist() == [[0, 0, 3, 5]]


@given(st.lists(st.tuples(st.integers(-6, 6), st.integers(-6, 6)), min_size=1, max_size=3))
def test_each_image_moves_by_its_own_offset_and_repeats_its_border(offsets):
    x = picture(len(offsets))
    moved = augment(x, offset=torch.tensor(offsets))
    for image, result, (down, right) in zip(x, moved, offsets):
        wide = np.pad(image, ((0, 0), (6, 6), (6, 6)), mode="edge")
        np.testing.assert_array_equal(result, wide[:, 6 - down:10 - down, 6 - right:11 - right])


def test_a_flip_comes_before_the_offset():
    flip, offset = torch.tensor([True] * 3), torch.tensor([[0, 1]] * 3)
    assert augment(picture(), flip, offset).equal(augment(augment(picture(), flip), offset=offset))


# The order of training

@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 2 ** 40), st.integers(0, 3))
def test_an_epoch_visits_each_index_once_whatever_the_batch_size(n, batch_size, seed, epoch):
    batches = Batches(numbered(n), batch_size, seed)
    read = np.concatenate([batches.indices(step) for step in range((epoch + 1) * n // batch_size + 1)])
    assert sorted(read[epoch * n:(epoch + 1) * n]) == list(range(n))


@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 1000))
def test_every_batch_is_full(n, batch_size, step):
    images, labels = Batches(numbered(n), batch_size, seed=0)[step]
    assert len(images) == len(labels) == batch_size


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        return tuple(Batches(numbered(50), 50, seed).indices(epoch))
    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


@given(st.permutations(range(12)), st.integers(1, 9), st.integers(1, 20))
def test_the_order_depends_on_the_step_alone(steps, n, batch_size):
    batches = Batches(numbered(n), batch_size, seed=3)
    for step in steps:
        np.testing.assert_array_equal(batches.indices(step), Batches(numbered(n), batch_size, seed=3).indices(step))


@pytest.mark.parametrize("world", [2, 4])
def test_the_parts_of_all_processes_make_the_whole_batch(world):
    dataset, N = numbered(30), 20
    parts = [slice(rank * N // world, (rank + 1) * N // world) for rank in range(world)]
    for step in (0, 1, 7):
        images, labels = (torch.cat(pieces) for pieces in zip(*(Batches(dataset, N, 5, part)[step] for part in parts)))
        whole = Batches(dataset, N, 5)[step]
        assert images.equal(whole[0]) and labels.equal(whole[1])


def test_what_is_read_ahead_comes_in_order_while_the_next_is_read_and_an_error_in_its_place():
    reading, threads = threading.Semaphore(0), set()

    def read(item):
        reading.release()
        threads.add(threading.current_thread())
        return 12 // (3 - item), None
    read_ahead, seen = ahead(read, range(9), torch.device("cpu")), []
    with pytest.raises(ZeroDivisionError):
        for number, _ in read_ahead:
            seen.append(number)
            assert all(reading.acquire(timeout=10) for _ in range(1 + (len(seen) == 1)))         # the next is being read
    assert seen == [4, 6, 12] and len(threads) == 1 and not threads.pop().is_alive()
    unfinished = ahead(read, range(3), torch.device("cpu"))
    next(unfinished)
    unfinished.close()                                   # as at a signal
    assert not threads.pop().is_alive()


def test_a_batch_holds_the_images_of_its_split_beside_their_labels():
    images, labels = numbered(9, rows=np.array([2, 3, 7])).batch(np.array([2, 0]))
    assert images.dtype == torch.uint8 and images.flatten().tolist() == [7, 2]
    assert labels.dtype == torch.int64 and labels.tolist() == [7, 2]


def test_a_batch_without_classes_has_no_labels():
    assert Dataset("", noise(3, 4, 4, 1)).batch(np.array([0, 1]))[1] is None


# The embedded digits, and the tenth that is held out

def test_nine_tenths_of_the_digits_train_and_the_rest_tests():
    train, test = load(), load(split="test")
    assert len(train) == 9000 and len(test) == 1000
    assert sorted([*train.rows, *test.rows]) == list(range(10_000))


def test_the_same_digits_are_held_out_on_every_load():
    np.testing.assert_array_equal(load(split="test").rows, load(image_size=28, split="test").rows)


def test_digits_are_padded_with_black_to_32_pixels():
    dataset, digits = load(), load(image_size=28)
    assert dataset.image_size == (32, 32) and digits.image_size == (28, 28) and dataset.channels == digits.channels == 1
    np.testing.assert_array_equal(dataset.images[:, 2:30, 2:30], digits.images)
    assert dataset.images.sum(dtype=np.int64) == digits.images.sum(dtype=np.int64)


def test_digits_of_ten_classes_are_all_there_in_equal_shares():
    dataset = load()
    assert dataset.classes == list("0123456789") and dataset.num_classes == 10
    assert np.bincount(dataset.labels).min() > 800                       # MNIST's rarest digit, 5, makes 9 %


def test_another_image_size_scales_the_digits():
    small = load(image_size=16)
    assert small.images.shape == (10_000, 16, 16, 1) and len(small) == 9000
    blocks = load().images.reshape(10_000, 16, 2, 16, 2).mean(axis=(2, 4))
    assert abs(small.images[..., 0] - blocks).max() <= 1                 # rows round, then columns


@given(st.integers(2, 200))
def test_the_two_splits_of_any_data_set_share_no_image_and_miss_none(tmp_path_factory, n):
    path = tmp_path_factory.getbasetemp() / "splits.npz"
    np.savez(path, arr_0=np.zeros((n, 1, 1), np.uint8))
    train, test = load(str(path)), load(str(path), split="test")
    assert sorted([*train.rows, *test.rows]) == list(range(n))
    assert len(test) == max(1, n // 10)


def test_all_of_a_data_set_is_both_of_its_splits(tmp_path):
    folder = photos(tmp_path / "photos", range(12))
    both = np.concatenate([load_folder(folder, split=split).rows for split in ("train", "test")])
    assert sorted(both) == load_folder(folder, split="all").rows.tolist() == list(range(12))


def test_the_side_of_a_folder_is_that_of_its_images(tmp_path):
    assert side_of(photos(tmp_path / "photos", [1, 2, 3], side=6)) == 6


def test_a_folder_of_unequal_or_oblong_images_has_no_side(tmp_path):
    folder = photos(tmp_path / "photos", [1, 2])
    solid(folder / "03.png", 3, side=5)
    with pytest.raises(ValueError, match=r"00\.png has 4x4 pixels, 03\.png has 5x5 pixels; --image-size"):
        side_of(folder)
    Image.new("L", (4, 6)).save(tmp_path / "photos" / "00.png")
    with pytest.raises(ValueError, match=r"00\.png has 4x6 pixels"):
        side_of(folder)
    (folder / "00.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot read the image .*00.png"):
        side_of(folder)


# Folders: layout

def test_a_colour_file_among_grey_ones_gives_three_channels_to_all(tmp_path):
    dataset = load_folder(photos(tmp_path / "photos", [1, (7, 8, 9), 3]))
    assert dataset.images[:, 0, 0].tolist() == [[1, 1, 1], [7, 8, 9], [3, 3, 3]]


# Centre crop

def adm_crop(image, size):
    """ADM's center_crop_arr, as a recursion on NumPy arrays, where crop_y, crop_x are cut off equally on both sides."""
    if min(image.size) // 2 >= size:
        return adm_crop(image.resize([side // 2 for side in image.size], Image.BOX), size)
    ratio = size / min(image.size)
    pixels = np.asarray(image.resize([round(side * ratio) for side in image.size], Image.BICUBIC))
    above, before = ((side - size) // 2 for side in pixels.shape[:2])
    return np.delete(np.delete(pixels, np.r_[:above, above + size:pixels.shape[0]], 0),
                     np.r_[:before, before + size:pixels.shape[1]], 1)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 24), st.booleans())
def test_the_centre_crop_is_adms(width, height, size, colour):
    image = Image.fromarray(noise(*(height, width, 3)[:2 + colour], seed=width))
    np.testing.assert_array_equal(center_crop(image, size), adm_crop(image, size))


@pytest.mark.parametrize("shape", [(3, 500), (500, 3), (1, 200), (200, 1), (33, 700)])
@pytest.mark.parametrize("size", [2, 8, 16])
def test_the_crop_of_an_elongated_image_is_adms(shape, size):
    image = Image.fromarray(noise(*shape))
    np.testing.assert_array_equal(center_crop(image, size), adm_crop(image, size))


def test_a_crop_to_a_fraction_of_two_averages_blocks():
    pixels = noise(64, 64)
    blocks = pixels.reshape(8, 8, 8, 8).mean(axis=(1, 3))
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 8))
    assert abs(cropped - blocks).max() <= 3                              # three halvings, each rounds twice


def test_an_image_of_the_right_size_is_not_touched():
    np.testing.assert_array_equal(center_crop(Image.fromarray(noise(7, 7, 3)), 7), noise(7, 7, 3))


def test_the_centre_is_kept():
    pixels = np.zeros((9, 30), np.uint8)
    pixels[:, 10:19] = 200                                               # 10 columns before, 11 after
    assert np.asarray(center_crop(Image.fromarray(pixels), 9)).min() == 200


# Folders: the cache

def caches(folder):
    return list((folder.parent / "cache").iterdir())


def test_a_second_load_decodes_nothing(tmp_path, monkeypatch):
    folder = photos(tmp_path / "photos", [1, 2, 3])
    load_folder(folder)
    monkeypatch.setattr(image_files, "_decode", lambda path, size: 1 / 0)
    assert levels(load_folder(folder, split="test")) == [1, 2, 3]


@pytest.mark.parametrize("level", [7, (7, 8, 9)], ids=["grey", "colour"])
def test_a_killed_decode_goes_on_where_it_was(tmp_path, monkeypatch, level):
    folder, decode, calls = photos(tmp_path / "photos", [1, 2, 3, level, 5]), image_files._decode, []
    monkeypatch.setattr(tables, "SECONDS", 0)
    monkeypatch.setattr(image_files, "_decode", lambda path, size: (
        os.kill(os.getpid(), signal.SIGKILL) if path.name == "03.png" else decode(path, size)))
    assert forked(lambda: load_folder(folder)) == [-signal.SIGKILL]
    monkeypatch.setattr(image_files, "_decode", lambda path, size: calls.append(path.name) or decode(path, size))
    dataset = load_folder(folder)
    assert calls == ["03.png", "04.png"] and levels(dataset) == [1, 2, 3, 7, 5]
    assert dataset.channels == 3 - 2 * (level == 7) and len(caches(folder)) == 1


def test_decoded_images_are_memory_mapped_and_not_writable(tmp_path):
    dataset = load_folder(photos(tmp_path / "photos", [1, 2, 3]))
    assert isinstance(dataset.images, np.memmap) and not dataset.images.flags.writeable


def replace(path, side, time):
    """Write another image under the same name, which differs in its size or in its time of change, not in both."""
    before = path.stat()
    solid(path, 9, side)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + time))
    assert (path.stat().st_size == before.st_size) == (time > 0)


CHANGES = {
    "changed in time": (lambda folder: replace(folder / "01.png", side=4, time=1), [1, 9, 3]),
    "changed in size": (lambda folder: replace(folder / "01.png", side=40, time=0), [1, 9, 3]),
    "added": (lambda folder: solid(folder / "00b.png", 9), [1, 9, 2, 3]),
    "removed": (lambda folder: (folder / "01.png").unlink(), [1, 3]),
    "renamed": (lambda folder: (folder / "01.png").rename(folder / "99.png"), [1, 3, 2]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_cache_is_rebuilt_when_the_files_change(tmp_path, change):
    folder, (edit, expected) = photos(tmp_path / "photos", [1, 2, 3]), CHANGES[change]
    load_folder(folder)
    edit(folder)
    assert levels(load_folder(folder)) == expected and len(caches(folder)) == 1      # that of the old files is gone


def test_the_cache_is_rebuilt_when_files_are_decoded_in_another_way(tmp_path, monkeypatch):
    folder = photos(tmp_path / "photos", [1, 2, 3])
    load_folder(folder)
    monkeypatch.setattr(image_files, "VERSION", image_files.VERSION + 1)
    monkeypatch.setattr(image_files, "_decode", lambda path, size: np.full((4, 4, 1), 9, np.uint8))
    assert levels(load_folder(folder)) == [9, 9, 9] and len(caches(folder)) == 1


def test_each_image_size_has_a_cache_of_its_own(tmp_path):
    folder = photos(tmp_path / "photos", [1, 2, 3])
    assert load_folder(folder, 4).image_size == (4, 4) and load_folder(folder, 2).image_size == (2, 2)
    assert len(caches(folder)) == 2


def test_folders_of_one_name_have_caches_of_their_own(tmp_path):
    for name, level in (("a", 1), ("b", 2)):
        photos(tmp_path / name / "photos", [level] * 3)
    datasets = [load(str(tmp_path / name / "photos"), 4, cache=tmp_path / "cache") for name in "ab"]
    assert [levels(dataset)[0] for dataset in datasets] == [1, 2]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_worker_processes_decode_the_same_bytes(tmp_path, monkeypatch):
    for i in range(70):                                                  # more than one chunk for each of two workers
        path = tmp_path / "photos" / f"class {i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(5 + i % 4, 6, 3, seed=i) if i % 2 else noise(9, 5, seed=i)).save(path)
    alone = load(str(tmp_path / "photos"), 4, cache=tmp_path / "alone")
    monkeypatch.setattr(image_files, "FOR_A_WORKER", 35)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    pools = []
    monkeypatch.setattr(image_files, "ProcessPoolExecutor", lambda *args: pools.append(args[0]) or ProcessPoolExecutor(*args))
    together = load(str(tmp_path / "photos"), 4, cache=tmp_path / "together")
    np.testing.assert_array_equal(alone.images, together.images)
    np.testing.assert_array_equal(alone.labels, together.labels)
    assert pools == [2]


def test_the_users_cache_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    load(str(photos(tmp_path / "photos", [1, 2])), 4)
    assert list((tmp_path / "user").rglob("images.npy"))


# Folders: bad files

def animals(folder, damage=None):
    """Three classes of two images, 10 11, 20 21, 30 31; a damaged file as 20."""
    for i, name in enumerate(("ant", "cat", "dog"), 1):
        for j in range(2):
            solid(folder / name / f"{j}.png", 10 * i + j)
    bad = folder / "cat" / "0.png"
    if damage is not None:
        bad.write_bytes(damage(bad.read_bytes()))
    return folder, bad


def bomb(content):
    """The header of a PNG of 50,000 x 50,000 pixels, and no pixels: a few bytes that would fill 2.5 GB."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]


def ribbon(content):
    """A PNG of 30,000 x 1 pixels, which at 64 pixels of height would be 120 million."""
    file = io.BytesIO()
    Image.new("L", (30_000, 1)).save(file, format="PNG")
    return file.getvalue()


DAMAGES = {"empty": lambda content: b"", "text": lambda content: b"no image", "cut off": lambda content: content[:40],
           "damaged": lambda content: content[:45] + b"\xff\xff\xff\xff" + content[49:], "bomb": bomb, "ribbon": ribbon}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_image_is_named_at_every_start(tmp_path, damage):
    folder, bad = animals(tmp_path / "animals", DAMAGES[damage])
    for _ in range(2):
        refusal(lambda: load_folder(folder, 64), bad, "--skip-bad")


@pytest.mark.parametrize("damage", DAMAGES)
def test_skipping_bad_images_counts_them_and_keeps_labels_aligned(tmp_path, damage):
    folder, bad = animals(tmp_path / "animals", DAMAGES[damage])
    dataset = load_folder(folder, 64, split="all", skip_bad=True)
    images, labels = dataset.batch(np.arange(len(dataset)))
    assert dict(zip(images[:, 0, 0, 0].tolist(), labels.tolist())) == {10: 0, 11: 0, 21: 1, 30: 2, 31: 2}
    assert "left out: 1 of 6 image files, the first: " in dataset.summary and str(bad) in dataset.summary


def test_bad_images_that_were_skipped_once_stop_who_does_not_skip_them(tmp_path):
    folder, bad = animals(tmp_path / "animals", DAMAGES["text"])
    load_folder(folder, skip_bad=True)
    refusal(lambda: load_folder(folder), bad, "--skip-bad")


def test_a_file_that_was_bad_for_a_while_is_not_taken_for_black(tmp_path, monkeypatch):
    folder, seldom = animals(tmp_path / "animals")
    with monkeypatch.context() as offline:
        offline.setattr(image_files, "_decode", lambda path, size: "a disk that is away" if path == seldom else np.ones((4, 4, 1)))
        assert len(load_folder(folder, split="all", skip_bad=True)) == 5
    refusal(lambda: load_folder(folder), seldom, "now can be", "delete", tmp_path / "cache")


def test_a_rebuild_that_fails_does_not_leave_the_old_cache_in_use(tmp_path):
    folder = photos(tmp_path / "photos", [1, 2, 3])
    load_folder(folder)
    (folder / "01.png").write_bytes(b"no image")
    for _ in range(2):
        refusal(lambda: load_folder(folder), "01.png")


def test_a_folder_of_bad_images_alone_is_refused(tmp_path):
    folder = photos(tmp_path / "photos", [1, 2])
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    refusal(lambda: load_folder(folder, skip_bad=True), "none of 2 files", "00.png")


# .npz files; what their arrays may hold is in test_cases_arrays.py

def npz(folder, **arrays):
    path = folder / "images.npz"
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("away", [-0.3, 0, 0.3])
def test_float_pixels_in_minus_one_to_one_become_the_nearest_bytes(tmp_path, dtype, away):
    images = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    dataset = load(npz(tmp_path, images=((images + away) / 127.5 - 1).clip(-1, 1).astype(dtype)))
    np.testing.assert_array_equal(dataset.images[..., 0], images)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_is_scaled_to_another_image_size(tmp_path, channels):
    images = np.full((5, 9, 12, channels), 77, np.uint8)
    dataset = load(npz(tmp_path, images=images, labels=np.arange(5)), 4)
    np.testing.assert_array_equal(dataset.images, np.full((5, 4, 4, channels), 77))
    np.testing.assert_array_equal(dataset.labels, range(5))


GOOD = noise(5, 4, 4)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("key", ["images", "labels"])
def test_an_npz_of_python_objects_is_refused_and_runs_nothing(tmp_path, key):
    objects = np.array([Payload(tmp_path / "marker")] * 5)
    path = npz(tmp_path, **{"images": GOOD, key: objects})
    refusal(lambda: load(path), path)
    assert not (tmp_path / "marker").exists()


def test_the_payload_does_run_where_it_is_trusted(tmp_path):
    with np.load(npz(tmp_path, x=np.array([Payload(tmp_path / "marker")])), allow_pickle=True) as archive:
        archive["x"]
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("shape", [(9, 4, 4, 3), (9, 4, 4)], ids=["colour", "grey"])
def test_large_images_of_an_npz_stay_in_the_file(tmp_path, monkeypatch, shape):
    images = noise(*shape)
    np.savez(tmp_path / "large.npz", arr_1=np.arange(9), arr_0=images)
    loaded = load(str(tmp_path / "large.npz"), split="all")
    monkeypatch.setattr(arrays, "MAPPED", 100)
    mapped = load(str(tmp_path / "large.npz"), split="all")
    assert isinstance(mapped.images, np.memmap) and type(loaded.images) is np.ndarray
    assert np.array_equal(mapped.images, loaded.images)
    assert mapped.labels.tolist() == list(range(9))


def test_large_images_that_are_compressed_are_read_into_memory(tmp_path, monkeypatch):
    images = noise(9, 4, 4, 3)
    np.savez_compressed(tmp_path / "large.npz", arr_0=images)
    monkeypatch.setattr(arrays, "MAPPED", 100)
    loaded = load(str(tmp_path / "large.npz"), split="all")
    assert type(loaded.images) is np.ndarray and np.array_equal(loaded.images, images)


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01\x00", b"PK\x03\x04" + bytes(50), b"\x80\x04N."])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "images.npz"
    path.write_bytes(content)
    refusal(lambda: load(str(path)), path, "no zip archive")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@given(fraction=st.floats(0, 1), byte=st.none() | st.integers(0, 255))
def test_a_cut_off_or_damaged_npz_loads_or_is_refused_in_one_line(tmp_path_factory, save, fraction, byte):
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    save(path, images=GOOD, labels=np.arange(5))
    content = bytearray(path.read_bytes())
    place = int(fraction * (len(content) - 1))
    path.write_bytes(content[:place] if byte is None else content[:place] + bytes([byte]) + content[place + 1:])
    try:
        assert load(str(path)).images.shape == (5, 4, 4, 1) and byte is not None
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_an_npz_that_claims_more_than_the_memory_is_refused(tmp_path):
    path, file = tmp_path / "images.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (10 ** 15, 4, 4)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", file.getvalue())
    refusal(lambda: load(str(path)), path)


# CIFAR-10

PARTS = [f"data_batch_{i}.bin" for i in (1, 2, 3, 4, 5)] + ["test_batch.bin"]


def record(label, red, green, blue):
    """One record of the official binary version: the label, then 1024 bytes of each colour, row by row."""
    return bytes([label]) + b"".join(bytes([level]) + bytes(range(250)) * 4 + bytes(23) for level in (red, green, blue))


def cifar_files():
    """Two records a file, numbered through: the label is the file's number, the first red the record's."""
    return {name: record(i, 2 * i, 7, 8) + record(i, 2 * i + 1, 7, 8) for i, name in enumerate(PARTS)}


def cifar_archive(path, files=None):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in (files or cifar_files()).items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(params=["archive", "extracted", "extracted, its folder above"])
def cifar_folder(request, tmp_path):
    """A folder with CIFAR-10 in each way that a user may have it."""
    if request.param == "archive":
        cifar_archive(tmp_path / "cifar-10-binary.tar.gz")
    else:
        folder = tmp_path / "cifar-10-batches-bin" if "above" in request.param else tmp_path
        folder.mkdir(exist_ok=True)
        for name, content in cifar_files().items():
            (folder / name).write_bytes(content)
    return f"cifar10:{tmp_path}"


def test_cifar10_trains_on_its_five_batches_in_order(cifar_folder):
    dataset = load(cifar_folder)
    assert levels(dataset) == list(range(10)) and dataset.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len(dataset) == 10 and dataset.num_classes == 10 and dataset.classes[3] == "cat"


def test_the_test_split_of_cifar10_is_its_own(cifar_folder):
    dataset = load(cifar_folder, split="test")
    assert levels(dataset) == [10, 11] and dataset.labels.tolist() == [5, 5] and len(dataset) == 2


def test_all_of_cifar10_is_its_training_batches_and_then_its_test_batch(cifar_folder):
    parts = [load(cifar_folder, split=split) for split in ("train", "test", "all")]
    assert np.array_equal(parts[2].images, np.concatenate([part.images for part in parts[:2]]))


def test_cifar10_pixels_are_three_planes_of_rows(tmp_path):
    cifar_archive(tmp_path / "cifar-10-binary.tar.gz")
    images = load(f"cifar10:{tmp_path}").images
    assert images.shape == (10, 32, 32, 3) and images[0, 0, 0].tolist() == [0, 7, 8]
    plane = [*range(250)] * 4 + [0] * 23
    assert (images[0, 0, 1:4] == [[0] * 3, [1] * 3, [2] * 3]).all() and (images[0, 1, 0] == plane[31]).all()


def test_cifar10_is_scaled_to_another_image_size(tmp_path):
    cifar_archive(tmp_path / "cifar-10-binary.tar.gz")
    dataset = load(f"cifar10:{tmp_path}", 16)
    assert dataset.images.shape == (10, 16, 16, 3) and len(dataset) == 10


BAD_CIFAR = {
    "a batch is missing": {name: content for name, content in cifar_files().items() if name != "data_batch_4.bin"},
    "a record is cut off": {**cifar_files(), "data_batch_4.bin": cifar_files()["data_batch_4.bin"][:-1]},
    "there are no records": {name: b"" for name in PARTS},
    "a label is none": {**cifar_files(), "data_batch_4.bin": record(10, 1, 2, 3)},
}


@pytest.mark.parametrize("case", BAD_CIFAR)
def test_an_archive_of_something_else_is_refused(tmp_path, case):
    cifar_archive(tmp_path / "cifar-10-binary.tar.gz", BAD_CIFAR[case])
    refusal(lambda: load(f"cifar10:{tmp_path}"), f"cannot read CIFAR-10 in {tmp_path}")


@given(fraction=st.floats(0, 1), byte=st.none() | st.integers(0, 255))
def test_a_cut_off_or_damaged_archive_loads_or_is_refused_in_one_line(tmp_path_factory, fraction, byte):
    path = cifar_archive(tmp_path_factory.getbasetemp() / "cifar-10-binary.tar.gz")
    content = path.read_bytes()
    place = int(fraction * (len(content) - 1))
    path.write_bytes(content[:place] if byte is None else content[:place] + bytes([byte]) + content[place + 1:])
    try:
        load(f"cifar10:{path.parent}")
    except ValueError as error:
        assert "cannot read CIFAR-10" in str(error) and "\n" not in str(error)


def test_a_folder_without_cifar10_is_refused(tmp_path):
    refusal(lambda: load(f"cifar10:{tmp_path}"), tmp_path, "data_batch_1.bin", "cifar-10-binary.tar.gz")


class Server(http.server.ThreadingHTTPServer):
    """Serves one reply, whatever is asked, and counts."""

    def __init__(self):
        self.reply, self.count = b"", 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/cifar-10-binary.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.count += 1
        self.wfile.write(self.server.reply)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of CIFAR-10, from which it is downloaded and whose archive is the one expected."""
    content = cifar_archive(tmp_path / "original.tar.gz").read_bytes()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "CIFAR10_SHA256", hashlib.sha256(content).hexdigest())
    with Server() as server:
        monkeypatch.setattr(data, "CIFAR10_URL", server.url)
        server.reply = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def cifar_from_web(tmp_path, **options):
    return load("cifar10", cache=tmp_path / "cache", **options)


def test_cifar10_is_downloaded_once(tmp_path, server):
    assert levels(cifar_from_web(tmp_path)) == list(range(10))
    assert levels(cifar_from_web(tmp_path, split="test")) == [10, 11]
    assert server.count == 1 and [path.name for path in (tmp_path / "cache").iterdir()] == ["cifar-10-binary.tar.gz"]


REPLIES = {                                  # a server's reply, and what the error says of it
    "another file": (lambda reply: reply[:-1] + b"x", "SHA-256"),
    "cut off": (lambda reply: reply[:-10], "SHA-256"),
    "cut off in chunks": (lambda reply: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100\r\nabc", "IncompleteRead"),
    "nothing": (lambda reply: b"", "closed connection"),
    "no HTTP": (lambda reply: b"SSH-2.0-server\r\n", "SSH"),
    "not found": (lambda reply: b"HTTP/1.0 404 Not Found\r\n\r\n", "404"),
}


@pytest.mark.parametrize("case", REPLIES)
@pytest.mark.filterwarnings("ignore:unclosed <socket")                   # urllib's error 404 holds it until it is collected
def test_a_download_that_fails_says_what_to_do_and_keeps_nothing(tmp_path, server, case):
    change, reason = REPLIES[case]
    server.reply = change(server.reply)
    refusal(lambda: cifar_from_web(tmp_path), reason, server.url, tmp_path / "cache" / "cifar-10-binary.tar.gz", kind=OSError)
    assert list((tmp_path / "cache").iterdir()) == []
    gc.collect()


def test_a_download_succeeds_after_one_that_failed(tmp_path, server):
    good, server.reply = server.reply, server.reply[:-10]
    refusal(lambda: cifar_from_web(tmp_path), "CIFAR-10", kind=OSError)
    server.reply = good
    assert levels(cifar_from_web(tmp_path)) == list(range(10))


def test_without_a_server_the_error_names_the_address_and_the_place(tmp_path, server):
    server.shutdown()
    server.server_close()
    refusal(lambda: cifar_from_web(tmp_path), server.url, tmp_path / "cache" / "cifar-10-binary.tar.gz", kind=OSError)
