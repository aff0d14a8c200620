"""The networks by name: what --model and --size mean, and which network a state dict of an official release holds.

A description is {"class": name, "arguments": {…}}, plain values that run.pt holds; `build` makes the network of it. With
"text": {…} the network has a `text.TextEncoder` of these arguments as its .text_encoder, and takes captions by their ids.

Releases (report §4-7 … §4-9): the names and shapes of tensors say most of it. What they do not show, as heads, how time is counted
or the schedule, comes from tables. checkpoint.py reads the files.
"""
import math
import re
from inspect import signature

import torch

import dit
import points
import text
import unet
import uvit
import vae
import vit

MODELS = {
    "dit": (dit.DiT, dit.SIZES),
    "uvit": (uvit.UViT, uvit.SIZES),
    "unet": (unet.UNet, unet.SIZES),
    "vit": (vit.ViT, vit.SIZES),
}
TRAINABLE = {
    **MODELS,
    "vae": (vae.AutoencoderKL, vae.SIZES),
    "mlp": (points.MLP, points.SIZES),                   # denoises points
}
NETWORKS = {network.__name__: network for network in (*(network for network, _ in TRAINABLE.values()), unet.SuperResUNet)}
HEADS = {(size["dim"], size["depth"]): size["heads"] for sizes in (vit.SIZES, dit.SIZES, uvit.SIZES) for size in sizes.values()}
LDM_PREFIX = "model.diffusion_model."
AVERAGED = re.compile(r"(?<![a-z])(ema|averaged?)(?![a-z])", re.I)       # in names of what training code wraps its state dicts in
IMAGENET_CLASSES = 1000
MOST_BLOCKS, LARGEST_SIDE, LARGEST = 1000, 4096, 10 ** 6                     # of a network in a file, and any other number of it
SD_SCALE, COCO_SCALE = 0.18215, 0.2301           # of Stable Diffusion's latents in most releases, and in U-ViT's on MS-COCO


# Ours

def named(model, size):
    """The class and the arguments that a size fixes: ("dit", "B/4") -> DiT, dict(dim=768, depth=12, heads=12, patch_size=4).

    Transformers take a patch size after the slash, the others none. ValueError, with the list, on an unknown size.
    """
    network, sizes = TRAINABLE[model]
    name, slash, patch = size.partition("/")
    patched = model in ("dit", "uvit", "vit")
    fits = patch.isdecimal() and int(patch) > 0 if patched else not slash
    if name not in sizes or not fits:
        raise ValueError(f"--size {size}: for --model {model} it is one of {', '.join(sizes)}"
                         + (" and a patch size, as in B/4" if patched else ", without a patch size"))
    if name in unet.UPSAMPLERS:
        network = unet.SuperResUNet
    return network, sizes[name] | (dict(patch_size=int(patch)) if patched else {})


def check_options(model, size, learn_sigma=False, conditioning=None, context_dim=None, hybrid=False):
    """ValueError on a size that there is not, or on options, those of `describe`, that do not go with the model."""
    named(model, size)
    if conditioning and model != "dit":
        raise ValueError(f"--conditioning {conditioning} is a choice of DiT's, not of {model}")
    if hybrid and model != "vit":
        raise ValueError(f"--hybrid is a choice of ViT's, not of {model}")
    if learn_sigma and model not in ("dit", "unet"):
        raise ValueError(f"--variance learned: {model} puts out no variance; use small or large")


def describe(model, size, image_size, channels, num_classes=None, null_class=True, learn_sigma=False, conditioning=None,
             context_dim=None, context_tokens=77, hybrid=False):
    """The description of a named network for images of a size and a number of channels and classes.

    learn_sigma: also put out a variance. context_dim: a text's width, which takes the classes' place; context_tokens: its
    length. conditioning is DiT's, hybrid ViT's. ValueError as of `check_options`, and on a classifier without classes.
    """
    check_options(model, size, learn_sigma, conditioning, context_dim, hybrid)
    if model == "vit" and num_classes is None:
        raise ValueError("--model vit learns labels, and the data has none")
    network, arguments = named(model, size)
    if model == "vae":
        arguments = {**arguments, "channels": channels}
    elif model != "mlp":                                 # points have one shape
        own = {
            "dit": dict(null_class=null_class, learn_sigma=learn_sigma,
                        conditioning=conditioning or ("adaln-zero" if context_dim is None else "cross-attention")),
            "uvit": dict(null_class=null_class),
            "unet": dict(null_class=null_class, out_channels=channels * (2 if learn_sigma else 1)),
            "vit": dict(hybrid=hybrid),
        }[model]
        if context_dim is not None:
            num_classes = None
            own["context_dim"] = context_dim
            if model in ("dit", "uvit"):
                own["context_tokens"] = context_tokens
        arguments = {**arguments, "image_size": image_size, "channels": channels, "num_classes": num_classes, **own}
    return {"class": network.__name__, "arguments": arguments}


def build(description):
    """The network of a description, freshly initialised."""
    network = NETWORKS[description["class"]](**description["arguments"])
    if "text" in description:
        network.text_encoder = text.TextEncoder(**description["text"])
    return network


def check_description(description):
    """ValueError, KeyError or TypeError where a description, of a file perhaps, is of no network, or of one too large for any
    machine."""
    own, reader = NETWORKS[description["class"]], text.TextEncoder
    for kind, arguments in ((own, description["arguments"]), (reader, description.get("text", {}))):
        parameters = signature(kind).parameters
        for name, value in arguments.items():
            default = parameters[name].default
            numbers, kinds, least = (value, (int, float), 0) if isinstance(value, (list, tuple)) else ([value], (int,), 1)
            fits = (type(value) is type(default) if isinstance(default, (bool, str)) else
                    0 <= value < 1 if isinstance(default, float) else
                    value is None or all(type(number) in kinds and least <= number <= LARGEST for number in numbers))
            if not fits:
                raise ValueError(f"{name} is {repr(value)[:50]}")
        blocks = arguments.get("depth", 1) * arguments.get("res_blocks", 1) * len(arguments.get("multipliers", "1"))
        side = max(vit.pair(arguments.get("image_size", 1)))
        if blocks > MOST_BLOCKS or side > LARGEST_SIDE:
            raise ValueError(f"{blocks} blocks for sides of {side} pixels are more than the {MOST_BLOCKS} and {LARGEST_SIDE} "
                             "of any network known here")


def filled(network, state):
    """A network of the device "meta", which takes no memory, with a state dict's tensors, on the CPU and in eval mode.

    ValueError on a name or a shape that differs: so a network becomes no larger than the file that its tensors are from. And on
    NaN and infinite numbers, which would draw black images.
    """
    expected, found = ({name: tuple(value.shape) for name, value in tensors.items()} for tensors in (network.state_dict(), state))
    for name in expected | found:
        if expected.get(name) != found.get(name):
            raise ValueError(f"{name} is {found.get(name, 'missing')} and should be {expected.get(name, 'absent')}")
        if not state[name].isfinite().all():
            raise ValueError(f"{name} holds numbers that are NaN or infinite")
    network.to_empty(device="cpu").load_state_dict(state)
    return network.eval()


def build_with(description, state):
    """The network of a description, see `check_description`, with the tensors of a state dict, see `filled`."""
    check_description(description)
    with torch.device("meta"):
        network = build(description)
    return filled(network, state)


def compile_blocks(network):
    """Have PyTorch compile a network when it runs: a transformer by blocks, of which those of one kind share one graph, which
    takes a fraction of the time; any other as a whole. In place: its state dict stays as it is, and copies are not compiled."""
    if isinstance(network, (dit.DiT, uvit.UViT, vit.ViT)):
        torch._dynamo.config.optimize_ddp = False        # else a block is cut where DistributedDataParallel's buckets end
        kinds = (vit.Block, dit.AdaLNBlock, text.TextBlock)
    else:
        kinds = type(network)
    for module in network.modules():
        if isinstance(module, kinds):
            module.compile()


# Official releases

def named_tensors(content):
    """The tensors in nested dicts by their names, joined by dots: {"ema": {"module.x": …}} -> {"ema.module.x": …}."""
    found, parts, seen = {}, [("", content)] * isinstance(content, dict), set()
    for prefix, part in parts:                           # which grows
        if id(part) not in seen and len(prefix) < 200:   # a dict may hold itself
            seen.add(id(part))
            found |= {f"{prefix}{name}": value for name, value in part.items() if torch.is_tensor(value)}
            parts += [(f"{prefix}{name}.", value) for name, value in part.items() if isinstance(value, dict)]
    return found


def places_of(marker, tensors):
    """What stands before a name in names of tensors, as "" or "model.module.": the averaged weights' first, a list."""
    places = [name.removesuffix(marker) for name in tensors if f".{name}".endswith(f".{marker}")]
    return sorted(places, key=lambda place: AVERAGED.search(place) is None)


def state_at(place, tensors):
    """The state dict of the tensors whose names begin with a place.  ValueError if they are quantised."""
    state = {name.removeprefix(place): value for name, value in tensors.items() if name.startswith(place)}
    small = next((name for name, value in state.items() if value.dtype.itemsize == 1), None)
    if small:
        raise ValueError(f"its {place}{small} has numbers of 8 bits, {state[small].dtype}: take a file of float16, bfloat16 or "
                         "float32")
    return state


def counted(state, stem):
    """The length of a ModuleList of the name stem: how many different numbers stand behind it."""
    return len({name[len(stem) + 1:].split(".")[0] for name in state if name.startswith(f"{stem}.")})


def label_arguments(state, table, config, null=True):
    """num_classes and null_class, from the rows of a label table, or from its lack.  null: whether the last row is the null class,
    but of a table of ImageNet's classes alone."""
    rows = len(state.get(table, ()))
    num_classes = config.get("num_classes", rows - 1 if null and rows not in (0, IMAGENET_CLASSES) else rows) or None
    return dict(num_classes=num_classes, null_class=num_classes is not None and rows > num_classes)


def transformer_arguments(state, embedder, tokens, depth, config):
    """What all transformers take, from the patch embedding, the number of image tokens and that of blocks."""
    dim, channels, patch, _ = state[f"{embedder}.proj.weight"].shape
    side = math.isqrt(max(0, tokens))
    if side ** 2 != tokens and "image_size" not in config:
        raise ValueError(f"{tokens} position rows are no square: give image_size")
    return dict(image_size=side * patch, patch_size=patch, channels=channels, dim=dim, depth=depth,
                heads=HEADS.get((dim, depth), max(1, dim // 64)))


def infer_dit(state, config):
    """The arguments of a DiT."""
    found = transformer_arguments(state, "x_embedder", state["pos_embed"].shape[1], counted(state, "blocks"), config)
    modulation = state.get("blocks.0.adaLN_modulation.1.weight")
    if "blocks.0.cross_attn.q.weight" in state:
        conditioning = "cross-attention"
    elif modulation is None:
        conditioning = "in-context"
    else:                                                # shifts and scales, with or without gates
        conditioning = "adaln-zero" if len(modulation) == 6 * found["dim"] else "adaln"
    numbers = len(state["final_layer.linear.weight"])    # that are put out for a patch
    return dict(**found, **label_arguments(state, "y_embedder.embedding_table.weight", config),
                learn_sigma=numbers == 2 * found["patch_size"] ** 2 * found["channels"], conditioning=conditioning)


def infer_uvit(state, config):
    """The arguments of a U-ViT."""
    found = label_arguments(state, "label_emb.weight", config)
    extras = 1 + (found["num_classes"] is not None)      # tokens besides the image's: the time, and the condition
    if "context_embed.weight" in state:
        found |= dict(context_dim=state["context_embed.weight"].shape[1], context_tokens=config.get("context_tokens", 77))
        extras += found["context_tokens"]
    found |= dict(mlp_time_embed="time_embed.0.weight" in state, conv="final_layer.weight" in state,
                  skip="out_blocks.0.skip_linear.weight" in state or not counted(state, "out_blocks"))
    tokens, depth = state["pos_embed"].shape[1] - extras, 2 * counted(state, "in_blocks")
    return {**found, **transformer_arguments(state, "patch_embed", tokens, depth, config)}


def infer_vit(state, config):
    """The arguments of a ViT."""
    tokens = state["pos_embed"].shape[1] - 1             # the class token's row
    found = transformer_arguments(state, "patch_embed", tokens, counted(state, "blocks"), config)
    return dict(**found, num_classes=len(state["head.weight"]))


NAMED = {                                                # class: two names that tell its state dict, and what infers its arguments
    "DiT": (("x_embedder.proj.weight", "final_layer.linear.weight"), infer_dit),
    "UViT": (("decoder_pred.weight", "mid_block.norm1.weight"), infer_uvit),
    "ViT": (("cls_token", "head.weight"), infer_vit),
}
UNET_NAMES = ("input_blocks.0.0.weight", "out.2.weight")


def infer(state, config=None):
    """The description of a network from its official state dict -> {"class", "arguments"}.

    config overrides arguments, as dict(heads=4); for a U-Net it may be the name of a configuration of unet.SIZES. A label table
    of 1000 rows is ImageNet's without a null class; else the last row is the null class, but of U-Nets, which OpenAI trained
    without. ValueError if the names are of no network that is known here.
    """
    name, config = (config, {}) if isinstance(config, str) else (None, config or {})
    if {*UNET_NAMES} <= state.keys():
        return infer_unet(state, name, {**label_arguments(state, "label_emb.weight", config, null=False), **config})
    if name is not None:
        raise ValueError(f"it is not the U-Net {name}: its tensors have other names")
    for kind, (names, arguments) in NAMED.items():
        if {*names} <= state.keys():
            return {"class": kind, "arguments": {**arguments(state, config), **config}}
    if any(name.startswith(("transformer_blocks.", "down_blocks.")) for name in state):
        raise ValueError("its tensors have the names of the diffusers library, in which only autoencoders are read here: take the "
                         "file that the network's authors released")
    raise ValueError("its tensors have the names of no network known here: it is neither a run of train.py nor a released DiT, "
                     "U-ViT, ViT or U-Net")


def infer_unet(state, name, changes):
    """As `infer`, for a U-Net: the configuration of unet.SIZES with these names and shapes, or the named one, with changes."""
    if name is not None and name not in unet.SIZES:
        raise ValueError(f"no U-Net is called {name!r}: it is one of {', '.join(unet.SIZES)}")
    shapes = {key: value.shape for key, value in state.items()}
    for size in [name] if name else unet.SIZES:
        network, fixed = named("unet", size)
        arguments = {"image_size": 32, **fixed, "channels": state["input_blocks.0.0.weight"].shape[1] // network.inputs,
                     "out_channels": len(state["out.2.weight"]), **changes}
        if shapes["time_embed.0.weight"][-1:] != (arguments["dim"],):    # of another width: it need not be built
            continue
        with torch.device("meta"):                       # no shape depends on the image size, which it can take, or on heads
            built = network(**{**arguments, "image_size": fixed.get("image_size", 32), "heads": 1, "head_dim": None})
        if {key: value.shape for key, value in built.state_dict().items()} == shapes:
            return {"class": network.__name__, "arguments": arguments}
    raise ValueError(f"its shapes are not those of {name}" if name else "it is a U-Net of no configuration known here: its heads, "
                     "which shapes do not show, must be given with all other arguments")


def unet_name(arguments):
    """The configuration of unet.SIZES that a U-Net's arguments are of, or "". What shapes do not show may differ: a caller can
    override it, and the weights are still those of that release."""
    hidden = {"image_size", "heads", "head_dim", "new_attention_order", "dropout"}
    shown = {name: {key: value for key, value in size.items() if key not in hidden} for name, size in unet.SIZES.items()}
    matches = [name for name in shown if shown[name].items() <= arguments.items()]
    return max(matches, key=lambda name: len(shown[name]), default="")               # the one that says most


def released_process(network):
    """What a released network was trained on, as run.pt describes it, or None if it is not among what can be sampled here.

    "range" holds the schedule's ends, "time" the scale and offset of the times that the network gets.
    """
    kind, arguments = network["class"], network["arguments"]
    linear = dict(schedule="linear", T=1000, prediction="eps", variance="learned")
    if kind == "DiT":
        return {**linear, "variance": "learned" if arguments["learn_sigma"] else "small"}
    if kind == "UViT":                 # H and the text models count n = t + 1; the others were trained in continuous time
        discrete = arguments["channels"] == 4 and (not arguments["conv"] or "context_dim" in arguments)
        return {**linear, "schedule": "scaled-linear", "variance": "small", "time": (1, 1)} if discrete else None
    if kind not in ("UNet", "SuperResUNet"):
        return None
    size = unet_name(arguments)
    if size.startswith("ldm"):
        return {**linear, "schedule": "scaled-linear", "variance": "small", "range": (0.0015, 0.0195)}
    if size.startswith("iddpm"):
        return {**linear, "schedule": "cosine", "T": 4000, "time": (0.25, 0)}        # their rescale_timesteps
    learned = arguments["out_channels"] == 2 * arguments["channels"]
    return {**linear, "schedule": "cosine" if size == "adm-64" else "linear", "variance": "learned" if learned else "large"}


def released_scale(network):
    """The factor of the latents that a released network was trained on, 1 for LDM's; None for pixels."""
    kind, arguments = network["class"], network["arguments"]
    if kind == "UNet" and unet_name(arguments).startswith("ldm"):
        return 1.0
    if arguments["channels"] != 4:
        return None
    return COCO_SCALE if kind == "UViT" and "context_dim" in arguments else SD_SCALE


def released_state(content):
    """The state dict of a released network, from whatever training code wrapped around it, and the places where one lies, of which
    it is taken from the first: the averaged weights' where there are some."""
    tensors = named_tensors(content)
    markers = (*(names[0] for names, _ in NAMED.values()), UNET_NAMES[0])
    places = next(filter(None, (places_of(marker, tensors) for marker in markers)), [""])
    state = state_at(places[0], tensors)
    if places[0].endswith(LDM_PREFIX):                   # the averaged weights, if there, have names without dots
        averaged = state_at(f"{places[0].removesuffix(LDM_PREFIX)}model_ema.diffusion_model", tensors)
        state = {name: averaged.get(name.replace(".", ""), value) for name, value in state.items()}
    return state, places


def released_run(content, config=None):
    """What a run.pt would hold of released weights, but its version, and the "places" of their file in which such lie.

    ValueError if the content of their file is none of a network known here; config: see `infer`.
    """
    state, places = released_state(content)
    network = infer(state, config)
    scale = released_scale(network)
    data = dict(spec=None, classes=None, **{key: network["arguments"][key] for key in ("num_classes", "channels", "image_size")})
    return dict(step=None, config={}, network=network, diffusion=released_process(network), data=data,
                vae=None if scale is None else dict(scale=scale), model=state, ema=state, places=places)


def clip_encoder(tensors):
    """The text.CLIPTextEncoder in a dict of tensors, which may also hold the rest of CLIP; its sizes follow from their shapes."""
    tensors = named_tensors(tensors)
    place = next(iter(places_of(text.TABLE, tensors)), "")
    state = {text.PREFIX + name: value for name, value in state_at(place, tensors).items()}
    (vocab, dim), length = state[text.PREFIX + text.TABLE].shape, len(state[f"{text.PREFIX}embeddings.position_embedding.weight"])
    hidden = len(state[f"{text.PREFIX}encoder.layers.0.mlp.fc1.weight"])
    depth = counted(state, f"{text.PREFIX}encoder.layers")
    state.pop(f"{text.PREFIX}embeddings.position_ids", None)                 # older files also hold the numbers 0 .. L-1
    with torch.device("meta"):
        encoder = text.CLIPTextEncoder(vocab, length, dim, depth, max(1, dim // 64), hidden)         # CLIP's heads are 64 wide
    return filled(encoder, state)


# Autoencoders, in CompVis's names or the diffusers library's: `released_autoencoder` is the door

AUTOENCODER_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")      # a training checkpoint has more: loss.*
DIFFUSERS_NAMES = [                              # a pattern in the diffusers library's names, old or new, and what CompVis calls it
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"attn_1\.group_norm\.", "attn_1.norm."),
    (r"attn_1\.(to_q|query)\.", "attn_1.q."),
    (r"attn_1\.(to_k|key)\.", "attn_1.k."),
    (r"attn_1\.(to_v|value)\.", "attn_1.v."),
    (r"attn_1\.(to_out\.0|proj_attn)\.", "attn_1.proj_out."),
    (r"down_blocks\.(\d+)\.", r"down.\1."),
    (r"up_blocks\.(\d+)\.", lambda match, levels: f"up.{levels - 1 - int(match[1])}."),          # counted from the smallest map
    (r"\.resnets\.", ".block."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
]


def compvis_names(state):
    """An autoencoder's state dict in CompVis's names and shapes, from theirs or the diffusers library's.

    Within a whole Stable Diffusion checkpoint its names begin with first_stage_model. or vae.; the rest is left out. Attention's
    weights may be matrices (D, D), as in newer files, and become kernels (D, D, 1, 1).
    """
    tensors = named_tensors(state)
    place = next(iter(places_of("decoder.conv_in.weight", tensors)), "")
    state = {name: value for name, value in state_at(place, tensors).items() if name.startswith(AUTOENCODER_PARTS)}
    levels, renamed = counted(state, "decoder.up_blocks"), {}
    for name, value in state.items():
        for pattern, ours in DIFFUSERS_NAMES:
            name = re.sub(pattern, ours if isinstance(ours, str) else lambda match: ours(match, levels), name)
        renamed[name] = value[:, :, None, None] if ".attn_1." in name and value.ndim == 2 else value
    return renamed


def infer_autoencoder(state):
    """The arguments of the autoencoder with this state dict, in CompVis's names. KeyError where a name is missing."""
    dim, channels = state["encoder.conv_in.weight"].shape[:2]
    widths = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(counted(state, "encoder.down"))]
    return dict(channels=channels, dim=dim, multipliers=tuple(max(1, width // dim) for width in widths),
                res_blocks=counted(state, "encoder.down.0.block"), latent_channels=state["decoder.conv_in.weight"].shape[1])


def released_autoencoder(state):
    """The autoencoder of a released state dict, in either naming, in eval mode, in float32. ValueError if it is none."""
    try:
        state = compvis_names(state)
        with torch.device("meta"):                           # nothing is drawn that the file replaces
            network = vae.AutoencoderKL(**infer_autoencoder(state))
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, ArithmeticError):
        raise ValueError("its tensors have the names of no autoencoder known here") from None
    return filled(network, state)
