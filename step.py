"""A training step: gradients by micro-batches, the optimizer, the average of the weights; and the state that a step changes.

Report §4-5. AdamW (Loshchilov & Hutter 2019) at a learning rate that is a function of the step. An exponential moving average of
the weights is what draws (Ho et al. 2020, appendix B). Nothing here waits for the device.
"""
import contextlib
import copy
import math

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ddpm import key_seed
from objectives import DROPOUT


class State:
    """What training changes: the network, its average, the optimizer, and the losses since the last row of the log."""

    def __init__(self, network, args, groups, device):
        self.network = network.to(device).train()
        self.ema = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
        self.bad_steps = torch.zeros((), device=device)                  # non-finite gradients in a row
        self.taken = torch.zeros((), device=device)                      # steps since the last save that were not skipped
        self.norm = torch.full((), math.nan, device=device)              # of the last gradient
        self.sums = torch.zeros(2, max(1, len(groups)), dtype=torch.float64, device=device)  # of losses, and how many, by group

    def restore(self, run):
        """Go on from a Run.  ValueError if it does not fit."""
        try:
            self.network.load_state_dict(run.model)
            self.ema.load_state_dict(run.ema)
            self.optimizer.load_state_dict(run.optimizer)
            self.bad_steps += run.bad_steps
            self.norm.fill_(run.norm)
            self.sums += run.log.to(self.sums.device)
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--resume: the run is damaged: {error}") from None

    def worth_saving(self):
        """Whether a step was taken since the last save, and all weights and averages are finite."""
        tensors = [z for network in (self.network, self.ema) for z in network.state_dict().values() if z.is_floating_point()]
        return bool(self.taken) and all(norm.isfinite() for norm in torch._foreach_norm(tensors, float("inf")))

    def add_losses(self, losses, groups):
        """Sum losses (n,) of samples that belong to groups (n,), on the device."""
        masks = groups == torch.arange(self.sums.shape[1], device=groups.device).unsqueeze(1)    # (G, n)
        self.sums[0] += torch.where(masks, losses.detach().double(), 0.0).sum(dim=1)
        self.sums[1] += masks.sum(dim=1)


def learning_rate(step, args):
    """The learning rate of a step: a linear rise over --warmup, then constant, or a half cosine to 0 at --steps."""
    rise = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    fall = 0.5 * (1 + math.cos(math.pi * step / args.steps)) if args.decay == "cosine" else 1.0
    return args.lr * rise * fall


@torch.no_grad()
def update_ema(ema, network, step, decay, finite):
    """ema <- d ema + (1 - d) network, d = min(decay, (1 + step) / (10 + step)); unchanged where finite (0 or 1) is 0."""
    weight = (1 - min(decay, (1 + step) / (10 + step))) * finite
    parameters, averages = list(network.parameters()), list(ema.parameters())
    torch._foreach_lerp_(averages, parameters, [weight] * len(averages))
    for average, buffer in zip(ema.buffers(), network.buffers()):
        average.copy_(buffer)                            # tables and statistics are no weights: copied, not averaged


def skip_unless(finite, optimizer):
    """Have the fused optimizer's next step change nothing where finite, on the device, is 0.0: it reads this of a GradScaler."""
    optimizer.grad_scale, optimizer.found_inf = None, 1 - finite


def guarded_step(optimizer, parameters, clip):
    """Clip and take an optimizer step, unless a gradient is not finite: then weights and moments stay as they are.

    Decided on the device, without waiting for it -> the gradient's norm, and whether it is finite (1.0 or 0.0).
    """
    norm = get_total_norm([parameter.grad for parameter in parameters])
    finite = norm.isfinite().float()
    if clip:
        clip_grads_with_norm_(parameters, clip, norm)
    skip_unless(finite, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    return norm, finite


def train_step(state, model, objective, batch, step, args, rank, world):
    """One step on this process's part of a batch: forward and backward by micro-batches, the optimizer, the average."""
    micro = len(batch[0]) // args.accumulate
    autocast = torch.autocast(batch[0].device.type, torch.bfloat16, enabled=args.precision == "bf16")
    for i in range(args.accumulate):
        torch.manual_seed(key_seed((args.seed, step, DROPOUT, i, rank)))         # of dropout, which draws globally
        last = world == 1 or i + 1 == args.accumulate
        with contextlib.nullcontext() if last else model.no_sync():              # exchange gradients once a step
            micro_batch = [None if z is None else z[i * micro:(i + 1) * micro] for z in batch]
            with autocast:
                losses, groups = objective.loss(model, *micro_batch)             # of (n,) samples, and their groups (n,)
            (losses.mean() / args.accumulate).backward()
        state.add_losses(losses, groups)
    for parameter_group in state.optimizer.param_groups:
        parameter_group["lr"] = learning_rate(step, args)
    state.norm, finite = guarded_step(state.optimizer, state.parameters, args.clip_grad)
    state.bad_steps = (state.bad_steps + 1) * (1 - finite)
    state.taken += finite
    update_ema(state.ema, state.network, step, args.ema, finite)
