"""What a network costs: parameters, multiply-adds and the memory of training, beside the numbers that the report quotes.

Report §2-7-1, §4-3, §4-10, Fig. 5-1 and 5-2. Convention, that of the papers: Gflops are the 10^9 multiply-adds of one forward
pass for one image, in linear layers, convolutions and both products of attention; biases, norms, activations, softmax and
resampling are not counted. Guidance doubles them. Training keeps 20 bytes a parameter, and what each image's forward pass saves
for the backward pass: the activations. Counting runs on PyTorch's meta device, which knows shapes only, so neither memory nor
time depends on the width of the network.

    python gflops.py                                            every table of the report, and the memory of training
    python gflops.py --model uvit --size H/2 --image-size 64    one network
"""
import interrupts                        # noqa: F401  first, for signals while PyTorch is imported
import functools
import sys
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import dit
import unet
import vit
from cli import Parser, natural, one_line_errors, positive
from ddpm import Diffusion, linear_betas
from models import MODELS, build, describe
from text import CLIPTextEncoder
from vae import AutoencoderKL

# What the networks see: latents of 256 x 256 and 512 x 512 images (four channels, an eighth of the sides), or pixels
LATENT_256, LATENT_512 = (dict(image_size=side, channels=4, num_classes=1000) for side in (32, 64))
DIT_256, DIT_512 = ({**size, "learn_sigma": True} for size in (LATENT_256, LATENT_512))
COCO = dict(image_size=32, channels=4, context_dim=768)                  # latents and CLIP's 77 tokens


def pixels(side, num_classes=None):
    """Options of a network that sees colour images."""
    return dict(image_size=side, channels=3, num_classes=num_classes)


def adm(side):
    """Options of ADM's released networks, which have no null class and learn the variance."""
    return dict(**pixels(side, 1000), null_class=False, learn_sigma=True)


# A row: name, the networks that it runs once each, published 10^6 parameters and Gflops as they are printed, perhaps a remark.
# Published numbers are the report's, or the papers' as later work quotes them; None where none was at hand.
TABLES = {
    "§4-3: DiT on latents of 256x256 images (Peebles & Xie 2023, tables 1 and 4)": [
        *((f"DiT-{size}", [("dit", size, DIT_256)], parameters, gflops) for size, parameters, gflops in (
            ("S/8", None, "0.36"), ("S/4", None, "1.41"), ("S/2", "33", "6.06"),
            ("B/8", None, "1.42"), ("B/4", None, "5.56"), ("B/2", "130", "23.01"),
            ("L/8", None, "5.01"), ("L/4", None, "19.70"), ("L/2", "458", "80.71"),
            ("XL/8", None, "7.39"), ("XL/4", None, "29.05"), ("XL/2", "675", "118.64"))),
        ("DiT-XL/2 at 512x512", [("dit", "XL/2", DIT_512)], "675", "525"),
    ],
    "§2-8-3: the four blocks of DiT-XL/2 (Peebles & Xie 2023, figure 5)": [
        (f"DiT-XL/2 {name}", [("dit", "XL/2", {**DIT_256, "conditioning": name})], None, published)
        for name, published in zip(dit.BLOCKS, ("118.64", "118.56", "137.62", "119.37"))
    ],
    "§4-1: U-ViT (Bao et al. 2023, table 1)": [
        ("U-ViT-S/2 CIFAR-10", [("uvit", "S/2", pixels(32))], None, None),
        ("U-ViT-S/4 CelebA 64", [("uvit", "S/4", pixels(64))], None, None),
        ("U-ViT-M/4 ImageNet 64", [("uvit", "M/4", {**pixels(64, 1000), "null_class": False})], "131", None),
        ("U-ViT-L/4 ImageNet 64", [("uvit", "L/4", {**pixels(64, 1000), "null_class": False})], "287", None),
        ("U-ViT-L/2 ImageNet 256", [("uvit", "L/2", LATENT_256)], "287", None),
        ("U-ViT-H/2 ImageNet 256", [("uvit", "H/2", LATENT_256)], "501", None),
        ("U-ViT-L/4 ImageNet 512", [("uvit", "L/4", LATENT_512)], "287", None),
        ("U-ViT-H/4 ImageNet 512", [("uvit", "H/4", LATENT_512)], "501", None),
    ],
    "Fig. 5-1: MS-COCO; the figure adds text encoder (TE) and autoencoder (AE) to the denoiser": [
        ("U-ViT-S/2", [("uvit", "S/2", COCO)], "45", None),
        ("U-ViT-S/2 Deep", [("uvit", "S-deep/2", COCO)], "58", None),
        ("U-Net", [("unet", "ldm-coco", COCO)], "53", None, "a configuration of that size; theirs is not published"),
        ("CLIP's text encoder (TE)", [("clip", None, {})], "123", None, "one caption"),
        ("Stable Diffusion's (AE)", [("vae", None, {})], "84", None, "one 256x256 image, in and out"),
    ],
    "§4-10, Fig. 5-2: ImageNet (Dhariwal & Nichol 2021; Rombach et al. 2022; Peebles & Xie 2023)": [
        ("ADM at 256x256", [("unet", "adm-256", adm(256))], None, "1120"),
        ("ADM-U at 256x256", [("unet", "adm-64", adm(64)), ("unet", "adm-64-256", adm(256))], None, "742"),
        ("LDM-8", [("unet", "ldm-8", dict(image_size=32, channels=4))], None, "57"),
        ("LDM-4", [("unet", "ldm-4", dict(image_size=64, channels=3))], "400", "103.6"),
        ("DiT-XL/2", [("dit", "XL/2", DIT_256)], "675", "119"),
        ("ADM at 512x512", [("unet", "adm-512", adm(512))], None, "1983"),
        ("ADM-U at 512x512", [("unet", "adm-128", adm(128)), ("unet", "adm-128-512", adm(512))], None, "2813"),
        ("DiT-XL/2 at 512x512", [("dit", "XL/2", DIT_512)], "675", "525"),
    ],
}
TRAINED = [                            # name and network, of which the memory of training is printed
    *((f"DiT-{size}", ("dit", size, DIT_256)) for size in ("L/2", "XL/2")),
    ("U-ViT-H/2", ("uvit", "H/2", LATENT_256)), ("ADM at 64x64", ("unet", "adm-64", adm(64)))]
BATCH, GIB, MIB = 256, 2 ** 30, 2 ** 20
ROOM = 0.9                             # of a card's memory; its context, the kernels' own memory and gaps take the rest


BESIDE = {                             # Fig. 5-1: what a denoiser needs beside it, and what that takes for one caption or image
    "clip": lambda: (CLIPTextEncoder(), torch.zeros(1, 77, dtype=torch.long)),
    "vae": lambda: (AutoencoderKL(), torch.empty(1, 3, 256, 256), torch.empty(1, 4, 32, 32)),
}


@torch.no_grad()
def count(model, *inputs):
    """Parameters of a network, and multiply-adds of its forward pass for inputs, tensors or None, by the convention above.

    The network computes nothing: shapes alone pass through it. Parameters are the numbers of its state dict, so DiT's fixed
    positions are among them, as in the published counts.
    """
    state = {name: value.to("meta") for name, value in (*model.named_parameters(), *model.named_buffers())}
    with FlopCounterMode(display=False) as counter:      # on the CPU it would miss the fused kernel of attention
        functional_call(model, state, tuple(None if z is None else z.to("meta") for z in inputs))
    return sum(value.numel() for value in model.state_dict().values()), counter.get_total_flops() // 2


def inputs_of(network):
    """What a network takes for one image, as tensors on the meta device."""
    with torch.device("meta"):
        x, t = torch.empty(1, network.channels, *network.image_size), torch.zeros(1, dtype=torch.long)
        if isinstance(network, vit.ViT):
            return (x,)
        y = None if network.num_classes is None else t
        if network.context_dim is not None:
            y = torch.empty(1, getattr(network, "context_tokens", 1), network.context_dim)       # LDM's class is one token
        if not isinstance(network, unet.SuperResUNet):
            return x, t, y
        return x, t, y, torch.empty(1, network.channels, *(side // network.factor for side in network.image_size))


@functools.cache
def network_cost(model, size, **options):
    """Parameters, and multiply-adds for one image, of a named network; options as in `models.describe`."""
    with torch.device("meta"):
        if model in BESIDE:
            network, *inputs = BESIDE[model]()
            return count(network, *inputs)
        network = build(describe(model, size, **options))
    return count(network, *inputs_of(network))


# Memory

class OnCuda(TorchFunctionMode):
    """Has tensors on the meta device be computed as training on CUDA computes them, for what that saves.

    Attention is a fused kernel's, which saves no weights. With half, as under autocast, products are in bfloat16, and norms and
    the cross-entropy in float32.
    """

    TYPES = {F.linear: torch.bfloat16, F.conv2d: torch.bfloat16,
             F.layer_norm: torch.float32, F.group_norm: torch.float32, F.cross_entropy: torch.float32}

    def __init__(self, half):
        super().__init__()
        self.half = half

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, attention = kwargs or {}, function is F.scaled_dot_product_attention
        if self.half and (attention or function in self.TYPES):
            dtype = self.TYPES.get(function, torch.bfloat16)
            args = [z.to(dtype) if torch.is_tensor(z) and z.is_floating_point() else z for z in args]
        if attention:
            mask = kwargs["attn_mask"]
            bias = None if mask is None else mask.to(args[0].dtype)
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, bias, torch.is_grad_enabled())[0]
        return function(*args, **kwargs)


def saved_bytes(network, loss, batch, half, checkpointing):
    """Bytes that a forward pass in training saves for the backward pass on CUDA: in all, and the most in one of the blocks.

    loss(model, *batch) -> a scalar; batch: tensors, of which types and shapes count, or None; half: by bf16 autocast.
    """
    state = {name: value.detach().to("meta").requires_grad_(value.requires_grad)
             for name, value in (*network.named_parameters(), *network.named_buffers())}
    kept, others, ends = {}, {id(value.untyped_storage()) for value in state.values()}, [0]

    def save(z):
        storage = z.untyped_storage()                    # views of one are saved once
        if id(storage) not in others:
            kept[id(storage)] = storage
        return z

    def total():
        return sum(storage.nbytes() for storage in kept.values())

    blocks = [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]
    hooks = [block.register_forward_hook(lambda *_: ends.append(total())) for block in blocks]
    before, network.checkpointing = network.checkpointing, checkpointing
    try:
        with saved_tensors_hooks(save, lambda z: z), OnCuda(half):
            loss(lambda *args, **kwargs: functional_call(network, state, args, kwargs), *batch)
    finally:
        network.checkpointing = before
        for hook in hooks:
            hook.remove()
    return total(), max((after - before for before, after in pairwise(ends)), default=0)


class Memory(NamedTuple):
    """Bytes that a training step takes at its peak, when the forward pass ends."""

    state: int                         # weights, gradients, Adam's two moments and the averaged weights, in float32
    fixed: int                         # activations that do not depend on the batch: the weights in bfloat16
    image: int                         # activations of each image

    def needed(self, n):
        """Of n images at once."""
        return self.state + self.fixed + n * self.image


def training_memory(network, loss, batch, half):
    """The Memory that training a network takes, and that with --checkpointing; arguments as of `saved_bytes`.

    With checkpointing the peak is in the backward pass, which has the activations of one block at a time besides.
    """
    def activations(n):
        images = [None if z is None else z.new_empty((n, *z.shape[1:]), device="meta") for z in batch]
        whole, block = saved_bytes(network, loss, images, half, False)
        return whole, saved_bytes(network, loss, images, half, True)[0] + block
    state = 20 * sum(value.numel() for value in network.parameters())
    return tuple(Memory(state, 2 * one - two, two - one) for one, two in zip(activations(1), activations(2)))


def gib(size):
    """A number of bytes as text."""
    return f"{size / GIB:.1f} GiB"


def fitting_parts(memory, n, card):
    """The least --accumulate with which n images a step fit a card of so many bytes; None if not even one at a time does."""
    return next((parts for parts in range(1, n + 1) if n % parts == 0 and memory.needed(n // parts) <= ROOM * card), None)


@functools.cache
def network_memory(model, size, half=True, **options):
    """As `training_memory`, of a named network; options as in `models.describe`."""
    with torch.device("meta"):
        network = build(describe(model, size, **options))
    diffusion = Diffusion(linear_betas(), variance="learned" if options.get("learn_sigma") else "small")

    def classification(model, x):
        return F.cross_entropy(model(x), x.new_zeros(len(x), dtype=torch.long))

    def denoising(model, x, t, y, *low):
        return diffusion.losses(lambda *inputs: model(*inputs, *low), x, t, y, x)["loss"].mean()
    return training_memory(network, classification if model == "vit" else denoising, inputs_of(network), half)


# What is printed

def compared(ours, published):
    """Our number, the published one, a text or None, and their difference as columns -> text, and whether it is above 0.5 %.

    A number that rounds to the published digits is "as printed", however large the difference.
    """
    if published is None:
        return f"{ours:10.2f} {'':>9} {'':>11}", False
    places = len(published.partition(".")[2])
    as_printed = f"{ours:.{places}f}" == published
    difference = ours / float(published) - 1
    said = "as printed" if as_printed else f"{difference:+.2%}"
    return f"{ours:10.2f} {published:>9} {said:>11}", not as_printed and abs(difference) > 0.005


def show(tables):
    """Print tables like TABLES, our numbers beside the published ones."""
    for title, rows in tables.items():
        print(f"\n{title}")
        print(f"{'':24}{'M parameters':>13} {'published':>9} {'':>11}{'Gflops':>11} {'published':>9}")
        for name, networks, parameters, gflops, *remarks in rows:
            costs = [network_cost(model, size, **options) for model, size, options in networks]
            parameter_columns, parameters_differ = compared(sum(p for p, _ in costs) / 1e6, parameters)
            gflops_columns, gflops_differ = compared(sum(m for _, m in costs) / 1e9, gflops)
            if not remarks and (parameters_differ or gflops_differ):
                remarks = ["not explained"]
            print(f"{name:27}{parameter_columns} {gflops_columns}  {''.join(remarks)}".rstrip())


def show_memory(trained):
    """Print what training each network of a list like TRAINED takes."""
    print(f"\nMemory of training in bf16 on CUDA, {BATCH} images a step, GiB; --checkpointing recomputes activations\n"
          f"{'':24}{'weights, moments':>19}{'activations':>14}{'in all':>9}{'--checkpointing':>18}{'in all':>9}")
    for name, (model, size, options) in trained:
        numbers = [f"{value / GIB:.1f}" for memory in network_memory(model, size, **options)
                   for value in (memory.state, memory.needed(BATCH) - memory.state, memory.needed(BATCH))]
        state, activations, whole, _, recomputed, less = numbers
        print(f"{name:24}{state:>19}{activations:>14}{whole:>9}{recomputed:>18}{less:>9}")


def show_one(args):
    """Print the cost of one network, and what training it takes."""
    options = dict(image_size=args.image_size, channels=args.channels, num_classes=args.num_classes or None,
                   learn_sigma=args.variance == "learned", conditioning=args.conditioning, hybrid=args.hybrid)
    description = describe(args.model, args.size, **options)
    try:
        parameters, multiply_adds = network_cost(args.model, args.size, **options)
    except RuntimeError as error:                        # shapes beyond 64 bits
        raise ValueError(f"--image-size {args.image_size} is too large to be counted: {error}") from None
    arguments = ", ".join(f"{name}={value}" for name, value in description["arguments"].items())
    print(f"{description['class']} {args.size}: {arguments}")
    print(f"parameters {parameters:,}; {multiply_adds / 1e9:.3f} Gflops (multiply-adds) an image, three times that in training"
          + ("" if args.model == "vit" else ", twice with guidance"))
    weights = 4 * parameters / GIB
    print(f"memory in float32: weights {weights:.2f} GiB; with gradients and Adam's two moments {4 * weights:.2f} GiB, with the "
          f"averaged weights {5 * weights:.2f} GiB; activations come on top:")
    for precision in ("bf16", "fp32"):
        memories = network_memory(args.model, args.size, precision == "bf16", **options)
        print(f"{precision} on CUDA: " + "; with --checkpointing ".join(
            f"{memory.image / MIB:.1f} MiB an image, {memory.needed(args.batch_size) / GIB:.2f} GiB in all for {args.batch_size}"
            for memory in memories))


def flags():
    """The command line."""
    parser = Parser(prog="gflops.py", description="Parameters and multiply-adds: the report's tables, or one network.")
    parser.add_argument("--model", choices=MODELS, help="one network instead of the tables")
    parser.add_argument("--size", help="as for train.py: B/4 of dit, H/2 of uvit, adm-256 of unet, S/16 of vit")
    parser.add_argument("--image-size", type=positive, default=32, help="side of what the network sees (default: 32)")
    parser.add_argument("--channels", type=positive, default=3, help="of what the network sees; latents have 4 (default: 3)")
    parser.add_argument("--num-classes", type=natural, default=1000, help="0 is none (default: 1000)")
    parser.add_argument("--variance", choices=("fixed", "learned"), default="fixed", help="learned: put out beside the prediction")
    parser.add_argument("--conditioning", choices=dit.BLOCKS, help="of a DiT (default: adaln-zero)")
    parser.add_argument("--hybrid", action="store_true", help="of a ViT")
    parser.add_argument("--batch-size", type=positive, default=BATCH, help=f"images a step (default: {BATCH})")
    return parser


def main(argv=None):
    """The command: all tables, or one network."""
    args = flags().parse_args(argv)
    with one_line_errors("gflops.py"):
        if (args.model is None) != (args.size is None):
            raise ValueError("give both --model and --size, or neither for the report's tables")
        if args.model is None:
            show(TABLES)
            show_memory(TRAINED)
        else:
            show_one(args)


if __name__ == "__main__":
    sys.exit(main())
