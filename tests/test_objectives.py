"""objectives.py: what a step draws is a function of (seed, step) and of nothing else; what it minimises is what it says."""
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data
import objectives
from objectives import Classification, Denoising
from ddpm import keyed_generator

CPU = torch.device("cpu")


def settings_of(**changes):
    return Namespace(**(dict(seed=0, batch_size=8, flip=False, shift=0, cfg_drop=0.1, schedule="linear", prediction="eps",
                             variance="small", data="mnist", image_size=None, cache=None, skip_bad=False, eval_every=None, eval_n=20,
                             features=None) | changes))


def labelled(num_classes=10):
    return Namespace(num_classes=num_classes)


def denoising(null_label=10, **changes):
    return Denoising(settings_of(**changes), labelled(), Namespace(null_label=null_label), CPU)


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
