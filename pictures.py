"""Pictures: grids of images, files of images, and points in the plane."""
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from chart import COLOURS, Chart
from files import mark, output_file
from points import swiss_roll

WINDOW = (-2.6, 2.6)                             # of x and y, where points are drawn


def grid(images, columns, gap=2):
    """Tile uint8 images (n, H, W, C) into one (H', W', C), row by row on grey, small ones magnified to a height of up to 64."""
    zoom = max(1, 64 // images.shape[1])
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 128, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top:top + height, left:left + width] = image
    return canvas


def to_image(array):
    """uint8 (H, W, 1 or 3) -> Pillow image."""
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def save_image(path, array, purpose="sample", **rule):
    """Write uint8 (H, W, 1 or 3) as a PNG that says what for; purpose and rule are `files.check_output`'s."""
    said = PngInfo()
    said.add_text("Software", mark(purpose))
    with output_file(path, purpose, **rule) as file:
        to_image(array).save(file, format="PNG", pnginfo=said)


def write_gif(path, frames, purpose, **rule):
    """Write uint8 frames (H, W, C) as a GIF, likewise: ten a second, the last one held for two."""
    images = [to_image(frame) for frame in frames]
    with output_file(path, purpose, **rule) as file:
        images[0].save(file, format="GIF", save_all=True, append_images=images[1:],
                       duration=[100] * (len(images) - 1) + [2000], loop=0, comment=mark(purpose).encode())


def points_panel(points, title="", colour=COLOURS[0], width=460, height=460):
    """A chart of points (n, 2), over the whole roll."""
    chart = Chart(WINDOW, WINDOW, title, width=width, height=height)
    chart.points(*points.T, colour, radius=1.5)
    return chart


def points_picture(samples):
    """Samples (n, 2) beside as many points of the data -> uint8 (H, W, 3)."""
    data = swiss_roll(len(samples), seed=1)
    return np.concatenate([points_panel(data.numpy(), f"{len(data)} points of the data", COLOURS[6]).image(),
                           points_panel(np.asarray(samples), f"{len(samples)} samples").image()], axis=1)
