"""study.py and judges.py: each run is trained and scored once, what is said follows from the numbers, and the judges are right on
images whose worth is known."""
import csv
import shutil
import subprocess
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import judges
import metrics
import points
import shapes
import study
import train
from gflops import count, inputs_of
from models import build, describe
from outcomes import (against, along, by_run, duels, falls_with, numbers_of, rank_correlation, ranking, sampled, scattered, seen,
                      trade_off)
from study import Study


# Runs and scores

SMALL = "--size Ti/16 --steps 2 --batch-size 8 --device cpu"
SMALL_RUNS = {"a": SMALL, "b": f"{SMALL} --lr 0.001"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of all runs of the trial."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "sample_report", lambda *_: {})             # takes longer than two steps
        patch.setattr(study, "RUNS", SMALL_RUNS)
        for seed, run in product((0, 1), SMALL_RUNS):
            train.main(study.flags_of(run, seed, folder))
    return folder


@pytest.fixture
def trial(tmp_path, runs, monkeypatch):
    """A study "trial" of two runs, two seeds and two settings, and a list of what it trained and judged."""
    done = []

    def judge(path, seed, scale):
        done.append(f"{path.stem} at {scale:g}")
        return {"FD": scale + seed + 10 * (path.stem[0] == "b")}

    def trained(command, **_):
        out = Path(command[command.index("--out") + 1])
        done.append(f"trained {out.name}")
        shutil.copy(runs / out.name, out)
    monkeypatch.setattr(subprocess, "run", trained)
    monkeypatch.setattr(study, "RUNS", dict(SMALL_RUNS))
    monkeypatch.setattr(study, "STUDIES", {"trial": Study("Claimed.", ("a", "b"), judge, {"FD": ".1f"}, ranking("FD", "a"),
                                                          by_run("FD"), "Open.", 1, (0, 1), ({"scale": 1.0}, {"scale": 2.0}))})
    monkeypatch.setattr(study, "ASSETS", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.chdir(tmp_path)
    return done


def test_each_run_is_trained_and_scored_once_in_each_setting(trial, tmp_path, capsys):
    study.main(["trial"])
    assert trial == [f"{what}{run}-{seed}{how}" for seed in (0, 1) for run in "ab"
                     for what, how in (("trained ", ".pt"), ("", " at 1"), ("", " at 2"))]
    table = (tmp_path / "study-trial.csv").read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert [row["FD"] for row in rows] == ["1", "2", "11", "12", "2", "3", "12", "13"] and rows[0]["training_steps"] == "2"
    assert "| a | 1.0 | 0.0" in capsys.readouterr().out
    trial.clear()
    study.main(["trial"])
    assert not trial and (tmp_path / "study-trial.csv").read_text() == table


def test_runs_at_once_have_one_thread_each_and_all_are_scored(trial, tmp_path, monkeypatch):
    threads, here, train_it = [], [], subprocess.run
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(torch, "set_num_threads", here.append)

    def trained(command, env, **_):
        threads.append(env["OMP_NUM_THREADS"])
        train_it(command)
    monkeypatch.setattr(subprocess, "run", trained)
    study.main(["trial", "--together", "2"])
    rows = list(csv.DictReader((tmp_path / "study-trial.csv").read_text().splitlines()))
    assert threads == ["1"] * 4 and {*here} == {1} and {row["threads"] for row in rows} == {"1"}
    assert sorted(float(row["FD"]) for row in rows) == [1, 2, 2, 3, 11, 12, 12, 13]


def test_a_study_that_was_stopped_scores_what_is_missing(trial, tmp_path):
    study.main(["trial"])
    path = tmp_path / "study-trial.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    trial.clear()
    study.main(["trial"])
    assert trial == ["b-1 at 2"] and len(path.read_text().splitlines()) == len(lines)


@pytest.mark.parametrize("flags, words", [("--lr 0.5", ["--lr is 0.001, not 0.5"]), ("--prediction v", ["--prediction is x0, not v"]),
                                          ("--steps 1", ["--steps is 2, not 1"])])
def test_a_run_of_other_settings_under_its_name_is_refused(trial, runs, tmp_path, monkeypatch, capsys, flags, words):
    shutil.copytree(runs, tmp_path / "studies")
    monkeypatch.setitem(study.RUNS, "b", f"{study.RUNS['b']} {flags}")
    with pytest.raises(SystemExit) as stop:
        study.main(["trial"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and all(word in said for word in words)


def test_a_run_that_was_stopped_is_not_judged(trial, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    with pytest.raises(SystemExit) as stop:
        study.main(["trial"])
    assert stop.value.code == 2 and "the run 'a', seed 0, did not come to its end" in capsys.readouterr().err


def test_a_table_of_other_columns_is_refused_and_kept(trial, tmp_path, capsys):
    (tmp_path / "study-trial.csv").write_text("model,FD\nmine,1\n")
    with pytest.raises(SystemExit) as stop:
        study.main(["trial"])
    assert stop.value.code == 2 and "has other columns" in capsys.readouterr().err
    assert (tmp_path / "study-trial.csv").read_text() == "model,FD\nmine,1\n"


def test_the_report_stands_between_its_marks_and_nothing_else_changes(trial, tmp_path, capsys):
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n\n<!-- study trial: written by study.py -->\nold\n<!-- end of study trial -->\n\nThe end.\n")
    study.main(["trial", "--write"])
    first, between, last = page.read_text().replace("<!-- end", "<!-- study").split("<!-- study")
    assert first == "# Results\n\n" and last == " of study trial -->\n\nThe end.\n" and "old" not in between
    assert "| a | 2.0 |" in between and "(assets/study-trial.png)" in between and (tmp_path / "study-trial.png").exists()
    page.write_text("# Results\n")
    with pytest.raises(SystemExit) as stop:
        study.main(["trial", "--write"])
    assert stop.value.code == 2 and "<!-- study trial" in capsys.readouterr().err and page.read_text() == "# Results\n"


def test_the_list_has_each_study_its_minutes_and_its_claim(capsys):
    study.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(study.STUDIES) and all(line.split()[1].isdigit() for line in lines)


@pytest.mark.parametrize("run", study.RUNS)
def test_the_flags_of_a_run_are_train_pys(tmp_path, monkeypatch, run):
    monkeypatch.setattr(study, "best_rate", lambda name: study.RATES[0])
    for autoencoder in study.AUTOENCODERS.values():
        study.path_of(autoencoder, 0, tmp_path).touch()
    args, _ = study.read_settings(study.flags_of(run, 3, tmp_path))
    assert args.seed == 3 and args.out == str(study.path_of(run, 3, tmp_path))


def test_no_two_runs_share_a_file():
    assert len({study.path_of(run, 0, "").name for run in study.RUNS}) == len(study.RUNS)


def test_the_best_rate_has_the_least_held_out_loss_and_waits_for_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "ASSETS", tmp_path)
    rates = study.STUDIES["rates"]
    losses = {run: i + 10 * (study.RATES[1] not in run) for i, run in enumerate(rates.runs)}
    lines = [",".join(columns := study.columns_of(rates))]
    lines += [",".join({"run": f'"{run}"', "held-out loss": str(loss)}.get(column, "0") for column in columns)
              for run, loss in losses.items()]
    study.table_path("rates").write_text("\n".join(lines) + "\n")
    assert {study.best_rate(name) for name in study.BACKBONES} == {study.RATES[1]}
    study.table_path("rates").write_text("\n".join(lines[:-1]) + "\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("trained before it refused"))
    with pytest.raises(SystemExit) as stop:
        study.main(["backbones", "--runs", str(tmp_path / "runs")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "has not tried 0.003 yet: python study.py rates" in said


def test_every_study_has_its_place_in_the_results_and_every_run_its_study():
    page = study.RESULTS.read_text(encoding="utf-8")
    for name in study.STUDIES:
        columns = study.columns_of(study.STUDIES[name])
        assert len({*columns}) == len(columns)           # no setting and no score has another's column
        assert page.index(f"<!-- study {name}: written by study.py -->") < page.index(f"<!-- end of study {name} -->")
    assert {run for one in study.STUDIES.values() for run in one.runs} == set(study.RUNS) - set(study.AUTOENCODERS.values())


def network_of(run, folder):
    """The network of a run on digits, or on their latents."""
    args, _ = study.read_settings(study.flags_of(run, 0, folder))
    return build(describe(args.model, args.size, *((8, 4) if args.vae else (32, 1)), 10))


@pytest.mark.parametrize("where", ["pixels", "latents"])
def test_the_networks_compared_cost_alike(monkeypatch, tmp_path, where):
    monkeypatch.setattr(study, "best_rate", lambda name: study.RATES[0])
    for autoencoder in study.AUTOENCODERS.values():
        study.path_of(autoencoder, 0, tmp_path).touch()
    costs = [count(network, *inputs_of(network))[1] for network in (
        network_of(run, tmp_path) for run in study.BACKBONES if run.endswith(where))]
    assert len(costs) == 3 and max(costs) < 1.2 * min(costs)


# What is said

def made(rows, *columns):
    """Rows of a table, as they are read from it."""
    return [dict(zip(columns, map(str, row))) for row in rows]


@pytest.mark.parametrize("a, b, said", [((1, 2), (3, 4), "agrees"), ((3, 4), (1, 2), "contradicts"), ((1, 3), (2, 4), "neither"),
                                        ((2, 4), (1, 3), "neither"), ((1, 6), (4, 5), "neither")])
def test_a_ranking_agrees_with_the_report_only_where_the_ranges_lie_apart(a, b, said):
    one = Study("", ("a", "b"), None, {"FD": ".1f"}, None, None, "", 1, seeds=(0, 1))
    text = ranking("FD", "a")(one, made([(run, seed, x) for run, xs in zip("ab", (a, b)) for seed, x in enumerate(xs)],
                                        "run", "seed", "FD"))
    assert {word for word in ("agrees", "contradicts", "neither") if word in text} >= {said}
    assert ("lie apart" in text) == (said != "neither") and text.index(f"{min((a, b))[0]}.0 –") > 0
    first, other = sorted((a, b), key=sum)
    assert f"is the best in {sum(x < y for x, y in zip(first, other))} of 2 seeds" in text


@pytest.mark.parametrize("eps, verdict", [((1, 1), "agrees with"), ((9, 9), "contradicts"), ((1, 9), "neither"), ((4, 4), "neither")])
def test_two_kinds_of_runs_are_compared_case_by_case(eps, verdict):
    one = Study("", ("eps a", "x0 a", "eps b", "x0 b"), None, {"FD": ".0f"}, None, None, "", 1)
    rows = made([(run, value + seed) for run, value in zip(one.runs, (eps[0], 4, eps[1], 4)) for seed in (0, 2)], "run", "FD")
    text = duels("FD", "eps", "x0")(one, rows)
    assert f"This {verdict}" in text and text.startswith("FD, from the best: a: ") and "x0 5 (4 – 6)" in text
    assert f"in {sum(e == 1 for e in eps)} of 2 cases, and worse in {sum(e == 9 for e in eps)}" in text


def test_the_rank_correlation_is_that_of_ranks_and_shares_those_of_equal_values():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1) and rank_correlation(x, -x ** 3) == pytest.approx(-1)
    assert rank_correlation(np.array([1.0, 1, 2]), np.array([5.0, 6, 7])) == pytest.approx(3 ** 0.5 / 2)
    assert rank_correlation(np.array([3.0, 1, 2, 5, 4]), np.arange(5)) == pytest.approx(1 - 6 * 8 / 120)


@pytest.mark.parametrize("slope, verdict", [(-1, "agrees with"), (1, "contradicts"), (0, "neither")])
def test_a_score_falls_with_a_cost_where_the_whole_interval_is_below_zero(slope, verdict):
    noise = np.random.default_rng(1).permutation(8)
    one = Study("", tuple(f"{i}, {end}" for end in ("few", "many") for i in range(8)), None, {}, None, None, "", 1, seeds=(0,))
    rows = made([(run, i % 8, slope * (i % 8) + (slope == 0) * noise[i % 8]) for i, run in enumerate(one.runs)], "run", "cost", "FD")
    text = falls_with((("cost", "many"), ("cost", "")), ("FD",))(one, rows)
    assert f"This {verdict}" in text and "FD with cost, 8 runs of many: " in text and "FD with cost, 16 runs: " in text


def test_guidance_is_said_to_trade_recall_for_precision_up_to_the_scale_where_it_does():
    one = study.STUDIES["guidance"]
    scales = [setting["scale"] for setting in one.settings]
    rows = made([("digits", s, 0.9 - abs(s - 3) / 20, 0.9 - s / 20, abs(s - 1.5)) for s in scales]
                + [("latents", s, 0.5 + s / 20, 0.9, s) for s in scales], "run", "scale", "precision", "recall", "FD")
    text = trade_off(one, rows)
    assert ("digits: from scale 1 to 3 precision goes from 0.800 to 0.900 and recall from 0.850 to 0.750, as the report says; at scale 6 "
            "precision is 0.750 and recall 0.600; FD is lowest at scale 1.5.") in text
    assert text.endswith("latents: recall is 0.900 at scale 6, where precision is highest, which contradicts the report; FD is lowest "
                         "at scale 1.")


def test_a_sampler_reaches_250_ancestral_steps_with_the_fewest_evaluations_that_do():
    one = study.STUDIES["samplers"]
    rows = made([(1.0, s["sampler"], s["steps"], 1 + 10 / s["steps"] + 9 * (s["sampler"] == "ddim") - (s["sampler"] == "dpm++"),
                  1000 / s["steps"]) for s in one.settings], "scale", "sampler", "steps", "FD", "images_per_s")
    text = sampled(one, rows)
    assert "reach an FD of 1.04" in text and "ddim does not reach it" in text
    assert "dpm++ reaches it with 10 evaluations, at 25.0 times the images/s" in text


def test_numbers_are_said_with_their_range_in_each_setting():
    one = Study("", ("a",), None, {"FD": ".1f"}, None, None, "", 1, settings=({"scale": 1.0}, {"scale": 2.0}))
    rows = made([("a", s, s + seed) for s in (1.0, 2.0) for seed in (0, 2)], "run", "scale", "FD")
    assert numbers_of("FD")(one, rows) == "a, scale 1.0: FD 2.0 (1.0 – 3.0); a, scale 2.0: FD 3.0 (2.0 – 4.0)."


@pytest.mark.parametrize("picture", [by_run("FD"), by_run("FD", log=True), along("scale", "FD"), against("FD", "FD", "scale"),
                                     along("scale", "FD", log=True), scattered(("scale", "FD"), "FD", ("a", "b")),
                                     seen(lambda path: np.zeros((480, 900, 3), np.uint8))])
def test_every_kind_of_picture_is_drawn(picture):
    one = Study("", ("a", "b"), None, {"FD": ".1f"}, None, picture, "", 1, settings=({"scale": 1.0}, {"scale": 2.0}))
    rows = made([(run, s, s + i) for i, run in enumerate("ab") for s in (1.0, 2.0)], "run", "scale", "FD")
    assert picture(one, rows, None).shape[1:] in ((900, 3), (2 * 640, 3))


# Judges

@pytest.fixture
def few(monkeypatch):
    """Judges of few samples."""
    for name, n in dict(SAMPLES=40, PROMPTS=24, DIGITS=100, DATA_SETS=25, SCATTERED=300).items():
        monkeypatch.setattr(judges, name, n)


def test_the_vote_recognises_real_held_out_digits():
    real, held_out = data.load(split="train"), data.load(split="test")
    images, labels = real.batch(np.arange(len(real)))
    queries, truth = held_out.batch(np.arange(300))
    right = (metrics.vote(labels, metrics.nearest(queries, images)) == truth).float().mean().item()
    assert right > 0.9                                   # about 94 %: 300 digits leave a standard error of 1.4 %


def test_real_digits_are_recognised_and_copies_are_not_authentic(few, tiny_run, monkeypatch):
    images, labels, *_ = judges.digits()
    copies = torch.cat([images[labels == digit][:4] for digit in range(10)])[torch.arange(40).reshape(10, 4).T.flatten()]
    monkeypatch.setattr(judges, "draw_images", lambda *_, **__: [(range(40), copies)])
    found = judges.digit_scores(tiny_run, 0)
    assert found["accuracy"] > 0.95 and found["recognised"] > 0.85 and found["unique"] == 1 and found["authentic"] == 0
    assert 0 <= found["precision"] <= 1 and found["FD"] > 0 and found["images_per_s"] > 0


def test_the_held_out_loss_of_a_network_that_sees_nothing_is_that_of_the_data(few, tiny_run, monkeypatch):
    run, network, diffusion = judges.drawable(tiny_run)
    blind = lambda x, t, y: torch.zeros_like(x)                                          # noqa: E731
    monkeypatch.setattr(judges, "drawable", lambda path: (run, blind, diffusion))
    assert run.config["prediction"] == "x0" and run.config["max_weight"] == 1
    images, _ = judges.held_out_digits()
    power = (images ** 2).mean().item()
    assert judges.held_out_loss(tiny_run, 0)["held-out loss"] == pytest.approx(power, rel=1e-5)
    latents = SimpleNamespace(scale=2, encode=lambda x: (x / 3, None))
    monkeypatch.setattr(judges, "decoder", lambda *_: latents)
    assert judges.held_out_loss(tiny_run, 0)["held-out loss"] == pytest.approx(4 / 9 * power, rel=1e-5)


def test_a_run_is_scored_with_its_held_out_loss_and_its_cost(tiny_run, monkeypatch):
    monkeypatch.setattr(judges, "digit_scores", lambda path, seed, steps: {"FD": 1})
    run, network, _ = judges.drawable(tiny_run)
    found = judges.loss_and_scores(tiny_run, 0)
    assert found["FD"] == 1 and found["held-out loss"] > 0
    assert found["training TFLOP"] == pytest.approx(
        6 * count(network, *inputs_of(network))[1] * run.config["steps"] * run.config["batch_size"] / 1e12)


def test_restored_digits_are_judged_beside_their_nearest_neighbours(few, tiny_run, monkeypatch):
    monkeypatch.setattr(judges.restoration, "STEPS", 1)
    monkeypatch.setattr(judges.restoration, "restore", lambda diffusion, network, y, degrade, *_, **__: degrade[1](y))
    filled, enlarged = (judges.restored_share(tiny_run, 0, task, "given") for task in judges.TASKS)
    assert filled["nearest"] == pytest.approx(0.80, abs=0.08) and enlarged["nearest"] == pytest.approx(0.94, abs=0.06)
    assert filled["kept"] < 0.9                          # with a grey hole
    noise = judges.denoised(tiny_run, 0)
    assert noise["noisy"] == pytest.approx(12, abs=0.1) and noise["best blur"] == pytest.approx(18.3, abs=0.3)
    assert noise["linear filter"] == pytest.approx(21.1, abs=0.3)
    picture = judges.restored_digits(tiny_run)
    assert picture.shape == (5 * 66 + 2, 10 * 66 + 2, 1) and judges.denoised_digits(tiny_run).shape == (4 * 66 + 2, 10 * 66 + 2, 1)
    assert (picture[2:66, 2:66][18:46, 18:46] == 128).all()              # the hole, and round it the original
    assert (picture[2:20, 2:66] == picture[4 * 66 + 2:4 * 66 + 20, 2:66]).all()


def test_perfect_images_fulfil_their_prompts(few, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "sample_report", lambda *_: {})
    train.main(["--model", "uvit", "--data", "shapes:one", "--text", "--steps", "1", "--out", str(tmp_path / "text.pt")])
    alone = [next(i for i in np.flatnonzero(shapes.labels(4000) == k) if shapes.scenes([i]).number[0] == 1) for k in range(24)]
    perfect = torch.from_numpy(shapes.Drawn(4000, 32)[np.array(alone)])
    monkeypatch.setattr(judges, "draw_images", lambda *_, **__: [(range(24), perfect)])
    assert judges.prompts_fulfilled(tmp_path / "text.pt", 0, "a red disc") == {"right": 1, "right in colour": 1}
    assert judges.prompts_fulfilled(tmp_path / "text.pt", 0, "two red squares")["right"] == 0
    assert judges.prompts_drawn(tmp_path / "text.pt").shape[2] == 3


def test_prompts_of_a_run_on_latents_are_judged_as_images(few, tiny_run, monkeypatch):
    given = []
    for name, value in dict(text_reader=None, read_prompts=None, unconditional=None, decoder="its autoencoder").items():
        monkeypatch.setattr(judges, name, lambda *_, value=value: value)
    monkeypatch.setattr(judges, "draw_images", lambda *args, **_: given.extend(args) or [(range(1), torch.zeros(1))])
    judges.drawn_prompts(tiny_run, 0, "a red disc")
    assert given[5] == "its autoencoder"                 # draw_images' autoencoder


def test_the_roll_is_as_far_from_itself_as_two_of_its_data_sets(few, monkeypatch):
    monkeypatch.setattr(judges, "drawable", lambda path: (None, None, None))
    monkeypatch.setattr(judges, "draw_points", lambda network, diffusion, n, seed: points.swiss_roll(n, 1000))
    found = judges.distance_to_roll("roll.pt", 0)
    assert found["distance"] == pytest.approx(found["of data to data"], rel=0.5)
