"""Strict decoder of fax-coded pictures, ITU-T T.4 and T.6 (TIFF compression 2 to 4).

libtiff goes on after a bad code word and invents the rest of the picture. Here everything an
encoder would not have written is an error: unknown codes, rows of another width, a mode that T.6
does not choose there, anything but fill bits at the end. The code has no checksum: a flipped bit
that makes another proper picture (edges moved by a pixel or two) cannot be seen by any decoder.
"""

import array

import numpy as np

RLE, GROUP_3, GROUP_4 = 2, 3, 4  # TIFF's numbers of compression
TWO_DIMENSIONAL = 1  # bit of GROUP_3's T4Options
_LONGEST = 13  # bits of a code word

# Code words for runs of 0 to 63, then 64, 128 .. 1728 pixels; T.4, tables 2 and 3a.
_WHITE = """
00110101 000111 0111 1000 1011 1100 1110 1111 10011 10100 00111 01000 001000 000011 110100 110101
101010 101011 0100111 0001100 0001000 0010111 0000011 0000100 0101000 0101011 0010011 0100100
0011000 00000010 00000011 00011010 00011011 00010010 00010011 00010100 00010101 00010110 00010111
00101000 00101001 00101010 00101011 00101100 00101101 00000100 00000101 00001010 00001011 01010010
01010011 01010100 01010101 00100100 00100101 01011000 01011001 01011010 01011011 01001010 01001011
00110010 00110011 00110100
11011 10010 010111 0110111 00110110 00110111 01100100 01100101 01101000 01100111 011001100
011001101 011010010 011010011 011010100 011010101 011010110 011010111 011011000 011011001 011011010
011011011 010011000 010011001 010011010 011000 010011011
"""
_BLACK = """
0000110111 010 11 10 011 0011 0010 00011 000101 000100 0000100 0000101 0000111 00000100 00000111
000011000 0000010111 0000011000 0000001000 00001100111 00001101000 00001101100 00000110111
00000101000 00000010111 00000011000 000011001010 000011001011 000011001100 000011001101
000001101000 000001101001 000001101010 000001101011 000011010010 000011010011 000011010100
000011010101 000011010110 000011010111 000001101100 000001101101 000011011010 000011011011
000001010100 000001010101 000001010110 000001010111 000001100100 000001100101 000001010010
000001010011 000000100100 000000110111 000000111000 000000100111 000000101000 000001011000
000001011001 000000101011 000000101100 000001011010 000001100110 000001100111
0000001111 000011001000 000011001001 000001011011 000000110011 000000110100 000000110101
0000001101100 0000001101101 0000001001010 0000001001011 0000001001100 0000001001101 0000001110010
0000001110011 0000001110100 0000001110101 0000001110110 0000001110111 0000001010010 0000001010011
0000001010100 0000001010101 0000001011010 0000001011011 0000001100100 0000001100101
"""
# 1792, 1856 .. 2560 pixels of either colour; T.4, table 3b.
_EITHER = """
00000001000 00000001100 00000001101 000000010010 000000010011 000000010100 000000010101
000000010110 000000010111 000000011100 000000011101 000000011110 000000011111
"""
_PASS, _HORIZONTAL = 8, 9  # beside the vertical modes, -3 to 3
_MODES = {"1": 0, "011": 1, "000011": 2, "0000011": 3, "010": -1, "000010": -2, "0000010": -3}
_MODES |= {"0001": _PASS, "001": _HORIZONTAL}  # T.6, table 1


def _table(codes):
    """[(bits, meaning)] by the next _LONGEST bits; (0, 0) where they begin with no code word."""
    table = [(0, 0)] * (1 << _LONGEST)
    for code, meaning in codes.items():
        first = int(code.ljust(_LONGEST, "0"), 2)
        for window in range(first, first + (1 << (_LONGEST - len(code)))):
            table[window] = len(code), meaning
    return table


_LENGTHS = [*range(64), *range(64, 1729, 64)]
_LONG = dict(zip(_EITHER.split(), range(1792, 2561, 64), strict=True))
_RUNS = [
    _table(dict(zip(codes.split(), _LENGTHS, strict=True)) | _LONG) for codes in (_WHITE, _BLACK)
]
_MODE = _table(_MODES)


def decode(data: bytes, rows: int, width: int, compression: int, options: int = 0) -> np.ndarray:
    """Return a strip as bool (rows, width), True where it is coded black.

    `data` has the highest bit first; `options` is GROUP_3's T4Options. Raises ValueError for what
    no encoder writes.
    """
    bits = _Bits(data)
    flips = np.zeros((rows, width + 1), bool)  # True where the colour changes
    above = []
    for row in range(rows):
        two_dimensional = compression == GROUP_4
        if compression == GROUP_3:
            marked = bits.skip_end_of_line()
            if options & TWO_DIMENSIONAL:
                if not marked:
                    raise ValueError(f"fax row {row} does not begin with an end of line")
                two_dimensional = bits.take(1) == 0
        coded = _row_by_reference(bits, above, width) if two_dimensional else _row(bits, width)
        if coded is None:
            raise ValueError(f"fax code is damaged in row {row} of {rows}")
        if compression == RLE:
            bits.align()
        flips[row, coded] = True
        above = coded
    bits.check_end(compression, options)
    return np.logical_xor.accumulate(flips, axis=1)[:, :width]


class _Bits:
    """The bits of a strip, and the place reached."""

    def __init__(self, data):
        bits = np.unpackbits(np.frombuffer(data, np.uint8))
        self.end = len(bits)
        bits = np.append(bits, np.zeros(_LONGEST, np.uint8)).astype(np.uint16)
        windows = np.zeros(self.end + 1, np.uint16)
        for bit in range(_LONGEST):
            windows |= bits[bit : bit + self.end + 1] << np.uint16(_LONGEST - 1 - bit)
        self.windows = array.array("H", windows.tobytes())  # the next _LONGEST bits at each place
        self.ones = np.append(np.flatnonzero(bits), self.end + _LONGEST)
        self.place = 0

    def read(self, table):
        """The meaning of the next code word, None where there is none."""
        if self.place > self.end:
            return None
        length, meaning = table[self.windows[self.place]]
        self.place += length
        return meaning if length and self.place <= self.end else None

    def take(self, count):
        window = self.windows[min(self.place, self.end)]
        self.place += count
        return window >> (_LONGEST - count)

    def align(self):
        self.place += -self.place % 8

    def skip_end_of_line(self):
        """Skip an end of line, 11 zeros or more and a one, and say whether there was one."""
        one = int(self.ones[np.searchsorted(self.ones, self.place)])
        if one - self.place < 11 or one >= self.end:
            return False
        self.place = one + 1
        return True

    def check_end(self, compression, options):
        """Raise ValueError unless only ends of lines and fill bits are left."""
        if compression != RLE:
            while self.skip_end_of_line():  # T.4's return to control, T.6's end of block
                if compression == GROUP_3 and options & TWO_DIMENSIONAL:
                    self.take(1)
        if self.ones[np.searchsorted(self.ones, self.place)] < self.end or self.place > self.end:
            raise ValueError("fax code does not end with its last row")


def _run(bits, colour):
    """The length of the next run, None for no proper code."""
    total = 0
    while (length := bits.read(_RUNS[colour])) is not None:
        total += length
        if length < 64:
            return total
        if length < 2560:  # one code word for what is left of it must follow
            rest = bits.read(_RUNS[colour])
            return total + rest if rest is not None and rest < 64 else None
    return None


def _row(bits, width):
    """The places where a row of runs changes its colour, None for no proper row."""
    changes, place, colour = [], 0, 0
    while place < width:
        run = _run(bits, colour)
        if run is None or (run == 0 and place):
            return None
        place += run
        changes.append(place)
        colour ^= 1
    return changes if place == width else None


def _row_by_reference(bits, above, width):
    """As `_row`, for a row that is coded by the changes in the row `above` it; T.6, 2.2."""
    above = [*above, width, width, width]
    changes, place, colour, first = [], -1, 0, 0
    while place < width:
        # b1: the first change above that is right of `place` and to the other colour.
        first = max(0, first - 1)
        while above[first] <= place and above[first] < width:
            first += 1
        b1 = first + ((first ^ colour) & 1)
        before, after = above[b1], above[b1 + 1]
        mode = bits.read(_MODE)
        if mode is None:
            return None
        if mode == _PASS:
            if after >= width:
                return None
            place = after
            continue
        if mode == _HORIZONTAL:
            runs = _run(bits, colour), _run(bits, colour ^ 1)
            if None in runs:
                return None
            change = max(place, 0) + runs[0]
            ends = [change, change + runs[1]]
            if abs(change - before) <= 3 or (runs[1] == 0 and change < width):
                return None
        else:
            change = before + mode
            ends = [change]
            colour ^= 1
        # A change lies right of the last one, and T.6 passes by what ends above left of it.
        if change <= place or after < change or ends[-1] > width:
            return None
        changes += ends
        place = ends[-1]
    return changes
