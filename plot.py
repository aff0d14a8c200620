"""Draw the figures: each shows one claim, which the command prints for the caption, and one line remakes it.

Report Fig. 1-2 and Eq. 2-3 (schedules and noise), Fig. 2-1 (a swiss roll, there and back), §3 (guidance), Fig. 4-3 and §2-7-1
(quality against Gflops). Times in the figures are the report's, t = 1 … T, and t = 0 is the data. pictures.py draws the lines.

    python plot.py run1.csv run2.csv                     loss curves of runs
    python plot.py schedules                             beta, alpha_bar and the signal-to-noise ratio of the three schedules
    python plot.py noising                               a digit on its way to noise, under two schedules
    python plot.py guidance --ckpt run.pt                the same noise at rising guidance scales
    python plot.py cost compare/compare.csv              Fréchet distance against Gflops, of `bench.py compare`
    python plot.py swissroll --ckpt run.pt --gif way.gif     Fig. 2-1 of a run of `train.py --data swissroll`
"""
import interrupts                        # noqa: F401  first, for signals while PyTorch is imported
import sys
from pathlib import Path

import numpy as np
import torch

import data
import ddpm
from cli import Parser, add_overwrite_flag, natural, one_line_errors, processes, rule_of
from files import check_output, csv_rows, read_text
from pictures import COLOURS, WINDOW, Chart, faint, points_panel, save_image, spread, table, write_gif
from sampling import decode, decoder, draw, drawable
from points import MLP, swiss_roll

SMOOTHED = 5                                     # rows of a log that a curve's point is the mean of
SCALES = (0, 1, 1.5, 3, 6)                       # of guidance; 0 leaves the class out, 1 is none
NOISED = (0, 50, 125, 250, 500, 750, 1000)       # times of the report's, of 1000
CHAIN = 2000                                     # points that go there and back
ARROWS = 12                                      # in each direction


# Logs

def read_rows(path, *needed):
    """The rows of a CSV file, dicts of text, "" where a row is short.  ValueError or OSError if there are none."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: there is no such file, and a command is one of {', '.join(COMMANDS)}")
    columns, rows = csv_rows(read_text(path), path, restval="")
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]}; it has {', '.join(columns) or 'none'}")
    if not rows:
        raise ValueError(f"{path} has a header and no rows")
    return rows


def numbers(path, rows, column):
    """A column of a file's rows as float64 (n,).  ValueError on what is no number."""
    try:
        return np.array([float(row[column]) for row in rows])
    except ValueError:
        raise ValueError(f"{path}: its column {column} holds something that is no number") from None


def smooth(values, window=SMOOTHED):
    """Means of up to `window` values around each of values (n,), as many on either side: fewer towards the ends."""
    reach = [min(window // 2, i, len(values) - 1 - i) for i in range(len(values))]
    return np.array([values[i - k:i + k + 1].mean() for i, k in enumerate(reach)])


def curves(args):
    """The loss of runs by step, each row of the log pale and their running means in full colour."""
    if len(args.csv) > len(COLOURS):
        raise ValueError(f"{len(args.csv)} runs: a chart tells {len(COLOURS)} apart, draw the others in another")
    stems = [Path(path).stem for path in args.csv]
    names = [stem if stems.count(stem) == 1 else path for stem, path in zip(stems, args.csv)]
    steps, losses = [], []
    for path in args.csv:
        rows = read_rows(path, "step", "loss")
        x, y = numbers(path, rows, "step"), numbers(path, rows, "loss")
        drawn = np.isfinite(y) & (y > 0)
        if not drawn.any():
            raise ValueError(f"{path} has no loss above 0, which a logarithmic axis needs")
        steps.append(x[drawn])
        losses.append(y[drawn])
    chart = Chart(spread(*steps), spread(*losses, log=True), width=900, height=560, x_label="step",
                  y_label=f"loss: rows of the log (pale), geometric means of {SMOOTHED}", log_y=True)
    for colour, x, y in zip(COLOURS, steps, losses):
        chart.line(x, y, faint(colour), 1.5)
    for colour, name, x, y in zip(COLOURS, names, steps, losses):
        chart.line(x, np.exp(smooth(np.log(y))), colour, label=name)
    ends = [y[-SMOOTHED:].mean() for y in losses]
    best = int(np.argmin(ends))
    which = "ends with a loss of" if len(names) == 1 else "ends with the lowest loss,"
    return chart.image(), f"{names[best]} {which} {ends[best]:.4g}, a mean of {min(SMOOTHED, len(losses[best]))} rows."


def cost(args):
    """Fréchet distance of each run against what one forward pass costs."""
    path = args.csv
    rows = read_rows(path, "model", "size", "gflops", "FD", "n")
    gflops, distances = numbers(path, rows, "gflops"), numbers(path, rows, "FD")
    if len({(row["n"], row.get("steps"), row.get("features_sha256")) for row in rows}) > 1:
        raise ValueError(f"{path}: its distances are of different n, steps or features, and do not compare: keep the rows of one")
    if not (gflops > 0).all() or not np.isfinite([gflops, distances]).all():
        raise ValueError(f"{path}: Gflops must be above 0, and distances finite")
    models = list(dict.fromkeys(row["model"] for row in rows))
    if len(models) > len(COLOURS):
        raise ValueError(f"{path} has {len(models)} models: a chart tells {len(COLOURS)} apart")
    low, high = spread(gflops, log=True, margin=0.1)
    chart = Chart((low, high * (high / low) ** 0.1), (0, 1.08 * max(distances.max(), 1e-9)), width=900, height=560,
                  x_label="Gflops of a forward pass", y_label="FD, the Frechet distance", log_x=True)
    for model, colour in zip(models, COLOURS):
        of_model = [i for i, row in enumerate(rows) if row["model"] == model]
        chart.points(gflops[of_model], distances[of_model], colour, 6, label=model)
        for size in dict.fromkeys(rows[i]["size"] for i in of_model):
            of_size = [i for i in of_model if rows[i]["size"] == size]
            x, low, high = gflops[of_size[0]], distances[of_size].min(), distances[of_size].max()
            chart.line([x, x], [low, high], colour, 1.5)
            chart.text(x, (low + high) / 2, size, colour)
    best = int(distances.argmin())
    return chart.image(), (f"The lowest FD, {distances[best]:.2f}, is that of {rows[best]['model']} {rows[best]['size']} at "
                           f"{gflops[best]:.3g} Gflops; a mark is a run, a line joins runs of one network.")


# The forward process

def schedules(args):
    """beta, alpha_bar and the signal-to-noise ratio alpha_bar / (1 - alpha_bar) of every schedule."""
    betas = {name: schedule() for name, schedule in ddpm.SCHEDULES.items()}
    alpha_bars = {name: ddpm.Diffusion(beta).alpha_bars for name, beta in betas.items()}
    snr = {name: alpha_bar / (1 - alpha_bar) for name, alpha_bar in alpha_bars.items()}
    charts = []
    for title, log, values_of in (("beta", True, betas), ("alpha_bar", False, alpha_bars), ("signal to noise", True, snr)):
        chart = Chart((0, 1000), spread(*values_of.values(), log=log), title, "t", width=480, log_y=log)
        for colour, (name, values) in zip(COLOURS, values_of.items()):
            chart.line(np.arange(1, len(values) + 1), values, colour, label=None if charts else name)     # one legend for all three
        charts.append(chart.image())
    half = ", ".join(f"{alpha_bar[499]:.3f} under {name}" for name, alpha_bar in alpha_bars.items())
    return np.concatenate(charts, axis=1), f"At t = 500 of 1000, alpha_bar, what is left of the image's variance, is {half}."


def noising(args):
    """One digit at several times under the linear and the cosine schedule, Eq. 2-3, with one eps."""
    held_out = data.load("mnist", split="test")
    if args.digit >= len(held_out):
        raise ValueError(f"--digit {args.digit}: there are {len(held_out)} held-out digits, from 0 on")
    images, _ = held_out.batch(np.array([args.digit]))
    x0 = data.to_float(images)
    eps = torch.randn(x0.shape, generator=ddpm.keyed_generator(args.seed))
    rows = []
    for name in ("linear", "cosine"):
        process = ddpm.Diffusion(ddpm.SCHEDULES[name]())
        noised = [process.q_sample(x0, torch.tensor([t - 1]), eps) if t else x0 for t in NOISED]
        rows.append(data.to_uint8(torch.cat(noised)).numpy())
    picture = table(np.stack(rows), ("linear", "cosine"), [str(t) for t in NOISED], "t =")
    return picture, "Under the linear schedule the digit is lost by t = 500; under the cosine one it can still be seen there."


# Runs

def guidance(args):
    """Samples of each class at rising guidance scales, a column one noise."""
    run, network, diffusion = drawable(args.ckpt)
    if network.num_classes is None or network.null_label is None:
        raise ValueError(f"{args.ckpt}: guidance needs a network with classes and an unconditional input")
    autoencoder = decoder(None, run, network)
    if run.vae and autoencoder is None:
        raise ValueError(f"{args.ckpt} draws latents, and the autoencoder that decodes them is not at hand")
    device, columns = processes()[0], min(network.num_classes, 10)
    network, autoencoder = network.to(device), autoencoder and autoencoder.to(device)
    rows = []
    for scale in SCALES:
        drawn = torch.cat([x for _, x in draw(network, diffusion, range(columns), list(range(columns)), args.seed, cfg_scale=scale,
                                              clip=autoencoder is None)])
        rows.append(data.to_uint8(drawn if autoencoder is None else decode(autoencoder, drawn)).cpu().numpy())
    names = (run.data.classes or list(map(str, range(columns))))[:columns]
    picture = table(np.stack(rows), [f"{scale:g}" for scale in SCALES], names, "scale")
    return picture, ("From the same noise, a larger guidance scale draws each class more clearly, up to a point; 0 leaves the "
                     "class out.")


@torch.no_grad()
def drift(network, diffusion, x, t):
    """f(x, t) = mu(x, t) - x of the reverse step from t (the code's, a number), Eq. 2-7, at points x (n, 2) -> (n, 2)."""
    xt, t = x.reshape(-1, 2, 1, 1), torch.full((len(x),), t)
    mean, *_ = diffusion.p_mean_variance(network(xt, diffusion.original(t)), xt, t)
    return (mean - xt).flatten(1)


def reverse(network, diffusion, n, seed=0):
    """The reverse process, Eq. 2-7, step by step -> (T + 1, n, 2): row t is x_t for the report's t, row T the noise."""
    noise = torch.randn(diffusion.T + 1, n, 2, 1, 1, generator=ddpm.keyed_generator(seed))
    path = [noise[0]]
    ddpm.sample(diffusion, network, noise.shape[1:], noise=noise, callback=lambda t, x, x0: path.append(x))
    return torch.stack(path[::-1]).flatten(2)


def drift_panel(network, diffusion, points, t, size):
    """Arrows of the drift at the report's t over points x_t (n, 2) -> uint8 (size, size, 3).

    The median arrow is as long as they are apart, and longer ones are cut to that: the scale is the panel's own.
    """
    ends = torch.linspace(*WINDOW, ARROWS + 2)[1:-1]
    places = torch.cartesian_prod(ends, ends)
    f = drift(network, diffusion, places, t - 1)
    length = f.norm(dim=1, keepdim=True)                                 # (ARROWS^2, 1)
    f = (f / torch.maximum(length, length.median()).clamp(min=1e-12) * (ends[1] - ends[0])).numpy()
    chart = points_panel(points, colour=faint(COLOURS[0]), size=size)
    chart.arrows(*places.T.numpy(), *f.T, COLOURS[1])
    return chart.image()


def swissroll(args):
    """Fig. 2-1: points of the data on the way to noise, points of noise on the way to data, and the drift that leads them."""
    _, network, diffusion = drawable(args.ckpt)
    if not isinstance(network, MLP):
        raise ValueError(f"{args.ckpt} draws images: python train.py --data swissroll makes a run on points")
    T, size, x0 = diffusion.T, 290, swiss_roll(CHAIN, seed=1)
    times = [max(1, round(share * T)) for share in (0, 0.03, 0.08, 0.2, 1)]
    eps = torch.randn(x0.shape, generator=ddpm.keyed_generator((args.seed, 1)))
    path = reverse(network, diffusion, CHAIN, (args.seed, 0))
    forward = [diffusion.q_sample(x0, torch.full((CHAIN,), t - 1), eps).numpy() for t in times]
    rows = [[points_panel(points, colour=COLOURS[6], size=size).image() for points in forward],
            [points_panel(path[t], size=size).image() for t in times],
            [drift_panel(network, diffusion, points, t, size) for t, points in zip(times, forward)]]
    if args.gif:
        shown = dict.fromkeys(round(T * (1 - i / 60) ** 2) for i in range(61))       # more of them where the roll appears
        write_gif(args.gif, [points_panel(path[t], f"t = {t}").image() for t in shown], "way", **rule_of(args))
    picture = table(np.array(rows), ("forward", "reverse", "drift"), [f"t = {t}" for t in times])
    return picture, ("Noise takes the roll apart (first row, to the right), and the learned reverse process puts it together "
                     "(second row, to the left), led by the drift f(x, t) = mu(x, t) - x (third row, each panel to its own scale).")


COMMANDS = {function.__name__: function for function in (curves, schedules, noising, guidance, cost, swissroll)}


def flags():
    """The command line."""
    parser = Parser(prog="plot.py", description="Draw a figure: python plot.py run.csv …, or one of the commands.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__)
        command.add_argument("--out", default=f"{name}.png", help=f"default: {name}.png")
        add_overwrite_flag(command)
    of = commands.choices
    of["curves"].add_argument("csv", nargs="+", help="logs of train.py; the command's name can be left out")
    of["cost"].add_argument("csv", help="compare.csv of bench.py compare")
    of["noising"].add_argument("--digit", type=natural, default=0, help="number of a held-out digit (default: 0)")
    of["swissroll"].add_argument("--gif", help="also write the way from noise to the roll")
    for name in ("guidance", "swissroll"):
        of[name].add_argument("--ckpt", default="run.pt", help="default: run.pt")
    for name in ("noising", "guidance", "swissroll"):
        of[name].add_argument("--seed", type=natural, default=0, help="of the noise (default: 0)")
    return parser


def main(argv=None):
    """The command: draw, write, and print the claim."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in (*COMMANDS, "-h", "--help"):
        argv = ["curves", *argv]
    args = flags().parse_args(argv)
    with one_line_errors("plot.py"):
        files, rule = {args.out: f"figure {args.command}"}, rule_of(args)
        if getattr(args, "gif", None):
            files[args.gif] = "way"
        for path, purpose in files.items():
            check_output(path, purpose, **rule)
        picture, claim = COMMANDS[args.command](args)
        save_image(args.out, picture, files[args.out], **rule)
        print(f"wrote {' and '.join(files)}: {claim}")


if __name__ == "__main__":
    sys.exit(main())
