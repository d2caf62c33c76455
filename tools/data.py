#!/usr/bin/env python3
"""Makes a dataset file for fpdm.c: one safetensors file with x, y and the names of the classes.

    python3 tools/data.py emoji --out emoji32.safetensors --size 32       # every emoji of the Noto Color Emoji font
    python3 tools/data.py folder PICTURES --out pictures.safetensors --size 64         # PICTURES/CLASS/*.jpg
    python3 tools/data.py cifar10 cifar-10-batches-bin --out cifar10.safetensors
    python3 tools/data.py mnist train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz --out mnist.safetensors --size 32
    python3 tools/data.py npy features --labels labels --out latents.safetensors --latent_scale 0.18215
    python3 tools/data.py show emoji32.safetensors --out sheet.png        # what is in a dataset file

x is U8 (N,H,W,C) for pictures, F32, F16 or BF16 (N,C,H,W) for latents; y is I64 (N). Needs numpy and pillow. The file
is written here, not by the safetensors package, because that wants the whole dataset in memory. What several tools need
(one line for an error, files that are whole or not there) stands here, too, and they import it.
"""
import argparse
import contextlib
import gzip
import json
import math
import os
import re
import struct
import sys
import time
import zipfile
import zlib
from multiprocessing.pool import ThreadPool
from pathlib import Path

try:
    import numpy as np
    from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps, features
except ImportError as error:
    sys.exit(f"{Path(sys.argv[0]).name}: needs the Python package {error.name}: pip install -r tools/requirements.txt")

EMOJI_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
EMOJI_GROUPS = "/usr/share/unicode/emoji/emoji-test.txt"
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
STORED_AS = {"U8": np.dtype("u1"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
CLASSES = 999_999  # labels without names are smaller: what the programs take
CHUNK = 64 << 20  # bytes that are converted at a time, so that memory does not grow with the dataset


# ---- what other tools use, too


def note(message):
    print(f"{Path(sys.argv[0]).name}: {message}".replace("\n", " "), file=sys.stderr)


def die(message):
    note(message)
    sys.exit(1)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        die(f"{message}; see --help")


def replace_file(path, write, option="--out"):
    """Writes beside the target, then renames: never half a file. write(file) gets a binary file."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        die(f"{option} {path}: {error.strerror}; give a path in a folder that can be written, with enough space")
    finally:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()


def main_of(run, *args):
    """Runs a tool: what its user, or a full disk, does to it ends it with one line."""
    try:
        run(*args)
    except OSError as error:  # a full disk, a folder that must not be read
        die(f"{error}; make room, or correct the path or its permissions")
    except KeyboardInterrupt:
        note("stopped")
        sys.exit(130)


class Progress:
    """A line on standard error about every two seconds; on a terminal one line that is written over."""

    def __init__(self, what, total):
        self.what, self.total, self.done, self.begin = what, total, 0, time.monotonic()
        self.shown = self.begin

    def step(self, count=1):
        self.done += count
        now = time.monotonic()
        if now - self.shown < 2:
            return
        left = (now - self.begin) / self.done * (self.total - self.done)
        line = f"{self.done}/{self.total} {self.what}, {int(left) // 60}:{int(left) % 60:02d} left"
        print(f"\r{line} " if sys.stderr.isatty() else f"{line}\n", end="", file=sys.stderr, flush=True)
        self.shown = now


def to_dtype(x, dtype, where):
    """x in the bytes that the file stores. BF16, which numpy lacks, is F32's upper half, rounded to even."""
    if dtype == "U8":
        return np.ascontiguousarray(x, np.uint8)
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(x, "<f4" if dtype == "BF16" else STORED_AS[dtype])
    if not np.isfinite(out).all():
        more = "" if dtype == "F32" else ", or give --dtype F32"
        die(f"{where}: values that are not finite numbers in {dtype}; correct them{more}")
    if dtype == "BF16":
        bits = out.view("<u4")
        out = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype("<u2")
    return out


class Writer:
    """Writes a dataset file while the pictures arrive: header, y, x, in a temporary file that is renamed at the end.

    x starts where it would if all `count` pictures came. When some turn out unreadable, y is shorter and the header is
    padded with blanks (the format allows that), so that nothing that was written has to move. y stands before x because
    the format has no gaps, and 8-byte numbers after pictures of any size would not be aligned.
    """

    def __init__(self, path, count, shape, dtype="U8", labelled=True, class_names=None, latent_scale=None):
        self.path, self.shape, self.dtype, self.labelled, self.class_names = path, shape, dtype, labelled, class_names
        self.metadata = {}
        if class_names:
            self.metadata["class_names"] = json.dumps(class_names, ensure_ascii=False)
        if latent_scale is not None:
            self.metadata["latent_scale"] = repr(latent_scale)
        self.labels = []
        self.n = 0
        self.x_start = 8 + (len(self.header(count)) + 7) // 8 * 8 + (8 * count if labelled else 0)

    def header(self, n):
        tensors = {"__metadata__": self.metadata} if self.metadata else {}
        y_bytes = 8 * n if self.labelled else 0
        x_bytes = n * math.prod(self.shape) * STORED_AS[self.dtype].itemsize
        if self.labelled:
            tensors["y"] = {"dtype": "I64", "shape": [n], "data_offsets": [0, y_bytes]}
        tensors["x"] = {"dtype": self.dtype, "shape": [n, *self.shape], "data_offsets": [y_bytes, y_bytes + x_bytes]}
        return json.dumps(tensors, ensure_ascii=False, separators=(",", ":")).encode()

    def __enter__(self):
        try:
            self.file = open(f"{self.path}.tmp", "wb")
        except OSError as error:
            die(f"--out {self.path}: {error.strerror}; give a path in a folder that can be written")
        self.file.seek(self.x_start)
        return self

    def add(self, x, y=None, where=""):
        """Appends pictures x (k, *shape) and their labels y (k)."""
        if x.shape[1:] != tuple(self.shape):
            die(f"{where}: shape {x.shape[1:]} where the others have {tuple(self.shape)}; all must have one shape")
        if self.labelled and len(y):
            top = len(self.class_names) if self.class_names else CLASSES
            if np.min(y) < 0 or np.max(y) >= top:
                die(f"{where}: labels {np.min(y)}..{np.max(y)}, want 0..{top - 1}; check the labels, or --class_names")
            self.labels.extend(int(label) for label in y)
        self.file.write(to_dtype(x, self.dtype, where))
        self.n += len(x)

    def __exit__(self, error, *_):
        try:
            if error is None:
                self.finish()
        finally:  # after finish() there is none, after an error of any kind it goes
            Path(f"{self.path}.tmp").unlink(missing_ok=True)

    def finish(self):
        if self.n == 0:
            die(f"{self.path}: not written, for there was no picture to put into it")
        head = self.x_start - 8 - 8 * len(self.labels)
        self.file.seek(0)
        self.file.write(struct.pack("<Q", head) + self.header(self.n).ljust(head))
        self.file.write(np.array(self.labels, "<i8"))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(f"{self.path}.tmp", self.path)
        print_counts(self.path, self.dtype, [self.n, *self.shape], self.labels, self.class_names)


def print_counts(path, dtype, shape, labels, class_names):
    print(f"{path}: x {dtype} {tuple(shape)}, {os.path.getsize(path) / 1e6:.1f} MB, ", end="")
    if len(labels) == 0:
        print("no labels")
        return
    counts = np.bincount(labels, minlength=len(class_names or []))
    print(f"{len(counts)} classes")
    for label, count in enumerate(counts):
        if count or class_names:
            name = ([*class_names, "no label"][label] if label <= len(class_names) else "?") if class_names else ""
            print(f"{label:5d} {count:8d} {name}".rstrip())


def names_option(text):
    """--class_names: a file with one name a line, or the names themselves with commas between."""
    if text and os.path.isfile(text):
        try:
            return Path(text).read_text(encoding="utf-8-sig").rstrip().splitlines()
        except UnicodeDecodeError as error:
            die(f"--class_names {text}: {error}; want a text file in UTF-8, one name a line")
    return text.split(",") if text else None


def flatten(image, background):
    """The picture as RGB, whatever its mode, transparent parts showing the background colour."""
    if image.mode == "F":
        raise ValueError("pixels are floats, of any range; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip to 8 instead of scaling
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 257).astype(np.uint8))
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")


# ---- emoji: the pictures of a colour font, in the groups of emoji-test.txt


def emoji_list(path, by, skin_tones):
    """(sequence, class) of every fully-qualified emoji in Unicode's emoji-test.txt, in its order."""
    found, group, subgroup = [], None, None
    try:
        lines = open(path, encoding="utf-8").read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        die(f"{path}: {error}; install Debian's unicode-data, or give Unicode's emoji-test.txt with --groups")
    for line in lines:
        if line.startswith("# group:"):
            group = line.split(":")[1].split("&")[0].strip().lower()  # "Smileys & Emotion": smileys, easy to type
        elif line.startswith("# subgroup:"):
            subgroup = line.split(":")[1].strip()
        else:
            match = re.match(r"([0-9A-F ]+?) *; fully-qualified ", line)
            if match and group is None:
                die(f"{path}: an emoji before the first '# group:' line; this is not Unicode's emoji-test.txt")
            if match:
                codes = [int(code, 16) for code in match[1].split()]
                if skin_tones or not any(0x1F3FB <= code <= 0x1F3FF for code in codes):
                    found.append(("".join(map(chr, codes)), group if by == "group" else subgroup))
    if not found:
        die(f"{path}: no line like '1F600 ; fully-qualified'; this is not Unicode's emoji-test.txt")
    return found


def emoji(args):
    needs = {args.font: "fonts-noto-color-emoji, or a font with colour bitmaps as --font",
             args.groups: "unicode-data, or Unicode's emoji-test.txt as --groups"}
    missing = [path for path in needs if not os.path.exists(path)]
    if missing:
        die(f"{' and '.join(missing)}: not there; install Debian's {' and '.join(needs[path] for path in missing)}")
    if not features.check("raqm"):
        die("this pillow was built without libraqm, which joins code points to one emoji; use Debian's python3-pil")
    try:
        # 109 is the one size of the bitmaps in the font: 136 x 128 pixels
        font = ImageFont.truetype(args.font, 109, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        die(f"{args.font}: {error}; install Debian's fonts-noto-color-emoji, or give a colour bitmap font with --font")
    one_glyph = font.getlength("\U0001F600")
    pictures, labels, seen, missing, same = [], [], set(), 0, 0
    wanted = emoji_list(args.groups, args.classes, args.skin_tones)
    class_names = list(dict.fromkeys(name for _, name in wanted))
    for text, name in wanted:
        canvas = Image.new("RGBA", (128, 128))  # leaves out 4 columns on either side, which are always empty
        if font.getlength(text) == one_glyph:  # longer where the font has no picture for the whole sequence
            ImageDraw.Draw(canvas).text((-4, 0), text, font=font, embedded_color=True)
        if canvas.getbbox() is None:
            missing += 1
            continue
        if canvas.tobytes() in seen:  # a person is often drawn as the man or the woman
            same += 1
            continue
        seen.add(canvas.tobytes())
        canvas = flatten(canvas, args.background).resize((args.size, args.size), Image.Resampling.LANCZOS)
        pictures.append(np.asarray(canvas))
        labels.append(class_names.index(name))
    print(f"{len(wanted)} emoji wanted, {missing} not in the font, {same} drawn as one before")
    with Writer(args.out, len(pictures), (args.size, args.size, 3), class_names=class_names) as out:
        if pictures:
            out.add(np.stack(pictures), labels, args.font)


# ---- folder: pictures in a folder per class


def folder(args, writer=Writer, step=None):
    """writer: the class of what takes the pictures; step: how many it gets at a time."""
    root = Path(args.input)
    if not root.is_dir():
        die(f"{root}: not a folder; want a folder of pictures, or of folders of pictures, one per class")
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    shown = lambda path, below: not any(part.startswith(".") for part in path.relative_to(below).parts)
    entries = sorted(path for path in root.iterdir() if shown(path, root))
    class_names = [path.name for path in entries if path.is_dir()]
    if class_names and set(map(str.lower, class_names)) <= {"train", "training", "test", "val", "valid", "validation"}:
        note(f"{root}: {', '.join(class_names)} became the classes; if the classes stand inside, give "
             f"{root / class_names[0]}")
    loose = sum(path.suffix.lower() in endings and path.is_file() for path in entries) if class_names else 0
    if loose:
        note(f"{root}: {loose} pictures beside the folders of classes are left out")
    files, others = [], []
    for label, name in enumerate(class_names or ["."]):
        try:
            name.encode()
        except UnicodeEncodeError:
            die(f"{root}: the class {name!r} is not UTF-8; rename that folder")
        inside = []
        for path in sorted((root / name).rglob("*")):
            if path.is_file() and shown(path, root / name):
                (inside if path.suffix.lower() in endings else others).append(path)
        if not inside:
            die(f"{root / name}: no pictures inside; put some there, or remove it")
        files += [(path, label) for path in inside]
    if others:
        note(f"{root}: {len(others)} files are left out, for by their names they are no pictures that pillow can open: "
             f"{others[0]}{', ...' if others[1:] else ''}")

    def load(path):
        """The picture, or the reason why there is none."""
        try:
            with Image.open(path) as picture:
                picture.draft("RGB", (args.size, args.size))  # lets the JPEG decoder do most of a large reduction
                picture = flatten(ImageOps.exif_transpose(picture), args.background)
            picture = ImageOps.fit(picture, (args.size, args.size), Image.Resampling.LANCZOS)
            return np.asarray(picture.convert("L") if args.channels == 1 else picture)
        except Exception as error:  # a broken picture raises whatever its decoder ran into
            return f"{type(error).__name__}: {error}"

    shape = (args.size, args.size, args.channels)
    step, progress = step or max(1, CHUNK // math.prod(shape)), Progress("pictures", len(files))
    with writer(args.out, len(files), shape, labelled=bool(class_names), class_names=class_names) as out:
        with ThreadPool(args.workers) as pool:
            for start in range(0, len(files), step):
                some = files[start : start + step]
                loaded = []
                for (path, _), picture in zip(some, pool.imap(load, [path for path, _ in some])):
                    loaded.append(picture)
                    progress.step()
                    if isinstance(picture, str):
                        note(f"skipped {path}: {picture}")
                good = [i for i, picture in enumerate(loaded) if not isinstance(picture, str)]
                if good:
                    x = np.stack([loaded[i] for i in good]).reshape(-1, *shape)
                    out.add(x, [some[i][1] for i in good], str(root))


# ---- cifar10 and mnist: their binary files


def cifar10(args):
    paths = []
    for path in map(Path, args.input):
        paths += sorted(path.glob("data_batch_*.bin")) if path.is_dir() else [path]
    if not paths:
        die(f"{args.input[0]}: no data_batch_*.bin inside; want CIFAR-10's binary version, cifar-10-binary.tar.gz")
    records = []
    for path in paths:
        try:
            raw = np.fromfile(path, np.uint8)
        except OSError as error:
            die(f"{path}: {error.strerror}; want a data_batch_*.bin of CIFAR-10's binary version, or their folder")
        if raw.size == 0 or raw.size % 3073 or raw[::3073].max() > 9:
            die(f"{path}: not whole records of a label 0..9 and 3072 bytes; want CIFAR-10's binary version")
        records.append(raw.reshape(-1, 3073))
    with Writer(args.out, sum(map(len, records)), (32, 32, 3), class_names=CIFAR10_NAMES) as out:
        for path, some in zip(paths, records):
            out.add(some[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), some[:, 0], path)


def read_idx(path, dims):
    """The array in a file of MNIST's format: two zeros, type 8 (bytes), the number of dimensions, each dimension."""
    try:
        raw = Path(path).read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        die(f"{path}: {error}; want an idx file of MNIST or Fashion-MNIST, gzipped or not")
    kind = "images (N,H,W)" if dims == 3 else "labels (N)"
    if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) < 4 + 4 * dims:
        die(f"{path}: not an idx file of {kind}; give the images, then the labels, as MNIST names them")
    shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    if len(raw) - 4 - 4 * dims != math.prod(shape):
        die(f"{path}: {len(raw)} bytes do not hold {shape}; the file is cut short: fetch it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def mnist(args):
    x, y = read_idx(args.images, 3), read_idx(args.labels, 1)
    if len(x) != len(y):
        die(f"{args.labels}: {len(y)} labels for {len(x)} images; give the two files of one set")
    size = args.size or x.shape[1]
    if x.shape[1] != x.shape[2] or size < x.shape[1]:
        die(f"{args.images}: images of {x.shape[1:]}; they must be square, and --size at least their side")
    before, after = (size - x.shape[1]) // 2, (size - x.shape[1] + 1) // 2
    x = np.pad(x, ((0, 0), (before, after), (before, after)))[..., None]
    class_names = names_option(args.class_names) or [str(digit) for digit in range(10)]
    with Writer(args.out, len(x), (size, size, 1), class_names=class_names) as out:
        out.add(x, y, args.labels)


# ---- npy: pictures or latents that a program of numpy's wrote


def open_npy(path):
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError(f"an archive of {', '.join(array.files)}")
        return array
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        die(f"{path}: {error}; want an array that numpy.save wrote")


def npy_parts(path):
    """Name and array: of the one file, or of each NAME.npy in the folder, 2.npy before 10.npy."""
    path = Path(path)
    if not path.is_dir():
        yield "", open_npy(path)
        return
    names = [entry.name for entry in path.iterdir() if entry.suffix == ".npy"]
    if not names:
        die(f"{path}: no .npy files inside")
    for name in sorted(names, key=lambda name: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", name)]):
        yield name, open_npy(path / name)


def npy(args):
    count, first = 0, None
    for name, x in npy_parts(args.input):
        where = Path(args.input) / name
        if first is None:
            first = x
            pixels = x.dtype == np.uint8
            if not pixels and x.dtype.kind != "f":
                die(f"{where}: {x.dtype}; want uint8 pictures (N,H,W,C) or (N,H,W), or float latents (N,C,H,W)")
            if x.ndim != 4 and not (pixels and x.ndim == 3):
                die(f"{where}: shape {x.shape}; want (N,H,W,C) or (N,H,W) of uint8, or (N,C,H,W) of float")
        if x.dtype != first.dtype or x.shape[1:] != first.shape[1:]:
            die(f"{where}: {x.dtype} {x.shape[1:]} where the first has {first.dtype} {first.shape[1:]}; want one kind")
        count += len(x)
    shape = (*first.shape[1:], 1)[:3]
    side = shape[:2] if pixels else shape[1:]
    if side[0] != side[1] or not (1 <= (shape[2] if pixels else shape[0]) <= 64):
        order = "(N,H,W,C) of uint8" if pixels else "(N,C,H,W) of float"
        die(f"{args.input}: shape {shape} of a picture; want {order}, square: transpose or crop it")
    if pixels and (args.dtype or args.latent_scale is not None):
        die(f"{args.input}: uint8 pictures are stored as they are; leave --dtype and --latent_scale away")
    if args.labels and Path(args.input).is_dir() != Path(args.labels).is_dir():
        die(f"{args.labels}: give two .npy files, or two folders in which a picture and its label have the same name")
    dtype = "U8" if pixels else args.dtype or "F16"
    step = max(1, CHUNK // (math.prod(shape) * 4))
    class_names = names_option(args.class_names)
    with Writer(args.out, count, shape, dtype, bool(args.labels), class_names, args.latent_scale) as out:
        for name, x in npy_parts(args.input):
            where = str(Path(args.input) / name)
            y = np.zeros(len(x), np.int64)
            if args.labels:
                where = str(Path(args.labels) / name)
                y = open_npy(where).reshape(-1)
                if len(y) != len(x) or y.dtype.kind not in "iu":
                    die(f"{where}: {len(y)} labels of {y.dtype} for {len(x)} pictures; want one integer for each")
            for start in range(0, len(x), step):
                some = x[start : start + step]
                out.add(some.reshape(len(some), *shape), y[start : start + step], where)


# ---- show


def show(args):
    try:
        raw = np.memmap(args.input, np.uint8, "r")
        start = 8 + int(raw[:8].view("<u8")[0])
        header = json.loads(bytes(raw[8:start]))
        tensors = {}
        for name in {"x", "y"} & header.keys():
            begin, end = header[name]["data_offsets"]
            stored = STORED_AS[header[name]["dtype"]] if name == "x" else np.dtype("<i8")
            tensors[name] = raw[start + begin : start + end].view(stored).reshape(header[name]["shape"])
        x, y = tensors["x"], tensors.get("y", np.array([], int))
        if x.ndim != 4 or y.ndim != 1 or len(y) not in (0, len(x)):
            raise ValueError(f"shapes {x.shape} of x, {y.shape} of y")
        if np.any((y < 0) | (y > CLASSES)):
            raise ValueError(f"labels {y.min()}..{y.max()}")
        n, *_, channels = x.shape if x.dtype == np.uint8 else x.transpose(0, 2, 3, 1).shape
        class_names = list(json.loads(header.get("__metadata__", {}).get("class_names", "[]")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        die(f"{args.input}: {error!r}; want a dataset file, with x and perhaps y, that this program wrote")
    dtype = header["x"]["dtype"]
    print_counts(args.input, dtype, x.shape, y, class_names)
    if not args.out:
        return
    rows = [np.flatnonzero(y == label)[: args.columns] for label in np.unique(y)]
    rows = rows or [np.arange(n)[i : i + args.columns] for i in range(0, min(n, args.columns**2), args.columns)]
    cell = x.shape[2] + 2
    sheet = Image.new("RGB", (args.columns * cell + 2, len(rows) * cell + 2), "#888")
    for r, row in enumerate(rows):
        for q, i in enumerate(row):
            picture = x[i]
            if dtype != "U8":  # the first three channels of a latent, as if it were a picture
                picture = (picture.astype("<u4") << 16).view("<f4") if dtype == "BF16" else picture.astype("<f4")
                picture = np.clip(127.5 * picture + 128, 0, 255).astype(np.uint8).transpose(1, 2, 0)
            picture = np.ascontiguousarray(picture[:, :, :3] if channels >= 3 else picture[:, :, 0])
            sheet.paste(Image.fromarray(picture), (2 + q * cell, 2 + r * cell))
    sheet = sheet.resize((sheet.width * args.zoom, sheet.height * args.zoom), Image.Resampling.NEAREST)
    replace_file(args.out, lambda file: sheet.save(file, "PNG"))


def positive(text):
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def colour(text):
    try:
        return ImageColor.getrgb(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a colour such as white or #ffffff")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run, about):
        sub = commands.add_parser(run.__name__, help=about, description=about)
        sub.set_defaults(run=run)
        option = sub.add_argument
        if run is not show:
            option("--out", required=True, help="the dataset file to write")
        return option

    names_help = "names of the classes: with commas between, or a file with one a line"
    option = command(emoji, "the pictures of a colour emoji font")
    option("--size", type=positive, default=32, help="side of a picture (default: 32)")
    option("--font", default=EMOJI_FONT, help=f"a font with colour bitmaps of 136x128 pixels (default: {EMOJI_FONT})")
    option("--groups", default=EMOJI_GROUPS, help=f"Unicode's list of emoji and groups (default: {EMOJI_GROUPS})")
    option("--classes", choices=["group", "subgroup"], default="group", help="the 9 groups, or about 100 subgroups")
    option("--skin_tones", action="store_true", help="every skin tone too; then 6 of 10 pictures are people")
    option("--background", type=colour, default="white", help="colour behind the picture: a name or #rrggbb")

    option = command(folder, "pictures in a folder per class, or in one folder without labels; centre crop")
    option("input", help="the folder")
    option("--size", type=positive, default=64, help="side of a picture (default: 64)")
    option("--channels", type=int, choices=[1, 3], default=3, help="1 for grey (default: 3)")
    option("--background", type=colour, default="white", help="colour behind transparent parts: a name or #rrggbb")
    option("--workers", type=positive, default=os.cpu_count(), help="threads that decode pictures (default: all cores)")

    option = command(cifar10, "CIFAR-10, binary version")
    option("input", nargs="+", help="data_batch_*.bin, test_batch.bin, or a folder of data_batch_*.bin")

    option = command(mnist, "MNIST, Fashion-MNIST and others in its format, gzipped or not")
    option("images", help="such as train-images-idx3-ubyte.gz")
    option("labels", help="such as train-labels-idx1-ubyte.gz")
    option("--size", type=positive, help="pad with black to this side, such as 32 (default: as it is)")
    option("--class_names", help=names_help + " (default: 0 to 9)")

    option = command(npy, "arrays of numpy: uint8 pictures (N,H,W,C) or (N,H,W), or float latents (N,C,H,W)")
    option("input", help="an .npy file, or a folder of them, such as fast-DiT's extract_features.py writes")
    option("--labels", help="an .npy file of integers (N), or a folder of them with the names of the input's")
    option("--dtype", choices=["F32", "F16", "BF16"], help="of latents (default: F16)")
    option("--latent_scale", type=float, help="what the latents were multiplied by; 0.18215 for Stable Diffusion")
    option("--class_names", help=names_help)

    option = command(show, "what is in a dataset file: a count and a row of pictures for each class")
    option("input", help="the dataset file")
    option("--out", help="a PNG of the first pictures of each class")
    option("--columns", type=positive, default=24, help="pictures in a row (default: 24)")
    option("--zoom", type=positive, default=1, help="screen pixels per pixel (default: 1)")

    args = parser.parse_args()
    main_of(args.run, args)


if __name__ == "__main__":
    main()
