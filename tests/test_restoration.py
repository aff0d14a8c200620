"""restoration.py, and sample.py on images to restore: what is known is kept, the rest is what the exact denoiser says."""
from dataclasses import replace
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from torch.testing import assert_close

import checkpoint
import data
import dit
import restoration
import sample
import vae
from ddpm import Diffusion, SAMPLERS, cosine_betas, linear_betas
from restoration import denoise, masked, pooled
from tests.refusals import refusal

EXACT = {"rtol": 1e-9, "atol": 1e-9}                     # float64, a few terms
KEPT = {"rtol": 0, "atol": 1e-5}                         # what is promised of a measurement, in float32


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(betas, mean, S, prediction="x0"):
    """The best possible model(x, t, y) of images x (N, C, H, W) ~ N(mean, S); y (N,), if any, is added to each pixel's mean."""
    alpha_bars = torch.from_numpy(np.cumprod(1 - betas))
    variances, U = torch.linalg.eigh(S)

    def model(x, t, y=None):
        alpha_bar, xt = alpha_bars[t].reshape(-1, 1), x.flatten(1).double()
        centre = mean if y is None else mean + y.reshape(-1, 1)
        gain = alpha_bar ** 0.5 * variances / (alpha_bar * variances + 1 - alpha_bar)
        x0 = centre + ((xt - alpha_bar ** 0.5 * centre) @ U * gain) @ U.T
        eps = (xt - alpha_bar ** 0.5 * x0) / (1 - alpha_bar) ** 0.5
        v = alpha_bar ** 0.5 * eps - (1 - alpha_bar) ** 0.5 * x0
        return {"x0": x0, "eps": eps, "v": v}[prediction].reshape(x.shape).to(x.dtype)
    return model


def assert_moments(x, mean, S):
    """Draws x (N, ...) have these moments within five standard errors, and 1 % of a deviation for the steps' size."""
    x = x.flatten(1)
    deviations = S.diagonal().sqrt()
    assert (abs(x.mean(dim=0) - mean) <= (5 / len(x) ** 0.5 + 0.01) * deviations + 1e-9).all()
    scale = deviations[:, None] * deviations
    assert (abs(torch.cov(x.T) - S) <= (5 * (2 / len(x)) ** 0.5 + 0.02) * scale + 1e-9).all()


# The operators

@st.composite
def operators(draw):
    """An operator with its pseudo-inverse, and the shape (C, H, W) of an image of its."""
    C, H, W = (draw(st.integers(1, 3)) for _ in range(3))
    if draw(st.booleans()):
        factor = draw(st.sampled_from([2, 4]))
        return pooled(factor), (C, factor * H, factor * W)
    return masked(torch.rand(1, 1, H, W, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).round()), (C, H, W)


@given(operators())
def test_the_pseudo_inverse_is_that_of_the_operators_matrix(operator):
    (A, A_plus), shape = operator
    basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    matrix = A(basis).flatten(1).T                       # a column is what A makes of one pixel
    outputs = torch.eye(len(matrix), dtype=torch.float64).reshape(-1, *A(basis).shape[1:])
    assert_close(A_plus(outputs).flatten(1).T, torch.linalg.pinv(matrix), **EXACT)


def test_a_mask_hides_where_it_is_one_and_pooling_is_the_mean_of_squares():
    hidden = torch.tensor([[1., 0.], [0., 0.]]).reshape(1, 1, 2, 2)
    x = torch.tensor([[3., 1.], [2., 6.]]).reshape(1, 1, 2, 2)
    assert masked(hidden)[0](x).flatten().tolist() == [0, 1, 2, 6] and pooled(2)[0](x).item() == 3


# What is known is kept

@given(operators(), st.integers(0, 99))
def test_the_correction_moves_the_measurement_to_y_and_leaves_what_it_does_not_see(operator, seed):
    (A, A_plus), shape = operator
    x0, y = normal(2, *shape, seed=seed), A(normal(2, *shape, seed=seed + 1))
    correct = restoration.consistent(y, (A, A_plus))
    assert_close(A(correct(x0)), y, **EXACT)
    assert_close(correct(x0) - A_plus(A(correct(x0))), x0 - A_plus(A(x0)), **EXACT)
    assert_close(correct(correct(x0)), correct(x0), **EXACT)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("options", [*(dict(sampler=sampler, steps=steps) for sampler in SAMPLERS for steps in (1, 8)),
                                     dict(sampler="ddim", eta=0.5, steps=8, repeats=3), dict(steps=8, repeats=3)], ids=str)
def test_the_result_has_the_measurement_whatever_the_sampler_and_clipping(options, prediction, clip):
    betas, real = linear_betas(1000), normal(2, 3, 8, 8, dtype=torch.float32).clamp(-1, 1)
    model = gaussian(betas, torch.zeros(192).double(), torch.eye(192).double(), prediction)
    hidden = torch.zeros(1, 1, 8, 8)
    hidden[..., 2:6, 2:6] = 1
    for A, A_plus in (masked(hidden), pooled(2), pooled(4)):
        x = restoration.restore(Diffusion(betas, prediction), model, A(real), (A, A_plus), clip=clip, seeds=[0, 1], **options)
        assert x.shape == real.shape and x.dtype == torch.float32
        assert_close(A(x), A(real), **KEPT)


# What is not known is drawn

KNOWN, HIDDEN = torch.tensor([[0.3, 0.2], [0.2, 0.4]]).double(), torch.tensor([[0.5, -0.3], [-0.3, 0.6]]).double()
MEAN = torch.tensor([0.2, -0.1, 0.4, -0.3]).double()
LAST_TWO = masked(torch.tensor([0., 0., 1., 1.]).double())
SURE = torch.tensor([1.5, -1, 0, 0]).double().expand(2000, 1, 1, 4)                      # a measurement, and 2000 draws to make


def drawn(betas, model, y, operator, steps=None, **options):
    """Draws for measurements y (N, ...)."""
    torch.manual_seed(0)
    return restoration.restore(Diffusion(betas, "x0"), model, y, operator, steps=steps, **options)


@pytest.mark.parametrize("options", [{}, dict(sampler="ddim"), dict(sampler="ddim", eta=1.0), dict(sampler="dpm++", steps=100)],
                         ids=str)
def test_pixels_independent_of_the_known_ones_have_their_exact_mean_and_covariance(options):
    betas = cosine_betas(1000)
    x = drawn(betas, gaussian(betas, MEAN, torch.block_diag(KNOWN, HIDDEN)), SURE, LAST_TWO, **options)
    assert (x[..., :2] == SURE[..., :2]).all()
    assert_moments(x[..., 2:], MEAN[2:], HIDDEN)


def test_what_the_means_of_squares_do_not_see_of_independent_pixels_has_its_exact_moments():
    betas, A_plus_A = cosine_betas(1000), torch.full((4, 4), 0.25).double()
    y = torch.tensor(0.9).double().expand(2000, 1, 1, 1)
    x = drawn(betas, gaussian(betas, MEAN, 0.25 * torch.eye(4).double()), y, pooled(2), sampler="dpm++", steps=100)
    unseen = torch.eye(4).double() - A_plus_A
    mean, S = unseen @ MEAN + 0.9, 0.25 * unseen
    assert_close(x.mean(dim=(2, 3), keepdim=True), y, **EXACT)
    assert_moments(x, mean, S)


def test_the_bias_of_correlated_pixels_falls_with_repeats_as_the_docstring_says():
    betas, S = cosine_betas(1000), torch.tensor([[1, 0.9], [0.9, 1]]).double()
    y = torch.tensor([2., 0]).double().expand(2000, 1, 1, 2)             # the other pixel's mean is then 1.8, its deviation 0.44
    model, operator = gaussian(betas, torch.zeros(2).double(), S), masked(torch.tensor([0., 1.]).double())
    found = [drawn(betas, model, y, operator, **options)[..., 1].mean().item() for options in (
        dict(sampler="dpm++", steps=100), *(dict(steps=100, repeats=repeats) for repeats in (1, 2, 4, 10)))]
    assert found == pytest.approx([0.9, 1.2, 1.5, 1.7, 1.75], abs=0.05)  # five standard errors
    assert found == sorted(found) and found[-1] < 1.8


def test_repeating_steps_keeps_the_moments_of_the_data_where_nothing_is_known():
    betas, S = cosine_betas(1000), torch.block_diag(KNOWN, HIDDEN)
    torch.manual_seed(0)
    x = restoration.repaint(Diffusion(betas, "x0"), gaussian(betas, MEAN, S), (2000, 1, 1, 4), sampler="ddim", repeats=2, steps=500)
    assert_moments(x.double(), MEAN, S)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_each_step_is_taken_as_often_as_it_is_repeated(sampler):
    betas, times = linear_betas(10), []
    model = gaussian(betas, MEAN, torch.eye(4).double())

    def watched(x, t, y=None):
        times.append(int(t[0]))
        return model(x, t, y)
    seen = []
    x = drawn(betas, watched, SURE[:2], LAST_TWO, sampler=sampler, steps=4, repeats=3, callback=lambda *state: seen.append(state))
    assert times == [9, 9, 9, 6, 6, 6, 3, 3, 3, 0, 0, 0] == [step for step, _, _ in seen] and torch.equal(seen[-1][1], x)


@pytest.mark.parametrize("scale", [1.0, 0.0, 3.0])
def test_the_condition_and_its_guidance_move_what_is_hidden(scale):
    betas, y = cosine_betas(1000), SURE
    model = gaussian(betas, MEAN, torch.block_diag(KNOWN, HIDDEN))       # labels shift the mean: the null label by 0, label 2 by 2
    x = drawn(betas, model, y, LAST_TWO, condition=torch.full((2000,), 2.0), cfg_scale=scale, y_null=0.0, sampler="dpm++", steps=50)
    assert_moments(x[..., 2:], MEAN[2:] + 2 * scale, HIDDEN)


def test_a_restored_image_is_the_same_alone_and_in_a_batch():
    betas = linear_betas(100)
    model = gaussian(betas, MEAN, torch.block_diag(KNOWN, HIDDEN))
    x, alone = (drawn(betas, model, SURE[:n], LAST_TWO, steps=10, repeats=2, seeds=seeds) for n, seeds in (
        (3, [(5, 0), (5, 1), (5, 2)]), (1, [(5, 2)])))
    assert_close(x[2:], alone, **EXACT)
    assert (x[0] != x[1]).any()


@pytest.mark.parametrize("options, said", [(dict(sampler="dpm++", repeats=2), "dpm++ cannot repeat its steps 2 times"),
                                           (dict(repeats=0), "0 times")])
def test_repeats_that_a_sampler_cannot_make_are_refused(options, said):
    betas = linear_betas(10)
    refusal(lambda: drawn(betas, gaussian(betas, MEAN, torch.eye(4).double()), SURE[:2], LAST_TWO, **options), said)


# Denoising

NOISY = torch.tensor([1.0, -0.5, 0.3, 0.9]).double()
CORRELATED = torch.block_diag(KNOWN, HIDDEN) + 0.1


def posterior(sigma):
    """Mean and covariance of x ~ N(MEAN, CORRELATED) given NOISY = x + sigma eps, by the conditional of a joint Gaussian."""
    gain = torch.linalg.solve(CORRELATED + sigma ** 2 * torch.eye(4), CORRELATED).T
    return MEAN + gain @ (NOISY - MEAN), CORRELATED - gain @ CORRELATED


@given(st.integers(0, 999), st.sampled_from(["eps", "x0", "v"]))
def test_the_denoised_image_is_the_exact_posterior_mean(step, prediction):
    betas = linear_betas(1000)
    diffusion = Diffusion(betas, prediction)
    sigma = math.sqrt(1 / diffusion.alpha_bars[step] - 1)
    x = denoise(diffusion, gaussian(betas, MEAN, CORRELATED, prediction), NOISY.reshape(1, 1, 1, 4), sigma)
    assert_close(x.flatten(), posterior(sigma)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_denoised_draws_have_the_posteriors_moments(sampler):
    betas, y = linear_betas(1000), NOISY.expand(2000, 1, 1, 4)
    diffusion = Diffusion(betas, "x0")
    sigma = math.sqrt(1 / diffusion.alpha_bars[300] - 1)
    torch.manual_seed(0)
    x = denoise(diffusion, gaussian(betas, MEAN, CORRELATED), y, sigma, sampler=sampler, steps=301, **(
        dict(eta=1.0) if sampler == "ddim" else {}))
    assert_moments(x, *posterior(sigma))


@given(st.floats(0.02, 10))
def test_the_process_ends_at_the_step_whose_noise_is_nearest(sigma):
    diffusion = Diffusion(linear_betas(1000))
    cut = restoration.noised_until(diffusion, sigma)
    levels = (1 / diffusion.alpha_bars - 1) ** 0.5
    assert cut.T - 1 == min(range(1000), key=lambda t: abs(math.log(levels[t] / sigma)))
    assert (cut.alpha_bars == diffusion.alpha_bars[:cut.T]).all() and (cut.timesteps == np.arange(cut.T)).all()


@pytest.mark.parametrize("sigma", [0, 0.009, 200])
def test_noise_beyond_the_schedule_is_refused_with_its_range(sigma):
    refusal(lambda: restoration.noised_until(Diffusion(linear_betas(1000)), sigma), f"sigma {sigma:g} is beyond", "0.01 to 157")


# Latents

def rearranging():
    """An autoencoder that loses nothing: 2 x 2 pixels become four channels, scaled by 0.5."""
    def encode(x):
        return torch.nn.functional.pixel_unshuffle(x, 2), None
    return SimpleNamespace(encode=encode, decode=lambda z: torch.nn.functional.pixel_shuffle(z, 2), scale=0.5)


def test_restoring_through_an_autoencoder_that_loses_nothing_is_restoring_pixels():
    betas, autoencoder = linear_betas(50), rearranging()
    diffusion = Diffusion(betas, "x0")

    def pixels(x, t, y=None):
        return 0.5 * x.roll(1, dims=3)                   # something that mixes pixels

    def latents(z, t, y=None):
        return autoencoder.encode(pixels(autoencoder.decode(z), t))[0]
    noise, real = normal(9, 2, 4, 2, 2), normal(2, 1, 4, 4, seed=1).clamp(-1, 1)
    autoencoder.scale = 1.0
    for A, A_plus in (pooled(2), masked(normal(1, 1, 4, 4).sign().clamp(0, 1))):
        decoded = torch.stack([autoencoder.decode(z) for z in noise])
        expected = restoration.restore(diffusion, pixels, A(real), (A, A_plus), noise=decoded, steps=8, clip=True)
        found = restoration.restore_latents(diffusion, latents, autoencoder, A(real), (A, A_plus), noise=noise, steps=8)
        assert_close(found, expected, **EXACT)


def test_what_is_hidden_from_latents_has_its_moments_through_the_scale():
    betas, S = cosine_betas(1000), 0.01 * torch.eye(4).double()         # small deviations: clipping at 1 cuts off nothing
    model, y = gaussian(betas, 0.5 * 0.3 * MEAN, 0.25 * S), (0.2 * torch.ones(2000, 1, 2, 2)).double()
    hidden = torch.tensor([[0., 1.], [1., 1.]]).double()
    torch.manual_seed(0)
    x = restoration.restore_latents(Diffusion(betas, "x0"), model, rearranging(), masked(hidden)[0](y), masked(hidden))
    assert_close(x[..., 0, 0], y[..., 0, 0], **EXACT)
    assert_moments(x.flatten(1)[:, 1:], 0.3 * MEAN[1:], S[1:, 1:])


def nudged(network, by=0.02):
    """A fresh network's state dict, a little away from where its output is zero."""
    return {name: value + by * normal(*value.shape, dtype=torch.float32) for name, value in network.state_dict().items()}


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory, tiny_run):
    """run.pt of a random DiT on the latents of a random autoencoder of grey images, which it carries."""
    folder = tmp_path_factory.mktemp("latent")
    torch.manual_seed(0)
    autoencoder = vae.AutoencoderKL(channels=1, **vae.SIZES["Ti"])
    arguments = dict(image_size=8, patch_size=4, channels=4, dim=64, depth=1, heads=1, num_classes=10, learn_sigma=False)
    run, state = checkpoint.load(tiny_run), nudged(dit.DiT(**arguments))
    network = {"class": "AutoencoderKL", "arguments": dict(channels=1, **vae.SIZES["Ti"])}
    kept = checkpoint.Autoencoder(0.5, sha256="0", network=network, model=autoencoder.state_dict())
    checkpoint.save(folder / "run.pt", replace(run, network={"class": "DiT", "arguments": arguments}, vae=kept, model=state, ema=state))
    return folder / "run.pt"


# The command

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a digit, its upper half hidden, a mask, one that hides nothing, and all in other forms."""
    monkeypatch.chdir(tmp_path)
    digit = data.load(split="test").batch(np.array([3]))[0][0, ..., 0].numpy()
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    for name, pixels in dict(digit=digit, mask=mask, none=0 * mask, all=0 * mask + 255, small=digit[12:20, 12:20],
                             large=digit.repeat(2, 0).repeat(2, 1), large_mask=mask.repeat(2, 0).repeat(2, 1)).items():
        Image.fromarray(pixels).save(f"{name}.png")
    Image.fromarray(np.stack([digit, 255 - digit, digit], axis=2)).save("colour.png")
    return tmp_path


def command(run, *argv):
    """sample.py with a few steps -> the strip that it wrote, (n + 1, 64, 64)."""
    sample.main(["--ckpt", str(run), "--out", "strip.png", *argv])
    strip = np.asarray(Image.open("strip.png"))
    assert strip.shape[0] == 68 and (strip.shape[1] - 2) % 66 == 0
    return np.stack([strip[2:66, 2 + 66 * i:66 + 66 * i] for i in range((strip.shape[1] - 2) // 66)])


FEW = ["--steps", "2", "--device", "cpu"]


def shown(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("latent", [False, True])
def test_inpainting_shows_the_hole_in_grey_and_keeps_every_other_pixel(tiny_run, latent_run, folder, capsys, latent):
    images = command(latent_run if latent else tiny_run, "--inpaint", "digit.png", "--mask", "mask.png", *FEW)[:, ::2, ::2]
    assert len(images) == 5 and (images[0, :16] == 128).all()
    assert (images[:, 16:] == shown("digit.png")[16:]).all()
    assert len({image.tobytes() for image in images}) == 5
    assert "4 images, ddpm, 2 steps repeated 5 times, seed 0, guidance 1: wrote strip.png" in capsys.readouterr().out


def test_upscaling_keeps_the_means_of_squares(tiny_run, latent_run, folder):
    grey = np.linspace(100, 156, 64).astype(np.uint8).reshape(8, 8)
    Image.fromarray(grey).save("grey.png")
    calm = changed(tiny_run, "calm.pt", by=0.01)             # its faint output leaves few pixels beyond black or white
    for run in (calm, latent_run):
        images = command(run, "--upscale", "grey.png", "--factor", "4", "--n", "3", *FEW)
        assert len(images) == 4 and (images[0][::8, ::8] == grey).all()
        squares = images[1:, ::2, ::2].reshape(3, 8, 4, 8, 4).astype(int)
        inside = ((squares > 0) & (squares < 255)).all(axis=(2, 4))
        assert inside.mean() > 0.5 and len({image.tobytes() for image in images}) == 4
        assert abs(squares.mean(axis=(2, 4)) - grey)[inside].max() <= 1          # levels of a file are rounded down


def test_denoising_gives_one_mean_or_several_draws(tiny_run, folder, capsys):
    network, diffusion = checkpoint.load(tiny_run).build()
    mean = command(tiny_run, "--denoise", "digit.png", "--sigma", "0.5", "--device", "cpu")
    x = data.to_float(torch.from_numpy(shown("digit.png").astype(np.uint8))[None, ..., None])
    expected = data.to_uint8(denoise(diffusion, network, x, 0.5, clip=True))[0, ..., 0].numpy().astype(int)
    assert len(mean) == 2 and (mean[0][::2, ::2] == shown("digit.png")).all()
    assert abs(mean[1][::2, ::2].astype(int) - expected).max() <= 1
    draws = command(tiny_run, "--denoise", "digit.png", "--sigma", "0.5", "--n", "3", *FEW)
    assert len(draws) == 4 and len({image.tobytes() for image in draws}) == 4
    assert "the mean of all possible originals" in capsys.readouterr().out


def test_a_seed_and_an_image_number_make_an_image_whatever_the_batch_and_classes_take_turns(tiny_run, folder):
    argv = ["--inpaint", "digit.png", "--mask", "mask.png", *FEW]
    together = command(tiny_run, *argv, "--classes", "3,7", "--seed", "1")
    apart = command(tiny_run, *argv, "--classes", "3,7", "--seed", "1", "--batch-size", "1")
    three, null, other = (command(tiny_run, *argv, *more) for more in (
        ["--classes", "3", "--seed", "1"], ["--seed", "1"], ["--classes", "3,7", "--seed", "2"]))
    guided = command(tiny_run, *argv, "--classes", "3,7", "--seed", "1", "--cfg-scale", "3")
    assert abs(together.astype(int) - apart).max() <= 1
    assert abs(together[1].astype(int) - three[1]).max() <= 1 and (together[2] != three[2]).any()
    assert all((together[1] != images[1]).any() for images in (null, other, guided))


def test_a_folder_takes_each_restored_image_at_its_size(tiny_run, folder):
    sample.main(["--ckpt", str(tiny_run), "--inpaint", "digit.png", "--mask", "mask.png", "--out", "many/", *FEW])
    images = command(tiny_run, "--inpaint", "digit.png", "--mask", "mask.png", *FEW)
    assert [path.name for path in sorted((folder / "many").iterdir())] == [f"{i:06d}.png" for i in range(4)]
    assert all((shown(f"many/{i:06d}.png") == images[1 + i][::2, ::2]).all() for i in range(4))


def test_an_image_of_another_size_or_colour_is_made_to_fit_and_that_is_said(tiny_run, folder, capsys):
    large = command(tiny_run, "--inpaint", "large.png", "--mask", "large_mask.png", *FEW)
    said = capsys.readouterr().out
    assert "large.png: 64x64 pixels, cropped and scaled to 32x32" in said and "large_mask.png: 64x64" in said
    assert (large == command(tiny_run, "--inpaint", "digit.png", "--mask", "mask.png", *FEW)).all()
    command(tiny_run, "--upscale", "colour.png", "--factor", "2", *FEW)
    said = capsys.readouterr().out
    assert "colour.png: made grey" in said and "colour.png: 32x32 pixels, cropped and scaled to 16x16" in said
    assert sample.pixels_of("digit.png", (32, 32), 3).shape == (1, 3, 32, 32)
    assert "digit.png: grey, repeated in all three colours" in capsys.readouterr().out


@pytest.mark.parametrize("mask, said", [("none.png", "hides nothing"), ("all.png", "hides everything")])
def test_a_mask_of_all_or_nothing_is_warned_of_and_obeyed(tiny_run, folder, capsys, mask, said):
    images = command(tiny_run, "--inpaint", "digit.png", "--mask", mask, *FEW)[:, ::2, ::2]
    error = capsys.readouterr().err
    assert error.startswith("WARNING: ") and said in error and error.count("\n") == 1
    assert (images[0] == (shown("digit.png") if mask == "none.png" else 128)).all()


INPAINT = ["--inpaint", "digit.png", "--mask", "mask.png"]


@pytest.mark.parametrize("argv, said", [
    (["--inpaint", "digit.png"], "--inpaint needs --mask"),
    (["--upscale", "digit.png"], "--upscale needs --factor"),
    (["--denoise", "digit.png"], "--denoise needs --sigma"),
    (["--mask", "mask.png"], "--mask belongs to --inpaint"),
    (["--factor", "2"], "--factor belongs to --upscale"),
    (["--sigma", "0"], "--sigma belongs to --denoise"),
    (["--repeats", "2"], "--repeats belongs to"),
    (["--denoise", "digit.png", "--sigma", "0.5", "--repeats", "2"], "--repeats belongs to"),
    (["--denoise", "digit.png", "--sigma", "0.5", "--steps", "5"], "takes no --steps"),
    (["--denoise", "digit.png", "--sigma", "0.5", "--n", "2", "--sampler", "ddim"], "with ddim every image would be the same"),
    ([*INPAINT, "--upscale", "digit.png"], "not allowed with"),
    ([*INPAINT, "--npz", "a.npz"], "--npz does not go with --inpaint"),
    ([*INPAINT, "--cfg-interval", "1,2"], "--cfg-interval does not go with --inpaint"),
    (["--upscale", "digit.png", "--factor", "3"], "--factor"),
    (["--inpaint", "digit.png", "--mask", "large_mask.png"], "mask large_mask.png has 64x64 pixels, --inpaint digit.png 32x32"),
    (["--inpaint", "gone.png", "--mask", "mask.png"], "gone.png"),
    (["--inpaint", "digit.png", "--mask", "torn.png"], "cannot read the image torn.png"),
    (["--denoise", "long.png", "--sigma", "0.5"], "long.png has 100000x1 pixels, where 32x32 are needed"),
    (["--denoise", "digit.png", "--sigma", "0.001"], "sigma 0.001 is beyond the schedule"),
    ([*INPAINT, "--cfg-scale", "2"], "name it with --classes"),
    ([*INPAINT, "--sampler", "dpm++", "--repeats", "2"], "dpm++ cannot repeat its steps")], ids=" ".join)
def test_what_cannot_be_restored_ends_in_one_line(tiny_run, folder, capsys, argv, said):
    (folder / "torn.png").write_bytes((folder / "mask.png").read_bytes()[:60])
    Image.fromarray(np.zeros((1, 100_000), np.uint8)).save("long.png")
    assert_refused(tiny_run, argv, said, capsys)
    assert not (folder / "strip.png").exists()


def assert_refused(run, argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(run), "--out", "strip.png", *argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and said in error, error


def changed(run, path, network={}, by=0.02, **fields):
    """The run with its network made anew from other arguments, and other fields."""
    content = checkpoint.load(run)
    arguments = {**content.network["arguments"], "depth": 1, **network}
    state = nudged(dit.DiT(**arguments), by)
    checkpoint.save(path, replace(content, network={"class": "DiT", "arguments": arguments}, model=state, ema=state, **fields))
    return path


def test_a_run_that_cannot_restore_says_why(tiny_run, latent_run, folder, capsys):
    odd = changed(tiny_run, "odd.pt", dict(image_size=(10, 10), patch_size=5))
    assert_refused(odd, ["--upscale", "small.png", "--factor", "4"], "--factor 4 does not divide the run's 10x10 pixels", capsys)
    classes_only = changed(tiny_run, "classes.pt", dict(null_class=False))
    assert_refused(classes_only, INPAINT, "classes.pt always wants a class: name it with --classes", capsys)
    strange = changed(tiny_run, "strange.pt", dict(channels=2))
    assert_refused(strange, INPAINT, "is neither grey nor in colour", capsys)
    long = changed(tiny_run, "long.pt", dict(image_size=(16, 32), patch_size=8))
    assert_refused(long, INPAINT, "mask.png has 32x32 pixels, where 32x16 are needed", capsys)
    assert_refused(latent_run, ["--denoise", "digit.png", "--sigma", "0.5"], "it needs a run on pixels", capsys)
    alone = changed(latent_run, "alone.pt", vae={"scale": 0.5})
    assert_refused(alone, INPAINT, "--vae FILE names their autoencoder", capsys)


@pytest.mark.parametrize("context_dim", [None, 8])
def test_runs_that_take_a_text_are_refused(tiny_run, context_dim):
    network = SimpleNamespace(context_dim=context_dim, channels=1, num_classes=None, null_label=None)
    args = SimpleNamespace(ckpt="run.pt", cfg_scale=None)
    call = lambda: sample.check_task(args, "inpaint", network, False, None, None)
    refusal(call, "run.pt takes a text") if context_dim else call()


def test_the_linear_filter_is_the_conditional_mean_of_a_gaussian():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(500, 1, 2, 2, generator=generator).cumsum(dim=3)
    x, sigma = real.flatten(1).double(), 0.7
    noisy = torch.randn(3, 1, 2, 2, generator=generator)
    joint = torch.cov(torch.cat([x, x], dim=1).T) + torch.block_diag(torch.zeros(4, 4), sigma ** 2 * torch.eye(4))
    expected = x.mean(dim=0) + (noisy.flatten(1).double() - x.mean(dim=0)) @ torch.linalg.inv(joint[4:, 4:]) @ joint[4:, :4]
    torch.testing.assert_close(restoration.linear_filter(noisy, real, sigma).flatten(1).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_blur_keeps_the_mean_spreads_a_point_by_its_deviation_and_leaves_flat_images_alone():
    point = torch.zeros(1, 1, 33, 33)
    point[..., 16, 16] = 1
    spread, place = restoration.blurred(point, 1.5)[0, 0], torch.arange(33) - 16
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)
    for axis in (0, 1):
        assert (spread.sum(dim=axis) * place ** 2).sum().item() == pytest.approx(1.5 ** 2, rel=1e-3)
    flat = torch.full((2, 1, 20, 20), 0.3)
    torch.testing.assert_close(restoration.blurred(flat, 1.5), flat)
