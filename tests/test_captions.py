"""Captions: read beside their images, told to a network, by an encoder that learns with it or by CLIP's; then drawn from."""
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
import ddpm
import dit
import evaluate
import latents
import models
import sample
import sampling
import train
import uvit
import vit
from data import Batches, load
from formula import GOLDEN, fill
from objectives import Denoising, Pixels, Randomness
from refusals import refusal
from sampling import TextReader, draw, drawable, read_prompts, text_reader, unconditional
from settings import read_settings
from test_train import SMALLER
from text import CLIPTextEncoder, TextEncoder
from vae import AutoencoderKL

COLOURS = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250)}


def plain(path, colour, side=8):
    Image.new("RGB", (side, side), COLOURS[colour]).save(path)


def make_pictures(folder):
    """A folder of 24 plain images, with two lines of caption beside each."""
    folder.mkdir()
    for i in range(24):
        colour = list(COLOURS)[i % 3]
        plain(folder / f"{i:02}.png", colour)
        (folder / f"{i:02}.txt").write_text(f"all of it is {colour}\n\n  a {colour} image \n")
    return folder


@pytest.fixture
def captioned(tmp_path):
    return make_pictures(tmp_path / "pictures")


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


def make_clip(folder):
    """A folder of a small CLIP: 20 tokens, 128 wide."""
    shutil.copytree(GOLDEN / "clip_tiny", folder)
    torch.save(fill(CLIPTextEncoder(vocab=714, length=20, dim=128, depth=1, heads=2, hidden=96)).state_dict(),
               folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module", autouse=True)
def smaller(tiny_run):
    """Networks of a hundredth of the size, and samples of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        for sizes, name in ((dit.SIZES, "Ti"), (uvit.SIZES, "Nano"), (vit.SIZES, "Nano")):
            patch.setitem(sizes, name, SMALLER)
        patch.setattr(sampling, "STEPS", 2)
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(folder, *flags, out="run.pt", steps=2):
    """A small run on a folder's captions."""
    train.main(["--model", "uvit", "--size", "Nano/4", "--data", str(folder), "--text", "--image-size", "8", "--batch-size", "8",
                "--device", "cpu", "--cache", "cache", "--out", str(out), "--steps", str(steps), *flags])
    return checkpoint.load(out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, smaller):
    """A folder of captioned pictures, clip, and two runs of two steps: own.pt, with an encoder of its own, and clip.pt."""
    folder = tmp_path_factory.mktemp("runs")
    pictures, clip = make_pictures(folder / "pictures"), make_clip(folder / "clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trained(pictures, out=folder / "own.pt")
        trained(pictures, "--clip", str(clip), out=folder / "clip.pt")
    return folder


def drawn(run, *flags):
    """The image (8, 8, 3) that a run draws of "a red image"."""
    sample.main(["--ckpt", str(run), "--prompt", "a red image", "--n", "1", "--npz", "drawn.npz", "--device", "cpu", *flags])
    return np.load("drawn.npz")["arr_0"][0]


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


def test_images_without_captions_and_captions_without_images_are_left_out_on_demand(captioned, tmp_path):
    for name in ("04.png", "07.png", "11.txt"):
        (captioned / name).unlink()
    assert len(load(str(captioned), 8, "all", tmp_path, skip_bad=True)) == 21
    (captioned / "11.png").unlink()
    refusal(lambda: load(str(captioned), 8, cache=tmp_path), "2 captions have no image", "04.txt", "--skip-bad")


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


def test_captions_of_coco_stay_with_their_images_where_some_are_missing_or_cannot_be_read(coco, tmp_path):
    root = coco(val2014=8)
    (root / "val2014" / "val2014_1.jpg").write_bytes(b"no image")
    for i in (2, 5):
        (root / "val2014" / f"val2014_{i}.jpg").unlink()
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
    dataset.condition = lambda indices, epochs: torch.zeros(len(indices))                # torch holds no texts
    for step in range(24 * 4 // 10):
        indices, epochs = batches.indices(step), (step * 10 + np.arange(10)) // 24
        for i, row in zip(indices, dataset.context_rows[dataset.first[indices] + epochs % 2]):
            read[i].append(dataset.contexts[row])
        assert len(batches[step][1]) == 10
    for i, captions in read.items():
        assert all(one != other for one, other in zip(captions, captions[1:])) and set(captions) == set(dataset.captions[i])


def test_a_batch_holds_the_ids_of_its_images_captions(captioned, tmp_path):
    dataset, encoder = load(str(captioned), 8, "train", tmp_path), TextEncoder(dim=16)
    dataset.encode_captions(lambda captions: encoder.tokenize(captions).numpy())
    for epoch in range(3):
        images, ids = dataset.batch(np.array([4, 0, 9]), np.full(3, epoch))
        words = [f"all of it is {colour_of(image)}" if epoch != 1 else f"a {colour_of(image)} image" for image in images]
        assert torch.equal(ids, encoder.tokenize(words))


def test_clips_contexts_are_its_encoders_and_are_made_once(runs, tmp_path, monkeypatch):
    encoder, tokenizer = checkpoint.load_clip(runs / "clip")
    captions = [f"a {colour} image" for colour in COLOURS]
    table = latents.embeddings(captions, encoder, tokenizer, tmp_path)
    with torch.no_grad():
        wanted = encoder(tokenizer.tokenize(captions))
    assert table.dtype == np.float16 and table.shape == wanted.shape
    torch.testing.assert_close(torch.from_numpy(np.array(table)).float(), wanted, rtol=2 ** -10, atol=2 ** -14)    # half precision
    monkeypatch.setattr(encoder, "forward", None)
    assert np.array_equal(latents.embeddings(captions, encoder, tokenizer, tmp_path), table)


# Training

@pytest.mark.parametrize("model, size, more", [("uvit", "Nano/4", ""), ("dit", "Ti/4", ""), ("unet", "Nano", ""),
                                               ("dit", "Ti/4", "--conditioning adaln-zero")])
def test_the_text_encoder_learns_with_the_denoiser_whatever_its_design(captioned, here, model, size, more):
    run = trained(captioned, "--model", model, "--size", size, *more.split(), "--weight-decay", "0", "--lr", "1e-3", "--warmup", "0", steps=3)
    torch.manual_seed(0)
    fresh = models.build(run.network).state_dict()
    names = [name for name in fresh if name.startswith("text_encoder.") and "k_proj.bias" not in name]     # which softmax ignores
    still = [name for name in names if torch.equal(run.model[name], fresh[name])]
    assert len(names) > 20 and not still, still
    assert all(not torch.equal(run.ema[name], run.model[name]) for name in names)
    assert run.network["text"]["length"] == len("all of it is green".split()) + 1


def test_a_resumed_run_by_text_goes_on_bit_for_bit(captioned, here):
    constant = ("--decay", "none", "--sample-every", "3")
    whole = trained(captioned, *constant, out="whole.pt", steps=6)
    trained(captioned, *constant, out="cut.pt", steps=3)
    train.main(["--resume", "--out", "cut.pt", "--steps", "6"])
    resumed = checkpoint.load("cut.pt")
    for first, second in ((whole.model, resumed.model), (whole.ema, resumed.ema)):
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_dropped_captions_are_the_empty_one(runs):
    N, dataset, encoder = 400, load(str(runs / "pictures"), 8, cache=runs), drawable(runs / "own.pt")[1].text_encoder
    dataset.encode_captions(lambda captions: encoder.tokenize(captions).numpy())
    images, ids = dataset.batch(np.arange(N) % 21)
    inputs = Pixels(Randomness(0, N, slice(0, N), torch.device("cpu")), flip=False, shift=0)
    objective = Denoising(ddpm.Diffusion(ddpm.linear_betas()), inputs, TextReader(encoder)([""])[0], cfg_drop=0.5)
    _, _, y, _ = objective.draw(5, images, ids)
    dropped = (y != ids).flatten(1).any(dim=1)
    assert torch.equal(y[dropped], encoder.tokenize([""]).expand(int(dropped.sum()), -1, -1))
    assert abs(dropped.double().mean() - 0.5) < 4 * (0.25 / N) ** 0.5                    # four standard errors


def test_a_network_reads_ids_as_their_encoded_context(runs):
    network = checkpoint.load_network(runs / "own.pt")
    ids = network.text_encoder.tokenize(["a red image", ""])
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    assert torch.equal(network(x, t, ids), network(x, t, network.text_encoder(ids)))


@pytest.mark.slow
def test_what_a_caption_says_is_learned(captioned, here):
    """At the last step there is only noise, so the best prediction is the mean image of what the caption leaves possible."""
    network, _ = trained(captioned, "--size", "Nano/8", "--lr", "1e-3", "--ema", "0.9", steps=300).build()
    captions = [f"a {colour} image" for colour in COLOURS] + [f"all of it is {colour}" for colour in COLOURS]
    noise = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        predicted = network(noise, torch.full((6,), 999), network.text_encoder.tokenize(captions)).mean(dim=(2, 3))
    wanted = 2 * torch.tensor([*COLOURS.values()]) / 255 - 1
    assert (torch.cdist(predicted, wanted).argmin(dim=1) == torch.arange(6) % 3).all()
    assert (predicted - wanted.repeat(2, 1)).abs().mean() < 0.3


# Conditions of samples

def test_a_run_told_by_clip_keeps_what_tells_it_and_draws_the_same_wherever_clip_lies(runs, here):
    run, (encoder, tokenizer) = checkpoint.load(runs / "clip.pt"), checkpoint.load_clip(runs / "clip")
    arguments = run.network["arguments"]
    assert (arguments["context_dim"], arguments["context_tokens"]) == (128, 20)
    with torch.no_grad():
        assert run.text.sha256 == encoder.origin["sha256"] and torch.equal(run.text.empty, encoder(tokenizer.tokenize([""]))[0])
    assert not any("text_encoder" in name for name in run.model)
    run.text.path = "gone"
    checkpoint.save("moved.pt", run)
    assert np.array_equal(drawn(runs / "clip.pt"), drawn("moved.pt", "--clip", str(runs / "clip")))
    refusal(lambda: text_reader(run, run.build()[0]), "gone does not lie beside", "--clip DIR")


def test_another_clip_is_refused_when_drawing_and_when_going_on(runs, here):
    weights = torch.load(make_clip(here / "clip") / "pytorch_model.bin")
    weights["text_model.final_layer_norm.bias"] += 1
    torch.save(weights, "clip/pytorch_model.bin")
    shutil.copy(runs / "clip.pt", "run.pt")
    run, network, _ = drawable("run.pt")
    refusal(lambda: text_reader(run, network, "clip"), "another text encoder")
    args, run = read_settings(["--resume", "--out", "run.pt", "--steps", "9", "--clip", "clip"])
    refusal(lambda: train.train(args, run, torch.device("cpu"), 0, 1), "another text encoder")


def test_conditions_do_not_depend_on_the_order_in_which_they_are_made_and_a_run_stays_as_it_is(runs):
    for name in ("own.pt", "clip.pt"):
        found = []
        for order in (("prompts", "empty", "reader"), ("reader", "empty", "prompts")):
            run, network, _ = drawable(runs / name)
            before, reader = (pickle.dumps(run), set(vars(network))), text_reader(run, network)
            make = dict(prompts=lambda: read_prompts(["a red image", "blue"], reader, network),
                        empty=lambda: unconditional(network, reader, 0.1),
                        reader=lambda: text_reader(run, network)(["a red image"]))
            made = {key: make[key]() for key in order}
            assert (pickle.dumps(run), set(vars(network))) == before
            found.append([made["prompts"], made["empty"], made["reader"]])
        for other in found:
            assert all(torch.equal(one, two) for one, two in zip(found[0], other))
        assert torch.equal(found[0][0][:1], found[0][2])


def test_the_unconditional_input_is_the_empty_caption_if_captions_were_dropped(runs):
    for name in ("own.pt", "clip.pt"):
        run, network, _ = drawable(runs / name)
        reader = text_reader(run, network)
        assert torch.equal(unconditional(network, reader, 0.1), reader([""])[0])
        assert torch.equal(unconditional(network, reader), reader([""])[0])              # where it is not known
        assert unconditional(network, reader, 0) is None
    run.text = None                                      # released weights: --clip says where CLIP is
    assert torch.equal(unconditional(network, text_reader(run, network, runs / "clip")), reader([""])[0])


def test_guidance_by_the_empty_caption_is_the_formula(runs):
    run, network, diffusion = drawable(runs / "clip.pt")
    encoder, tokenizer = checkpoint.load_clip(runs / "clip")
    with torch.no_grad():
        told, empty = encoder(tokenizer.tokenize(["a red image"])), encoder(tokenizer.tokenize([""]))
    reader = text_reader(run, network)
    (_, guided), = draw(network, diffusion, range(1), reader(["a red image"]), steps=1, sampler="ddim", cfg_scale=3.0,
                        y_null=unconditional(network, reader), clip=False)
    noise = torch.randn(1, 3, 8, 8, generator=ddpm.keyed_generator((0, 0)))
    with torch.no_grad():                                # one step from T - 1 to no noise returns the predicted image itself
        process = diffusion.respaced(1)
        t = process.original(torch.zeros(1, dtype=torch.long))
        x0, x0_uncond = network(noise, t, told), network(noise, t, empty)
    torch.testing.assert_close(guided, x0_uncond + 3 * (x0 - x0_uncond), rtol=1e-5, atol=1e-5)


def test_what_a_prompt_loses_is_shown_in_a_warning(runs, capsys):
    run, network, _ = drawable(runs / "own.pt")
    read_prompts(["All of it is green and more", "a red image"], text_reader(run, network), network)
    err = capsys.readouterr().err
    assert "'and more'" in err and "6 tokens" in err and len(err.splitlines()) == 1


def test_the_coco_recipe_runs_on_a_stand_in(coco, here):
    """The command in CHANGING.md, with everything smaller."""
    root, clip = coco(train2014=9, val2014=3), make_clip(here / "clip")
    torch.save(fill(AutoencoderKL(dim=32, multipliers=(1, 2), res_blocks=1)).state_dict(), "sd-vae.ckpt")
    text = (Path(__file__).parents[1] / "CHANGING.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if "coco:" in line and "--clip" in line)
    command = line.split("#")[0].split()[2:]
    smaller = dict(size="Nano/2", image_size=16, clip=clip, vae="sd-vae.ckpt", data=f"coco:{root}", steps=2, batch_size=4,
                   cache="c", device="cpu")
    train.main([*command, *(word for key, value in smaller.items() for word in (f"--{key.replace('_', '-')}", str(value)))])
    run = checkpoint.load(command[command.index("--out") + 1])
    assert run.vae.scale == 0.2301 and run.diffusion.schedule == "scaled-linear" and run.text.sha256
    at_its_size = [*command, "--vae", "sd-vae.ckpt", "--clip", str(clip), "--out", "other.pt"]
    recipe, _ = read_settings(at_its_size)
    assert (recipe.weight_decay, recipe.lr, recipe.steps, recipe.ema) == (0.03, 2e-4, 1_000_000, 0.9999)
    sample.main(["--ckpt", run.config["out"], "--prompt", "a red thing", "--n", "2", "--npz", "drawn.npz"])
    assert np.load("drawn.npz")["arr_0"].shape == (2, 16, 16, 3)


def test_the_embedded_shapes_are_a_captioned_data_set():
    dataset = data.load("shapes", 16)
    images, labels = dataset.batch(np.array([0, 5]))
    assert images.shape == (2, 16, 16, 3) and len(dataset) == 9000 and dataset.num_classes == len(dataset.classes)
    assert [dataset.classes[label] in dataset.captions[row][0] for label, row in zip(labels, dataset.rows[[0, 5]])] == [True, True]


def test_samples_for_scores_follow_captions_of_the_reference_and_know_their_clip(runs):
    dataset = load(str(runs / "pictures"), 8, "train", runs)
    reader = TextReader(*reversed(checkpoint.load_clip(runs / "clip")))
    few, about = evaluate.captioned(dataset, reader, 5, runs)
    more, again = evaluate.captioned(dataset, reader, 60, runs)          # the split has 22 images, 44 captions
    assert few.shape == (5, 20, 128) and np.array_equal(few, more[:5]) and np.array_equal(more[:16], more[44:]) and about == again
    known = reader([text for row in dataset.rows for text in dataset.captions[row]]).half().numpy()
    assert all((np.abs(known - row).max(axis=(1, 2)) < 0.01).any() for row in few)
    reader.encoder.origin["sha256"] = "another"
    assert evaluate.captioned(dataset, reader, 5, runs)[1] != about


def test_a_text_runs_samples_are_scored(captioned, here, capsys):
    """By a ViT that learned the colours' folders; its captions, not its classes, say what is drawn."""
    for i, path in enumerate(sorted(captioned.glob("*.png"))):
        folder = captioned / "rgb"[i % 3]
        folder.mkdir(exist_ok=True)
        path.with_suffix(".txt").rename(folder / f"{path.stem}.txt")
        path.rename(folder / path.name)
    trained(captioned)
    train.main(["--model", "vit", "--size", "Nano/4", "--data", str(captioned), "--image-size", "8", "--batch-size", "8",
                "--steps", "2", "--cache", "cache", "--out", "vit.pt", "--device", "cpu"])
    evaluate.main(["--ckpt", "run.pt", "--n", "6", "--features", "vit.pt", "--cache", "cache", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "6 of run.pt" in out and "FD[vit" in out and "accuracy[" not in out
