"""What in an image is no tissue: glass, what a scanner left black, and padding of one colour.

It decides no stain, keeps its colour where the tissue's is changed, and is never nucleus.
"""

import cv2
import numpy as np

SIDE = 16  # pixels; glass that is narrower lies within tissue, or is a part of it
EVEN = 32  # pixels; tissue has no square as large as this of exactly one colour, not even as JPEG
REACH = 40  # pixels around a pixel that decide on it: EVEN, and some
SMOOTH = 5  # pixels; side of the box that takes a camera's noise away
GLASS, COLOURLESS = 200, 0.06  # glass is as bright as this, and of at most this saturation
DARK, RIM = 64, 9  # beside black; pixels, twice a rim's width and one
BLACK = 20  # a scanner leaves at most this where it did not scan
BLURRED = 8  # lines beside a margin, a block of JPEG
NEAR, NEAREST = 8, 64  # levels of their difference to the margin's colour: mean, and largest
STRIP = 256  # pixels; of an image's margin that are read at once

_LEAST_SPREAD = (np.arange(256) * COLOURLESS).astype(np.uint8)  # of coloured pixels, by brightness


def background(image: np.ndarray) -> np.ndarray:
    """Where RGB uint8 (H, W, 3) shows no tissue: bool (H, W).

    That is every square of 16 x 16 pixels that are, slightly smoothed, all glass (the brightest
    channel 200 or more, the saturation, (max - min) / max, 0.06 or less) or all black (20 or less),
    and every square of 32 x 32 of exactly one colour. Lumina and fat of that width count as glass;
    a nucleus that lies alone in a lumen does not.
    """
    return background_and_padding(image)[0]


def background_and_padding(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`background`, and the part of it that no slide shows: black, or of one colour but not glass.

    Both are bool (H, W).
    """
    glass, black = glass_and_black(image)
    constant = _with_wedges(_constant, image)
    dark = _with_wedges(_opened, black) if black.any() else black
    padding = _grown(dark, image) | (constant & ~glass)
    return (_opened(glass | black) | constant | padding).view(bool), padding.view(bool)


def frame_of(image) -> tuple[int, int, int, int]:
    """(y, x, height, width) of what is left of an image without its margins of one colour.

    `image` has `height`, `width` and `read(y, x, height, width)`, as windows.Windows. A margin are
    rows or columns at an edge, of 32 pixels or more, that all have the colour of the image's corner
    there, and up to 8 more lines that JPEG has blurred a little. Nothing is left, a height of 0, of
    an image of one colour, and where the margins meet: (0, 0, 0, width).
    """
    height, width = image.height, image.width
    top = _margin(lambda at, n: image.read(at, 0, n, width), height)
    if top == height:
        return 0, 0, 0, width
    bottom = _margin(lambda at, n: image.read(height - at - n, 0, n, width)[::-1], height - top)
    inside = height - top - bottom
    if not inside:
        return 0, 0, 0, width

    def columns(at, n):
        return image.read(top, at, inside, n).swapaxes(0, 1)

    left = _margin(columns, width)
    right = _margin(lambda at, n: columns(width - at - n, n)[::-1], width - left)
    if left + right == width:
        return 0, 0, 0, width
    return top, left, inside, width - left - right


def _margin(read, length):
    """How many lines from an edge on have one colour; `read(at, n)` gives n of the `length` lines
    from the `at`-th on, (n, other side, 3).
    """
    done = 0
    size = 1  # at first no more than what tells that there is no margin
    while done < length:
        lines = read(done, min(size, length - done))
        if done == 0:
            colour = lines[0, 0]
            if lines.shape[1] < EVEN:  # tissue can have so few pixels of one colour
                return 0
        same = (lines == colour).all(axis=(1, 2))
        if not same.all():
            done += int(same.argmin())
            break
        done += len(lines)
        size = STRIP
    if done in (0, length):
        return done
    lines = read(done, min(BLURRED, length - done)).astype(np.int16)
    distance = np.abs(lines - colour)
    # A nucleus in a wide line hardly moves its mean.
    near = (distance.mean(axis=(1, 2)) <= NEAR) & (distance.max(axis=(1, 2)) <= NEAREST)
    return done + (len(near) if near.all() else int(near.argmin()))


def glass_and_black(image: np.ndarray, smooth: int = SMOOTH) -> tuple[np.ndarray, np.ndarray]:
    """What has, slightly smoothed, the colours of glass and of black, uint8 (H, W) of 0 and 1."""
    channels = cv2.split(cv2.blur(image, (smooth, smooth)))
    high, low = (most(most(*channels[:2]), channels[2]) for most in (cv2.max, cv2.min))
    colourless = high - low <= cv2.LUT(high, _LEAST_SPREAD)
    glass = cv2.threshold(high, GLASS - 1, 1, cv2.THRESH_BINARY)[1] & colourless.view(np.uint8)
    return glass, cv2.threshold(high, BLACK, 1, cv2.THRESH_BINARY_INV)[1]


def _with_wedges(find, image):
    """What `find` finds in an image that goes on beyond its edges as it ends there.

    The corners of an image that was turned run out in wedges, too thin for any square.
    """
    if min(image.shape[:2]) < EVEN:  # all of an edge is less than a square
        return find(image)
    if not _may_be_even(image):  # as nearly always
        return np.zeros(image.shape[:2], np.uint8)
    rows = cv2.copyMakeBorder(image, EVEN, EVEN, 0, 0, cv2.BORDER_REPLICATE)
    columns = cv2.copyMakeBorder(image, 0, 0, EVEN, EVEN, cv2.BORDER_REPLICATE)
    return find(rows)[EVEN:-EVEN] | find(columns)[:, EVEN:-EVEN]


def _may_be_even(image):
    """False where no square of EVEN pixels, sticking out or not, has one value: quickly."""
    height, width = image.shape[:2]
    step = SIDE // 2  # so that in any square, also one of SIDE, pixels looked at are neighbours
    grid = image[np.ix_([*range(0, height, step), height - 1], [*range(0, width, step), width - 1])]
    grid = grid.reshape(*grid.shape[:2], -1)
    across, down = (grid[:, 1:] == grid[:, :-1]).all(2), (grid[1:] == grid[:-1]).all(2)
    edges = across[0], across[-1], down[:, 0], down[:, -1]
    return bool((across[1:] & down[:, 1:]).any() or any(edge.any() for edge in edges))


def _opened(candidates):
    """Of candidates, uint8 of 0 and 1, those in squares of them, which may stick out."""
    return _squares(cv2.erode(candidates, np.ones((SIDE, SIDE), np.uint8)), SIDE)


def _constant(image):
    """Pixels in squares of exactly one colour, uint8 (H, W) of 0 and 1."""
    height, width = image.shape[:2]
    middles = np.ones((height, width), np.uint8)
    for y, x in ((0, 1), (1, 0)):  # all in a square that have a neighbour there are equal to it
        same = np.ones((height, width), np.uint8)
        parts = image[: height - y, : width - x], image[y:, x:]
        if parts[0].size:
            first, second, third = cv2.split(cv2.absdiff(*parts))
            differ = first | second | third
            same[: height - y, : width - x] = cv2.threshold(differ, 0, 1, cv2.THRESH_BINARY_INV)[1]
        kernel = np.ones((EVEN - y, EVEN - x), np.uint8)
        middles &= cv2.erode(same, kernel, anchor=(EVEN // 2, EVEN // 2))
    return _squares(middles, EVEN)


def _grown(black, image):
    """What is black, and what smoothing and JPEG make of its rim, uint8 (H, W) of 0 and 1."""
    if not black.any():
        return black
    first, second, third = cv2.split(image)
    dark = cv2.threshold(first | second | third, DARK - 1, 1, cv2.THRESH_BINARY_INV)[1]
    return black | (cv2.dilate(black, np.ones((RIM, RIM), np.uint8)) & dark)


def _squares(middles, side):
    """All pixels of the squares whose middles, as cv2.erode has them, are 1."""
    place = (side - 1 - side // 2,) * 2  # mirrors the default anchor
    return cv2.dilate(middles, np.ones((side, side), np.uint8), anchor=place)
