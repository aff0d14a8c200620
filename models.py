"""The networks by name: what --model and --size mean, and how a run describes its network.

A description is {"class": name, "arguments": {…}}, plain values that run.pt holds; `build` makes the network of it. With
"text": {…} the network has a `text.TextEncoder` of these arguments as its .text_encoder, and takes captions by their ids.
"""
import dit
import points
import unet
import uvit
import vae
import vit
from text import TextEncoder

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
    if context_dim is not None and conditioning not in (None, "cross-attention"):
        raise ValueError(f"--conditioning {conditioning}: a DiT reads a text by cross-attention only")


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
            if model == "uvit":
                own["context_tokens"] = context_tokens
        arguments = {**arguments, "image_size": image_size, "channels": channels, "num_classes": num_classes, **own}
    return {"class": network.__name__, "arguments": arguments}


def build(description):
    """The network of a description, freshly initialised."""
    network = NETWORKS[description["class"]](**description["arguments"])
    if "text" in description:
        network.text_encoder = TextEncoder(**description["text"])
    return network
