"""objectives.py: what a step draws is a function of (seed, step) and of nothing else; what it minimises is what it says."""
import numpy as np
import pytest
import torch
from torch.testing import assert_close

import data
import objectives
import vae
from ddpm import Diffusion, keyed_generator, linear_betas
from latents import measured_scale
from objectives import Autoencoding, Classification, Denoising, LatentSamples, Pixels, Randomness, SuperResolution

WHOLE = slice(0, 8)


def random_of(part=WHOLE, seed=0, batch_size=8):
    return Randomness(seed, batch_size, part, torch.device("cpu"))


def pixels(part=WHOLE, flip=True, shift=3, **how):
    return Pixels(random_of(part, **how), flip, shift)


def latents(part=WHOLE, flip=True, scale=0.25, **how):
    return LatentSamples(random_of(part, **how), flip, scale)


def denoising(inputs, y_null=10, cfg_drop=0.5, kind=Denoising):
    return kind(Diffusion(linear_betas()), inputs, y_null, cfg_drop)


def bytes_of(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def moments_of(*shape):
    """Of latents: (n, F, 2, c, h, w), of the image and of its mirror image."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5


IMAGES, MOMENTS, LABELS = bytes_of(8, 8, 8, 1), moments_of(8, 2, 2, 1, 8, 8), torch.arange(8)
OBJECTIVES = {                                           # of a part and perhaps a seed, and what it draws from
    "pixels": (lambda **how: denoising(pixels(**how)), IMAGES),
    "latents": (lambda **how: denoising(latents(**how)), MOMENTS),
    "upsampler": (lambda **how: denoising(pixels(**how), kind=SuperResolution), IMAGES),
    "classifier": (lambda **how: Classification(pixels(**how)), IMAGES),
    "autoencoder": (lambda **how: Autoencoding(pixels(**how), (4, 4, 4)), IMAGES),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def draw(name, part=WHOLE, step=3, seed=0):
    make, images = OBJECTIVES[name]
    return make(part=part, seed=seed).draw(step, images[part], LABELS[part])


@every_objective
def test_processes_draw_their_parts_of_one_batch(name):
    parts = [draw(name, slice(first, first + 2)) for first in range(0, 8, 2)]
    assert all(torch.equal(torch.cat(pieces), whole) for pieces, whole in zip(zip(*parts), draw(name), strict=True))


@every_objective
def test_a_step_draws_the_same_again_and_another_step_or_seed_draws_all_anew(name):
    first, again, later, other = (draw(name, **how) for how in ({}, {}, dict(step=4), dict(seed=1)))
    assert all(map(torch.equal, first, again))
    drawn = 1 if name == "classifier" else len(first)    # its labels are the data's
    assert not any(torch.equal(a, b) for another in (later, other) for a, b in zip(first[:drawn], another))


@every_objective
def test_every_draw_of_every_step_has_a_generator_of_its_own(monkeypatch, name):
    keys = []

    def recorded(key, device):
        keys.append(key)
        return keyed_generator(key, device)
    monkeypatch.setattr(objectives, "keyed_generator", recorded)
    draw(name, step=3), draw(name, step=4)
    assert len(keys) == len(set(keys)) >= 4              # flips and shifts; times, noise, dropped labels, latents, low


def test_augmentation_and_latents_do_not_disturb_times_noise_and_labels():
    x0, *plain = denoising(pixels(flip=False, shift=0)).draw(3, IMAGES, LABELS)
    for name in ("pixels", "latents"):
        moved, *rest = draw(name)
        assert not torch.equal(moved, x0) and all(map(torch.equal, rest, plain))


def test_labels_are_dropped_at_the_stated_rate_and_times_are_uniform():
    n = 20000
    objective = denoising(pixels(slice(0, n), flip=False, shift=0, batch_size=n), cfg_drop=0.1)
    _, t, y, eps = objective.draw(3, torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(n) % 10)
    # standard errors: sqrt(0.1 0.9 / n) = 0.0021; 1000 / sqrt(12 n) = 2.04; 1 / sqrt(n) = 0.007. Four of them are allowed
    assert abs((y == 10).float().mean() - 0.1) < 0.0085
    assert abs(t.float().mean() - 499.5) < 8.2 and t.min() >= 0 and t.max() < 1000
    assert abs(eps.mean()) < 0.028 and abs(eps.std() - 1) < 0.02


def test_labels_stay_where_there_is_no_null_class():
    assert torch.equal(denoising(pixels(), y_null=None, cfg_drop=0.9).draw(3, IMAGES, LABELS)[2], LABELS)


def test_the_denoising_loss_of_silence_is_the_square_of_the_noise_and_its_group_the_quarter_of_t():
    x0, eps, t = torch.zeros(5, 1, 4, 4), torch.randn(5, 1, 4, 4), torch.tensor([0, 249, 250, 500, 999])
    losses, groups = denoising(pixels()).loss(lambda x, t, y: torch.zeros_like(x), x0, t, None, eps)
    assert_close(losses, eps.square().mean(dim=(1, 2, 3)))
    assert groups.tolist() == [0, 0, 1, 2, 3]


def test_the_classification_loss_is_the_surprise_at_the_label_in_nats():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    losses, groups = Classification(pixels()).loss(lambda x: probabilities.log() + 7, torch.zeros(2, 1, 4, 4), torch.tensor([0, 2]))
    assert_close(losses, -torch.tensor([0.5, 0.1]).log())
    assert groups.tolist() == [0, 0]


# Latents

def test_latents_have_the_mean_and_the_deviation_of_their_moments_times_the_scale():
    n, mean, std = 20000, torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])
    moments = torch.stack([mean, std]).reshape(1, 1, 2, 2, 1, 1).expand(n, -1, -1, -1, -1, -1)
    x = latents(slice(0, n), flip=False, batch_size=n)(3, moments).flatten(1)
    # standard errors: std / sqrt(n) of the mean, std / sqrt(2 n) of the deviation. 4.5 of them are allowed
    assert ((x.mean(dim=0) - 0.25 * mean).abs() < 4.5 * 0.25 * std / n ** 0.5).all()
    assert ((x.std(dim=0) - 0.25 * std).abs() < 4.5 * 0.25 * std / (2 * n) ** 0.5).all()


def test_images_of_one_batch_have_latents_of_their_own():
    same = MOMENTS[:1].expand(8, -1, -1, -1, -1, -1)
    assert len(latents(flip=False)(3, same).unique(dim=0)) == 8


def test_flips_take_half_of_the_mirror_images_those_that_would_be_flipped_as_pixels():
    n = 20000
    moments = torch.zeros(n, 2, 2, 1, 1, 2)
    moments[:, 0, 0], moments[:, 1, 0] = torch.tensor([0.0, 255.0]), torch.tensor([255.0, 0.0])          # deviation 0
    part = slice(0, n)
    x = latents(part, scale=1.0, batch_size=n)(3, moments)
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 2, 1).expand(n, -1, -1, -1)
    assert torch.equal(x / 127.5 - 1, pixels(part, shift=0, batch_size=n)(3, images))
    assert abs((x[:, 0, 0, 0] > 0).float().mean() - 0.5) < 4.5 * 0.5 / n ** 0.5
    assert torch.equal(latents(part, flip=False, scale=1.0, batch_size=n)(3, moments), moments[:, 0, 0])         # none


# Autoencoding

def test_the_autoencoding_loss_is_l1_and_a_millionth_of_the_divergence_both_per_number_of_the_image():
    x, image = 2 * torch.rand(3, 1, 4, 4) - 1, 2 * torch.rand(3, 1, 4, 4) - 1
    mean, log_variance = 100 * torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    losses, groups = Autoencoding(pixels(), (4, 2, 2)).loss(lambda x, noise: (image, mean, log_variance), x, None)
    divergence = (0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance)).sum(dim=(1, 2, 3)) / 16
    l1 = (image - x).abs().mean(dim=(1, 2, 3))
    assert_close(losses, l1 + 1e-6 * divergence)
    assert (losses - l1).min() > 1e-3 and groups.tolist() == [0, 0, 0]   # the means are large: the divergence shows


@pytest.fixture
def autoencoder():
    """f = 2, c = 4; with latents of mean and deviation far from 0 and 1."""
    torch.manual_seed(0)
    network = vae.AutoencoderKL(channels=1, dim=32, multipliers=(1, 2), res_blocks=1).eval()
    network.quant_conv.weight.data *= 5
    network.quant_conv.bias.data[:4], network.quant_conv.bias.data[4:] = 2.0, -3.0
    return network


def test_every_weight_of_an_autoencoder_learns(autoencoder):
    objective = Autoencoding(pixels(), (4, 4, 4))
    objective.loss(autoencoder, *objective.draw(3, IMAGES, None))[0].mean().backward()
    # the keys' bias moves all of a softmax's inputs alike
    assert all(value.grad.any() for name, value in autoencoder.named_parameters() if not name.endswith(".k.bias"))


def test_the_measured_scale_gives_latents_from_all_of_the_data_a_deviation_of_one(autoencoder, monkeypatch):
    dataset, seen = data.Dataset("", bytes_of(5000, 2, 2, 1).numpy()), []
    batch = dataset.batch
    monkeypatch.setattr(dataset, "batch", lambda rows: seen.extend(rows) or batch(rows))
    scale = measured_scale(autoencoder, dataset, torch.device("cpu"))
    assert len(set(seen)) == len(seen) == 1024 and (seen[0], seen[-1]) == (0, 4999)
    assert type(scale) is float and abs(scale - 1) > 0.1                 # the fixture's latents have another
    with torch.no_grad():
        mean, log_variance = autoencoder.encode(data.to_float(batch(np.array(seen))[0]))
    z = scale * vae.sample_latent(mean, log_variance, torch.randn(mean.shape, generator=torch.Generator().manual_seed(1)))
    # 1024 x 4 numbers share their means and differ in their noise: at most 1 / sqrt(2 n), and 4.5 of that twice are allowed
    assert abs(z.std().item() - 1) < 4.5 * (2 / (2 * z.numel())) ** 0.5
    assert measured_scale(autoencoder, dataset, torch.device("cpu")) == scale        # a function of the weights
