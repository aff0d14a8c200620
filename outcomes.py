"""What came out of a study of the report's claims: its table in Markdown, the outcome in words, the chart.

Report §1 … §4. study.py has the studies, each of which names its outcome and its chart. All follow from the rows of its table of
scores. An outcome is a function (study, rows) -> text, a chart (study, rows, path of the first run) -> uint8 (H, W, C); rows are
dicts of text, a row a run, seed and setting.
"""
from itertools import product

import numpy as np

from pictures import COLOURS, Chart, spread


def values(rows, score, **chosen):
    """The values (n,) of a score in the rows of a run, or of a setting."""
    return np.array([float(row[score]) for row in rows if all(row[key] == str(value) for key, value in chosen.items())])


def spread_of(values, form):
    """A mean and the range of several seeds, in words."""
    mean, low, high = (format(value, form) for value in (values.mean(), values.min(), values.max()))
    return mean if low == high else f"{mean} ({low} – {high})"


def score_table(study, rows):
    """The scores of a study in Markdown: a line a run and setting, each a mean and a range over seeds."""
    keys = list(study.settings[0])
    lines = [["run", *keys, "Gflops", "minutes", *study.columns]]
    lines += [["---"] * len(lines[0])]
    for run, setting in product(study.runs, study.settings):
        mine = [row for row in rows if row["run"] == run and all(row[key] == str(value) for key, value in setting.items())]
        if not mine:
            continue
        minutes = [float(row["minutes"]) for row in mine if row["minutes"]]
        lines.append([run, *map(str, setting.values()), f"{float(mine[0]['gflops']):.3g}",
                      f"{np.mean(minutes):.1f}" if minutes else "",
                      *(spread_of(values(mine, score), form) for score, form in study.columns.items())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ranking(score, claimed):
    """An outcome: the runs from the least to the largest mean of a score; claimed: the run that the report expects to be first."""
    def say(study, rows):
        found = {run: values(rows, score, run=run) for run in study.runs}
        order = sorted(found, key=lambda run: found[run].mean())
        first, second = order[:2]
        apart = found[first].max() < found[second].min()
        means = ", ".join(f"{run} {spread_of(found[run], study.columns[score])}" for run in order)
        best = [min(order, key=lambda run: values(rows, score, run=run, seed=seed).mean()) for seed in study.seeds]
        return (f"{score}, from the best: {means}. {first} is the best in {best.count(first)} of {len(best)} seeds. The ranges of "
                f"{first} and {second} "
                + ("lie apart. " if apart else "overlap: these seeds do not tell them apart. ")
                + ("This agrees with the report." if first == claimed and apart else
                   "This contradicts the report." if first != claimed and found[first].max() < found[claimed].min() else
                   "This neither confirms the report nor contradicts it."))
    return say


def duels(score, claimed, other):
    """An outcome: whether runs whose name begins with `claimed` have a lower score than those of the same name with `other`."""
    def say(study, rows):
        text, better, worse = [], 0, 0
        names = list(dict.fromkeys(run.partition(" ")[2] for run in study.runs))         # what the first words are tried with
        for name in names:
            found = {run.split()[0]: values(rows, score, run=run) for run in study.runs if run.partition(" ")[2] == name}
            order = sorted(found, key=lambda word: found[word].mean())
            text.append(f"{name}: " + ", ".join(f"{word} {spread_of(found[word], study.columns[score])}" for word in order))
            better += found[claimed].max() < found[other].min()
            worse += found[claimed].min() > found[other].max()
        verdict = ("agrees with" if better and not worse else "contradicts" if worse and not better else
                   "neither confirms nor contradicts")
        return (f"{score}, from the best: {'; '.join(text)}. All seeds of {claimed} are better than those of {other} in {better} "
                f"of {len(names)} cases, and worse in {worse}. This {verdict} the report.")
    return say


def trade_off(study, rows):
    """The outcome of guidance: what precision and recall do up to the scale of the highest precision, and beyond it."""
    text, scales = [], [setting["scale"] for setting in study.settings]
    for run in study.runs:
        p, r, distance = ({scale: values(rows, score, run=run, scale=scale).mean() for scale in scales}
                          for score in ("precision", "recall", "FD"))
        first, best, last = scales[0], max(p, key=p.get), scales[-1]
        if best == first or r[best] >= r[first]:
            said = f"recall is {r[best]:.3f} at scale {best:g}, where precision is highest, which contradicts the report"
        else:
            said = (f"from scale {first:g} to {best:g} precision goes from {p[first]:.3f} to {p[best]:.3f} and recall from "
                    f"{r[first]:.3f} to {r[best]:.3f}, as the report says")
        beyond = f"; at scale {last:g} precision is {p[last]:.3f} and recall {r[last]:.3f}" if best != last else ""
        text.append(f"{run}: {said}{beyond}; FD is lowest at scale {min(distance, key=distance.get):g}.")
    return " ".join(text)


def sampled(study, rows):
    """The outcome of samplers: what each needs at least to reach the distance of 250 ancestral steps, and how fast that is."""
    full = dict(sampler="ddpm", steps=250)
    distance, rate = (values(rows, score, **full) for score in ("FD", "images_per_s"))
    text = [f"250 ancestral steps reach an FD of {spread_of(distance, '.2f')}."]
    for sampler in ("ddpm", "ddim", "dpm++"):
        enough = [setting for setting in study.settings
                  if setting["sampler"] == sampler and values(rows, "FD", **setting).mean() <= distance.max()]
        text.append(f"{sampler} does not reach it." if not enough else
                    f"{sampler} reaches it with {enough[0]['steps']} evaluations, at "
                    f"{values(rows, 'images_per_s', **enough[0]).mean() / rate.mean():.1f} times the images/s.")
    return " ".join(text)


def rank_correlation(x, y):
    """Spearman's: the correlation of the ranks of x and y (n,); equal values share their mean rank."""
    ranks = [(v[:, None] > v).sum(axis=1) + (v[:, None] == v).mean(axis=1) * len(v) / 2 for v in (x, y)]
    return np.corrcoef(ranks)[0, 1]


def falls_with(costs, scores):
    """An outcome: the rank correlation of each score with each cost, and its interval by 10,000 resamplings of the runs.

    costs: pairs (cost, how the names of the runs end that are compared).
    """
    def say(study, rows):
        generator, text, highs, lows = np.random.default_rng(0), [], [], []
        for score, (cost, end) in product(scores, costs):
            pairs = np.array([[values(rows, name, run=run).mean() for name in (cost, score)]
                              for run in study.runs if run.endswith(end)])               # (runs, 2)
            some = (pairs[generator.integers(0, len(pairs), len(pairs))].T for _ in range(10_000))
            low, high = np.percentile([rank_correlation(x, y) for x, y in some if np.ptp(x) and np.ptp(y)], (5, 95))
            text.append(f"{score} with {cost}, {len(pairs)} runs{f' of {end}' if end else ''}: "
                        f"{rank_correlation(*pairs.T):.2f} ({low:.2f} – {high:.2f})")
            lows, highs = [*lows, low], [*highs, high]
        verdict = ("agrees with" if max(highs) < 0 else "contradicts" if min(lows) > 0 else "neither confirms nor contradicts")
        return (f"Rank correlation, with the middle 90 % of 10,000 resamplings of the runs: {'; '.join(text)}. "
                f"This {verdict} the report.")
    return say


def numbers_of(*scores):
    """An outcome where nothing is ranked: some scores of each run in each setting."""
    def say(study, rows):
        text = []
        for run, setting in product(study.runs, study.settings):
            found = (f"{score} {spread_of(values(rows, score, run=run, **setting), study.columns[score])}" for score in scores)
            text.append(", ".join([run, *(f"{key} {value}" for key, value in setting.items())]) + ": " + ", ".join(found))
        return "; ".join(text) + "."
    return say


# Charts

def by_run(score, log=False):
    """A chart of a score: a row a run, a disc a seed."""
    def draw(study, rows, path):
        found = [values(rows, score, run=run) for run in study.runs]
        low, high = spread(*found, log=log)
        room = high * (high / low) ** 0.3 if log else high + 0.3 * (high - low)          # for names
        chart = Chart((low, room), (0.5, len(found) + 0.5), x_label=score, width=900, height=110 + 34 * len(found), log_x=log)
        chart.y_ticks = []                               # rows have names
        for row, run, scored, colour in zip(range(len(found), 0, -1), study.runs, found, COLOURS * 3):
            chart.points(scored, np.full(len(scored), row), colour, 6)
            chart.text(scored.max(), row, run, colour)
        return chart.image()
    return draw


def along(key, score, lines="run", log=False):
    """A chart of the mean of a score along a setting, a line each run, or each value of another setting; discs are seeds."""
    def draw(study, rows, path):
        x, y = values(rows, key), values(rows, score)
        chart = Chart(spread(x, log=log), spread(y), x_label=key, y_label=score, width=900, height=480, log_x=log)
        for name, colour in zip(dict.fromkeys(row[lines] for row in rows), COLOURS):
            places = sorted({float(row[key]) for row in rows if row[lines] == name})
            mine = [np.array([float(row[score]) for row in rows if row[lines] == name and float(row[key]) == place])
                    for place in places]
            chart.line(places, [scored.mean() for scored in mine], colour, label=name)
            for place, scored in zip(places, mine):
                chart.points(np.full(len(scored), place), scored, colour, 4)
        return chart.image()
    return draw


def against(x, y, key):
    """A chart of a score against another: a line a run through the means in its settings, whose `key` is said; discs are seeds."""
    def draw(study, rows, path):
        chart = Chart(spread(values(rows, x)), spread(values(rows, y)), x_label=x, y_label=y, width=900, height=480)
        for run, colour in zip(study.runs, COLOURS):
            seeds = [[values(rows, score, run=run, **setting) for score in (x, y)] for setting in study.settings]
            means = np.array(seeds).mean(axis=2)                         # (settings, 2)
            chart.line(*means.T, colour, label=run)
            for pair, mean, setting in zip(seeds, means, study.settings):
                chart.points(*pair, colour, 4)
                chart.text(*mean, f"{setting[key]:g}", colour)
        return chart.image()
    return draw


def scattered(costs, score, groups):
    """Charts side by side of a score against each cost, on logarithmic axes: a disc a run, a colour a group, the end of its name."""
    def draw(study, rows, path):
        charts = []
        for cost in costs:
            x, y = (np.array([values(rows, name, run=run).mean() for run in study.runs]) for name in (cost, score))
            low, high = spread(x, log=True)
            chart = Chart((low, high * (high / low) ** 0.2), spread(y, log=True), x_label=cost, y_label=score, width=640,
                          height=480, log_x=True, log_y=True)
            for group, colour in zip(groups, COLOURS):
                mine = [i for i, run in enumerate(study.runs) if run.endswith(group)]
                chart.points(x[mine], y[mine], colour, 5, label=group)
                for i in mine:
                    chart.text(x[i], y[i], study.runs[i].removesuffix(group).rstrip(", "), colour)
            charts.append(chart.image())
        return np.concatenate(charts, axis=1)
    return draw


def seen(picture):
    """Samples of the first run, as a picture of judges.py shows them."""
    return lambda study, rows, path: picture(path)
