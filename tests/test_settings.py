"""settings.py: flags left out take the recipe of the model and size, and the learning rate is a function of the step."""
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

import checkpoint
import settings
from objectives import learning_rate
from settings import read_settings


def settings_of(tmp_path, *argv):
    return read_settings([*argv, "--out", str(tmp_path / "run.pt")])[0]


@given(st.integers(0, 50), st.integers(51, 400), st.sampled_from(["none", "cosine"]))
def test_the_learning_rate_rises_linearly_and_falls_to_nothing_or_not_at_all(warmup, steps, decay):
    args = Namespace(lr=2.0, warmup=warmup, decay=decay, steps=steps)
    rates = [learning_rate(step, args) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)
    if decay == "none":
        assert rates[warmup:] == [2.0] * (steps - warmup)
        assert np.allclose(np.diff([0.0, *rates[:warmup]]), 2.0 / max(1, warmup))
    else:
        assert all(a > b for a, b in zip(rates[warmup:], rates[warmup + 1:])) and rates[-1] < 2.0 * (4 / steps) ** 2
        assert learning_rate(steps, args) < 1e-12


def test_the_embedded_recipe_is_the_default(tmp_path):
    args = settings_of(tmp_path)
    assert (args.model, args.size, args.data, args.prediction, args.max_weight) == ("dit", "XS/16", "mnist", "x0", 5.0)
    assert settings_of(tmp_path, "--prediction", "v").max_weight == 1        # of the simple loss
    paper = settings_of(tmp_path, "--size", "B/4")
    assert (paper.lr, paper.batch_size, paper.variance, paper.steps, paper.ema) == (1e-4, 256, "learned", 400_000, 0.9999)


@pytest.mark.parametrize("model, size, recipe", [
    ("dit", None, settings.FIRST), ("dit", "Ti/4", settings.LAPTOP), ("uvit", None, settings.LAPTOP),
    ("uvit", "S-deep/2", settings.UVIT), ("unet", "ddpm-cifar10", settings.DDPM), ("unet", "S", settings.DDPM),
    ("unet", "iddpm-64", settings.IDDPM), ("unet", "adm-256", settings.DIT)])
def test_what_flags_leave_out_takes_the_recipe_of_the_model_and_size(tmp_path, model, size, recipe):
    args = vars(settings_of(tmp_path, "--model", model, *(["--size", size] if size else [])))
    assert recipe.items() <= args.items() and args["size"] == (size or settings.DEFAULT_SIZE[model])


@pytest.mark.parametrize("size, rate", [("Ti/8", settings.TEXT_LR), ("S/2", settings.UVIT["lr"])])
def test_captions_are_learned_at_a_rate_that_is_not_above_theirs(tmp_path, size, rate):
    given = ["--model", "uvit", "--size", size, "--data", "shapes"]
    assert settings_of(tmp_path, *given, "--text").lr == rate <= settings_of(tmp_path, *given).lr
    assert settings_of(tmp_path, *given, "--text", "--lr", "1").lr == 1


def test_a_resumed_run_may_be_without_what_its_machine_was_asked_for(tmp_path, tiny_run):
    run = checkpoint.load(tiny_run)
    checkpoint.save(tmp_path / "run.pt", replace(run, config={**run.config, "compile": True, "checkpointing": True}))
    kept, without = settings_of(tmp_path, "--resume"), settings_of(tmp_path, "--resume", "--no-compile", "--no-checkpointing")
    assert kept.compile and kept.checkpointing and not without.compile and not without.checkpointing
