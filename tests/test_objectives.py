"""objectives.py: what a step draws is a function of (seed, step) and of nothing else; what it minimises is what it says."""
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data
import objectives
import vae
from objectives import Autoencoding, Classification, Denoising, draw_latents
from ddpm import keyed_generator

CPU = torch.device("cpu")


def settings_of(**changes):
    return Namespace(**(dict(seed=0, batch_size=8, flip=False, shift=0, cfg_drop=0.1, schedule="linear", prediction="eps",
                             variance="small", data="mnist", image_size=None, cache=None, skip_bad=False, eval_every=None, eval_n=20,
                             features=None) | changes))


def labelled(num_classes=10):
    return Namespace(num_classes=num_classes, text=None, contexts=None)


def denoising(null_label=10, **changes):
    return Denoising(settings_of(**changes), labelled(), Namespace(null_label=null_label, context_dim=None), CPU)


def draw(objective, images, part, step=3):
    labels = torch.arange(len(images)) % 10
    return objective.draw(step, images[part], labels[part], part)


def bytes_of(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("objective", [denoising(flip=True, shift=3), Classification(settings_of(flip=True, shift=3), labelled(), None, CPU)])
def test_processes_draw_their_parts_of_one_batch(objective):
    images = bytes_of(8, 6, 6, 1)
    whole = draw(objective, images, slice(0, 8))
    parts = [draw(objective, images, slice(first, first + 2)) for first in range(0, 8, 2)]
    assert all(torch.equal(torch.cat(pieces), all_of_it) for pieces, all_of_it in zip(zip(*parts), whole, strict=True))


def test_every_draw_of_every_step_has_a_generator_of_its_own(monkeypatch):
    keys = []

    def recorded(key, device):
        keys.append(key)
        return keyed_generator(key, device)
    monkeypatch.setattr(objectives, "keyed_generator", recorded)
    images = torch.zeros(8, 6, 6, 1, dtype=torch.uint8)
    first, second = (draw(denoising(flip=True, shift=3), images, slice(0, 8), step) for step in (3, 4))
    assert len(keys) == 10 and len(set(keys)) == 10      # times, noise, dropped labels, flips and shifts, in two steps
    assert not torch.equal(first[1], second[1]) and not torch.equal(first[3], second[3])


def test_another_seed_draws_other_times_and_noise():
    images = torch.zeros(8, 6, 6, 1, dtype=torch.uint8)
    first, second = (draw(denoising(seed=seed), images, slice(0, 8)) for seed in (0, 1))
    assert not torch.equal(first[1], second[1]) and not torch.equal(first[3], second[3])


def test_augmentation_does_not_disturb_times_noise_and_labels():
    images = bytes_of(8, 6, 6, 1)
    plain, moved = (draw(denoising(**how), images, slice(0, 8)) for how in ({}, dict(flip=True, shift=3)))
    assert not torch.equal(plain[0], moved[0]) and all(torch.equal(a, b) for a, b in zip(plain[1:], moved[1:], strict=True))


def test_labels_are_dropped_at_the_stated_rate_and_times_are_uniform():
    _, t, y, eps = draw(denoising(batch_size=20000), torch.zeros(20000, 1, 1, 1, dtype=torch.uint8), slice(0, 20000))
    # standard errors: sqrt(0.1 0.9 / n) = 0.0021; 1000 / sqrt(12 n) = 2.04; 1 / sqrt(n) = 0.007. Four of them are allowed
    assert abs((y == 10).float().mean() - 0.1) < 0.0085
    assert abs(t.float().mean() - 499.5) < 8.2 and t.min() >= 0 and t.max() < 1000
    assert abs(eps.mean()) < 0.028 and abs(eps.std() - 1) < 0.02


def test_labels_stay_where_there_is_no_null_class():
    _, _, y, _ = draw(denoising(null_label=None, cfg_drop=0.9), torch.zeros(8, 6, 6, 1, dtype=torch.uint8), slice(0, 8))
    assert y.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_the_denoising_loss_of_silence_is_the_square_of_the_noise_and_its_group_the_quarter_of_t():
    x0, eps, t = torch.zeros(5, 1, 4, 4), torch.randn(5, 1, 4, 4), torch.tensor([0, 249, 250, 500, 999])
    losses, groups = denoising().loss(lambda x, t, y: torch.zeros_like(x), x0, t, None, eps)
    assert_close(losses, eps.square().mean(dim=(1, 2, 3)))
    assert groups.tolist() == [0, 0, 1, 2, 3]


@pytest.fixture(scope="module")
def classification():
    return Classification(settings_of(), labelled(), None, CPU)


def test_the_classification_loss_is_the_surprise_at_the_label_in_nats(classification):
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    losses, groups = classification.loss(lambda x: probabilities.log() + 7, torch.zeros(2, 1, 4, 4), torch.tensor([0, 2]))
    assert_close(losses, -torch.tensor([0.5, 0.1]).log())
    assert groups.tolist() == [0, 0]


def test_a_guess_by_the_first_pixel_is_as_accurate_as_counted_by_hand(tmp_path, monkeypatch):
    images = np.zeros((40, 8, 8, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(40) % 4 * 60                          # the first pixel says the label
    labels = np.where(np.arange(40) % 5 == 0, (np.arange(40) + 1) % 4, np.arange(40) % 4)        # but lies every fifth time
    np.savez(tmp_path / "images.npz", arr_0=images, arr_1=labels)
    objective = Classification(settings_of(data=str(tmp_path / "images.npz")), labelled(4), None, CPU)

    def by_first_pixel(x):
        return -(data.to_uint8(x)[:, 0, 0, :1].float() / 60 - torch.arange(4)).abs()
    rows = objective.held_out.rows
    scores = objective.report(by_first_pixel, tmp_path / "run.png")
    assert scores == {"accuracy": pytest.approx(np.mean(rows % 5 != 0))} and len(rows) == 4


def test_the_picture_has_a_column_for_each_guess_with_the_mistakes_on_top(tmp_path, classification):
    images, labels = classification.held_out.batch(np.arange(len(classification.held_out)))
    taken = labels.clone()
    taken[labels == 7] = 1                                               # every seven is taken for a one
    answers = torch.nn.functional.one_hot(taken, 10).float()
    seen = iter(answers.split(256))
    assert classification.report(lambda x: next(seen), tmp_path / "run.png")["accuracy"] == pytest.approx(
        (labels != 7).double().mean().item())
    picture = np.asarray(Image.open(tmp_path / "run.png"))
    tile = picture[2:66:2, 2 + 66:66 + 66:2]                             # first row, second column, at its own size
    assert any(np.array_equal(tile, image[..., 0]) for image in images[labels == 7].numpy())
    assert (picture[2:66, 2 + 7 * 66:66 + 7 * 66] == 128).all()          # nothing is taken for a seven


# Latents: moments (n, F, 2, c, h, w), of the image and of its mirror image

def moments_of(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5


def latents_of(moments, part=slice(None), step=3, scale=0.25, **changes):
    return draw_latents(step, moments[part], part, settings_of(batch_size=len(moments), **changes), CPU, scale)


def test_latents_have_the_mean_and_the_deviation_of_their_moments_times_the_scale():
    n, mean, std = 20000, torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])
    moments = torch.stack([mean, std]).reshape(1, 1, 2, 2, 1, 1).expand(n, -1, -1, -1, -1, -1)
    x = latents_of(moments).flatten(1)
    # standard errors: std / sqrt(n) of the mean, std / sqrt(2 n) of the deviation. 4.5 of them are allowed
    assert ((x.mean(dim=0) - 0.25 * mean).abs() < 4.5 * 0.25 * std / n ** 0.5).all()
    assert ((x.std(dim=0) - 0.25 * std).abs() < 4.5 * 0.25 * std / (2 * n) ** 0.5).all()


def test_a_latent_is_another_one_in_every_step_and_the_same_for_the_same_seed_and_step():
    moments = moments_of(8, 1, 2, 4, 2, 3)
    first, again, later, other = (latents_of(moments, **how) for how in ({}, {}, dict(step=4), dict(seed=1)))
    assert torch.equal(first, again) and first.shape == (8, 4, 2, 3)
    assert not any((first == another).any() for another in (later, other))
    assert len(first.unique(dim=0)) == 8 and len(latents_of(moments[:1].expand(8, -1, -1, -1, -1, -1)).unique(dim=0)) == 8


def test_processes_draw_their_parts_of_one_batch_of_latents():
    moments = moments_of(8, 2, 2, 4, 2, 3)
    whole = latents_of(moments, flip=True)
    parts = [latents_of(moments, slice(first, first + 2), flip=True) for first in range(0, 8, 2)]
    assert torch.equal(torch.cat(parts), whole)


def test_flips_take_half_of_the_mirror_images_those_that_would_be_flipped_as_pixels():
    n = 20000
    moments = torch.zeros(n, 2, 2, 1, 1, 2)
    moments[:, 0, 0], moments[:, 1, 0] = torch.tensor([0.0, 255.0]), torch.tensor([255.0, 0.0])          # deviation 0
    x = latents_of(moments, flip=True, scale=1.0)
    pixels = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 2, 1).expand(n, -1, -1, -1)
    flipped = objectives.draw_images(3, pixels, slice(None), settings_of(batch_size=n, flip=True), CPU)
    assert torch.equal(x / 127.5 - 1, flipped)
    assert abs((x[:, 0, 0, 0] > 0).float().mean() - 0.5) < 4.5 * 0.5 / n ** 0.5
    assert torch.equal(latents_of(moments, scale=1.0), moments[:, 0, 0])         # without --flip none


def test_a_latent_run_draws_the_same_times_noise_and_labels_and_its_latents_with_a_generator_of_their_own(monkeypatch):
    keys = []

    def recorded(key, device):
        keys.append(key)
        return keyed_generator(key, device)
    monkeypatch.setattr(objectives, "keyed_generator", recorded)
    of_pixels, of_latents = denoising(flip=True, cfg_drop=0.5), denoising(flip=True, cfg_drop=0.5)
    of_latents.vae = Namespace(scale=0.25)
    moments = moments_of(8, 2, 2, 1, 6, 6)
    x0, *rest = draw(of_latents, moments, slice(0, 8))
    assert len(keys) == len(set(keys)) == 5
    assert torch.equal(x0, latents_of(moments, flip=True))
    assert all(torch.equal(a, b) for a, b in zip(rest, draw(of_pixels, bytes_of(8, 6, 6, 1), slice(0, 8))[1:], strict=True))


# Autoencoding

def held_in(path, n=200, side=8):
    """Flags and training data of n smooth grey images, of which a tenth is held out."""
    rng = np.random.default_rng(0)
    ramps = np.linspace(-1, 1, side)
    images = 128 + 45 * (rng.uniform(-1, 1, (n, 1, 1)) * ramps[:, None] + rng.uniform(-1, 1, (n, 1, 1)) * ramps)
    np.savez(path, arr_0=images.astype(np.uint8))
    return settings_of(data=str(path)), data.load(str(path))


@pytest.fixture
def small():
    """f = 2, c = 4; with latents of mean and deviation far from 0 and 1."""
    torch.manual_seed(0)
    network = vae.AutoencoderKL(channels=1, dim=32, multipliers=(1, 2), res_blocks=1).eval()
    network.quant_conv.weight.data *= 5
    network.quant_conv.bias.data[:4], network.quant_conv.bias.data[4:] = 2.0, -3.0
    return network


class Offset:
    """An autoencoder that gives images back with `error` added."""
    latent_channels, factor, encoded = 4, 2, 0

    def __init__(self, error=0.0):
        self.error = error

    def encode(self, x):
        self.encoded += len(x)
        return x, torch.zeros_like(x)

    def decode(self, z):
        return z + self.error


def autoencoding(tmp_path, network, **how):
    args, dataset = held_in(tmp_path / "images.npz", **how)
    return Autoencoding(args, dataset, network, CPU)


def test_the_autoencoding_loss_is_l1_and_a_millionth_of_the_divergence_both_per_number_of_the_image(tmp_path):
    x, image = 2 * torch.rand(3, 1, 4, 4) - 1, 2 * torch.rand(3, 1, 4, 4) - 1
    mean, log_variance = 100 * torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    losses, groups = autoencoding(tmp_path, Offset()).loss(lambda x, noise: (image, mean, log_variance), x, None)
    divergence = (0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance)).sum(dim=(1, 2, 3)) / 16
    l1 = (image - x).abs().mean(dim=(1, 2, 3))
    assert_close(losses, l1 + 1e-6 * divergence)
    assert (losses - l1).min() > 1e-3 and groups.tolist() == [0, 0, 0]   # the means are large: the divergence shows


def test_every_weight_of_an_autoencoder_learns(tmp_path, small):
    objective = autoencoding(tmp_path, small)
    x, noise = objective.draw(3, bytes_of(8, 8, 8, 1), None, slice(0, 8))
    losses, _ = objective.loss(small.train(), x, noise)
    losses.mean().backward()
    # the keys' bias moves all of a softmax's inputs alike
    assert all(value.grad.any() for name, value in small.named_parameters() if not name.endswith(".k.bias"))


def test_processes_draw_their_parts_of_one_batch_of_images_and_noise(tmp_path, small):
    objective, images = autoencoding(tmp_path, small), bytes_of(8, 8, 8, 1)
    whole = objective.draw(3, images, None, slice(0, 8))
    parts = [objective.draw(3, images[first:first + 2], None, slice(first, first + 2)) for first in range(0, 8, 2)]
    assert all(torch.equal(torch.cat(pieces), all_of_it) for pieces, all_of_it in zip(zip(*parts), whole, strict=True))
    assert whole[1].shape == (8, 4, 4, 4) and not torch.equal(whole[1], objective.draw(4, images, None, slice(0, 8))[1])


def test_the_score_is_the_psnr_of_the_held_out_images(tmp_path):
    objective = autoencoding(tmp_path, Offset())
    assert len(objective.held_out) == 20
    error = torch.linspace(0.01, 0.2, 20).reshape(20, 1, 1, 1)           # pixels reach 0.71: nothing is clamped
    score = objective.report(Offset(error), tmp_path / "run.png")
    assert score == {"psnr": pytest.approx(10 * np.log10(4 / error.square().mean().item()), rel=1e-5)}
    assert objective.report(Offset(error / 10), tmp_path / "run.png")["psnr"] == pytest.approx(score["psnr"] + 20, rel=1e-5)
    assert objective.report(Offset(0.0), tmp_path / "run.png") == {"psnr": np.inf}


def test_what_lies_outside_the_range_is_scored_as_it_is_shown(tmp_path):
    args, dataset = held_in(tmp_path / "images.npz")
    np.savez(tmp_path / "images.npz", arr_0=np.full((20, 8, 8, 1), 255, np.uint8))
    objective = Autoencoding(args, dataset, Offset(), CPU)
    assert objective.report(Offset(5.0), tmp_path / "run.png") == {"psnr": np.inf}
    assert objective.report(Offset(-5.0), tmp_path / "run.png")["psnr"] == pytest.approx(0.0, abs=1e-6)  # black for white


def test_the_picture_shows_held_out_images_above_what_becomes_of_them(tmp_path):
    objective = autoencoding(tmp_path, Offset())
    objective.report(Offset(0.2), tmp_path / "run.png")
    picture = np.asarray(Image.open(tmp_path / "run.png"))
    assert picture.shape == (4 * 66 + 2, 10 * 66 + 2)                    # 20 images in rows of ten, magnified eight times
    images, _ = objective.held_out.batch(np.arange(20))
    changed = data.to_uint8(data.to_float(images) + 0.2)
    for i in range(20):
        row, column = i // 10 * 2, i % 10
        for shown, expected in ((row, images[i]), (row + 1, changed[i])):
            tile = picture[2 + 66 * shown:66 + 66 * shown:8, 2 + 66 * column:66 + 66 * column:8]
            assert np.array_equal(tile, expected[..., 0].numpy())


def test_the_measured_scale_gives_the_training_latents_a_deviation_of_one(tmp_path, small):
    objective = autoencoding(tmp_path, small)
    scale = objective.autoencoder(small)["scale"]
    assert type(scale) is float and abs(scale - 1) > 0.1                 # the fixture's latents have another
    with torch.no_grad():
        mean, log_variance = small.encode(data.to_float(objective.dataset.batch(np.arange(180))[0]))
    z = scale * vae.sample_latent(mean, log_variance, torch.randn(mean.shape, generator=torch.Generator().manual_seed(1)))
    # 180 x 64 numbers share their means and differ in their noise: at most 1 / sqrt(2 n), and 4.5 of that twice are allowed
    assert abs(z.std().item() - 1) < 4.5 * (2 / (2 * z.numel())) ** 0.5
    assert objective.autoencoder(small)["scale"] == scale                # a function of the weights


def test_the_scale_is_measured_on_a_thousand_images_from_all_of_the_data(tmp_path):
    network, seen = Offset(), []
    objective = autoencoding(tmp_path, network)

    class Many:
        def __len__(self):
            return 5000

        def batch(self, rows):
            seen.extend(rows)
            return torch.zeros(len(rows), 2, 2, 1, dtype=torch.uint8), None
    objective.dataset = Many()
    objective.autoencoder(network)
    assert network.encoded == len(set(seen)) == 1024 and (seen[0], seen[-1]) == (0, 4999)


def test_an_image_that_the_factor_does_not_divide_is_refused_before_a_step(tmp_path, small):
    with pytest.raises(ValueError, match="image size 9 is not a multiple of the autoencoder's factor 2: use 8 or 10"):
        autoencoding(tmp_path, small, side=9)
