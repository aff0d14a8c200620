"""What people bring: image files and folders of every kind come out right, or are refused in a line that says why.

Three tables: image files and the pixels that a viewer shows, masks and what they hide, folders and what they are read as.
"""
import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

import checkpoint
import evaluate
import features
import image_files
import models
import sample
import train
from data import load
from image_files import open_image
from refusals import refusal
from sample import hidden_of

SQUARE = np.array([[0, 10, 20], [30, 40, 50], [60, 70, 250]], np.uint8)
WIDE = np.array([[0, 255, 256], [511, 32768, 65535]], np.uint16)
RED, GREEN, BLUE, NAVY, WHITE, BLACK = [255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 100], [255, 255, 255], [0, 0, 0]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
NOISE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


# Files that Pillow does not write

def saved(image, kind, **options):
    """A Pillow image, or an array of pixels, as the bytes of a file of a kind."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def png(depth, colour, rows, *chunks, after=(), end=True):
    """A PNG of rows of packed pixels, with chunks (name, content) before and after the pixels."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    channels = {0: 1, 2: 3, 4: 2}[colour]
    header = struct.pack(">IIBBBBB", 8 * len(rows[0]) // (depth * channels), len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in (
        (b"IHDR", header), *chunks, (b"IDAT", pixels), *after, *([(b"IEND", b"")] if end else [])))


def big_endian(*numbers):
    return np.array(numbers, ">u2").tobytes()


def tiff(width, height, pixels, **tags):
    """A TIFF of one strip; tags: what it says besides of its pixels, by the names below."""
    numbers = dict(bits=258, compression=259, photometric=262, samples=277, kind=339, orientation=274)
    entries = {256: width, 257: height, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(pixels),
               **{numbers[name]: value for name, value in tags.items()}}
    table = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, entries[tag]) for tag in sorted(entries))
    return struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + struct.pack("<H", len(entries)) + table + bytes(4)


def profile(space, **tags):
    """An ICC profile of pixels of a space, as bytes."""
    tags = {"desc": b"desc\0\0\0\0\0\0\0\1\0" + bytes(78), "cprt": b"text\0\0\0\0\0", "wtpt": xyz(0.9642, 1, 0.8249), **tags}
    table, content, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name.encode() + struct.pack(">II", start + len(content), len(tag))
        content += tag + bytes(-len(tag) % 4)
    connection = b"Lab " if space == b"CMYK" else b"XYZ "
    head = struct.pack(">I4xI4s4s4s12x4s28x", start + len(content), 0x02400000, b"prtr", space, connection, b"acsp")
    return head + struct.pack(">3I48xI", 63190, 65536, 54061, len(tags)) + table + content


def xyz(*values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * value) for value in values))


def curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma))


def inks():
    """A profile whose inks all print as grey: the more of any, the darker."""
    grid = [255 - 255 * max(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    ramp, identity = bytes(range(256)), struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).flatten())
    return profile(b"CMYK", A2B0=b"mft1\0\0\0\0\4\3\2\0" + identity + 4 * ramp
                   + b"".join(bytes([level, 128, 128]) for level in grid) + 3 * ramp)


def swapped():
    """sRGB's profile with red and blue swapped."""
    content = bytearray(SRGB)
    red, blue = content.index(b"rXYZ"), content.index(b"bXYZ")
    content[red:red + 4], content[blue:blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(content)


def nearly():
    """sRGB's profile as another maker rounds it, by which some colours move by a level."""
    content = bytearray(SRGB)
    place = int.from_bytes(content[content.index(b"rXYZ") + 4:][:4], "big") + 10     # of the lower half of X
    content[place:place + 2] = (int.from_bytes(content[place:place + 2], "big") + 50).to_bytes(2, "big")
    return bytes(content)


SWAPPED, LINEAR = swapped(), profile(b"GRAY", kTRC=curve(1))


def solid(colour, mode="RGB", side=8):
    return Image.new(mode, (side, side), tuple(colour) if isinstance(colour, list) else colour)


def palette(**options):
    """A PNG of 2 x 2 indices into a palette of three colours."""
    image = Image.fromarray(np.array([[0, 1], [1, 2]], np.uint8)).convert("P")
    image.putpalette([*RED, *GREEN, *NAVY])
    return saved(image, options.pop("kind", "PNG"), **options)


def noted(kind="zip", after=False):
    """A PNG beside whose pixels stands a text of 2 MB."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=kind == "zip") if kind != "international" else info.add_itxt(
        "workflow", "x" * 2_000_000, zip=True)
    return saved(SQUARE, "PNG", pnginfo=info)


def turned(orientation):
    """EXIF that says how a viewer turns an image."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def animated(kind):
    return saved(solid(RED), kind, save_all=True, append_images=[solid(BLUE)], **({"lossless": True} if kind == "WEBP" else {}))


JPEG = saved(NOISE, "JPEG", quality=100)
JPEG_PIXELS = np.asarray(Image.open(io.BytesIO(JPEG)))
TEXT = (b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 2_000_000))
IMAGES = {                                   # the file, and the pixels that it should have, or words of the refusal
    "grey": (saved(SQUARE, "PNG"), SQUARE),
    "grey bitmap": (saved(SQUARE, "BMP"), SQUARE),
    "one bit": (saved(SQUARE > 45, "PNG"), 255 * (SQUARE > 45)),
    "sixteen bits": (saved(WIDE, "PNG"), WIDE // 256),
    "sixteen dark bits": (saved(WIDE[:1, :2], "PNG"), [[0, 0]]),
    "sixteen bits, TIFF": (saved(WIDE, "TIFF"), WIDE // 256),
    "sixteen bits, the other end first": (tiff(2, 1, np.array([511, 65535], "<u2").tobytes(), bits=16), [[1, 255]]),
    "sixteen bits, PGM": (saved(WIDE.astype(np.int32), "PPM"), WIDE // 256),
    "ten bits, PGM": (b"P5 2 1 1023 " + big_endian(1023, 0), [[255, 0]]),
    "sixteen bits, one transparent level": (png(16, 0, [big_endian(300, 301, 65535)], (b"tRNS", big_endian(300))),
                                            [[255, 1, 255]]),
    "sixteen bits and alpha": (png(16, 4, [big_endian(32768, 65535, 0, 0)]), [[3 * [128], WHITE]]),
    "sixteen bits of colour": (png(16, 2, [big_endian(65535, 256, 255)]), [[[255, 1, 0]]]),
    "sixteen bits of colour, one transparent": (png(16, 2, [big_endian(0, 0, 9)], (b"tRNS", big_endian(0, 0, 9))),
                                                "16 bits and a transparent colour"),
    "two bits, one transparent level": (png(2, 0, [b"\x1b"], (b"tRNS", big_endian(1))), [[0, 255, 170, 255]]),
    "four bits, one transparent level": (png(4, 0, [b"\x2f"], (b"tRNS", big_endian(2))), [[255, 255]]),
    "one bit, black transparent": (png(1, 0, [b"\xa0"], (b"tRNS", big_endian(0))), [8 * [255]]),
    "grey and alpha": (saved(np.dstack([SQUARE, 255 * np.eye(3, dtype=np.uint8)]), "PNG"), np.where(np.eye(3), SQUARE, 255)),
    "grey, one transparent level": (saved(SQUARE, "PNG", transparency=40), np.where(SQUARE == 40, 255, SQUARE)),
    "palette": (palette(), [[RED, GREEN], [GREEN, NAVY]]),
    "palette, GIF": (palette(kind="GIF"), [[RED, GREEN], [GREEN, NAVY]]),
    "palette, one transparent": (palette(transparency=1), [[RED, WHITE], [WHITE, NAVY]]),
    "palette, one half transparent": (palette(transparency=bytes([255, 255, 51])), [[RED, GREEN], [GREEN, [204, 204, 224]]]),
    "palette, GIF, one transparent": (palette(kind="GIF", transparency=1), [[RED, WHITE], [WHITE, NAVY]]),
    "colour, WebP": (saved(solid([10, 200, 30]), "WEBP", lossless=True), 8 * [8 * [[10, 200, 30]]]),
    "colour, one transparent": (saved(solid([9, 8, 7], side=1), "PNG", transparency=(9, 8, 7)), [[WHITE]]),
    "colour under full transparency": (saved(solid([10, 20, 30, 0], "RGBA", 1), "PNG"), [[WHITE]]),
    "a fifth opaque": (saved(solid([5, 105, 255, 51], "RGBA", 1), "PNG"), [[[205, 225, 255]]]),         # 1/5 x + 4/5 255
    "ink": (saved(solid([0, 255, 155, 0], "CMYK", 1), "TIFF"), [[[255, 0, 100]]]),
    "ink, JPEG": (saved(solid([0, 0, 0, 255], "CMYK"), "JPEG"), np.zeros((8, 8, 3))),
    "luma and chroma": (saved(solid([255, 128, 128], "YCbCr", 1), "TIFF"), [[WHITE]]),
    "white in Lab": (saved(solid([255, 128, 128], "LAB", 1), "TIFF"), [[WHITE]]),
    "red in Lab": (saved(solid([138, 209, 198], "LAB", 1), "TIFF"), [[RED]]),
    "float": (saved(np.float32([[0, 0.5, 1]]), "TIFF"), [[0, 128, 255]]),
    "floats beyond 1": (saved(np.float32([[0, 0.5, 3]]), "TIFF"), "floating-point numbers from 0 to 3: black must be 0"),
    "floats below 0": (saved(np.float32([[-1, 0.5]]), "TIFF"), "from -1 to 0.5"),
    "NaN": (saved(np.float32([[np.nan, 0.5]]), "TIFF"), "floating-point numbers"),
    "whole numbers of 32 bits": (saved(np.int32([[0, 70000]]), "TIFF"), "whole numbers of 32 bits"),
    "signed numbers": (tiff(2, 1, np.int16([-5, 5]).tobytes(), bits=16, kind=2), "with a sign"),
    "signed bytes": (tiff(2, 1, np.int8([-5, 5]).tobytes(), bits=8, kind=2), "with a sign"),
    "doubles": (tiff(1, 1, np.float64([1]).tobytes(), bits=64, kind=3), "cannot read"),
    "twelve bits": (tiff(2, 1, b"\xff\xf8\x00", bits=12), [[255, 128]]),
    "white is zero": (tiff(2, 1, b"\0\xc8", bits=8, photometric=0), [[255, 55]]),
    "white is zero, sixteen bits": (tiff(2, 1, np.uint16([0, 51200]).tobytes(), bits=16, photometric=0), [[255, 55]]),
    "red and blue swapped by a profile": (saved(solid(RED), "PNG", icc_profile=SWAPPED), 8 * [8 * [BLUE]]),
    "a profile, JPEG": (saved(solid(RED), "JPEG", icc_profile=SWAPPED), 8 * [8 * [BLUE]]),
    "a profile, WebP": (saved(solid(RED), "WEBP", lossless=True, icc_profile=SWAPPED), 8 * [8 * [BLUE]]),
    "a profile, TIFF": (saved(solid(RED), "TIFF", icc_profile=SWAPPED), 8 * [8 * [BLUE]]),
    "a profile and a palette": (palette(icc_profile=SWAPPED), [[BLUE, GREEN], [GREEN, [100, 0, 0]]]),
    "a profile and alpha": (saved(solid([255, 0, 0, 51], "RGBA", 1), "PNG", icc_profile=SWAPPED), [[[204, 204, 255]]]),
    "a linear grey profile": (saved(solid(55, "L", 1), "PNG", icc_profile=LINEAR), [[128]]),         # 0.2158, of 0.5 in sRGB
    "a linear grey profile and alpha": (saved(solid([55, 255], "LA", 1), "PNG", icc_profile=LINEAR), [[128]]),
    "a linear grey profile, sixteen bits": (saved(np.uint16([[55 * 256]]), "PNG", icc_profile=LINEAR), [[128]]),
    "a profile of inks": (saved(solid([255, 0, 0, 0], "CMYK", 1), "TIFF", icc_profile=inks()), [[BLACK]]),
    "sRGB's own profile": (saved(NOISE, "PNG", icc_profile=SRGB), NOISE),
    "a profile close to sRGB's": (saved(NOISE, "PNG", icc_profile=nearly()), NOISE),
    "a profile of other pixels": (saved(SQUARE, "PNG", icc_profile=SWAPPED), SQUARE),
    "a broken profile": (saved(NOISE, "PNG", icc_profile=b"no profile" * 20), NOISE),
    "a text of 2 MB": (png(8, 0, [b"\7"], TEXT), [[7]]),
    "a text of 2 MB behind the pixels": (png(8, 0, [b"\7"], after=[TEXT]), [[7]]),
    "a text of 2 MB in UTF-8": (png(8, 0, [b"\7"], (b"iTXt", b"prompt\0\1\0\0\0" + TEXT[1][10:])), [[7]]),
    "a text with a wrong checksum": (png(8, 0, [b"\7"], (b"tEXt", b"a\0b")).replace(b"a\0b", b"a\0c"), [[7]]),
    "a PNG without its end": (png(8, 0, [b"\7"], end=False), [[7]]),
    "a PNG cut in a text behind the pixels": (png(8, 0, [b"\7"], after=[(b"tEXt", b"a\0b")], end=False)[:-9], [[7]]),
    "a broken EXIF": (saved(NOISE, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), NOISE),
    "a broken EXIF, JPEG": (saved(NOISE, "JPEG", quality=100, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"), JPEG_PIXELS),
    "a JPEG with rubbish behind it": (JPEG + bytes(100), JPEG_PIXELS),
    "a JPEG without its last bytes": (JPEG[:-2], "truncated"),
    "half a PNG": (saved(NOISE, "PNG")[:120], "truncated"),
    "half a TIFF": (saved(NOISE, "TIFF")[:100], "cannot read"),
    "a damaged TIFF": (saved(NOISE, "TIFF", compression="tiff_deflate").replace(b"\x78\x9c", b"\xff\xff"), "decoder error"),
    "an animation": (animated("GIF"), 8 * [8 * [RED]]),
    "an animated PNG": (animated("PNG"), 8 * [8 * [RED]]),
    "an animated WebP": (animated("WEBP"), 8 * [8 * [RED]]),
    "text": (b"no image", "cannot identify"),
    "nothing": (b"", "cannot identify"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "cannot identify"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_an_image_file_is_seen_as_a_viewer_shows_it_or_refused(tmp_path, capfd, case):
    content, expected = IMAGES[case]
    (tmp_path / "image").write_bytes(content)
    if isinstance(expected, str):
        refusal(lambda: open_image(tmp_path / "image"), "image", expected)
    else:
        found = np.asarray(open_image(tmp_path / "image")).astype(int)
        assert found.shape == np.shape(expected) and abs(found - expected).max() <= 5 * ("JPEG" in case or "Lab" in case), found
    assert not capfd.readouterr().err                    # of a library, which knows no file


UPRIGHT = {                                  # EXIF's orientation: from the stored rows and columns to those to be seen
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: np.transpose,
    6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).T, 8: np.rot90, 9: lambda x: x}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_rotated_photo_is_turned_upright_whatever_its_format(tmp_path, orientation):
    grey, path = SQUARE[:2], tmp_path / "photo"
    for content, pixels in (
            (saved(grey, "PNG", exif=turned(orientation)), grey),
            (saved(WIDE, "PNG", exif=turned(orientation)), WIDE // 256),
            (saved(np.stack([grey] * 3, axis=2), "WEBP", lossless=True, exif=turned(orientation)), grey),
            (tiff(3, 2, grey.tobytes(), bits=8, orientation=orientation), grey)):
        path.write_bytes(content)
        np.testing.assert_array_equal(np.asarray(open_image(path).convert("L")), UPRIGHT[orientation](pixels))


@pytest.mark.parametrize("case", ["sixteen bits, one transparent level", "palette, one half transparent", "a profile and alpha",
                                  "grey", "half a PNG", "floats beyond 1"])
def test_a_large_image_is_converted_in_strips(tmp_path, capfd, case, monkeypatch):
    monkeypatch.setattr(image_files, "STRIP", 1)
    test_an_image_file_is_seen_as_a_viewer_shows_it_or_refused(tmp_path, capfd, case)


def test_ninety_megapixels_are_taken_and_more_where_it_is_said(tmp_path):
    path = tmp_path / "scan.png"
    path.write_bytes(saved(solid(9, "L"), "PNG"))
    assert image_files.MAX_PIXELS > 90e6
    try:
        image_files.allow_pixels(63)
        refusal(lambda: open_image(path), "scan.png", "more than 63 pixels", "--max-pixels")
        image_files.allow_pixels(64)
        assert open_image(path).size == (8, 8)
    finally:
        image_files.allow_pixels(None)


# Masks

HOLE = 255 * np.eye(4, dtype=np.uint8)
MASKS = {                                    # all but the last two hide the diagonal
    "grey": saved(HOLE, "PNG"),
    "one bit": saved(HOLE > 0, "PNG"),
    "sixteen bits": saved(HOLE.astype(np.uint16) * 257, "PNG"),
    "float": saved(np.float32(HOLE / 255), "TIFF"),
    "palette": saved(Image.fromarray(HOLE).quantize(2), "PNG"),
    "white paint on a transparent layer": saved(np.dstack([HOLE] * 4), "PNG"),
    "white paint on transparent white": saved(np.dstack([*3 * [0 * HOLE + 255], HOLE]), "PNG"),
    "white paint, half transparent black elsewhere": saved(np.dstack([*3 * [HOLE], 128 + HOLE // 2]), "PNG"),
    "one transparent level": saved(HOLE // 5 * 4 + 51, "PNG", transparency=51),
    "upright": saved(np.rot90(HOLE), "PNG", exif=turned(6)),
    "WebP": saved(np.dstack([HOLE] * 3), "WEBP", lossless=True),
    "wholly transparent": saved(np.dstack([*3 * [0 * HOLE + 255], 0 * HOLE]), "PNG"),
    "black": saved(0 * HOLE, "PNG"),
}


@pytest.mark.parametrize("case", MASKS)
def test_a_mask_hides_what_is_white_and_not_transparent(tmp_path, case):
    (tmp_path / "mask").write_bytes(MASKS[case])
    (tmp_path / "image").write_bytes(saved(HOLE, "PNG"))
    hidden = hidden_of(tmp_path / "mask", tmp_path / "image", (4, 4))[0, 0].numpy()
    np.testing.assert_array_equal(hidden, np.eye(4) * (case not in list(MASKS)[-2:]))


@pytest.mark.parametrize("mask", [HOLE // 255, HOLE // 3, np.dstack([HOLE // 2, 0 * HOLE, 0 * HOLE])], ids=["1", "grey", "red"])
def test_a_mask_that_is_neither_black_nor_white_is_refused(tmp_path, mask):
    for name, pixels in (("mask", mask), ("image", HOLE)):
        (tmp_path / name).write_bytes(saved(pixels, "PNG"))
    refusal(lambda: hidden_of(tmp_path / "mask", tmp_path / "image", (4, 4)), "--mask", "hides nothing: its brightest pixel is ")


# Folders

def tree(*names, **files):
    """A function that fills a folder: image number i of the names is of level 10 i + 10; files: the contents of others.

    labels: those of a dataset.json; texts: lines of a metadata.jsonl.
    """
    contents = {name: saved(solid(10 * i + 10, "L"), "PNG") for i, name in enumerate(names)} | files.pop("files", {})
    if "labels" in files:
        contents["dataset.json"] = json.dumps({"labels": files["labels"]})
    if "texts" in files:
        contents["metadata.jsonl"] = "".join(json.dumps(line) + "\n" for line in files["texts"])

    def write(folder):
        for name, content in contents.items():
            path = os.path.join(os.fsencode(folder), os.fsencode(name))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
    return write


def linked(folder):
    """Class folders that are links: two to one elsewhere, one that leads back, two that lead nowhere; and a linked file."""
    tree("b/1.png", "b/2.png")(folder)
    tree("x/3.png")(folder.parent / "store")
    for name, target in (("a", "../store/x"), ("c", "../store/x"), ("b/back", "../../photos"), ("gone", "nowhere"),
                         ("loop", "loop"), ("b/4.png", "1.png")):
        os.symlink(target, folder / name)


EDM = ("00000/img0.png", "00000/img1.png", "00001/img2.png")
SPLIT = ("train/cat/0.png", "train/dog/1.png", "val/dog/2.png")
CAT, DOG = {"file_name": "0.png", "text": "a cat"}, {"file_name": "1.png", "text": "a dog"}
SYSTEMS = ("A/._IMG 1.png", ".DS_Store", "A/Thumbs.db", "desktop.ini", "__MACOSX/A/1.png", "A/.ipynb_checkpoints/1.png",
           "A/@eaDir/1.png")
UNREAD = ("b.HEIC", "c.heic", "d.svg", "e.cr2", "f.pdf", "g.mp4", "h.csv", "Makefile")


def of_edm(*values):
    return [[name, value] for name, value in zip(EDM, values)]


FOLDERS = {                      # what fills it; class or captions by level, and words of the start; or ValueError and its words
    "folders within classes": (tree("cat/young/tiny/0.png", "cat/1.png", "ant/2.png", "dog/old/3.png"),
                               {10: "cat", 20: "cat", 30: "ant", 40: "dog"}, "3 classes: ant, cat, dog"),
    "class folders that are links": (linked, "5 images, 8x8 pixels, grey, levels 10 to 20; 3 classes: a, b, c; no captions; ",
                                     "held out: nothing; left out: 2 that are no files, as "),
    "a split": (tree(*SPLIT), "3 images, ", {10: "cat", 20: "dog", 30: "dog"}),
    "a split in capitals": (tree("Train/cat/0.png", "Train/dog/1.png", "TEST/cat/2.png"), {10: "cat", 20: "dog", 30: "cat"}),
    "a split and a test set": (tree(*SPLIT, "test/3.png", "test/4.png"), "3 images", "2 classes: cat, dog",
                               "left out: 2 images in test"),
    "a split without classes": (tree("train/0.png", "valid/1.png"), "2 images", "no classes"),
    "a training part alone": (tree("train/cat/0.png", "train/dog/1.png"), {10: "cat", 20: "dog"}),
    "a test part alone": (tree("test/cat/0.png", "test/dog/1.png"), {10: "cat", 20: "dog"}),
    "a class called train": (tree("train/0.png", "bus/1.png"), {10: "train", 20: "bus"}),
    "a held-out class that is new": (tree(*SPLIT, "val/owl/3.png"), ValueError, "owl/3.png is held out, and its class, owl,"),
    "a held-out part without classes": (tree("train/cat/0.png", "test/1.png"), ValueError, "test/1.png is held out, and its class, none,"),
    "images beside classes": (tree("cat/0.png", "1.png"), ValueError, "beside class sub-folders", "1.png"),
    "EDM's labels": (tree(*EDM, labels=of_edm(0, 1, 2)), {10: "0", 20: "1", 30: "2"}, "left out: nothing"),
    "labels from 5, with a gap": (tree(*EDM, labels=of_edm(5, 7, 7)), {10: "5", 20: "7", 30: "7"}),
    "labels as an object": (tree(*EDM, labels=dict(of_edm(9, 8, 10))), {10: "9", 20: "8", 30: "10"}, "3 classes: 8, 9, 10"),
    "one-hot labels": (tree(*EDM, labels=of_edm([1.0, 0.0], [0.0, 1.0], [0, 1])), {10: "0", 20: "1", 30: "1"}),
    "labels that are null": (tree(*EDM, labels=None), "3 images", "no classes", "left out: nothing"),
    "labels of each part": (tree("train/a/0.png", "train/a/1.png", "val/a/2.png", files={
        "train/dataset.json": '{"labels": [["a/0.png", 3], ["a/1.png", 4]]}',
        "val/dataset.json": '{"labels": [["a/2.png", 4]]}'}),
        {10: "3", 20: "4", 30: "4"}),
    "an image without a label": (tree(*EDM, labels=of_edm(1)), ValueError, "img1.png has no class"),
    "labels that are vectors": (tree(*EDM, labels=of_edm([0.1, 0.2], [0, 1], [1, 0])), ValueError, "[0.1, 0.2] is no class"),
    "labels that are damaged": (tree(*EDM, files={"dataset.json": '{"labels": ['}), ValueError, "dataset.json does not say"),
    "another dataset.json": (tree("cat/0.png", "dog/1.png", files={"dataset.json": "[1, 2]"}), {10: "cat", 20: "dog"},
                             "left out: 1 .json"),
    "metadata.jsonl": (tree("0.png", "1.png", texts=[CAT, DOG]), {10: ["a cat"], 20: ["a dog"]}, "captions, such as a cat",
                       "no classes", "left out: nothing"),
    "metadata.jsonl of classes": (tree("a/0.png", "b/1.png", texts=[{"file_name": "a/0.png", "text": "x, y"},
                                                                    {"file_name": "b\\1.png", "text": "z"}]),
                                  'captions, such as "x, y"', "2 classes: a, b"),
    "metadata.jsonl with a mark": (tree("0.png", files={"metadata.jsonl": "\ufeff" + json.dumps(CAT)}), {10: ["a cat"]}),
    "metadata.jsonl of captions": (tree("0.png", texts=[{"file_name": "0.png", "caption": ["a cat", "a pet"]}]),
                                   {10: ["a cat", "a pet"]}),
    "metadata.jsonl without texts": (tree("0.png", texts=[{"file_name": "0.png", "box": [1, 2]}]), "no captions",
                                     "left out: 1 .jsonl"),
    "metadata.jsonl that is damaged": (tree("0.png", files={"metadata.jsonl": '{"file_name"'}), ValueError,
                                       "metadata.jsonl does not say"),
    "a text that is none": (tree("0.png", texts=[{**CAT, "text": 7}]), ValueError, "7 is no caption"),
    "an image without a text": (tree("0.png", "1.png", "3.png", texts=[CAT, DOG]), ValueError,
                                "1 of 3 images have no caption", "3.png"),
    "a text without an image": (tree("0.png", texts=[CAT, DOG]), ValueError, "1 captions have no image", "1.png"),
    "a text beside each image": (tree("0.png", "1.png", files={"0.txt": "a cat\r\n", "1.TXT": "\ufeffa dog\na pet"}),
                                 {10: ["a cat"], 20: ["a dog", "a pet"]}, "left out: nothing"),
    "a text beside no image": (tree("0.png", files={"LICENSE.txt": "all rights"}), "no captions", "left out: 1 .txt, which"),
    "formats that are not read": (tree("a.png", files=dict.fromkeys(UNREAD, "x")), "1 image,", "left out: 2 .heic, 1 ",
                                  " and 2 of other endings, which are not read here"),
    "nothing that is read": (tree(files={"b.heic": "x", "c.heic": "x"}), ValueError, "no image that can be read, but 2 .heic"),
    "nothing": (tree(), ValueError, "holds no image"),
    "files of systems": (tree("A/IMG 1.PNG", files=dict.fromkeys(SYSTEMS, "x")), {10: "A"}, "1 image,", "left out: nothing"),
    "names in Latin-1": (tree(b"caf\xe9/0.png", b"the/\xff.png"), "2 classes: caf?, the", {10: "caf\udce9", 20: "the"}),
    "a line's end in names": (tree("two\nlines/0\n.png"), "1 class: two?lines;"),
    "accents that are letters": (tree("cafe\u0301/0.png", "caf\u00e9/1.png"), {10: "cafe\u0301", 20: "caf\u00e9"}),
    "a comma in names": (tree("big, cat/0.png", "dog/1.png"), '2 classes: "big, cat", dog;'),
    "numbers as names": (tree(*(f"{i}/0.png" for i in range(12))), "12 classes: 0, 1, 10, 11, 2, …;"),
    "a long name": (tree("x" * 250 + "/0.png"), "1 class: " + "x" * 49 + "…"),
    "grey as WebP": (tree(files={"0.webp": saved(solid(100, "L"), "WEBP")}), "grey, levels 100 to 100"),
    "grey as GIF": (tree(files={"0.gif": saved(solid(100, "L"), "GIF")}), "grey, levels 100"),
    "grey as colour": (tree(files={"0.png": saved(solid([7, 7, 7]), "PNG"), "1.jpg": saved(solid([9, 9, 9]), "JPEG")}),
                       "grey, levels 7 to 9"),
    "grey as palette": (tree(files={"0.png": saved(solid(7, "L").convert("P"), "PNG")}), "grey, levels 7"),
    "grey among colour": (tree("0.png", files={"1.png": saved(solid([0, 9, 200]), "PNG")}), "colour, levels 0 to 200"),
    "a wrong ending": (tree("0.jpg"), "1 image,", "levels 10"),
    "a folder called as a file": (tree("x.png/0.png", "y.png/1.png"), {10: "x.png", 20: "y.png"}),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_is_read_as_its_owner_means_it_or_refused(tmp_path, case):
    make, *said = FOLDERS[case]
    (tmp_path / "photos").mkdir()
    make(tmp_path / "photos")
    load_it = lambda split="all": load(str(tmp_path / "photos"), 8, split, tmp_path / "cache")      # noqa: E731
    if said[0] is ValueError:
        return refusal(load_it, *said[1:])
    dataset = load_it()
    of_each = dataset.captions or [dataset.classes[label] for label in (() if dataset.labels is None else dataset.labels)]
    for words in said:
        if isinstance(words, dict):                      # the class or the captions of each level
            assert dict(zip(dataset.images[:, 0, 0, 0].tolist(), of_each)) == words
        else:
            assert words in dataset.summary
    assert "\n" not in dataset.summary and dataset.summary.encode()


def test_a_folder_may_have_any_name(tmp_path):
    folder = tmp_path / ("caf\udce9" + "x" * 240)        # Latin-1, and nearly as long as a name may be
    folder.mkdir()
    tree("0.png", "1.png")(folder)
    assert len(load(str(folder), 8, "all", tmp_path / "cache")) == 2


def test_a_data_set_by_name_and_a_folder_of_that_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mnist", "coco"):
        (tmp_path / name).mkdir()
        tree("0.png", "1.png")(tmp_path / name)
    assert [len(load(spec, 32, "all", "cache")) for spec in ("mnist", "./mnist", "mnist/", "coco")] == [10_000, 2, 2, 2]
    assert load("./mnist", 32, "all", "cache").spec == "./mnist"         # the shipped ViT judges mnist alone
    assert not evaluate.in_files("mnist") and evaluate.in_files("./mnist")


def small_run(path):
    """A run that learned nothing of grey images of 8 x 8 pixels -> its path."""
    arguments = dict(image_size=8, patch_size=8, channels=1, dim=8, depth=1, heads=1, learn_sigma=False)
    network = {"class": "DiT", "arguments": arguments}
    state = models.build(network).state_dict()
    checkpoint.save(path, checkpoint.Run(checkpoint.VERSION, 1, {}, network, checkpoint.Process("linear", 9, "eps", "small"),
                                         checkpoint.Data("photos", None, 1000, 1, 8), state, state))
    return path


def test_what_a_command_reads_is_said_and_how_large_files_may_be_is_its_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tree("cat/0.png", "dog/1.png")(tmp_path / "photos")
    (tmp_path / "mask.png").write_bytes(saved(HOLE, "PNG"))
    for main, argv in ((train.main, "--data photos --image-size 8 --steps 1"),
                       (evaluate.main, "--samples photos --reference photos --image-size 8"),
                       (sample.main, f"--ckpt {small_run(tmp_path / 'small.pt')} --inpaint photos/cat/0.png --mask mask.png")):
        image_files.allow_pixels(None)
        with pytest.raises(SystemExit) as stop:
            main([*argv.split(), "--max-pixels", "15", *([] if main is sample.main else ["--cache", "cache"])])
        assert stop.value.code == 2 and "--max-pixels allows more" in capsys.readouterr().err
    image_files.allow_pixels(None)
    with pytest.raises(SystemExit):                      # the shipped ViT wants other images, after they were read
        argv = "--samples photos --reference photos --image-size 8 --cache cache --features".split()
        evaluate.main([*argv, str(features.JUDGE)])
    said = "photos: 2 images, 8x8 pixels, grey, levels 10 to 20; 2 classes: cat, dog; no captions; held out: nothing; left out: "
    assert capsys.readouterr().out.splitlines() == 2 * [said + "nothing"]
