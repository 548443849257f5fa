"""The rows of a file of JSON, plain or gzipped, and the values in them, checked."""
import gzip
import json
import math
import zlib

from data import InputError
from data.files import wrong_kind
from data.files.tokenizer import BLANK, MAX_BLANKS


class DataError(InputError):
    """A file that cannot be used. The message begins with the path, and the line where one is at fault."""


class Malformed(Exception):
    """A row of wrong shape. `formats.load` makes a DataError of it."""


class Unusable(Exception):
    """A well-formed row of no use, and why. `formats.load` counts it."""


# ------------------------------------------------------------------------------------------------------------
# Bytes: every object of a file.

# NaN is how pandas writes a missing value.
CONSTANTS = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}
DECODER = json.JSONDecoder(parse_constant=CONSTANTS.get)


def read_rows(path):
    """Yield (place, row) for every object of a file of JSON lines, or of one that is a JSON list; either may
    be gzipped. place is path:line, or the path and the number of the object in its list. Blank lines are
    skipped. DataError: the file cannot be read, holds no object, or is something else, with the line."""
    line, empty = 0, True
    try:
        with open(path, "rb") as disk:
            packed = disk.peek(2)[:2] == b"\x1f\x8b"
            file = gzip.GzipFile(fileobj=disk) if packed else disk
            for line, raw in enumerate(file, 1):
                bare = raw.removeprefix(b"\xef\xbb\xbf").strip()       # without a byte-order mark
                if empty and bare.startswith(b"["):
                    # A list is read whole, since its objects may span lines.
                    for n, row in enumerate(parse(path, line, raw + file.read()), 1):
                        empty = False
                        yield f"{path}, object {n} of the list", row
                elif bare:
                    empty = False
                    # Without its end: what is missing there is missing in this line, not in the next.
                    yield f"{path}:{line}", parse(path, line, raw.rstrip())
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"{path}:{line + 1}: expected a whole gzip file, this is cut off or damaged") from e
    except OSError as e:
        raise DataError(f"{path}: expected a readable file ({e.strerror or e})") from e
    if empty:
        raise DataError(f"{path}: expected at least one JSON object, found none")


def parse(path, line, raw):
    """The JSON value in bytes of a file that begin at a line. DataError: there is none, or more than one."""
    try:
        return DECODER.decode(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        line += raw.count(b"\n", 0, e.start)
        problem = (f"the byte 0x{raw[e.start]:02x}, which is not UTF-8 text; a file of zstd, xz, zip or "
                   "parquet has to be unpacked or converted first")
    except json.JSONDecodeError as e:
        line += e.lineno - 1
        problem = wrong_kind(path) or f"something else ({e.msg})"
    except (RecursionError, ValueError) as e:      # thousands of brackets, or of digits
        problem = f"no value of sane size ({e})"
    raise DataError(f"{path}:{line}: expected JSON, an object a line or a list of them, found {problem}")


# ------------------------------------------------------------------------------------------------------------
# Values, checked.

NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number",
         float: "a number", type(None): "null"}


def value_of(row, key, *types, default=None):
    """row[key], or the default where there is one and the key is absent or null. Malformed: it is of none of
    the types."""
    value = row.get(key)
    if value is None and default is not None:
        return default
    if type(value) not in types:
        found = NAMES[type(value)] if key in row else "no such key"
        *names, last = dict.fromkeys(NAMES[kind] for kind in types)
        expected = f"{', '.join(names)} or {last}" if names else last
        raise Malformed(f'expected "{key}" to be {expected}, found {found}')
    return value


def text_of(row, key, default=None):
    """The text under a key, without surrounding space. Unusable: no tokenizer can read it."""
    text = value_of(row, key, str, default=default).strip()
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:     # JSON can spell "\ud83d", half of an emoji
        raise Unusable("half a character") from None
    if len(text) > MAX_BLANKS and BLANK.search(text):      # damage
        raise Unusable(f"run of {MAX_BLANKS:,} blanks")
    return text


def number_of(row, key, low=-1e300, high=1e300, default=None):
    """The number under a key, which may be written as text: "8.5"."""
    value = value_of(row, key, int, float, str, default=default)
    try:
        number = float(value)
    except ValueError:
        raise Malformed(f'expected "{key}" to be a number, found {NAMES[type(value)]}') from None
    except OverflowError:      # a whole number of hundreds of digits
        number = math.inf
    if not low <= number <= high:      # Infinity is too high for all
        raise Malformed(f'expected "{key}" to be between {low:g} and {high:g}, found another number')
    return number
