"""Coloured shapes with captions: a data set without files, and a judge that says whether a caption holds for an image.

Report §4-1 (images from text). An image shows one object, two or three alike, or two in a relation, and its caption says so: "a
large green triangle", "three blue discs", "a small red star above a blue disc". Both are functions of the image's index: nothing is
stored, and an index is the same scene at any resolution. The judge reads pixels alone, so it takes generated images as well.

Images are square, and lengths are in sides of the picture: a place is the (row, column) of an object's centroid, from the top left
corner, and the size of an object, whatever its shape, is the radius of the disc that has its area. Objects are whole and apart.
"""
import math
import re
from itertools import permutations
from typing import NamedTuple

import numpy as np

BACKGROUND = (32, 32, 40)              # not black: noise of 20 levels is hardly clipped
COLOURS = {"red": (235, 50, 45), "green": (50, 190, 70), "blue": (60, 95, 255), "gold": (250, 190, 40),
           "pink": (240, 80, 200), "cyan": (60, 220, 235)}
SHAPES = {                             # corners; radius of the edge half way between two, in radii of a corner; turn from upright
    "disc": (1000, math.cos(math.pi / 1000), 0.0),                       # in no picture can it be told from a circle
    "square": (4, math.cos(math.pi / 4), math.pi / 4),
    "triangle": (3, math.cos(math.pi / 3), 0.0),
    "star": (5, 0.5, 0.0),                                               # plumper than a pentagram's 0.38: arms of a pixel or two
}
CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
SIZES = {"small": (0.13, 0.15), "large": (0.25, 0.30)}                   # the least and the largest; three large ones had no room
LARGE = 3 / 4                          # of the objects that are alone
WANDER = 0.04                          # how far from the middle these stand, in each direction
RELATIONS = ("above", "below", "left of", "right of")
NUMBERS = {"a": 1, "two": 2, "three": 3}
MARGIN, GAP = 0.035, 0.07              # of the picture, one pixel of 32, and between boxes, two
ROOM = 1 - 2 * MARGIN
ASIDE = 0.6                            # of a relation's length an object may stand aside, so that no other relation holds
SAID = 1 / 3                           # of the captions that may say a size do
BATCH = 16                             # images drawn or judged at once, for the processor's cache

CORNERS, INNER, TURN = (np.array(column) for column in zip(*SHAPES.values()))
HALF = np.pi / CORNERS                                                   # the angle from a corner to the middle of its edge
NORMAL = np.arctan2(1 - INNER * np.cos(HALF), INNER * np.sin(HALF))      # of this half of the edge, from the corner's direction
OUTER = np.sqrt(np.pi / (CORNERS * INNER * np.sin(HALF)))                # a corner's radius, where the area is that of a unit disc
EDGE = OUTER * np.cos(NORMAL)                                            # the distance of the edge's line from the centroid


def _extent(shape):
    """How far a shape of size 1 reaches upwards, downwards, and to either side."""
    angles = TURN[shape] + 2 * HALF[shape] * np.arange(CORNERS[shape])
    return OUTER[shape] * np.array([np.cos(angles).max(), -np.cos(angles).min(), np.sin(angles).max()])


EXTENTS = np.array([_extent(shape) for shape in range(len(SHAPES))])     # (shapes, 3)
PALETTE = np.array(list(COLOURS.values()), np.float32) - np.array(BACKGROUND, np.float32)    # (colours, 3), from the background
MIDDLE = math.sqrt(SIZES["small"][1] * SIZES["large"][0])                # what is larger is large
SPECK = 0.3 * math.pi * SIZES["small"][0] ** 2                           # the area from which an object counts
HUGE = 0.34                            # the size from which an object is of none of the shapes, as a picture all of one colour
UNLIKE = 0.15                          # and its squared error, in areas: two discs that touch have 0.3, a small one in noise 0.08


# Scenes

class Scenes(NamedTuple):
    """n scenes of up to three objects, of which the first `number` (n,) are there, and the first is what the caption begins with.

    relation (n,), an index of RELATIONS or -1; said (n,), whether the caption says the first one's size; classes (n, 3), indices of
    CLASSES; sizes (n, 3); places (n, 3, 2).
    """

    number: np.ndarray
    relation: np.ndarray
    said: np.ndarray
    classes: np.ndarray
    sizes: np.ndarray
    places: np.ndarray


def uniform(indices, draws):
    """Numbers (n, draws) in [0, 1) that depend on the index alone: SplitMix64 (Steele et al. 2014) of a counter."""
    z = np.asarray(indices).astype(np.uint64)[:, None] * np.uint64(draws) + np.arange(1, draws + 1, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0 ** -53


def scenes(indices):
    """The Scenes of indices (n,): half of them one object, a quarter two or three alike, a quarter a relation."""
    u = uniform(indices, 20)
    kind, first, second, third, said, way = u[:, :6].T
    related = kind >= 0.75
    number = np.where(kind < 0.5, 1, np.where(related, 2, np.where(third < 0.5, 2, 3)))
    one = (first * len(CLASSES)).astype(int)
    other = (one + 1 + (second * (len(CLASSES) - 1)).astype(int)) % len(CLASSES)         # any class but the first one's
    classes = np.stack([one, np.where(related, other, one), one], axis=1)
    large = (u[:, 6:9] < LARGE) & (number == 1)[:, None]
    low, high = np.array(list(SIZES.values()))[large.astype(int)].transpose(2, 0, 1)
    sizes = low + (high - low) * u[:, 9:12]
    way = (way * len(RELATIONS)).astype(int)
    places = _places(classes % len(SHAPES), sizes, number, related, way, u[:, 12:])
    return Scenes(number, np.where(related, way, -1), (said < SAID) & (related | (number == 1)), classes, sizes, places)


def _apart(first, second, u):
    """Where two lengths (n,) begin that follow each other in the room inside the margins; u (n, 2) uniform."""
    low, high = np.sort(u, axis=1).T
    slack = ROOM - first - GAP - second
    return low * slack, first + GAP + high * slack


def _central(length, u):
    """Where a length (n,) begins that is near the middle of the room; u (n,) uniform."""
    middle = (ROOM - length) / 2
    return middle + (2 * u - 1) * np.minimum(middle, WANDER)


def _places(shapes, sizes, number, related, way, u):
    """Centroids (n, 3, 2) of objects whose boxes are GAP apart: the first is before the others in one direction, the way of a
    relation or any, and these are side by side across it.  way (n,), an index of RELATIONS; u (n, 8) uniform."""
    extents = EXTENTS[shapes] * sizes[..., None]                         # (n, 3, 3)
    before = extents[..., [0, 2]]                                        # (n, 3, 2)    up and left of the centroid
    boxes = (before + extents[..., [1, 2]]) * (np.arange(3) < number[:, None])[..., None]            # (n, 3, 2)
    columns, last = (way >= 2)[:, None], (way % 2 == 1)[:, None]
    along, across = np.where(columns, boxes[..., 1], boxes[..., 0]), np.where(columns, boxes[..., 0], boxes[..., 1])

    strip = along[:, 1:].max(axis=1)                                     # (n,)         in which the others are
    first, others = _apart(along[:, 0], strip, u[:, :2])
    first = np.where(number == 1, _central(along[:, 0], u[:, 0]), first)
    others = others[:, None] + u[:, 2:4] * (strip[:, None] - along[:, 1:])
    start = np.concatenate([first[:, None], others], axis=1)             # (n, 3)       along the direction
    start = np.where(last, ROOM - start - along, start)

    first = np.where(number == 1, _central(across[:, 0], u[:, 4]), u[:, 4] * (ROOM - across[:, 0]))
    second, third = _apart(across[:, 1], across[:, 2], u[:, 5:7])
    distance = abs(np.diff(start + along / 2, axis=1)[:, 0])
    aside = np.where(related, ASIDE * distance, 1)                       # (n,)         that two may be
    middle = first + (across[:, 0] - across[:, 1]) / 2
    least, most = np.maximum(0, middle - aside), np.minimum(ROOM - across[:, 1], middle + aside)
    second = np.where(number == 3, second, least + u[:, 7] * (most - least))
    side = np.stack([first, second, third], axis=1)                      # (n, 3)       across it
    return MARGIN + before + np.where(columns[..., None], np.stack([side, start], axis=2), np.stack([start, side], axis=2))


def _captions(found):
    """The captions of Scenes, a list."""
    texts = []
    for number, relation, said, classes, sizes in zip(found.number, found.relation, found.said, found.classes, found.sizes):
        thing = f"{_word(sizes[0])} {CLASSES[classes[0]]}" if said else CLASSES[classes[0]]
        if relation >= 0:
            texts.append(f"a {thing} {RELATIONS[relation]} a {CLASSES[classes[1]]}")
        else:
            texts.append(f"a {thing}" if number == 1 else f"{('two', 'three')[number - 2]} {thing}s")
    return texts


def _word(size):
    return "large" if size > MIDDLE else "small"


def captions(count):
    """The captions of the first `count` images: lower-case ASCII, at most 47 bytes each."""
    return _captions(scenes(np.arange(count)))


def labels(count):
    """The classes (count,) of the first objects of the first `count` images, int64: indices of CLASSES."""
    return scenes(np.arange(count)).classes[:, 0]


# Images

def coverage(shapes, sizes, places, side):
    """The share (..., side, side) of each pixel that an object covers; shapes and sizes (...), places (..., 2).

    From a corner to the middle of an edge, the outline is a straight line, and the rest is this line turned and mirrored: a pixel's
    distance from the line, in pixels, gives its share.
    """
    pixels = (np.arange(side, dtype=np.float32) + np.float32(0.5)) / side
    row = pixels[:, None] - places[..., 0, None, None].astype(np.float32)            # (..., side, 1)
    column = pixels - places[..., 1, None, None].astype(np.float32)                  # (..., 1, side)
    radius, angle = np.sqrt(row ** 2 + column ** 2), np.arctan2(column, -row)        # (..., side, side)   from upright, clockwise
    half, normal, turn = (table[shapes][..., None, None].astype(np.float32) for table in (HALF, NORMAL, TURN))
    edge = (EDGE[shapes] * sizes)[..., None, None].astype(np.float32)
    angle = angle - turn
    angle = abs(angle - 2 * half * np.round(angle / (2 * half)))         # from the nearest corner
    distance = radius * np.cos(angle - normal) - edge                    # positive outside
    return (0.5 - distance * side).clip(0, 1)


def _draw(indices, side):
    """Images (n, side, side, 3) uint8 of indices (n,)."""
    found = scenes(indices)
    images = np.empty((len(indices), side, side, 3), np.float32)
    images[:] = BACKGROUND
    for k in range(3):
        there = np.flatnonzero(found.number > k)
        classes = found.classes[there, k]
        covered = coverage(classes % len(SHAPES), found.sizes[there, k], found.places[there, k], side)
        images[there] += covered[..., None] * PALETTE[classes // len(SHAPES)][:, None, None]
    return (images + 0.5).astype(np.uint8)


class Drawn:
    """The images, as an array (count, image_size, image_size, 3) uint8 would hold them, drawn when they are asked for.

    It takes what selects images of such an array: a whole number, a slice, whole numbers, truth values.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, count, image_size):
        self.shape = (count, image_size, image_size, 3)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, key):
        indices = np.arange(len(self))[key]
        flat = indices.reshape(-1)
        images = np.empty((flat.size, *self.shape[1:]), np.uint8)
        for start in range(0, flat.size, BATCH):
            images[start:start + BATCH] = _draw(flat[start:start + BATCH], self.shape[1])
        return images.reshape(*indices.shape, *self.shape[1:])


# The judge

THING = rf"(?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
GRAMMAR = re.compile(rf"({'|'.join(NUMBERS)}) {THING}(s?)(?: ({'|'.join(RELATIONS)}) a {THING})?")


def parse(caption):
    """What a caption names: a list of (colour, shape, size or None), one an object, and the relation of the first two or None.

    ValueError if it is not as those of the data set are; a size may be said of any object.
    """
    match = GRAMMAR.fullmatch(caption)
    number, *first, plural, relation = match.groups()[:6] if match else [None] * 6
    if match is None or (number == "a") == bool(plural) or (plural and relation):
        raise ValueError(f"cannot judge the caption {caption!r}: it is not as \"a large red disc\", \"two gold stars\" or "
                         f"\"a pink square above a blue triangle\"; colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}")
    things = [first] * NUMBERS[number] + ([match.groups()[6:]] if relation else [])
    return [(colour, shape, size) for size, colour, shape in things], relation


def _around(x, outside):
    """The nine neighbours, itself included, of every element of x (..., H, W): nine arrays; outside, what is beyond the border."""
    padded = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(1, 1)] * 2, constant_values=outside)
    H, W = x.shape[-2:]
    return [padded[..., i:i + H, j:j + W] for i in range(3) for j in range(3)]


def _areas(colours):
    """The connected areas of one colour in (n, H, W) integers, -1 being none: numbers (n, H, W), equal in an area, else -1.

    A pixel takes the least number among its neighbours of its colour until nothing changes: the place of the area's first pixel.
    """
    none = colours.size                                  # more than any number
    numbers = np.where(colours >= 0, np.arange(none).reshape(colours.shape), none)
    alike = [other == colours for other in _around(colours, -1)]
    while True:
        least = np.min([np.where(same, other, none) for same, other in zip(alike, _around(numbers, none))], axis=0)
        if np.array_equal(least, numbers):
            return np.where(colours >= 0, numbers, -1)
        numbers = np.append(least, none)[least]          # a number is a place: take the one that stands there by now


def _look(images):
    """The objects in images (n, H, H, 3) uint8, m in all: their image, colour, size (m,), place (m, 2), and how far they are from
    each shape (m, shapes), the squared error in areas."""
    zoom = images.shape[1] // 32
    side = images.shape[1] // zoom                       # 32 to 63: there is nothing more to see
    images = images[:, :side * zoom, :side * zoom].reshape(len(images), side, zoom, side, zoom, 3)
    pixels = images.mean((2, 4), dtype=np.float32) - np.array(BACKGROUND, np.float32)    # (n, side, side, 3)
    norms = (PALETTE ** 2).sum(axis=1)
    shares = pixels @ (PALETTE / norms[:, None]).T       # (n, side, side, colours)      of a colour, the rest being background
    colours = (shares * np.sqrt(norms)).argmax(axis=-1)                                  # of the nearest direction
    colours[np.take_along_axis(shares, colours[..., None], -1)[..., 0] < 0.5] = -1

    areas = _areas(colours)
    firsts, counts = np.unique(areas[areas >= 0], return_counts=True)
    firsts = firsts[counts > SPECK * side ** 2]                                          # (m,)
    owners = np.full(areas.size + 1, -1)
    owners[firsts] = np.arange(len(firsts))
    owners = owners[areas]
    for _ in range(2):                                   # a soft edge is an object's as well
        owners = np.where(owners < 0, np.max(_around(owners, -1), axis=0), owners)
    image, row, column = np.nonzero(owners >= 0)
    owner, colour = owners[image, row, column], colours.reshape(-1)[firsts]
    share = shares[image, row, column, colour[owner]].clip(0)            # below 0 where the background is darker
    area = np.bincount(owner, share, len(firsts))
    places = np.stack([np.bincount(owner, share * (k + 0.5), len(firsts)) / area / side for k in (row, column)], axis=1)
    sizes = np.sqrt(area / math.pi) / side
    observed = np.zeros((len(firsts), 1, side, side), np.float32)
    observed[owner, 0, row, column] = share
    drawn, errors = coverage(np.arange(len(SHAPES)), sizes[:, None], places[:, None], side), []      # (m, shapes, side, side)
    for _ in range(3):                                   # sharp, blurred, and blurred again: area and centroid stay
        errors.append(((observed - drawn) ** 2).sum((2, 3)) / area[:, None])
        drawn = sum(_around(drawn, 0)) / 9
    return firsts // side ** 2, colour, sizes, places, np.min(errors, axis=0)


def look(images):
    """What images (n, H, H, 3) uint8, H >= 32, show: for each a list of (colour, shape, "small" or "large", (row, column)).

    A shape is None where it is like none of ours. ValueError on anything but such images.
    """
    images, names = np.asarray(images), list(SHAPES)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not 32 <= images.shape[1] == images.shape[2]:
        raise ValueError(f"cannot judge images {images.dtype} {images.shape}: they must be uint8 (n, H, H, 3), H from 32 on")
    objects = [[] for _ in images]
    for start in range(0, len(images), BATCH):
        for image, colour, size, place, errors in zip(*_look(images[start:start + BATCH])):
            shape = names[errors.argmin()] if errors.min() < UNLIKE and size < HUGE else None
            objects[start + image].append((list(COLOURS)[colour], shape, _word(size), tuple(place.tolist())))
    return objects


def _related(one, other):
    """The relation of an object to another: the direction in which it is further than in any other."""
    (row, column), (other_row, other_column) = one[3], other[3]
    ways = (other_row - row, row - other_row, other_column - column, column - other_column)
    return RELATIONS[int(np.argmax(ways))]


def _true_of(things, relation, objects):
    """Whether `objects` are the things of a parsed caption, in some order, and nothing more."""
    return len(objects) == len(things) and any(
        all(item[:2] == thing[:2] and thing[2] in (None, item[2]) for thing, item in zip(things, order))
        and (relation is None or relation == _related(*order)) for order in permutations(objects))


def matches(captions, images):
    """Whether each caption holds for its image (n, H, H, 3): truth values (n,).  ValueError as in `parse` and `look`."""
    parsed = [parse(caption) for caption in captions]
    if len(parsed) != len(images):
        raise ValueError(f"{len(parsed)} captions for {len(images)} images")
    return np.array([_true_of(*caption, objects) for caption, objects in zip(parsed, look(images))], bool)
