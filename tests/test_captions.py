"""Captions: read beside their images, told to a network, by an encoder that learns with it or by CLIP's; then drawn from."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
import ddpm
import evaluate
import latents
import sample
import train
from data import Batches, load
from formula import GOLDEN, fill
from objectives import Denoising
from refusals import refusal
from test_train import assert_same_run
from text import CLIPTextEncoder, TextEncoder
from vae import AutoencoderKL

COLOURS = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250)}
TEXT = ["--text", "--image-size", "8", "--batch-size", "8", "--device", "cpu"]


def plain(path, colour, side=8):
    Image.new("RGB", (side, side), COLOURS[colour]).save(path)


@pytest.fixture
def captioned(tmp_path):
    """A folder of 24 plain images, with two lines of caption beside each."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(24):
        colour = list(COLOURS)[i % 3]
        plain(folder / f"{i:02}.png", colour)
        (folder / f"{i:02}.txt").write_text(f"all of it is {colour}\n\n  a {colour} image \n")
    return folder


@pytest.fixture
def coco(tmp_path):
    """A function that makes a small MS-COCO: {part: images} -> its folder. Image i has i % 3 + 1 captions."""
    def make(**parts):
        root = tmp_path / "coco"
        (root / "annotations").mkdir(parents=True)
        for part, n in parts.items():
            (root / part).mkdir()
            images = [dict(id=7 * i + 1, file_name=f"{part}_{i}.jpg") for i in range(n)]
            for i, image in enumerate(images):
                plain(root / part / image["file_name"], list(COLOURS)[i % 3])
            annotations = [dict(image_id=7 * i + 1, caption=f"{list(COLOURS)[i % 3]} thing\n  number {i}, said {k}")
                           for k in range(3) for i in reversed(range(n)) if k <= i % 3]
            (root / "annotations" / f"captions_{part}.json").write_text(json.dumps(dict(images=images, annotations=annotations)))
        return root
    return make


@pytest.fixture
def clip(tmp_path):
    """A folder of a small CLIP: 20 tokens, 128 wide."""
    folder = tmp_path / "clip"
    shutil.copytree(GOLDEN / "clip_tiny", folder)
    torch.save(fill(CLIPTextEncoder(vocab=714, length=20, dim=128, depth=1, heads=2, hidden=96)).state_dict(),
               folder / "pytorch_model.bin")
    return folder


def colour_of(image):
    """The name of the colour that a plain image (H, W, 3) has."""
    return list(COLOURS)[int(np.argmax(np.asarray(image)[0, 0]))]


# Reading

def test_each_line_beside_an_image_is_a_caption_of_it(captioned, tmp_path):
    dataset = load(str(captioned), 8, "all", tmp_path)
    assert len(dataset.captions) == 24
    for image, captions in zip(dataset.images, dataset.captions):
        assert captions == [f"all of it is {colour_of(image)}", f"a {colour_of(image)} image"]


def test_a_changed_caption_is_read_without_decoding_again(captioned, tmp_path, monkeypatch):
    load(str(captioned), 8, "all", tmp_path)
    (captioned / "05.txt").write_text("changed")
    monkeypatch.setattr("image_files._decode", lambda path, size: 1 / 0)
    assert load(str(captioned), 8, "all", tmp_path).captions[5] == ["changed"]


def test_a_folder_without_texts_has_no_captions(captioned, tmp_path):
    for path in captioned.glob("*.txt"):
        path.unlink()
    (captioned / "README.txt").write_text("about these images")
    assert load(str(captioned), 8, "all", tmp_path).captions is None


def test_captions_stay_with_their_images_where_some_cannot_be_read(captioned, tmp_path):
    (captioned / "03.png").write_bytes(b"no image")
    dataset = load(str(captioned), 8, "all", tmp_path, skip_bad=True)
    assert len(dataset) == 23
    assert all(colour_of(dataset.images[row]) in dataset.captions[row][0] for row in dataset.rows)


def test_images_without_captions_and_captions_without_images_are_counted_and_named(captioned, tmp_path):
    for name in ("04.txt", "11.txt"):
        (captioned / name).unlink()
    refusal(lambda: load(str(captioned), 8, cache=tmp_path), "2 of 24 images have no caption", "04.png", "--skip-bad")
    for name in ("04.png", "11.png", "07.png"):
        (captioned / name).unlink()
    refusal(lambda: load(str(captioned), 8, cache=tmp_path), "1 caption files have no image", "07.txt", "--skip-bad")
    assert len(load(str(captioned), 8, "all", tmp_path, skip_bad=True)) == 21


def test_a_caption_that_is_no_text_is_refused(captioned, tmp_path):
    (captioned / "04.txt").write_bytes(b"\xff\xfe\x00")
    refusal(lambda: load(str(captioned), 8, cache=tmp_path), "04.txt", "UTF-8")


def test_coco_has_the_captions_of_its_images_and_a_test_split_of_its_own(coco, tmp_path):
    root = coco(train2014=9, val2014=4)
    for split, n in (("train", 9), ("test", 4), ("all", 13)):
        dataset = load(f"coco:{root}", 8, split, tmp_path)
        assert len(dataset) == n and dataset.labels is None
        for image, captions in zip(dataset.images, dataset.captions):
            numbers = {int(text.split()[3].rstrip(",")) for text in captions}
            assert len(numbers) == 1 and len(captions) == numbers.pop() % 3 + 1
            assert {text.split()[0] for text in captions} == {colour_of(image)}


def test_a_single_file_of_captions_has_a_tenth_held_out(coco, tmp_path):
    root = coco(train2017=20)
    assert [len(load(f"coco:{root}", 8, split, tmp_path)) for split in ("train", "test", "all")] == [18, 2, 20]


@pytest.mark.parametrize("place", ["", "images", "images/val2014"])
def test_coco_images_may_lie_in_other_usual_places(coco, tmp_path, place):
    root = coco(val2014=3)
    (root / "images").mkdir()
    for path in (root / "val2014").iterdir():
        (root / place).mkdir(exist_ok=True)
        path.rename(root / place / path.name)
    (root / "val2014").rmdir()
    assert len(load(f"coco:{root}", 8, "all", tmp_path)) == 3


def test_missing_images_of_coco_are_counted_and_named(coco, tmp_path):
    root = coco(val2014=6)
    for i in (2, 5):
        (root / "val2014" / f"val2014_{i}.jpg").unlink()
    refusal(lambda: load(f"coco:{root}", 8, cache=tmp_path), "2 of 6 images", "val2014/val2014_2.jpg", "--skip-bad")
    assert len(load(f"coco:{root}", 8, "all", tmp_path, skip_bad=True)) == 4


def test_captions_of_coco_stay_with_their_images_where_some_cannot_be_read(coco, tmp_path):
    root = coco(val2014=6)
    (root / "val2014" / "val2014_1.jpg").write_bytes(b"no image")
    dataset = load(f"coco:{root}", 8, "all", tmp_path, skip_bad=True)
    assert len(dataset) == 5
    assert all(colour_of(dataset.images[row]) == dataset.captions[row][0].split()[0] for row in dataset.rows)


@pytest.mark.parametrize("content", ["{", "[]", '{"images": []}', '{"images": [{"id": 1}], "annotations": []}',
                                     '{"images": [], "annotations": [{"image_id": 3, "caption": "x"}]}'])
def test_what_is_no_file_of_captions_is_refused(coco, tmp_path, content):
    root = coco(val2014=3)
    (root / "annotations" / "captions_val2014.json").write_text(content)
    refusal(lambda: load(f"coco:{root}", 8, cache=tmp_path), "captions_val2014.json", "MS-COCO")


# Encoding

def test_an_image_shows_its_captions_in_turn_an_epoch_each(captioned, tmp_path):
    dataset = load(str(captioned), 8, "all", tmp_path)
    dataset.encode_captions(lambda captions: np.array(captions))
    read = {i: [] for i in range(24)}
    batches = Batches(dataset, 10, seed=3)
    dataset.condition, told = (lambda indices, epochs: torch.zeros(len(indices))), dataset.condition     # torch holds no texts
    for step in range(24 * 4 // 10):
        indices, epochs = batches.indices(step), (step * 10 + np.arange(10)) // 24
        for i, row in zip(indices, dataset.context_rows[dataset.first[indices] + epochs % 2]):
            read[i].append(dataset.contexts[row])
        assert len(batches[step][1]) == 10
    del told
    for i, captions in read.items():
        assert all(one != other for one, other in zip(captions, captions[1:])) and set(captions) == set(dataset.captions[i])


def test_a_batch_holds_the_ids_of_its_images_captions(captioned, tmp_path):
    dataset, encoder = load(str(captioned), 8, "train", tmp_path), TextEncoder(dim=16)
    dataset.encode_captions(lambda captions: encoder.tokenize(captions).numpy())
    for epoch in range(3):
        images, ids = dataset.batch(np.array([4, 0, 9]), np.full(3, epoch))
        words = [f"all of it is {colour_of(image)}" if epoch != 1 else f"a {colour_of(image)} image" for image in images]
        assert torch.equal(ids, encoder.tokenize(words))


def test_clips_contexts_are_its_encoders_and_are_made_once(captioned, clip, tmp_path, monkeypatch):
    encoder, tokenizer = checkpoint.load_clip(clip)
    captions = [f"a {colour} image" for colour in COLOURS]
    table = latents.embeddings(captions, encoder, tokenizer, tmp_path)
    with torch.no_grad():
        wanted = encoder(tokenizer.tokenize(captions))
    assert table.dtype == np.float16 and table.shape == wanted.shape
    torch.testing.assert_close(torch.from_numpy(np.array(table)).float(), wanted, rtol=2 ** -10, atol=2 ** -14)    # half precision
    monkeypatch.setattr(encoder, "forward", None)
    assert np.array_equal(latents.embeddings(captions, encoder, tokenizer, tmp_path), table)


# Training

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(captioned, *flags, out="run.pt", steps=2):
    assert train.main([*TEXT, "--data", str(captioned), "--cache", "cache", "--out", out, "--steps", str(steps), *flags]) is None
    return checkpoint.load(out)


@pytest.mark.parametrize("model, size", [("uvit", "Nano/4"), ("dit", "Ti/4"), ("unet", "Nano")])
def test_the_text_encoder_learns_with_the_denoiser_whatever_its_design(captioned, here, model, size):
    run = trained(captioned, "--model", model, "--size", size, "--weight-decay", "0", "--lr", "1e-3", "--warmup", "0", steps=3)
    torch.manual_seed(0)
    fresh = train.build(run["network"]).state_dict()
    names = [name for name in fresh if name.startswith("text_encoder.")]
    moved = [name for name in names if not torch.equal(run["model"][name], fresh[name])]
    still = set(names) - set(moved)
    assert len(names) > 20 and not still - {name for name in names if "k_proj.bias" in name}, still    # softmax ignores these
    assert all(not torch.equal(run["ema"][name], run["model"][name]) for name in moved)
    assert run["network"]["text"]["length"] == len("all of it is green".split()) + 1


def test_a_resumed_run_by_text_goes_on_bit_for_bit(captioned, here):
    constant = ("--model", "uvit", "--size", "Nano/4", "--decay", "none", "--sample-every", "3")
    trained(captioned, *constant, out="whole.pt", steps=6)
    trained(captioned, *constant, out="cut.pt", steps=3)
    train.main(["--resume", "--out", "cut.pt", "--steps", "6"])
    assert_same_run("whole.pt", "cut.pt")


def denoising(dataset, network, cfg_drop=0.5, N=400):
    args = train.settings(["--model", "uvit", "--text", "--batch-size", str(N), "--cfg-drop", str(cfg_drop), "--out", "none.pt"])[0]
    return Denoising(args, dataset, network, torch.device("cpu"))


def test_dropped_captions_are_the_empty_one(captioned, here):
    dataset, network = load(str(captioned), 8, cache=here), train.build(trained(captioned, "--model", "uvit", "--size", "Nano/4")["network"])
    dataset.encode_captions(lambda captions: network.text_encoder.tokenize(captions).numpy())
    images, ids = dataset.batch(np.arange(400) % 21)
    _, _, y, _ = denoising(dataset, network).draw(5, images, ids, slice(0, 400))
    dropped = (y != ids).flatten(1).any(dim=1)
    assert torch.equal(y[dropped], network.text_encoder.tokenize([""]).expand(int(dropped.sum()), -1, -1))
    assert abs(dropped.double().mean() - 0.5) < 4 * (0.25 / 400) ** 0.5                  # four standard errors


def test_a_network_reads_ids_as_their_encoded_context(captioned, here):
    network = checkpoint.build(trained(captioned, "--model", "uvit", "--size", "Nano/4"))[0]
    ids = network.text_encoder.tokenize(["a red image", ""])
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    assert torch.equal(network(x, t, ids), network(x, t, network.text_encoder(ids)))


def test_what_a_caption_says_is_learned(captioned, here):
    """At the last step there is only noise, so the best prediction is the mean image of what the caption leaves possible."""
    run = trained(captioned, "--model", "uvit", "--size", "Nano/8", "--lr", "1e-3", "--ema", "0.9", steps=300)
    network, _ = checkpoint.build(run)
    captions = [f"a {colour} image" for colour in COLOURS] + [f"all of it is {colour}" for colour in COLOURS]
    noise = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        predicted = network(noise, torch.full((6,), 999), network.text_encoder.tokenize(captions)).mean(dim=(2, 3))
    wanted = 2 * torch.tensor([*COLOURS.values()]) / 255 - 1
    assert (torch.cdist(predicted, wanted).argmin(dim=1) == torch.arange(6) % 3).all()
    assert (predicted - wanted.repeat(2, 1)).abs().mean() < 0.3


# CLIP

def test_a_run_told_by_clip_notes_it_and_finds_it_again(captioned, clip, here):
    run = trained(captioned, "--model", "uvit", "--size", "Nano/4", "--clip", str(clip))
    encoder, tokenizer = checkpoint.load_clip(clip)
    assert run["network"]["arguments"]["context_dim"] == 128 and run["network"]["arguments"]["context_tokens"] == 20
    assert run["text"]["sha256"] == encoder.origin["sha256"]
    with torch.no_grad():
        assert torch.equal(run["text"]["empty"], encoder(tokenizer.tokenize([""]))[0])
    assert not any("text_encoder" in name for name in run["model"])
    sample.main(["--ckpt", "run.pt", "--prompt", "a red image", "--npz", "one.npz"])
    clip.rename(here / "moved")
    refusal(lambda: sample.draw_and_write(sample.flags().parse_args(["--ckpt", "run.pt", "--prompt", "a red image"])), "no longer at",
            "--clip DIR")
    sample.main(["--ckpt", "run.pt", "--prompt", "a red image", "--npz", "two.npz", "--clip", "moved"])
    assert np.array_equal(np.load("one.npz")["arr_0"], np.load("two.npz")["arr_0"])


def test_guidance_by_the_empty_caption_is_the_formula(captioned, clip, here):
    run = trained(captioned, "--model", "uvit", "--size", "Nano/4", "--clip", str(clip))
    network, diffusion = checkpoint.build(run)
    encoder, tokenizer = checkpoint.load_clip(clip)
    with torch.no_grad():
        told, empty = encoder(tokenizer.tokenize(["a red image"])), encoder(tokenizer.tokenize([""]))
    described, _, _ = sample.drawable("run.pt")
    contexts = sample.read_prompts(["a red image"], None, described, network)
    y_null = sample.unconditional(network, described["text"], described["config"])
    (_, guided), = sample.draw(network, diffusion, range(1), contexts, steps=1, sampler="ddim", cfg_scale=3.0, y_null=y_null, clip=False)
    noise = torch.randn(1, 3, 8, 8, generator=ddpm.keyed_generator((0, 0)))
    with torch.no_grad():                                # one step from T - 1 to no noise returns the predicted image itself
        process = diffusion.respaced(1)
        t = process.original(torch.zeros(1, dtype=torch.long))
        conditional, unconditional = network(noise, t, told), network(noise, t, empty)
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), rtol=1e-5, atol=1e-5)


def test_another_clip_is_refused(captioned, clip, here):
    trained(captioned, "--model", "uvit", "--size", "Nano/4", "--clip", str(clip))
    weights = torch.load(clip / "pytorch_model.bin")
    weights["text_model.final_layer_norm.bias"] += 1
    torch.save(weights, clip / "pytorch_model.bin")
    for call in (lambda: sample.draw_and_write(sample.flags().parse_args(["--ckpt", "run.pt", "--prompt", "a red image"])),
                 lambda: train.train(*train.settings(["--resume", "--out", "run.pt", "--steps", "9"]), torch.device("cpu"), 0, 1)):
        refusal(call, "another text encoder")


def test_the_coco_recipe_runs_on_a_stand_in(coco, clip, here):
    """The README's command, with everything smaller."""
    root = coco(train2014=9, val2014=3)
    torch.save(fill(AutoencoderKL(dim=32, multipliers=(1, 2), res_blocks=1)).state_dict(), "sd-vae.ckpt")
    text = (checkpoint.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if "coco:" in line and "--clip" in line)
    command = line.split("#")[0].split()[2:]
    smaller = dict(size="Nano/2", image_size=16, clip=clip, vae="sd-vae.ckpt", data=f"coco:{root}", steps=2, batch_size=4, cache="c")
    train.main([*command, *(word for key, value in smaller.items() for word in (f"--{key.replace('_', '-')}", str(value)))])
    run = checkpoint.load(command[command.index("--out") + 1])
    assert run["vae"]["scale"] == 0.2301 and run["diffusion"]["schedule"] == "scaled-linear" and run["text"]["sha256"]
    at_its_size = [*command, "--vae", "sd-vae.ckpt", "--clip", str(clip), "--out", "other.pt"]
    recipe = train.settings(at_its_size)[0]
    assert (recipe.weight_decay, recipe.lr, recipe.steps, recipe.ema) == (0.03, 2e-4, 1_000_000, 0.9999)
    sample.main(["--ckpt", run["config"]["out"], "--prompt", "a red thing", "--n", "2", "--npz", "drawn.npz"])
    assert np.load("drawn.npz")["arr_0"].shape == (2, 16, 16, 3)


# What is refused

def test_a_prompt_and_a_network_must_fit(captioned, tiny_run, clip, here, capsys):
    trained(captioned, "--model", "uvit", "--size", "Nano/4")
    for flags, *parts in ((["--ckpt", "run.pt"], "--prompt"),
                          (["--ckpt", str(tiny_run), "--clip", str(clip)], "not trained with texts"),
                          (["--ckpt", "run.pt", "--prompt", "red", "--classes", "3"], "without labels"),
                          (["--ckpt", "run.pt", "--prompt", "red", "--clip", str(clip)], "of its own")):
        refusal(lambda: sample.draw_and_write(sample.flags().parse_args(flags)), *parts)


def test_what_a_prompt_loses_is_shown_in_a_warning(captioned, here, capsys):
    trained(captioned, "--model", "uvit", "--size", "Nano/4")
    sample.main(["--ckpt", "run.pt", "--n", "1", "--prompt", "All of it is green and more"])
    out, err = capsys.readouterr()
    assert "'and more'" in err and "6 tokens" in err and len(err.strip().splitlines()) == 1


def test_without_dropped_captions_there_is_no_guidance(captioned, here):
    trained(captioned, "--model", "uvit", "--size", "Nano/4", "--cfg-drop", "0")
    sample.main(["--ckpt", "run.pt", "--n", "1", "--prompt", "a red image"])
    refusal(lambda: sample.draw_and_write(sample.flags().parse_args(["--ckpt", "run.pt", "--prompt", "a red image", "--cfg-scale", "2"])),
            "no unconditional input")


def test_the_embedded_shapes_are_a_captioned_data_set():
    dataset = data.load("shapes", 16)
    images, labels = dataset.batch(np.array([0, 5]))
    assert images.shape == (2, 16, 16, 3) and len(dataset) == 9000 and dataset.num_classes == len(dataset.classes)
    assert [dataset.classes[label] in dataset.captions[row][0] for label, row in zip(labels, dataset.rows[[0, 5]])] == [True, True]


def test_samples_for_scores_follow_captions_of_the_reference_and_know_their_clip(captioned, clip, here):
    dataset = load(str(captioned), 8, "train", here)
    encoder, tokenizer = checkpoint.load_clip(clip)
    few, about = evaluate.captioned(dataset, tokenizer, encoder, 5, here)
    more, again = evaluate.captioned(dataset, tokenizer, encoder, 60, here)              # the split has 22 images, 44 captions
    assert few.shape == (5, 20, 128) and np.array_equal(few, more[:5]) and np.array_equal(more[:16], more[44:]) and about == again
    encoder.origin["sha256"] = "another"
    assert evaluate.captioned(dataset, tokenizer, encoder, 5, here)[1] != about
    with torch.no_grad():
        known = encoder(tokenizer.tokenize([text for row in dataset.rows for text in dataset.captions[row]])).half().numpy()
    assert all((np.abs(known - row).max(axis=(1, 2)) < 0.01).any() for row in few)


def test_a_text_runs_samples_are_scored(captioned, here, capsys):
    """By a ViT that learned the colours' folders; its captions, not its classes, say what is drawn."""
    for i, path in enumerate(sorted(captioned.glob("*.png"))):
        folder = captioned / "rgb"[i % 3]
        folder.mkdir(exist_ok=True)
        path.with_suffix(".txt").rename(folder / f"{path.stem}.txt")
        path.rename(folder / path.name)
    trained(captioned, "--model", "uvit", "--size", "Nano/4")
    train.main(["--model", "vit", "--size", "Nano/4", "--data", str(captioned), "--image-size", "8", "--batch-size", "8", "--steps", "2",
                "--cache", "cache", "--out", "vit.pt", "--device", "cpu"])
    evaluate.main(["--ckpt", "run.pt", "--n", "6", "--features", "vit.pt", "--cache", "cache", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "6 of run.pt" in out and "FD[vit" in out and "accuracy[" not in out
