"""Folders of images: which files count, which are held out, what class each is of and what captions it has; and MS-COCO.

Classes are sub-folders, or the labels of a dataset.json as EDM and StyleGAN write it. Captions are the lines of a .txt beside
each image, or the texts of a metadata.jsonl as Hugging Face's data sets have it. What else lies there is counted and named.
"""
import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files import read_text
from image_files import endings, opened

TRAIN = ("train", "training")          # sub-folders of these names are a split, and no classes
HELD_OUT = ("val", "valid", "validation", "test", "testing")             # the first that is there is the test split
LABELS, METADATA = "dataset.json", "metadata.jsonl"
OF_SYSTEMS = {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "lost+found"}        # nobody's data, as hidden files


class Files(NamedTuple):
    """Image files, and what is known of them."""

    folder: Path
    name: Path                                           # tells this list from others of the folder
    paths: list
    labels: np.ndarray | None = None                     # (M,), numbers of classes
    classes: list | None = None                          # their names
    captions: list | None = None                         # texts of each
    own_split: str | None = None                         # the name of the part that is held out, where there is one
    left_out: tuple | list = ()                          # what was not read, in words


# Which files

def files_below(folder):
    """The files below a folder, in the order of their paths; links are followed. Hidden files and those of systems are none."""
    found, places = [], [(str(folder), frozenset())]
    while places:
        place, above = places.pop()
        state = os.stat(place)
        if (state.st_dev, state.st_ino) in above:        # a link that leads back
            continue
        inner = above | {(state.st_dev, state.st_ino)}
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.lower() in OF_SYSTEMS:
                    continue
                # a link may lead to itself, at which entry.is_dir() raises
                if entry.is_dir(follow_symlinks=False) or entry.is_symlink() and os.path.isdir(entry.path):
                    places.append((entry.path, inner))
                else:
                    found.append(Path(entry.path))
    return sorted(found)


def by_ending(files):
    """How many files there are of each ending, in words."""
    found = Counter(path.suffix.lower() or "without an ending" for path in files).most_common()
    more = sum(count for _, count in found[5:])
    return ", ".join(f"{count:,} {ending}" for ending, count in found[:5]) + f" and {more:,} of other endings" * bool(more)


def images_below(folder):
    """The image files below a folder, and the other files.  ValueError if there is no image."""
    files = files_below(folder)
    images = [path for path in files if path.suffix.lower() in endings() and path.is_file()]
    others = sorted({*files} - {*images})
    if not images:
        raise ValueError(f"{folder} holds no image that can be read" + f", but {by_ending(others)}" * bool(others))
    return images, others


def side_of(folder):
    """The pixel side of a folder's images.  ValueError if they are not squares of one size."""
    found = {}                                           # each size, and the first image that has it
    for path in images_below(Path(folder))[0]:
        with opened(path) as image:
            width, height = image.size
        found.setdefault((width, height), path.name)
        if len(found) > 1 or width != height:
            raise ValueError(f"the images of {folder} are not squares of one size: "
                             + ", ".join(f"{name} has {width}x{height} pixels" for (width, height), name in found.items())
                             + "; --image-size crops and scales them to one")
    return width


def own_split(folder, images):
    """A folder's images for training, those that its sub-folders hold out, and how many folders stand above the classes.

    All, none and 0, unless the sub-folders are a split.
    """
    tops = {path: path.relative_to(folder).parts[0].lower() for path in images}
    if not {*tops.values()} <= {*TRAIN, *HELD_OUT}:
        return images, [], 0
    train, *held_out = ([path for path in images if tops[path] in names] for names in (TRAIN, *zip(HELD_OUT)))
    return train or images, train and next(filter(None, held_out), []), 1


# What is said of them

def said_of_images(files, name):
    """What the files of a name, LABELS or METADATA, say of images: {path: label or text}, and these files.

    A file of that name may be something else: then it is not among them. ValueError if one is damaged.
    """
    said, read = {}, []
    for path in files:
        if path.name != name:
            continue
        try:
            text = read_text(path)
            if name == LABELS:
                content = json.loads(text)
                pairs = content["labels"] or [] if isinstance(content, dict) and "labels" in content else None
            else:
                entries = [json.loads(line) for line in text.split("\n") if line.strip()]
                key = next((key for key in ("text", "caption") if any(key in entry for entry in entries)), None)
                pairs = [(entry["file_name"], entry[key]) for entry in entries] if key else None
            if pairs is not None:
                said |= {path.parent / file.replace("\\", "/"): value for file, value in dict(pairs).items()}
                read.append(path)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"an entry lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} does not say what its images are: {reason}") from None
    return said, read


def class_in(label):
    """The class that a label of a dataset.json names, a whole number, a text or a one-hot vector.  ValueError on another one."""
    if isinstance(label, list) and label.count(1) == 1 and label.count(0) == len(label) - 1:
        return label.index(1)
    if type(label) not in (int, str):
        raise ValueError(f"{LABELS}: {str(label)[:50]} is no class, which is a whole number, a text or a one-hot vector")
    return label


def classes_of(folder, images, depth, others):
    """The class of each image file, {path: number or name}, None without; and the files that say it.

    Said by a dataset.json, or by the sub-folders, below `depth` others.
    """
    labels, read = said_of_images(others, LABELS)
    if read:
        return {path: class_in(labels[path]) if path in labels else None for path in images}, read
    inner = {path: path.relative_to(folder).parts[depth:] for path in images}
    return {path: parts[0] if len(parts) > 1 else None for path, parts in inner.items()}, read


def check_classes(folder, train, held_out, classes):
    """ValueError unless all images have a class or none has, and those held out have no other ones."""
    known = {classes[path] for path in train}
    without = [path for path in train if classes[path] is None]
    if without and len(known) > 1:
        raise ValueError(f"{folder} holds images beside class sub-folders: move {without[0].name} into one"
                         if without[0].parent == folder else f"{without[0]} has no class, which other images of {folder} have")
    for path in held_out:
        if classes[path] not in known:
            name = "none" if classes[path] is None else classes[path]
            raise ValueError(f"{path} is held out, and its class, {name}, is not one of the training images': move it into the "
                             "folder of one that is, or away")


def captions_in(source):
    """The captions in a .txt, one a line, or in an entry of a metadata.jsonl, a text or several.  ValueError if it is none."""
    lines = read_text(source).split("\n") if isinstance(source, Path) else [source] if isinstance(source, str) else source
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{METADATA}: {str(source)[:50]} is no caption")
    return [line.strip() for line in lines if line.strip()] or [""]


def captions_of(images, others, skip_bad):
    """Captions of image files -> the images that have some, their captions or None, the files read, and in words what is left out.

    They are the lines of a .txt beside each, or else the texts in a metadata.jsonl. ValueError if some images have none, or some
    captions no image; with skip_bad these are left out.
    """
    beside = {path.with_suffix(""): path for path in others if path.suffix.lower() == ".txt"}
    texts = {path: beside[path.with_suffix("")] for path in images if path.with_suffix("") in beside}
    read, folders = [*texts.values()], {path.parent for path in images}
    lone = sorted(path for path in {*beside.values()} - {*read} if path.parent in folders)
    if not texts:
        said, read = said_of_images(others, METADATA)
        texts = {path: said[path] for path in images if path in said}
        lone = sorted(path for path in {*said} - {*images} if not path.is_file())
    if not texts:
        return images, None, [], []
    kept, missing = ([path for path in images if (path in texts) is there] for there in (True, False))
    message = (f"{len(missing)} of {len(images)} images have no caption: the first, {missing[0]}, needs {missing[0].stem}.txt"
               if missing else f"{len(lone)} captions have no image, the first is {lone[0]}" if lone else None)
    if message and not skip_bad:
        raise ValueError(f"{message} (--skip-bad goes on without)")
    return kept, [captions_in(texts[path]) for path in kept], read, [message] if message else []


def unread(others, read, captioned):
    """The other files of a folder that were not read, in words: neither among those read, nor the .txt of a captioned image."""
    rest = [path for path in others if path not in read
            and not (path.suffix.lower() == ".txt" and path.with_suffix("") in captioned)]
    gone = {path for path in rest if not path.is_file()}                 # links that lead nowhere, devices
    files = [path for path in rest if path not in gone]
    return ([f"{len(gone):,} that {'are no files' if len(gone) > 1 else 'is no file'}, as {min(gone)}"] if gone else []) + (
        [f"{by_ending(files)}, which are not read here"] if files else [])


# Data sets

def image_folder(folder, split, skip_bad):
    """The Files of a folder's split: its own, see `own_split`, or else all.  ValueError on what is not clear."""
    images, others = images_below(folder)
    train, held_out, depth = own_split(folder, images)
    class_of, labelling = classes_of(folder, images, depth, others)
    check_classes(folder, train, held_out, class_of)
    parts = {"train": train, "test": held_out or train, "all": sorted(train + held_out)}
    paths, captions, captioning, left_out = captions_of(parts[split], others, skip_bad)
    known = sorted({class_of[path] for path in train} - {None}, key=lambda name: (isinstance(name, str), name))
    numbers = {name: number for number, name in enumerate(known)}
    labels = np.array([numbers[class_of[path]] for path in paths]) if known else None
    unused = {*images} - {*parts["all"]}
    if unused:
        left_out.append(f"{len(unused):,} images in {min(unused).relative_to(folder).parts[0]}")
    left_out += unread(others, {*labelling, *captioning}, {path.with_suffix("") for path in images} if captions else ())
    where, own = folder.resolve(), held_out[0].relative_to(folder).parts[0] if held_out else None
    return Files(folder, where / split if own else where, paths, labels, [*map(str, known)] or None, captions, own, left_out)


def coco_captions(annotations, skip_bad):
    """Image files, their captions, and in words what is left out, of a captions_*.json of MS-COCO.

    The images lie beside the json or its folder, or there in a folder of its name, as train2014, in "images", or in both, one in
    the other. ValueError, with their number, if some are missing; with skip_bad they are left out.
    """
    try:
        content = json.loads(read_text(annotations))
        names = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
        captions = {key: [] for key in names}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(" ".join(annotation["caption"].split()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{annotations} holds no captions of MS-COCO: {reason}") from None
    root, part = annotations.parent, annotations.stem.partition("_")[2]
    root = root.parent if root.name == "annotations" else root
    folders = [folder for folder in (root / part, root / "images" / part, root / "images", root) if folder.is_dir()]
    found = {key: next((folder / name for folder in folders if (folder / name).is_file()), None) for key, name in names.items()}
    missing = [names[key] for key, path in found.items() if path is None]
    if missing:
        message = f"{len(missing)} of {len(names)} images of {annotations.name} are missing, the first is {part}/{missing[0]}"
        if not skip_bad or len(missing) == len(names):
            raise ValueError(f"{message}, in {root}" + (" (--skip-bad goes on without)" if len(missing) < len(names) else ""))
    kept = sorted((path, captions[key]) for key, path in found.items() if path is not None and captions[key])
    if not kept:
        raise ValueError(f"{annotations} has no captioned image")
    return [path for path, _ in kept], [texts for _, texts in kept], [message] if missing else []


def coco(folder, split, skip_bad):
    """The Files of MS-COCO in a folder: of its own split, captions_val*.json beside a captions_train*.json, or of all.

    ValueError if there is no captions_*.json.
    """
    found = sorted(path for place in (folder, folder / "annotations") for path in place.glob("captions_*.json"))
    train, val = ([path for path in found if path.stem.startswith(f"captions_{part}")] for part in ("train", "val"))
    if not found or len(train) > 1 or len(val) > 1 or len(found) > 1 and not (train and val):
        raise ValueError(f"coco:{folder} needs one captions_train*.json and one captions_val*.json, or one captions_*.json: it has "
                         f"{', '.join(path.name for path in found) or 'none'}")
    own = bool(train and val)
    chosen = {"train": train, "test": val, "all": found}[split] if own else found
    files, captions, left_out = (sum(parts, []) for parts in zip(*(coco_captions(path, skip_bad) for path in chosen)))
    where = folder.resolve() / "+".join(path.stem for path in chosen)
    return Files(folder, where, files, captions=captions, own_split=val[0].name if own else None, left_out=left_out)
