"""Pictures: grids of images and files of them; charts, with points in the plane; and labelled tables of images. Pillow and NumPy.

A chart is a box with ticks, lines, points, arrows and a legend. It is drawn FINE times too large and then reduced, which smooths
every edge. Sizes are pixels of the result. Figures of several charts are their arrays side by side, `np.concatenate`. Pillow's own
font has ASCII characters only; in a text, ^ raises what follows.
"""
import math

import numpy as np
from PIL import Image, ImageColor, ImageDraw
from PIL.ImageFont import load_default
from PIL.PngImagePlugin import PngInfo

from files import mark, output_file
from points import swiss_roll

FINE = 3
FONT = 20                                        # so that half the size can still be read
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")     # Okabe & Ito 2008: colour-blind
INK, GRID, WHITE = (51, 51, 51), (225, 225, 225), (255, 255, 255)
WINDOW = (-2.6, 2.6)                             # of x and y, where points are drawn


# Images

def grid(images, columns):
    """Tile uint8 images (n, H, W, C) into one (H', W', C), row by row on grey, small ones magnified to a height of up to 64."""
    zoom, gap = max(1, 64 // images.shape[1]), 2
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


def faint(colour):
    """A colour of COLOURS, two thirds of the way to white."""
    return tuple((value + 2 * 255) // 3 for value in ImageColor.getrgb(colour))


# Numbers of an axis

def ticks(low, high, count=4):
    """Round numbers from low to high, at least `count` and as few as can be: all multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(high - low))
    for nice in (5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01):
        step = nice * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 >= count:
            break
    return [k * step for k in range(first, last + 1)]


def log_ticks(low, high, count=4):
    """Round numbers from low to high for a logarithmic axis, at most twice `count`: powers of ten, or fewer, or more between."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for every, factors in ((1, (1, 2, 5)), *((every, (1,)) for every in range(1, len(powers) + 1))):
        found = [factor * 10.0 ** k for k in powers if k % every == 0 for factor in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) <= 2 * count:
            break
    return found if len(found) > 1 else ticks(low, high, count)


def number(value):
    """A tick's number as text: 0.05, 2000, or where that is long a power, 10^-5 and 2e-5."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"10^{int(exponent)}" if float(mantissa) == 1 else f"{float(mantissa):g}e{int(exponent)}"


def spread(*values, log=False, margin=0.04):
    """The range (low, high) of an axis on which all finite values, arrays, lie, with a margin at both ends."""
    values = np.concatenate([np.asarray(array, dtype=np.float64).ravel() for array in values])
    values = values[np.isfinite(values) & (values > 0 if log else True)]
    if not len(values):
        raise ValueError("there is nothing to draw: no finite value" + " above 0" * log)
    low, high = values.min(), values.max()
    if log:
        room = (high / low) ** margin if high > low else 2.0             # one value: an octave on both sides
        return low / room, high * room
    room = margin * (high - low) or abs(high) / 2 or 1.0
    return low - room, high + room


# Text

def text_width(text, size):
    """Pixels that a text takes."""
    base, _, raised = text.partition("^")
    return load_default(size).getlength(base) + load_default(0.7 * size).getlength(raised)


def write_text(draw, x, y, text, size, anchor="lm", colour=INK):
    """Write a text at a point: l, m or r of it there, and t(op), m(iddle) or s (its base line)."""
    base, _, raised = text.partition("^")
    x -= {"l": 0, "m": 0.5, "r": 1}[anchor[0]] * text_width(text, size)
    draw.text((x, y), base, colour, load_default(size), "l" + anchor[1])
    if raised:
        x += load_default(size).getlength(base)
        draw.text((x, y - 0.35 * size), raised, colour, load_default(0.7 * size), "l" + anchor[1])


# Charts

def covered(canvas, x, y, width, height):
    """How many pixels of a box of a canvas hold marks; x, y: its left top corner."""
    box = np.asarray(canvas.crop([round(edge) for edge in (x, y, x + width, y + height)]))           # black outside
    return ((box != WHITE) & (box != GRID)).any(axis=2).sum()


class Chart:
    """A box over the ranges x and y, each (low, high). What is drawn outside of it is cut off at its edges.

    box: its left, top, right and bottom in pixels. ValueError on a range that is none, or not above 0 on a logarithmic axis.
    """

    def __init__(self, x, y, title="", x_label="", y_label="", width=640, height=460, log_x=False, log_y=False):
        for low, high, log in ((*x, log_x), (*y, log_y)):
            if not -math.inf < low < high < math.inf or log and low <= 0:
                raise ValueError(f"an axis from {low:g} to {high:g}" + " is not logarithmic" * log)
        self.x, self.y, self.log_x, self.log_y = x, y, log_x, log_y
        self.title, self.x_label, self.y_label, self.legend = title, x_label, y_label, []
        self.x_ticks = (log_ticks if log_x else ticks)(*x, min(5, max(3, width // 120)))
        self.y_ticks = (log_ticks if log_y else ticks)(*y, min(5, max(3, height // 120)))
        left = 22 + math.ceil(max(text_width(number(value), FONT) for value in self.y_ticks))
        self.box = left, 12 + 30 * bool(title) + 30 * bool(y_label), width - 28, height - 40 - 30 * bool(x_label)
        self.marks = Image.new("RGB", (width * FINE, height * FINE), WHITE)
        self.draw = ImageDraw.Draw(self.marks)
        for value in self.x_ticks:
            self.line([value, value], y, GRID, 1)
        for value in self.y_ticks:
            self.line(x, [value, value], GRID, 1)

    def pixels(self, x, y):
        """Where in the picture values x, y (n,) lie -> (n, 2)."""
        def place(values, ends, log, first, last):
            low, high = np.log(ends) if log else ends
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.asarray(values, dtype=np.float64)
                values = np.log(values) if log else values
            return first + (values - low) / (high - low) * (last - first)
        left, top, right, bottom = self.box
        return np.stack([place(x, self.x, self.log_x, left, right), place(y, self.y, self.log_y, bottom, top)], axis=1)

    def fine(self, x, y):
        """The same on the canvas, (n, 2), without what is no number, or not above 0 on a logarithmic axis."""
        places = self.pixels(x, y)
        return FINE * places[np.isfinite(places).all(axis=1)].clip(-1e5, 1e5)        # Pillow draws no line to infinity

    def line(self, x, y, colour, width=2.5, label=None):
        """Join points x, y (n,)."""
        self.draw.line([tuple(place) for place in self.fine(x, y)], colour, round(width * FINE), "curve")
        if label is not None:
            self.legend.append((label, colour, False))

    def points(self, x, y, colour, radius=2.0, label=None):
        """A disc at each point x, y (n,)."""
        for place in self.fine(x, y):
            self.draw.circle(tuple(place), radius * FINE, colour)
        if label is not None:
            self.legend.append((label, colour, True))

    def arrows(self, x, y, dx, dy, colour):
        """An arrow from each point x, y (n,) to x + dx, y + dy."""
        for ends in zip(x, np.add(x, dx), y, np.add(y, dy), strict=True):
            places = self.fine(ends[:2], ends[2:])
            if len(places) < 2:
                continue
            tail, tip = places
            head = min(5.0 * FINE, 0.5 * math.dist(tail, tip))
            angle = math.atan2(*(tail - tip)[::-1])
            barbs = [tuple(tip + head * np.array([math.cos(angle + turn), math.sin(angle + turn)])) for turn in (0.5, -0.5)]
            self.draw.line([tuple(tail), tuple(tip)], colour, round(1.5 * FINE))
            self.draw.line([barbs[0], tuple(tip), barbs[1]], colour, round(1.5 * FINE), "curve")

    def text(self, x, y, text, colour=INK):
        """Write to the right of a mark, or above, below or to the left, where it hides the least of what is there."""
        size, aside, apart = 0.8 * FONT * FINE, 12 * FINE, 20 * FINE
        width, (left, _, right, _) = text_width(text, size), (FINE * edge for edge in self.box)

        def hidden(place):
            return place[0] < left or place[0] + width > right, covered(self.marks, place[0], place[1] - size / 2, width, size)
        for x, y in self.fine([x], [y]):
            places = ((x + aside, y), (x - width / 2, y - apart), (x - width / 2, y + apart), (x - aside - width, y))
            x, y = min(places, key=hidden)
            write_text(self.draw, x, y, text, size, colour=colour)

    def draw_legend(self, canvas):
        """Write the legend into the corner of the box where the fewest marks are on the canvas."""
        left, top, right, bottom = (FINE * edge for edge in self.box)
        line, room = 26 * FINE, 10 * FINE
        width = room + 34 * FINE + max(text_width(label, 0.85 * FONT * FINE) for label, *_ in self.legend)
        height = line * len(self.legend)
        corners = [(x, y) for y in (top + room, bottom - room - height) for x in (right - room - width, left + room)]
        x, y = min(corners, key=lambda corner: covered(canvas, *corner, width, height))
        draw = ImageDraw.Draw(canvas)
        if covered(canvas, x, y, width, height):
            draw.rectangle([x, y, x + width, y + height], WHITE)
        for i, (label, colour, disc) in enumerate(self.legend):
            middle = y + (i + 0.5) * line
            if disc:
                draw.circle((x + 18 * FINE, middle), 5 * FINE, colour)
            else:
                draw.line([x + 6 * FINE, middle, x + 30 * FINE, middle], colour, 3 * FINE)
            write_text(draw, x + 38 * FINE, middle, label, 0.85 * FONT * FINE)

    def image(self):
        """The picture, uint8 (height, width, 3)."""
        marks, canvas, box = self.marks.copy(), Image.new("RGB", self.marks.size, WHITE), tuple(FINE * edge for edge in self.box)
        if self.legend:
            self.draw_legend(marks)
        canvas.paste(marks.crop(box), box[:2])                           # what lies outside is cut off
        draw, size = ImageDraw.Draw(canvas), FONT * FINE
        left, top, right, bottom = box
        draw.line([(left, top), (left, bottom), (right, bottom)], INK, round(1.5 * FINE))
        for value, (x, _) in zip(self.x_ticks, FINE * self.pixels(self.x_ticks, [self.y[0]] * len(self.x_ticks))):
            draw.line([x, bottom, x, bottom + 5 * FINE], INK, FINE)
            write_text(draw, x, bottom + 20 * FINE, number(value), size, "mm")
        for value, (_, y) in zip(self.y_ticks, FINE * self.pixels([self.x[0]] * len(self.y_ticks), self.y_ticks)):
            draw.line([left - 5 * FINE, y, left, y], INK, FINE)
            write_text(draw, left - 9 * FINE, y, number(value), size, "rm")
        write_text(draw, (left + right) / 2, canvas.height - 20 * FINE, self.x_label, size, "mm")
        write_text(draw, left, top - 18 * FINE, self.y_label, size)
        write_text(draw, (left + right) / 2, 22 * FINE, self.title, 1.1 * size, "mm")
        return np.asarray(canvas.reduce(FINE))


def table(images, rows, columns, corner=""):
    """Images uint8 (R, K, H, W, 1 or 3) in rows and columns with a text beside each row and above each column -> (H', W', 3).

    Each is magnified to at least 96 pixels; long texts above the columns are written smaller.
    """
    zoom = max(1, -(-96 // images.shape[2]))
    images = np.broadcast_to(images, (*images.shape[:4], 3)).repeat(zoom, axis=2).repeat(zoom, axis=3)
    R, K, H, W, _ = images.shape
    left = 24 + math.ceil(max(text_width(text, FONT) for text in (*rows, corner)))
    canvas = Image.new("RGB", (left + K * (W + 4) + 8, 40 + R * (H + 4) + 8), WHITE)
    draw, size = ImageDraw.Draw(canvas), FONT * min(1, W / max(text_width(text, FONT) for text in columns))
    write_text(draw, left - 12, 20, corner, FONT, "rm")
    for k, column in enumerate(columns):
        write_text(draw, left + k * (W + 4) + W / 2, 20, column, size, "mm")
    for r, row in enumerate(rows):
        write_text(draw, left - 12, 40 + r * (H + 4) + H / 2, row, FONT, "rm")
        for k in range(K):
            canvas.paste(Image.fromarray(np.ascontiguousarray(images[r, k])), (left + k * (W + 4), 40 + r * (H + 4)))
    return np.asarray(canvas)


# Points in the plane

def points_panel(points, title="", colour=COLOURS[0], size=460):
    """A chart of points (n, 2), over the whole roll."""
    chart = Chart(WINDOW, WINDOW, title, width=size, height=size)
    chart.points(*points.T, colour, radius=1.5)
    return chart


def points_picture(samples):
    """Samples (n, 2) beside as many points of the data -> uint8 (H, W, 3)."""
    data = swiss_roll(len(samples), seed=1)
    return np.concatenate([points_panel(data.numpy(), f"{len(data)} points of the data", COLOURS[6]).image(),
                           points_panel(np.asarray(samples), f"{len(samples)} samples").image()], axis=1)
