"""What people bring comes out right, or is refused by name: arrays, text files and tables, captions, checkpoints of other code.

A row is an input made in a line or two, and the value that must come out; a string is what a refusal says.
"""
import codecs
import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from refusals import refusal

import checkpoint
import plot
from data import load
from dit import DiT
from files import read_text
from folders import captions_of, coco_captions
from formula import GOLDEN, fill
from models import released_autoencoder
from reports import read_log
from text import Tokenizer, normalise
from unet import SIZES, UNet
from vae import AutoencoderKL
from vit import ViT


def compare(call, expected, same=None):
    """Assert that a call gives the expected value, or if that is a string, which a result is not, a refusal that says it."""
    if isinstance(expected, str):
        refusal(call, *expected.split(" … "))
    else:
        assert same(call(), expected) if same else call() == expected


def table(rows):
    """A parametrization by a dict of tuples: its keys are the names of the cases."""
    return pytest.mark.parametrize("given, expected", rows.values(), ids=rows)


# Pixels: the levels 0 to 255 as four grey images, in all the ways in which people keep them

LEVELS = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
COLOUR = np.arange(4 * 8 * 6 * 3, dtype=np.uint8).reshape(4, 8, 6, 3)
PIXELS = {
    "bytes": (LEVELS, LEVELS),
    "bytes without a channel": (LEVELS[..., 0], LEVELS),
    "bytes in column order": (np.asfortranarray(COLOUR), COLOUR),
    "float32 in [0, 1]": (LEVELS / np.float32(255), LEVELS),
    "float16 in [0, 1]": ((LEVELS / 255).astype(np.float16), LEVELS),
    "float64 in [0, 1], and none is bright": (LEVELS / 1000, (LEVELS * 0.255).round().astype(np.uint8)),
    "float32 in [-1, 1]": ((LEVELS / 127.5 - 1).astype(np.float32), LEVELS),
    "float16 in [-1, 1]": ((LEVELS / 127.5 - 1).astype(np.float16), LEVELS),
    "floats up to 255": (LEVELS.astype(np.float32), LEVELS),
    "int64": (LEVELS.astype(np.int64), LEVELS),
    "big-endian int32": (LEVELS.astype(">i4"), LEVELS),
    "uint16 of 8 bits": (LEVELS.astype(np.uint16), LEVELS),
    "uint16 of 16 bits": (LEVELS.astype(np.uint16) * 257, LEVELS),
    "bool": (LEVELS > 99, np.where(LEVELS > 99, 255, 0)),
    "bytes of 0 and 1": ((LEVELS > 99).astype(np.uint8), np.where(LEVELS > 99, 255, 0)),
    "black": (np.zeros_like(LEVELS), np.zeros_like(LEVELS)),
    "a little below 0, as after a filter": (LEVELS / np.float32(255) - np.float32(0.01), "of -0.01 to 0.99 … not clearly"),
    "float32 in [-0.5, 0.5]": (LEVELS / np.float32(255) - np.float32(0.5), "of -0.5 to 0.5 … not clearly"),
    "float32 to 1.02": (LEVELS / np.float32(250), "to 1.02 … not clearly"),
    "normalised by mean and deviation": (LEVELS / 64 - 2, "of -2 to 1.98438"),
    "not a number": (np.where(LEVELS == 7, np.nan, LEVELS / 255), "1 pixels are NaN or infinite"),
    "infinite": (np.where(LEVELS < 2, np.inf, LEVELS / 255), "2 pixels are NaN or infinite"),
    "12 bits in 16": (LEVELS.astype(np.uint16) * 16, "to 4080 … not clearly"),
    "negative int8": (LEVELS.astype(np.int8), "int8 of -128 to 127"),
    "32 bits": (LEVELS.astype(np.uint32) * 10 ** 6, "to 2.55e+08"),
    "texts": (np.full((4, 8, 8), "a"), "not <U1"),
    "complex": (LEVELS * 1j, "not complex128"),
    "objects": (np.array([*LEVELS, None], dtype=object)[:-1], "Python objects … astype"),
    "channels first": (COLOUR.transpose(0, 3, 1, 2), "(4, 3, 8, 6) … NCHW"),
    "two channels": (COLOUR[..., :2], "not of the shape (4, 8, 6, 2)"),
    "latents": (np.ones((4, 4, 8, 8), np.float32), "(4, 4, 8, 8) … NCHW"),
    "RGBA": (COLOUR.repeat(2, axis=3)[..., :4], "(4, 8, 6, 4) … RGBA"),
    "flat rows": (COLOUR.reshape(4, -1), "(4, 144) … flat rows"),
    "one image": (COLOUR[0], "(8, 6, 3) … one image"),
    "films": (COLOUR[None], "(1, 4, 8, 6, 3)"),
    "none": (COLOUR[:0], "(0, 8, 6, 3)"),
    "no pixels": (COLOUR[:, :0], "(4, 0, 6, 3)"),
}


def npz(folder, **content):
    np.savez(folder / "images.npz", **content)
    return str(folder / "images.npz")


@table(PIXELS)
def test_pixels_are_told_apart_by_what_they_hold(tmp_path, given, expected):
    compare(lambda: load(npz(tmp_path, images=given), split="all").images, expected, np.array_equal)


@pytest.mark.parametrize("given, words", [
    (LEVELS, "uint8"), (LEVELS > 9, "bool"), (LEVELS / np.float32(255), "float32 of 0 to 1, read as [0, 1]"),
    (LEVELS / 127.5 - 1, "float64 of -1 to 1, read as [-1, 1]"),
    (LEVELS * np.uint16(257), "uint16 of 0 to 65535, read as 0 to 65535")])
def test_what_pixels_were_taken_for_and_what_is_left_out_is_said(tmp_path, given, words):
    dataset = load(npz(tmp_path, images=given, label=LEVELS), 4)
    assert dataset.pixel_range == words and dataset.left_out == ("label",)


# Labels of six images

TURNS, ONE_HOT = np.arange(6) % 3, np.eye(3)[np.arange(6) % 3]
LABELS = {
    "0, 1, 2": (TURNS, ([0, 1, 2, 0, 1, 2], ["0", "1", "2"])),
    "from 1": (TURNS + 1, ([0, 1, 2, 0, 1, 2], ["1", "2", "3"])),
    "with gaps": (np.array([0, 90, 5, 5, 90, 0]), ([0, 2, 1, 1, 2, 0], ["0", "5", "90"])),
    "far apart": (np.array([2 ** 62, 7] * 3), ([1, 0] * 3, ["7", str(2 ** 62)])),
    "a column": (TURNS[:, None].astype(np.uint8), ([0, 1, 2, 0, 1, 2], ["0", "1", "2"])),
    "one-hot": (ONE_HOT, ([0, 1, 2, 0, 1, 2], ["0", "1", "2"])),
    "one-hot bool with an empty column": (np.eye(4, dtype=bool)[TURNS + 1], ([0, 1, 2, 0, 1, 2], ["1", "2", "3"])),
    "whole floats": (TURNS.astype(np.float32), ([0, 1, 2, 0, 1, 2], ["0", "1", "2"])),
    "bool": (TURNS > 0, ([0, 1, 1, 0, 1, 1], ["False", "True"])),
    "texts": (np.array(["dog", "cat"] * 3), ([1, 0] * 3, ["cat", "dog"])),
    "bytes": (np.array(["dog".encode(), "café".encode()] * 3), ([1, 0] * 3, ["café", "dog"])),
    "one class": (np.full(6, 4), ([0] * 6, ["4"])),
    "some unlabelled": (TURNS - 1, "2 labels are -1"),
    "an empty text": (np.array(["dog", ""] * 3), "3 labels are empty"),
    "fractions": (TURNS / 2, "whole numbers or texts, not float64"),
    "not a number": (np.where(TURNS == 1, np.nan, TURNS), "whole numbers"),
    "several a row": (np.ones((6, 3), int), "(6, 3), which are not one-hot"),
    "probabilities": (ONE_HOT * 0.9 + 0.05, "not one-hot"),
    "one too few": (TURNS[:5], "6 images but labels of shape (5,)"),
    "objects": (np.array(["dog", None] * 3, dtype=object), "Python objects"),
    "dates": (TURNS.astype("M8[s]"), "datetime64"),
}


@table(LABELS)
def test_labels_become_as_many_classes_as_occur_and_were_their_names(tmp_path, given, expected):
    def found():
        dataset = load(npz(tmp_path, images=LEVELS[[0, 1, 2, 3, 0, 1]], labels=given), split="all")
        return dataset.condition(np.arange(6)).tolist(), dataset.classes
    compare(found, expected)


def test_labels_that_count_from_0_stay_as_they_are_for_runs_know_them_by_their_hash(tmp_path):
    dataset = load(npz(tmp_path, images=LEVELS[[0, 1, 2, 3, 0, 1]], labels=TURNS.astype(np.uint8)), split="all")
    assert dataset.labels.dtype == np.uint8


def test_classes_are_those_of_the_whole_file_whatever_a_split_holds(tmp_path):
    path = npz(tmp_path, images=LEVELS, labels=np.array([3, 5, 7, 9]))
    assert load(path, split="test").classes == load(path).classes == ["3", "5", "7", "9"]


FILES = {
    "numbered": (dict(arr_0=LEVELS, arr_1=TURNS[:4]), 3),
    "named": (dict(images=LEVELS, labels=TURNS[:4]), 3),
    "images numbered, labels named": (dict(arr_0=LEVELS, labels=TURNS[:4]), 3),
    "no labels": (dict(arr_0=LEVELS), None),
    "ADM's, with statistics": (dict(arr_0=LEVELS, mu=np.ones(2), sigma=np.ones((2, 2))), None),
    "Keras's": (dict(x_train=LEVELS, y_train=TURNS, x_test=LEVELS, y_test=TURNS), "arr_0 or images … x_train, y_train, x_test"),
    "ImageNet32's": (dict(data=LEVELS.reshape(4, -1), labels=TURNS[:4]), "arr_0 or images … data, labels"),
    "two sets of images": (dict(arr_0=LEVELS, images=LEVELS), "arr_0, images"),
    "nothing": ({}, "nothing"),
}


@table(FILES)
def test_arrays_are_found_by_their_names(tmp_path, given, expected):
    compare(lambda: load(npz(tmp_path, **given)).num_classes, expected)


# Text files

TEXT = "a café\n“two” words\n"
TEXTS = {
    "UTF-8": (TEXT.encode(), TEXT),
    "UTF-8 with a mark": (codecs.BOM_UTF8 + TEXT.encode(), TEXT),
    "two marks": (2 * codecs.BOM_UTF8 + TEXT.encode(), TEXT),
    "Windows' line ends": (TEXT.replace("\n", "\r\n").encode(), TEXT),
    "old line ends": (TEXT.replace("\n", "\r").encode(), TEXT),
    "UTF-16": (TEXT.encode("utf-16"), TEXT),
    "big-endian UTF-16 with Windows' line ends": (codecs.BOM_UTF16_BE + TEXT.replace("\n", "\r\n").encode("utf-16-be"), TEXT),
    "UTF-32": (TEXT.encode("utf-32"), TEXT),
    "other breaks of lines": ("a\u2028b\x0cc\x85d".encode(), "a\u2028b\x0cc\x85d"),
    "nothing": (b"", ""),
    "Latin-1": (TEXT.replace("“", "").replace("”", "").encode("latin-1"), ValueError),
    "Windows-1252": (TEXT.encode("cp1252"), ValueError),
    "UTF-16 without a mark": ("a cat".encode("utf-16-le"), ValueError),
    "half of UTF-16": (TEXT.encode("utf-16")[:-1], ValueError),
}


@table(TEXTS)
def test_a_text_is_read_whole_or_refused(tmp_path, given, expected):
    (tmp_path / "text.txt").write_bytes(given)
    if expected is ValueError:
        return refusal(lambda: read_text(tmp_path / "text.txt"), tmp_path / "text.txt", "UTF-")
    assert read_text(tmp_path / "text.txt") == expected


@pytest.mark.parametrize("name, content, captions", [
    ("0.txt", "a cat\r\n\r\n a dog \r\n".encode("utf-16"), ["a cat", "a dog"]), ("0.TXT", b"a cat", ["a cat"]),
    ("0.txt", b"\xef\xbb\xbfa cat\r\n", ["a cat"]), ("0.txt", "a\u2028cat".encode(), ["a\u2028cat"]), ("0.Txt", b"", [""])])
def test_captions_beside_an_image_are_the_lines_of_its_text(tmp_path, name, content, captions):
    (tmp_path / name).write_bytes(content)
    images, found, *_ = captions_of([tmp_path / "0.png"], [tmp_path / name], skip_bad=False)
    assert images == [tmp_path / "0.png"] and found == [captions]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_vocabularies_and_annotations_are_read_as_other_texts(tmp_path, encoding):
    for name in ("vocab.json", "merges.txt"):
        text = (GOLDEN / "clip_tiny" / name).read_text("utf-8")
        (tmp_path / name).write_bytes(text.replace("\n", "\r\n").encode(encoding))
    ids = Tokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")("a photo of a cat")
    assert ids.equal(Tokenizer(GOLDEN / "clip_tiny" / "vocab.json", GOLDEN / "clip_tiny" / "merges.txt")("a photo of a cat"))
    (tmp_path / "1.jpg").touch()
    content = dict(images=[dict(id=1, file_name="1.jpg")], annotations=[dict(image_id=1, caption="un café")])
    (tmp_path / "captions_all.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    assert coco_captions(tmp_path / "captions_all.json", False) == ([tmp_path / "1.jpg"], [["un café"]], [])


LOG = "step,images,loss\n50,400,0.5\n100,800,1.25e-05\n"
TABLES = {
    "as written": LOG.encode(),
    "a mark and Windows' line ends": codecs.BOM_UTF8 + LOG.replace("\n", "\r\n").encode(),
    "semicolons": LOG.replace(",", ";").encode(),
    "semicolons and decimal commas": LOG.replace(",", ";").replace(".", ",").encode(),
    "tabs in UTF-16": LOG.replace(",", "\t").encode("utf-16"),
    "quoted": '"step";"images";"loss"\n"50";"400";"0,5"\n"100";"800";"1,25e-05"\n'.encode(),
    "quoted, without a last line end": ('"' + LOG.replace(",", '","').replace("\n", '"\n"'))[:-2].encode(),
    "spaces behind commas": LOG.replace(",", ", ").encode(),
    "empty rows": (LOG + ",,\n\n,,\n").encode(),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_log_that_a_spreadsheet_saved_is_the_same_log(tmp_path, kind):
    (path := tmp_path / "run.csv").write_bytes(TABLES[kind])
    rows = [dict(step="50", images="400", loss="0.5"), dict(step="100", images="800", loss="1.25e-05")]
    assert read_log(path, 100) == (("step", "images", "loss"), rows, True) and plot.read_rows(path, "step", "loss") == rows


def test_points_between_thousands_beside_decimal_commas_are_no_decimals(tmp_path):
    (tmp_path / "run.csv").write_text("step;loss\n1.000;0,5\n")
    refusal(lambda: plot.read_rows(tmp_path / "run.csv"), tmp_path / "run.csv", "1.000")


def test_a_table_that_is_no_text_is_refused_by_the_chart(tmp_path):
    (tmp_path / "run.csv").write_bytes("Schritt;Verlust für alle\n1;2\n".encode("latin-1"))
    refusal(lambda: plot.read_rows(tmp_path / "run.csv"), tmp_path / "run.csv", "UTF-8")


# Captions as OpenAI's code cleans them: what ftfy and it make of each

CAPTIONS = {
    "a dog’s toy": "a dog's toy", "“a red door”": '"a red door"', "it’s raining…": "it's raining…", "ＡＢＣ width": "abc width",
    "ﬁre truck": "fire truck", "don’t walk": "don't walk", "price &lt; 5 &amp; more": "price < 5 & more", "&ldquo;A&rdquo;": '"a"',
    "a &amp;amp;amp; b": "a & b", "<b>&rsquo;": "<b>’", "e\u0301clair": "éclair", "\ufeffbom  first\n": "bom first", "a\0b": "ab",
    "½ cup, 5×5": "½ cup, 5×5", "‚low„": "'low\"", "ŉ ﬅ ǅ": "'n \u017ft dž", "ｶﾅ\u3000！": "カナ !", "ﷺ": "ﷺ",
    "soft\u00adhyphen": "soft\u00adhyphen",
}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_caption_is_cleaned_as_openai_does(caption):
    assert normalise(caption) == CAPTIONS[caption]


# Checkpoints of other training code: whatever stands around it, the network is found, and its averaged weights

ARGUMENTS = dict(image_size=8, patch_size=2, channels=4, dim=16, depth=1, heads=1, num_classes=10)
NETWORK = fill(DiT(**ARGUMENTS), computed=["pos_embed"])
STATE, OTHER = NETWORK.state_dict(), DiT(**ARGUMENTS).state_dict()


def under(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


TRAINING = dict(opt={"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}, args=Namespace(lr=1e-4), steps=5)
CHECKPOINTS = {
    "bare": STATE, "DDP": under("module."), "compiled": under("_orig_mod."), "compiled in DDP": under("module._orig_mod."),
    "DDP in compiled": under("_orig_mod.module."), "model.": under("model."), "ema_model.": under("ema_model."),
    "Meta's training": {"model": under("module.", OTHER), "ema": STATE, **TRAINING},
    "of which the average is wrapped": {"model": OTHER, "ema": under("module."), **TRAINING},
    "model": {"model": STATE, **TRAINING}, "state_dict": {"state_dict": under("model."), "epoch": 3},
    "ema_model": {"model": OTHER, "ema_model": STATE}, "nested twice": {"state": {"net": OTHER, "EMA": {"state_dict": STATE}}},
    "average and online together": under("online_model.", OTHER) | under("ema_model.") | {"step": torch.tensor(3)},
    "Lightning, with a loss": {"state_dict": under("net.") | {"loss.scale": torch.ones(1)}},
    "averaged by PyTorch": under("module.") | {"n_averaged": torch.tensor(4)},
    "half precision": {name: value.half() for name, value in STATE.items()},
    "bfloat16": {name: value.bfloat16() for name, value in STATE.items()},
    "FP8": "8 bits", "INT8": "8 bits", "a whole module": "dit.DiT … state_dict()", "diffusers' names": "diffusers library",
    "an average as a list": "names of no network",
}
OF_REFUSED = {
    "FP8": {name: value.to(torch.float8_e4m3fn) for name, value in STATE.items()},
    "INT8": STATE | {"blocks.0.mlp.fc1.weight": torch.ones(64, 16, dtype=torch.int8)},
    "a whole module": NETWORK, "diffusers' names": {"transformer_blocks.0.attn1.to_q.weight": torch.ones(3, 3)},
    "an average as a list": {"ema": {"shadow_params": [*STATE.values()]}},
}
TAKEN = {                                                # what is said where there was a choice
    "Meta's training": "ema is taken, not model.module\n", "of which the average is wrapped": "ema.module is taken, not model\n",
    "ema_model": "ema_model is taken, not model\n", "nested twice": "state.EMA.state_dict is taken, not state.net\n",
    "average and online together": "ema_model is taken, not online_model\n",
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_weights_are_found_in_what_training_code_saves(tmp_path, case, capsys):
    torch.save(OF_REFUSED.get(case, CHECKPOINTS[case]), path := tmp_path / "weights.pt")

    def loaded():
        return checkpoint.load_network(path).state_dict()
    if case in OF_REFUSED:
        return refusal(loaded, path, *CHECKPOINTS[case].split(" … "))
    tolerance = dict(rtol=1e-2, atol=1e-2) if case in ("half precision", "bfloat16") else dict(rtol=0, atol=0)
    torch.testing.assert_close(loaded(), dict(STATE), **tolerance, check_dtype=True)
    assert capsys.readouterr().err.replace(f"{path} holds several sets of weights: ", "") == TAKEN.get(case, "")


def test_an_fp8_safetensors_is_named(tmp_path):
    path, header = tmp_path / "a.safetensors", b'{"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    refusal(lambda: checkpoint.load(path), path, "w is of F8_E4M3", "quantised")


CLASSES = {
    "a DiT of 10 classes": (DiT(**ARGUMENTS), (10, 10)),
    "a DiT of 1000 classes alone": (DiT(**ARGUMENTS | dict(num_classes=1000, null_class=False)), (1000, None)),
    "OpenAI's U-Net of 10 classes": (UNet(32, **SIZES["Nano"], num_classes=10, null_class=False), (10, None)),
    "a ViT of 7": (ViT(image_size=8, patch_size=2, dim=16, depth=1, heads=1, num_classes=7), (7, None)),
}


@table(CLASSES)
def test_a_label_table_says_how_many_classes_there_are(tmp_path, given, expected):
    torch.save(given.state_dict(), path := tmp_path / "weights.pt")
    network = checkpoint.load_network(path)
    assert (network.num_classes, getattr(network, "null_label", None)) == expected


def test_an_autoencoder_is_found_behind_its_trainers_names():
    state = AutoencoderKL(dim=32, multipliers=(1,), res_blocks=1).state_dict()
    for content in ({"state_dict": under("module.", state)}, {"ema": under("_orig_mod.", state), "loss": {"a": torch.ones(1)}}):
        torch.testing.assert_close(dict(released_autoencoder(content).state_dict()), dict(state), rtol=0, atol=0)
