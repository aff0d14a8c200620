"""Train a network: DiT, U-ViT or U-Net to denoise, ViT to classify, an autoencoder to give images back.

Report §4-5, §2-4 and §2-5. The flags are settings.py's. What a step draws and minimises is objectives.py's, and depends on
(seed, step) alone: so a run resumes exactly, and one process or eight train alike. The loop here is the same for all.

    python train.py                                                       a small DiT on the embedded digits, minutes on a CPU
    python train.py --model uvit --size S/2 --data cifar10 --flip         after the paper's recipe
    python train.py --model uvit --data shapes --text                     a small U-ViT learns to draw what a caption says
    torchrun --nproc-per-node 8 train.py --size L/2 --data photos/ --image-size 64
"""
import interrupts                        # noqa: F401  first, for signals while PyTorch is imported
import contextlib
import copy
import math
import os
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import data
from cli import (autocast, first_in_turn, gpu_memory, one_line_errors, precision_on, processes, smallest,
                 stop_signals, total)
from ddpm import SCHEDULES, Diffusion
from features import default_space, read_tables, space_of
from files import check_output, sole_writer
from gflops import fitting_parts, gib, training_memory
from image_files import allow_pixels
from latents import embeddings, latents, measured_scale
from models import build, compile_blocks
from objectives import (MAX_BAD_STEPS, Autoencoding, Classification, Denoising, LatentSamples, Pixels, Randomness, State,
                        SuperResolution, train_step)
from reports import (Log, accuracy_report, due, first_line, last_line, point_report, reconstruction_report, row_due, row_missing,
                     has_row, sample_report, say, upsampling_report)
from sampling import TextReader, unconditional
from scoring import lacks, measure_reference, possible, sample_scores, warn_of_few
from settings import TEXT_DIM, TEXT_TOKENS, description, read_settings, signature
from text import TextEncoder
from unet import UPSAMPLERS
from vit import divided

# Data

def check_data(args, run, pixels):
    """ValueError if a run was trained on other images, or other classes, than the data set now holds, wherever it lies."""
    known = run.data
    if known.fingerprint is None:
        if os.environ.get("RANK", "0") == "0":
            say(f"{args.out} is older than fingerprints of data: whether {args.data} still holds the same is not known")
    elif known.fingerprint != data.fingerprint(pixels):
        before, after = known.classes or [], pixels.classes or []
        gone, new = (", ".join(sorted({*names} - {*others})[:5]) or "none" for names, others in ((before, after), (after, before)))
        differ = (f"its classes differ, or their order: gone are {gone}, new are {new}" if before != after else
                  f"it had {known.images:,} images to train on and has {len(pixels):,}" if known.images != len(pixels) else
                  "it holds other images, labels or captions, or in another order")
        raise ValueError(f"--resume: {args.data} is not what the run in {args.out} was trained on: {differ}")


def load_split(args, split):
    """The "train" or "test" part of the data, which may lie in other files."""
    with first_in_turn():
        return data.load(args.data, args.image_size, split, args.cache, args.skip_bad)


def load_data(args, run, device):
    """The training split, or with --vae its latents, which are encoded once it is clear that the network takes them."""
    try:
        pixels = load_split(args, "train")
    except (ValueError, OSError) as error:
        if run is None:
            raise
        raise ValueError(f"{error}; if the data moved, --data NEW says where it is") from None
    if run:
        check_data(args, run, pixels)
    if args.text and pixels.captions is None:
        raise ValueError(f"--text: {args.data} has no captions; shapes, coco:DIR and a folder with a .txt beside each image do")
    if not args.vae:
        return pixels
    autoencoder = checkpoint.load_autoencoder(args.vae).to(device).requires_grad_(False)
    sha256, factor = autoencoder.origin.sha256, autoencoder.factor
    autoencoder.scale = args.latent_scale or autoencoder.scale
    if not 0 < autoencoder.scale < math.inf:
        raise ValueError(f"--vae {args.vae}: latents cannot be scaled by {autoencoder.scale}; --latent-scale names another number")
    if run and run.vae.sha256 != sha256:
        raise ValueError(f"--resume: {args.vae} is another autoencoder than the run in {args.out} was trained with")
    size = divided(pixels.image_size, factor, "the autoencoder's factor")
    try:
        with torch.device("meta"):
            build(description(args, size, autoencoder.latent_channels, pixels.num_classes,
                              *((TEXT_DIM, TEXT_TOKENS) if args.text else ())))
    except ValueError as error:
        raise ValueError(f"{error}; of latents: an image's side is {factor} times that; --size Ti/2 has patches of 2") from None
    with autocast(device, args.precision):
        return latents(pixels, autoencoder, sha256, args.flip, args.cache)


def encode_captions(args, dataset, run, device):
    """Have the batches of a data set hold conditions made of its captions -> the TextReader that makes them.

    With --clip they are contexts, encoded once. Else they are ids, which an encoder of the network's own reads.
    """
    if args.clip:
        encoder, tokenizer = checkpoint.load_clip(args.clip)
        if run and run.text.sha256 != encoder.origin["sha256"]:
            raise ValueError(f"--resume: {args.clip} is another text encoder than the run in {args.out} was trained with")
        encoder = encoder.to(device).requires_grad_(False)
        dataset.encode_captions(lambda captions: embeddings(captions, encoder, tokenizer, args.cache))
        return TextReader(tokenizer, encoder)
    longest = max(sum(len(pieces) for _, pieces in TextEncoder.pieces(caption))
                  for row in dataset.rows for caption in dataset.captions[row])
    encoder = TextEncoder(TEXT_DIM, min(longest + 1, TEXT_TOKENS))       # one ends the caption
    dataset.encode_captions(lambda captions: encoder.tokenize(captions).numpy())
    return TextReader(encoder)


# The network, what it learns, and what is shown of it

def build_network(args, dataset, reader=None):
    """The network that the flags name, at the data's size, channels and classes, and its description.

    reader: of --text, whose contexts the network takes.
    """
    context = {}
    if reader:
        encoder = reader.encoder or reader.tokenizer
        own = None if reader.encoder else dict(dim=encoder.dim, length=encoder.length)   # trained along with the network
        context = dict(context_dim=encoder.dim, context_tokens=encoder.length, encoder=own)
    described = description(args, dataset.image_size, dataset.channels, dataset.num_classes, **context)
    torch.manual_seed(args.seed)
    network = build(described)
    network.checkpointing = args.checkpointing
    return network, described


def build_objective(args, dataset, network, random, reader=None):
    """The objective of a model, see objectives.py; its report, see reports.py, and the names of its scores; reader: of --text."""
    device, autoencoder = random.device, dataset.autoencoder
    inputs = (Pixels(random, args.flip, args.shift) if autoencoder is None else
              LatentSamples(random, args.flip, autoencoder.scale))
    if args.model == "vit":
        return Classification(inputs), partial(accuracy_report, load_split(args, "test"), device), ("accuracy",)
    if args.model == "vae":
        shape = (network.latent_channels, *divided(dataset.image_size, network.factor, "the autoencoder's factor"))
        return Autoencoding(inputs, shape), partial(reconstruction_report, load_split(args, "test"), device), ("psnr",)
    diffusion = Diffusion(SCHEDULES[args.schedule](), args.prediction, args.variance)
    y_null = unconditional(network, reader, args.cfg_drop)
    if args.size in UPSAMPLERS:
        report = partial(upsampling_report, load_split(args, "test"), diffusion, args.seed, device)
        return SuperResolution(diffusion, inputs, y_null, args.cfg_drop, args.max_weight), report, ()
    objective = Denoising(diffusion, inputs, y_null, args.cfg_drop, args.max_weight)
    if args.model == "mlp":
        return objective, partial(point_report, load_split(args, "test"), diffusion, args.seed), ("distance",)
    return objective, partial(sample_report, dataset, diffusion, args.seed, objective.y_null), ()


def build_scores(args, dataset, objective, device):
    """evaluate.py's scores of --eval-n samples against the training data or --reference: a function of the network, see
    `scoring.sample_scores`, and their names."""
    images = dataset if dataset.autoencoder is None else dataset.pixels
    if args.reference:
        tables = read_tables(args.reference)
        images = data.load(args.reference, split="all") if tables is None or tables["images"] else None
    there = len(images) if images else args.eval_n
    if min(args.eval_n, there) < 4:
        raise ValueError(f"--eval-every: precision and recall need at least 4 samples and images, not {args.eval_n} and {there}")
    with first_in_turn():
        space = space_of(args.features or default_space(args.data, dataset.images.shape[1:]), device, args.cache)
    reference = measure_reference(images, space, args.reference or args.data, args.reference, args.cache)
    wanted = possible(space, None if args.text else dataset.classes, lacks(images, args.reference))
    warn_of_few(wanted, args.eval_n, reference.measured)
    scores = partial(sample_scores, dataset, objective.diffusion, reference.measured, space, wanted, args.eval_n, args.seed,
                     objective.y_null)
    return scores, tuple(map(space.title, wanted))


# The loop

def wrapped(network, args, device, world):
    """The network compiled, and shared by processes, as the flags say."""
    if args.compile:
        compile_blocks(network)
    if world == 1:
        return network
    with warnings.catch_warnings():                      # torch 2.13 has another name for broadcast_buffers, 2.11 this one only
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(network, [device] if device.type == "cuda" else None, broadcast_buffers=False,
                                       gradient_as_bucket_view=True)                     # else gradients are held twice


class Training:
    """A run in memory: its data, network, objective, report, scores and state; from the start, or from where a Run stopped."""

    def __init__(self, args, run, device, rank, world):
        parts = 1 if args.accumulate == "auto" else args.accumulate
        if args.batch_size % (world * parts):
            raise ValueError(f"--batch-size {args.batch_size} is not a multiple of {world} processes x {parts} micro-batches")
        self.args, self.device, self.rank, self.world = args, device, rank, world
        self.out, self.start, self.saved = Path(args.out), run.step if run else 0, run and run.step
        self.part = slice(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)
        random = Randomness(args.seed, args.batch_size, self.part, device)
        self.dataset = load_data(args, run, device)
        self.fingerprint = data.fingerprint(self.dataset if self.dataset.autoencoder is None else self.dataset.pixels)
        reader = encode_captions(args, self.dataset, run, device) if args.text else None
        network, self.described = build_network(args, self.dataset, reader)
        if run and run.network != self.described:
            raise ValueError(f"--resume: {self.out} holds {run.network}, these settings and data make {self.described}")
        self.objective, self.report, columns = build_objective(args, self.dataset, network, random, reader)
        self.scores, more = build_scores(args, self.dataset, self.objective, device) if args.eval_every else (None, ())
        self.clip = reader.record() if reader else None
        args.accumulate = self.fitting_accumulation(network, parts)
        self.state, self.unfinished = State(network, args, self.objective.groups, device), False
        if run:
            self.resume(run)
        self.log = Log(self.out.with_suffix(".csv"), args, self.objective.groups, columns + more, self.start, rank)
        self.model, self.saves = wrapped(network, args, device, world), checkpoint.Saves()

    def fitting_accumulation(self, network, parts):
        """--accumulate: the parts asked for, after a line if they take more memory than the GPU has, or of auto as few as fit.

        ValueError if not even one image fits.
        """
        card = gpu_memory(self.device)
        if card is None:
            return parts
        card = smallest(card)                            # or processes would disagree
        args, objective = self.args, copy.deepcopy(self.objective)       # whose tables move to the meta device
        batch = self.objective.draw(0, *data.Batches(self.dataset, args.batch_size, args.seed, self.part)[0])
        plain, recomputed = training_memory(network, lambda model, *inputs: objective.loss(model, *inputs)[0].mean(), batch,
                                            args.precision == "bf16")
        memory, n = recomputed if args.checkpointing else plain, len(batch[0])
        fits = fitting_parts(memory, n, card)
        if fits is None:
            remedy = ("take a smaller --size" if args.checkpointing or fitting_parts(recomputed, n, card) is None else
                      f"--checkpointing takes {gib(recomputed.needed(1))}")
            raise ValueError(f"training takes {gib(memory.needed(1))} by count for one image at a time, and this GPU has "
                             f"{gib(card)}: {remedy}")
        chosen = fits if args.accumulate == "auto" else parts
        room = f"a step takes {gib(memory.needed(n // chosen))} by count, and this GPU has {gib(card)}"
        if self.rank == 0 and chosen < fits:
            say(f"WARNING: {room}: --accumulate {fits} takes {gib(memory.needed(n // fits))}")
        elif self.rank == 0:
            say(f"--accumulate {chosen}: {room}")
        return chosen

    def resume(self, run):
        """Go on from a Run, which is emptied: it takes as much memory as the network and its optimizer."""
        log = self.out.with_suffix(".csv")
        missing = self.rank == 0 and row_missing(log, run, self.args)
        self.unfinished = total(torch.tensor(float(missing)), self.world) > 0        # a row, that of its last step
        self.state.restore(run)
        if self.rank > 0 or has_row(log, self.start):   # the sums are those of all processes, or in the log already
            self.state.sums.zero_()
        run.model = run.ema = run.optimizer = None

    def save(self, step, last):
        """Have run.pt written, by the first process, unless it would replace a better one: then that stays, and this is said.

        last: whether training ends here.
        """
        args, dataset, state = self.args, self.dataset, self.state
        sums, first = total(state.sums, self.world).cpu(), self.saved is None
        if not state.worth_saving(last):                 # all processes find the same
            if self.rank == 0:
                say(f"step {step} is not saved: its gradient, or those of all steps since the last save, or a weight is not finite")
            return
        state.taken.zero_()
        self.saved = step
        if self.rank > 0:
            return
        if first:                                        # a file may have appeared since the start
            check_output(self.out, "run")
        autoencoder = dataset.autoencoder and replace(dataset.autoencoder.origin, scale=dataset.autoencoder.scale)
        if args.model == "vae":
            autoencoder = checkpoint.Autoencoder(measured_scale(state.ema, dataset, self.device))
        process = args.schedule and checkpoint.Process(args.schedule, self.objective.diffusion.T, args.prediction, args.variance)
        about = checkpoint.Data(args.data, dataset.classes, dataset.num_classes, dataset.channels, list(dataset.image_size),
                                len(dataset), self.fingerprint, dataset.summary)
        self.saves.begin(self.out, checkpoint.Run(
            version=checkpoint.VERSION, step=step, config={**vars(args), "resume": False}, network=self.described,
            diffusion=process, data=about, vae=autoencoder, text=self.clip, model=state.network.state_dict(),
            ema=state.ema.state_dict(), optimizer=state.optimizer.state_dict(), bad_steps=int(state.bad_steps), log=sums,
            norm=state.norm.item(), signature=signature(vars(args))))
        if first:                                        # no log has rows of a run that is not there
            self.saves.wait()

    def write_row(self, step, diverged=False):
        """Write the log's row of a step, with the picture and the scores that are due there."""
        with self.log.paused(), autocast(self.device, self.args.precision):
            if self.rank == 0 and due(step, self.args, self.args.sample_every) and not diverged:
                self.log.scores |= self.report(self.state.ema, self.out.with_suffix(".png"))
            if due(step, self.args, self.args.eval_every) and not diverged:
                self.log.scores |= self.scores(self.state.ema)           # by all processes together
        self.log.write(total(self.state.sums, self.world), step, self.state.norm)
        self.state.sums.zero_()

    def run(self):
        """The loop over the steps -> the last one done, and whether a signal stopped it."""
        args, state, done, stopping = self.args, self.state, self.start, False
        steps, batches = range(self.start, args.steps), data.Batches(self.dataset, args.batch_size, args.seed, self.part)
        with stop_signals() as stop, self.log.bar, self.saves:
            if self.unfinished:
                self.write_row(self.start)
            for step, batch in zip(steps, data.ahead(batches.__getitem__, steps, self.device)):
                train_step(state, self.model, self.objective, batch, step, args, self.rank, self.world)
                done, row = step + 1, row_due(step + 1, args)
                self.log.advance(done)
                self.saves.check()
                stopping, diverged = self.world == 1 and bool(stop), False
                if row:                                  # the only steps that wait for the device
                    stopping = total(torch.tensor(float(bool(stop)), device=self.device), self.world) > 0    # all agree
                    diverged = bool(state.bad_steps >= MAX_BAD_STEPS)
                first = row and self.saved is None
                saves = stopping or first or due(done, args, args.save_every, args.sample_every, args.eval_every)
                if saves and not diverged:
                    with self.log.paused():
                        self.save(done, stopping or done == args.steps)          # before pictures and scores, which may fail
                if row and self.saved is not None:
                    self.write_row(done, diverged)
                if diverged:
                    raise ValueError(f"{int(state.bad_steps)} steps in a row had a NaN or infinite gradient, and none was taken: "
                                     "lower --lr, set --clip-grad, or look at the data")
                if stopping:
                    break
        return done


def train(args, run, device, rank, world):
    """Train from the start, or from where `run` stopped."""
    training = Training(args, run, device, rank, world)
    if rank == 0:
        say(first_line(training))
    began = time.perf_counter()
    done = training.run()
    if rank == 0:
        say(last_line(training, done, (time.perf_counter() - began) / 60))


def main(argv=None):
    """The command: validate the flags, join the processes, train."""
    with one_line_errors("train.py"):
        args, run = read_settings(argv)
        allow_pixels(args.max_pixels)
        device, rank, world = processes(args.device, args.compile, precision=args.precision)
        args.precision = precision_on(device, args.precision)
        with sole_writer(args.out) if rank == 0 else contextlib.nullcontext():
            if run and run.step >= args.steps and not row_missing(Path(args.out).with_suffix(".csv"), run, args):
                raise ValueError(f"--resume: {args.out} is at step {run.step} of {args.steps}: --steps sets a later end")
            train(args, run, device, rank, world)


if __name__ == "__main__":
    sys.exit(main())
