"""plot.py: what a figure shows is what was computed, its claim is true of it, and bad input gets one line."""
import itertools
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image, ImageColor

import checkpoint
import data
import ddpm
import plot
import sample
import train
from pictures import COLOURS
from plot import drift, reverse, smooth


@pytest.fixture(scope="module")
def roll_run(tmp_path_factory):
    """run.pt of a network on points that was trained for so long that samples stay near."""
    out = tmp_path_factory.mktemp("roll") / "run.pt"
    train.main(["--data", "swissroll", "--steps", "100", "--batch-size", "128", "--device", "cpu", "--out", str(out)])
    return out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def log(path, losses, steps=None, **columns):
    """Write a log of train.py's kind."""
    rows = zip(steps or range(50, 50 * len(losses) + 1, 50), losses, *columns.values(), strict=True)
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in (("step", "loss", *columns), *rows)))
    return str(path)


def picture(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def pixels_of(image, colour):
    """How many pixels have a colour."""
    return (image == ImageColor.getrgb(colour)).all(axis=2).sum()


# Curves

@given(values=st.lists(st.floats(-100, 100), min_size=1, max_size=12), window=st.sampled_from([1, 3, 5, 7]))
def test_a_smoothed_value_is_the_mean_of_as_many_neighbours_on_either_side(values, window):
    means = smooth(np.array(values), window)
    for i in range(len(values)):
        half = min(window // 2, i, len(values) - 1 - i)
        assert means[i] == pytest.approx(np.mean(values[i - half:i + half + 1]), abs=1e-9)


def test_curves_of_several_runs_stand_in_one_chart_and_the_claim_names_the_lowest(folder, capsys):
    runs = [log(folder / "high.csv", [1.0, 0.9, 0.8, 0.7]), log(folder / "low.csv", [2.0, 0.4, 0.2, 0.1])]
    plot.main(runs)
    image = picture("curves.png")
    assert all(pixels_of(image, colour) > 100 for colour in COLOURS[:2]) and pixels_of(image, COLOURS[2]) == 0
    said = capsys.readouterr().out
    assert said.startswith("wrote curves.png: low ends with the lowest loss, 0.675, a mean of 4 rows.") and said.count("\n") == 1


def test_the_commands_name_may_be_left_out_also_before_a_flag(folder, capsys):
    run = log(folder / "run.csv", [1.0, 0.5])
    for argv in (["curves", run], [run], ["--out", "curves.png", run]):
        plot.main(argv)
        assert "run ends with a loss of 0.75" in capsys.readouterr().out
        (folder / "curves.png").unlink()


def test_runs_of_one_name_go_by_their_paths_and_rows_without_a_loss_are_left_out(folder, capsys):
    one = log(folder / "a" / "run.csv", [1.0, "nan", 0.0, 0.9], extra=["", "", 1, 2])
    other = log(folder / "b" / "run.csv", [0.5])
    plot.main([one, other])
    assert f"{other} ends with the lowest loss, 0.5, a mean of 1 rows" in capsys.readouterr().out


# Forward

def test_the_noised_digit_is_eq_2_3_of_the_digit_under_both_schedules(folder, capsys):
    plot.main(["noising", "--digit", "7", "--seed", "5"])
    image = picture("noising.png")
    x0 = data.load("mnist", split="test").batch(np.array([7]))[0][0, ..., 0].double() / 127.5 - 1
    eps = torch.randn(32, 32, generator=ddpm.keyed_generator(5)).double()
    left = image.shape[1] - 8 - 7 * 100
    for (r, betas), (k, t) in itertools.product(enumerate((ddpm.linear_betas(), ddpm.cosine_betas())), enumerate(plot.NOISED)):
        kept = np.prod(1 - betas[:t])                                    # t factors, none at t = 0
        expected = (127.5 * (kept ** 0.5 * x0 + (1 - kept) ** 0.5 * eps) + 128).clamp(0, 255).floor()
        shown = image[40 + 100 * r + 1:40 + 100 * r + 96:3, left + 100 * k + 1:left + 100 * k + 96:3, 0]
        assert np.abs(shown - expected.numpy()).max() <= 1               # float32 at the edge of a level
    assert "wrote noising.png" in capsys.readouterr().out


def test_schedules_shows_three_charts_of_three_curves_and_its_claim_is_alpha_bar_half_way(folder, capsys):
    plot.main(["schedules"])
    charts = np.split(picture("schedules.png"), 3, axis=1)
    assert all(pixels_of(chart, colour) > 100 for chart in charts for colour in COLOURS[:3])
    said = capsys.readouterr().out
    for name, betas in ddpm.SCHEDULES.items():
        assert f"{np.exp(np.log1p(-betas()[:500]).sum()):.3f} under {name}" in said


# Runs

def test_each_row_of_guidance_is_what_sample_draws_at_its_scale_from_the_same_noise(tiny_run, folder, monkeypatch):
    monkeypatch.setattr(plot, "SCALES", (0, 1, 3))
    plot.main(["guidance", "--ckpt", str(tiny_run), "--seed", "3"])
    image = picture("guidance.png")
    left = image.shape[1] - 8 - 10 * 100
    for r, scale in enumerate(plot.SCALES):
        sample.main(["--ckpt", str(tiny_run), "--n", "10", "--seed", "3", "--cfg-scale", str(scale), "--npz", "s.npz", "--device",
                     "cpu"])
        with np.load("s.npz") as archive:
            drawn = archive["arr_0"][..., 0].astype(int)                 # (10, 32, 32)
        shown = np.stack([image[40 + 100 * r:136 + 100 * r:3, left + 100 * k:left + 100 * k + 96:3, 0] for k in range(10)])
        assert np.abs(shown - drawn).max() <= 1


class Normal(torch.nn.Module):
    """The exact predictor of eps where the data are standard normal: E[eps | x_t] = sqrt(1 - alpha_bar) x_t."""

    def __init__(self, diffusion):
        super().__init__()
        self.alpha_bars = torch.from_numpy(diffusion.alpha_bars)

    def forward(self, x, t, y=None):
        return ((1 - self.alpha_bars[t]) ** 0.5).reshape(-1, 1, 1, 1).to(x) * x


@given(t=st.integers(0, 999), seed=st.integers(0, 9))
def test_the_drift_of_normal_data_is_that_of_a_stationary_chain(t, seed):
    diffusion = ddpm.Diffusion(ddpm.linear_betas())
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = (diffusion.alphas[t] ** 0.5 - 1) * x                      # x_{t-1} and x_t have the correlation sqrt(alpha)
    assert torch.allclose(drift(Normal(diffusion), diffusion, x, t), expected, atol=1e-12)


def test_the_reverse_path_goes_from_noise_to_a_sample_and_keeps_normal_data_normal():
    diffusion = ddpm.Diffusion(ddpm.linear_betas(T=50, end=0.3), variance="large")       # exact where the data are normal
    path = reverse(Normal(diffusion), diffusion, 4000, seed=1)
    assert path.shape == (51, 4000, 2)
    noise = torch.randn(51, 4000, 2, 1, 1, generator=ddpm.keyed_generator(1))
    drawn = ddpm.sample(diffusion, Normal(diffusion), (4000, 2, 1, 1), noise=noise)
    assert torch.equal(path[-1], noise[0].flatten(1)) and torch.equal(path[0], drawn.flatten(1))
    assert (path.var(dim=(1, 2))[1:] - 1).abs().max() < 5 * (2 / 8000) ** 0.5    # 5 standard errors; the last step takes the mean
    together = [(path[t - 1] * path[t]).mean().item() for t in range(2, 51)]
    assert np.abs(together - diffusion.alphas[1:] ** 0.5).max() < 5 * (2 / 8000) ** 0.5      # row t is the report's x_t


def test_figure_2_1_has_three_rows_of_five_and_a_way_of_60_frames(roll_run, folder, capsys, monkeypatch):
    monkeypatch.setattr(plot, "CHAIN", 40)
    plot.main(["swissroll", "--ckpt", str(roll_run), "--gif", "way.gif"])
    rows = np.split(picture("swissroll.png")[40:-8], 3, axis=0)
    present = [[pixels_of(row, colour) > 40 for colour in (COLOURS[6], COLOURS[0], COLOURS[1])] for row in rows]
    assert present == [[True, False, False], [False, True, False], [False, False, True]]
    with Image.open("way.gif") as way:
        assert way.n_frames == 60 and way.size == (460, 460)
    assert capsys.readouterr().out.startswith("wrote swissroll.png and way.gif: ")
    for seed in (0, 1):                                  # the same again, and another with another seed
        plot.main(["swissroll", "--ckpt", str(roll_run), "--out", "again.png", "--seed", str(seed)])
        assert np.array_equal(picture("again.png"), picture("swissroll.png")) == (seed == 0)


# Bad input

def refused(capsys, argv, *words):
    """Assert that the command ends in one line on stderr that says the words, and status 2."""
    with pytest.raises(SystemExit) as stopped:
        plot.main(argv)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("plot.py") and said.count("\n") == 1, said
    assert all(word in said for word in words), said


def unlabelled(run):
    """The run without its classes."""
    content = checkpoint.load(run)
    content.network["arguments"] |= dict(num_classes=None)
    for weights in (content.model, content.ema):
        del weights["y_embedder.embedding_table.weight"]
    checkpoint.save("unlabelled.pt", content)


FILES = {
    "empty.csv": b"", "header.csv": b"step,loss\n", "no-loss.csv": b"step,accuracy\n50,0.5\n",
    "words.csv": b"step,loss\n50,high\n", "nan.csv": b"step,loss\n50,nan\n60,0\n", "binary.csv": bytes(range(256)), "nul.csv": b"step,loss\n\0,\0\n",
    "log.csv": b"step,loss\n50,1.0\n",
}


@pytest.mark.parametrize("argv, words", [
    (["missing.csv"], ["missing.csv", "no such file", "schedules"]),
    (["empty.csv"], ["empty.csv has no column step; it has none"]),
    (["header.csv"], ["header.csv has a header and no rows"]),
    (["no-loss.csv"], ["no-loss.csv has no column loss; it has step, accuracy"]),
    (["words.csv"], ["words.csv", "column loss", "no number"]),
    (["nan.csv"], ["nan.csv has no loss above 0"]),
    (["binary.csv"], ["binary.csv"]),
    (["nul.csv"], ["nul.csv"]),
    (["log.csv"] * 8, ["8 runs", "7"]),
    ([], ["command"]),
    (["noising", "--digit", "1000"], ["--digit 1000", "1000 held-out digits"]),
    (["schedules", "log.csv"], ["log.csv"]),
    (["guidance", "--ckpt", "roll.pt"], ["roll.pt", "classes"]),
    (["guidance", "--ckpt", "unlabelled.pt"], ["unlabelled.pt", "classes"]),
    (["swissroll", "--ckpt", "images.pt"], ["images.pt draws images", "--data swissroll"]),
])
def test_bad_input_gets_one_line_and_status_2_and_nothing_is_written(folder, tiny_run, roll_run, capsys, argv, words):
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    shutil.copy(tiny_run, "images.pt")
    shutil.copy(roll_run, "roll.pt")
    if "unlabelled.pt" in argv:
        unlabelled(tiny_run)
    before = sorted(path.name for path in folder.iterdir())
    refused(capsys, argv, *words)
    assert sorted(path.name for path in folder.iterdir()) == before

