"""Weights made from names, and golden files: what trusted implementations computed with those weights.

A golden file stores no weights. Both sides make them from the names and shapes of the state dict, so that a network whose
names, shapes or arithmetic differ cannot give the stored output.
"""
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def formula_weight(name, shape):
    """The float32 weight of this name and shape, on every machine: standard normal numbers, scaled by what the weight is for.

    The stream is NumPy's RandomState, which never changes, seeded by the CRC-32 of the name. A matrix, kernel or table keeps
    the variance of its input; a norm's gain lies around 1, a variance above 1; a bias or mean is small.
    """
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if name.endswith("running_var"):
        value = 1 + 0.1 * abs(normal)
    elif len(shape) > 1:
        value = normal / math.sqrt(math.prod(shape[1:]))
    elif name.endswith("weight"):
        value = 1 + 0.1 * normal
    else:
        value = 0.1 * normal
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def fill(network, computed=()):
    """The network in eval mode with formula weights under all its names but `computed`, which it makes itself.

    Nothing is zero then, so that nothing a fresh network would hide behind a closed gate stays hidden.
    """
    state = network.state_dict()
    made = {name: formula_weight(name, value.shape) for name, value in state.items() if name not in computed}
    network.load_state_dict({**state, **made}, strict=True)
    return network.eval()


def golden(name, network=None):
    """Read golden/<name>.npz: returns its arrays as tensors by name, and its meta, which says how they were computed.

    A network is checked to have exactly the names and shapes listed in the file, and gets their formula weights, in place.
    """
    with np.load(GOLDEN / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key not in ("meta", "keys")}
        if network is not None:
            shapes = {key: tuple(shape) for key, shape in json.loads(str(file["keys"]))}
            assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == shapes
            fill(network, meta.get("computed_keys", ()))
    return arrays, meta


def golden_json(name):
    """The content of golden/<name>.json."""
    return json.loads((GOLDEN / f"{name}.json").read_text())
