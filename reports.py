"""What training shows at intervals: the log, a picture of what the network does, and scores on images that were held out.

Report §4-5, §2-4, §2-5, Fig. 2-1. A report's last arguments are the averaged network and the path of its picture. It writes the
picture and returns its scores by their names. Held-out images are read and computed in batches, which are halved where the
device's memory does not hold them.
"""
import contextlib
import csv
import io
import itertools
import math
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import data
from cascade import enlarge, shrink
from files import append, csv_rows, output_file, read_text
from objectives import learning_rate
from pictures import grid, points_picture, save_image
from points import sliced_wasserstein
from sampling import SCATTERED, draw_images, draw_points
from unet import UPSAMPLERS
from vae import pieces

LOG_EVERY = 50                         # steps between rows of run.csv
BATCH = 64                             # held-out images at once
LONG = 10 ** 7                         # images in all that are too many for a CPU; recipes for a laptop see 2 million at most


# The log

def say(line):
    """Print a line above the bar, at once."""
    tqdm.write(line)
    sys.stdout.flush()


def due(step, args, *intervals):
    """Whether what is done at one of these intervals of steps, None is never, is due after a step; after the last one it is."""
    return any(every and (step % every == 0 or step == args.steps) for every in intervals)


def row_due(step, args):
    """Whether the log has a row of a step: the only steps that wait for the device."""
    return due(step, args, LOG_EVERY, args.sample_every, args.eval_every)


def read_log(path, step):
    """The columns of a log; its rows up to a step, as what follows is redone; and whether all its lines are rows.

    A kill may have cut the last line off, before its end. A spreadsheet may have saved the log, see `files.csv_rows`.
    """
    text = read_text(path, "replace") if path.exists() else ""
    columns, rows = csv_rows(text, path)
    found = [None not in (*row, *row.values()) and row.get("step", "").isdecimal() and row for row in rows]
    kept = sorted((row for row in found if row and int(row["step"]) <= step), key=lambda row: int(row["step"]))
    return columns, kept, all(found if text.endswith("\n") else found[:-1])


def kept_beside(path):
    """Give a file another name beside its own, which no other file has -> that name."""
    name = next(name for i in itertools.count(1) if not (name := path.with_name(f"{path.stem}-{i}{path.suffix}")).exists())
    return path.rename(name)


def has_row(path, step):
    """Whether a log has the row of a step."""
    _, rows, _ = read_log(path, step)
    return bool(rows) and int(rows[-1]["step"]) == step


def row_missing(path, run, args):
    """Whether a Run was stopped between the save of its last step and the row that is due there: the losses are in the run."""
    return row_due(run.step, args) and not has_row(path, run.step) and bool(run.log[1].sum() > 0)


def now():
    """Seconds on the clock, once a GPU has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Log:
    """run.csv and the line or bar on the terminal.  images/s are training's own: the clock stands still where it is `paused`."""

    def __init__(self, path, args, groups, scores, start, rank):
        self.path, self.args, self.groups, self.rank = path, args, groups, rank
        self.columns = ("step", "images", "loss", *groups, *scores, "grad_norm", "lr", "images_per_s")
        self.scores = {}                                 # of the next row
        self.start, self.since, self.fifth = start, (start, time.perf_counter()), None
        self.bar = tqdm(total=args.steps, initial=start, disable=rank > 0 or not sys.stderr.isatty(), unit="step")
        if rank > 0:
            return
        columns, rows, whole = read_log(path, start) if start else ((), [], True)
        if columns and (columns[:3] != self.columns[:3] or not whole):
            say(f"{path} is not as this run wrote it: it is kept as {kept_beside(path)}, with all that could not be read")
            columns, rows = (columns, rows) if columns[:3] == self.columns[:3] else ((), [])
        self.columns += tuple(name for name in columns if name not in self.columns)      # scores given up since
        table = csv.writer(lines := io.StringIO(), lineterminator="\n")
        table.writerows([self.columns, *([row.get(name, "") for name in self.columns] for row in rows)])
        with output_file(path, "log" if start else "new log") as file:
            file.write(lines.getvalue().encode())

    @contextlib.contextmanager
    def paused(self):
        """Keep the time of a save, a picture or a score out of images/s."""
        began = now()
        yield
        (step, since), paused = self.since, time.perf_counter() - began
        self.since, self.fifth = (step, since + paused), self.fifth and self.fifth + paused

    def write(self, sums, step, norm):
        """Append the row of the steps since the last one; sums are those of all processes."""
        (losses, counts), norm = sums.tolist(), norm.item()              # waits for these of the device, and no more
        ended, (last, since) = time.perf_counter(), self.since
        rate = (step - last) * self.args.batch_size / (ended - since)
        self.since = step, ended
        if self.rank > 0:
            return
        mean = sum(losses) / sum(counts)
        by_group = {name: loss / count if count else math.nan for name, loss, count in zip(self.groups, losses, counts)}
        values = {"loss": mean, **by_group, **self.scores, "grad_norm": norm, "lr": learning_rate(step - 1, self.args)}
        row = {"step": str(step), "images": str(step * self.args.batch_size), "images_per_s": f"{rate:.1f}" if rate else "",
               **{name: f"{value:.8g}" for name, value in values.items()}}       # no rate of a row that a stop had left out
        append(self.path, ",".join(row.get(name, "") for name in self.columns) + "\n")
        shown = "".join(f", {name} {value:.4g}" for name, value in self.scores.items())
        self.scores = {}
        self.bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{rate:.0f}")
        if rate and (self.bar.disable or shown):
            left = (self.args.steps - step) * self.args.batch_size / rate / 60
            say(f"step {step}: loss {mean:.4f}{shown}, {rate:.0f} images/s, {left:.1f} minutes left")

    def advance(self, step):
        """Count a step on the bar.  After ten, say how long the rest will take by the last five: the first compile and warm up."""
        self.bar.update()
        if step == self.start + 5:
            self.fifth = now()
        if step == self.start + 10 and self.rank == 0:
            say(f"about {(now() - self.fifth) / 5 * (self.args.steps - step) / 60:.1f} minutes to go")


def first_line(training):
    """What the data of a `train.Training` was read as; below it what is trained, for how many epochs; and a third line where that
    is no work for a CPU."""
    args, dataset, start = training.args, training.dataset, training.start
    count = sum(value.numel() for value in training.state.network.state_dict().values())
    size = "x".join(map(str, dataset.image_size)) + (" latents" if args.vae else " pixels")
    epochs = math.ceil(args.steps * args.batch_size / len(dataset))
    too_long = ("\nso many images take a CPU days to months, see the minutes to go; python train.py, a DiT XS/16 on the embedded "
                "digits, takes minutes")
    return (f"{dataset.summary}\n{training.described['class']} {args.size}, {count:,} parameters, on {size}, "
            f"{dataset.channels} channel{'s' * (dataset.channels > 1)}; {training.device}, {args.precision}, {training.world} "
            f"process{'es' * (training.world > 1)}; steps {start} to {args.steps} of {args.batch_size} images, {epochs:,} "
            f"epoch{'s' * (epochs > 1)}" + too_long * (training.device.type == "cpu" and args.steps * args.batch_size > LONG))


def last_line(training, done, minutes):
    """What was saved where, and which command goes on."""
    args, out = training.args, training.out
    line = f"{done - training.start} steps in {minutes:.1f} minutes: saved {out}, {out.with_suffix('.csv')}"
    if training.saved != done:                           # see `train.Training.save`
        return f"{line.partition(':')[0]}: none after step {training.saved or 0} is saved; lower --lr, or set --clip-grad"
    if done < args.steps:
        return f"{line} at step {done}; python train.py --resume --out {out} goes on"
    line += f", {out.with_suffix('.png')}"
    if args.schedule:                                    # it denoises
        flags = "--ckpt BASE.pt --cascade" if args.size in UPSAMPLERS else "--ckpt"
        line += f"; python sample.py {flags} {out}{' --prompt TEXT' * bool(args.text)} draws more"
    return line


# Pictures and held-out scores

def save_rows(path, *sets):
    """Write a picture of sets of n images, uint8 (n, H, W, C), in rows of ten: below each row of the first set the others'."""
    n = len(sets[0]) // 10 * 10 or len(sets[0])          # whole rows
    rows = zip(*(images[:n].split(10) for images in sets))
    save_image(path, grid(torch.cat([row for group in rows for row in group]).numpy(), min(10, n)), "picture")


def in_batches(function, dataset):
    """function(x, y) of a data set's images (n, C, H, W) on the CPU, and its labels: an iterator, batch by batch, in order."""
    def computed(indices):
        images, labels = dataset.batch(indices)
        return function(data.to_float(images), labels)
    return pieces(computed, np.arange(len(dataset)), BATCH)


def sample_report(dataset, diffusion, seed, y_null, network, path):
    """Samples of a denoiser in eight rows; one column a class, for the first ten classes, or a caption.

    y_null: the unconditional input.
    """
    contexts = dataset.contexts
    columns = min((dataset.num_classes if contexts is None else len(contexts)) or 8, 10)
    shown = list(range(columns)) if dataset.num_classes else None
    if contexts is not None:
        rows = np.linspace(0, len(contexts) - 1, columns, dtype=int)
        shown = contexts[rows]
        print("captions of the picture's columns: " + "; ".join(dataset.distinct[row] for row in rows), flush=True)
    drawn = draw_images(network, diffusion, range(8 * columns), shown, seed, dataset.autoencoder, y_null=y_null)
    save_image(path, grid(torch.cat([images.cpu() for _, images in drawn]).numpy(), columns), "picture")
    return {}


def upsampling_report(held_out, diffusion, seed, device, network, path):
    """For every ten of up to 30 held-out images three rows: small, what an upsampler draws of those, and the originals."""
    n = min(30, len(held_out))
    images, labels = held_out.batch(np.arange(n))
    low = shrink(data.to_float(images.to(device)))
    drawn = data.to_uint8(enlarge(network, diffusion, low, labels, seed, range(n))).cpu()
    small = data.to_uint8(low).cpu().repeat_interleave(network.factor, dim=1).repeat_interleave(network.factor, dim=2)
    save_rows(path, small, drawn, images)
    return {}


def point_report(held_out, diffusion, seed, network, path):
    """The sliced Wasserstein distance of samples to as many points held out; as picture, the samples beside the data."""
    points, _ = held_out.batch(np.arange(SCATTERED))
    samples = draw_points(network, diffusion, SCATTERED, seed)
    save_image(path, points_picture(samples), "picture")
    return {"distance": sliced_wasserstein(samples, points.flatten(1))}


@torch.no_grad()
def accuracy_report(held_out, device, network, path):
    """The accuracy on held-out images; as picture, what is taken for each of the first ten classes, mistakes on top."""
    found = in_batches(lambda x, y: (network(x.to(device)).argmax(dim=1).cpu(), y), held_out)
    taken, labels = (torch.cat(parts) for parts in zip(*found))          # (N,), (N,)
    wrong = taken != labels
    columns = min(held_out.num_classes, 10)
    picture = torch.full((8, columns, *held_out.images.shape[1:]), 128, dtype=torch.uint8)
    for k in range(columns):
        rows = torch.cat([(wrong & (taken == k)).nonzero(), (~wrong & (taken == k)).nonzero()]).flatten()[:8]
        picture[:len(rows), k], _ = held_out.batch(rows.numpy())
    save_image(path, grid(picture.flatten(0, 1).numpy(), columns), "picture")
    return {"accuracy": 1 - wrong.double().mean().item()}


@torch.no_grad()
def reconstruction_report(held_out, device, network, path):
    """The PSNR in dB of held-out images that an autoencoder gives back; as picture, 40 of them, below each row what comes back.

    PSNR = 10 log10(2^2 / mean square error), of means decoded.
    """
    def returned(x, _):
        x = x.to(device)
        decoded = network.decode(network.encode(x)[0]).clamp(-1, 1)
        return (decoded - x).double().square().flatten(1).mean(dim=1).sum().item(), data.to_uint8(decoded).cpu()
    error, shown = 0.0, []
    for error_of_batch, decoded in in_batches(returned, held_out):
        error += error_of_batch
        shown += decoded[:40 - len(shown)]
    originals, _ = held_out.batch(np.arange(len(shown)))
    save_rows(path, originals, torch.stack(shown))
    return {"psnr": 10 * math.log10(4 * len(held_out) / error) if error else math.inf}
