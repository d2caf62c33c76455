#!/usr/bin/env python3
"""Tests tools/ from end to end, on small files; test_convert.py tests convert.py.

    python3 test/test_tools.py           # everything
    python3 test/test_tools.py plot      # the tests with "plot" in their name

Needs numpy, pillow, matplotlib and safetensors; what needs the emoji font or torch is skipped where they are missing.
"""
import contextlib
import gzip
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import safetensors
from matplotlib.text import Text
from PIL import Image, features

import testing
from testing import TOOLS, Skip, call, fails, fails_on_full_disk, run

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
GROUPS = Path("/usr/share/unicode/emoji/emoji-test.txt")
rng = np.random.default_rng(0)


def load(path):
    """Tensors and metadata by way of the safetensors package, which checks the file; BF16 as F32."""
    raw = Path(path).read_bytes()
    tensors = {}
    for name, info in safetensors.deserialize(raw):
        stored = {"U8": "u1", "I64": "<i8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[info["dtype"]]
        values = np.frombuffer(bytes(info["data"]), stored).reshape(info["shape"])
        tensors[name] = (values.astype("<u4") << 16).view("<f4") if info["dtype"] == "BF16" else values
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0 and header["x"]["data_offsets"][0] % 8 == 0, "tensors are not aligned to 8 bytes"
    assert header["x"]["data_offsets"][1] == len(raw) - 8 - size, "x does not end where the file ends"
    metadata = header.get("__metadata__", {})
    metadata["dtype"] = header["x"]["dtype"]
    return tensors, metadata


def equal(got, want):
    want = np.asarray(want)
    assert got.shape == want.shape, f"shape {got.shape}, want {want.shape}"
    assert (got == want).all(), f"{(got != want).sum()} of {got.size} values differ"


def names(metadata):
    return json.loads(metadata["class_names"])


def emoji_needs():
    if not FONT.exists() or not features.check("raqm"):
        raise Skip("needs fonts-noto-color-emoji, and a pillow with libraqm")


# ---- data.py


def test_emoji_sequences():
    emoji_needs()
    Path("list.txt").write_text(
        "# group: Smileys & Emotion\n# subgroup: face-smiling\n"
        "1F600 ; fully-qualified # grinning face\n"
        "263A FE0F ; fully-qualified # smiling face\n263A ; unqualified # smiling face\n"
        "# group: People & Body\n# subgroup: family\n"
        "1F468 200D 1F469 200D 1F466 ; fully-qualified # family: one glyph of three people\n"
        "1F44B 1F3FB ; fully-qualified # waving hand: light skin tone\n"
        "1F600 200D 1F600 ; fully-qualified # no font has this sequence\n"
        "10FFFD ; fully-qualified # nor this\n"
        "1F600 ; fully-qualified # drawn before\n"
        "# group: Flags\n# subgroup: country-flag\n1F1EB 1F1F7 ; fully-qualified # France\n"
    )
    said, _ = run("data.py", "emoji", "--groups", "list.txt", "--size", 16, "--out", "a.safetensors")
    assert "7 emoji wanted, 2 not in the font, 1 drawn" in said, said
    tensors, metadata = load("a.safetensors")
    assert names(metadata) == ["smileys", "people", "flags"], metadata
    equal(tensors["y"], [0, 0, 1, 2])
    x = tensors["x"].astype(int)
    assert x.shape == (4, 16, 16, 3), x.shape
    assert (x[:2, [0, 0, -1, -1], [0, -1, 0, -1]] > 250).all(), "corners are not white"
    assert (x[0, 4, 6:9, 0] > 200).all() and (x[0, 4, 6:9, 2] < 120).all(), "a face is not yellow"
    left, right = x[3, 8, 2], x[3, 8, -3]
    assert left[2] > left[0] + 80 and right[0] > right[2] + 80, "the flag of France is not blue and red"

    run("data.py", "emoji", "--groups", "list.txt", "--classes", "subgroup", "--skin_tones", "--background", "#000",
        "--out", "b.safetensors")
    tensors, metadata = load("b.safetensors")
    assert names(metadata) == ["face-smiling", "family", "country-flag"], metadata
    equal(tensors["y"], [0, 0, 1, 1, 2])
    assert tensors["x"].shape == (5, 32, 32, 3) and (tensors["x"][0, 0, 0] == 0).all(), "background is not black"


def test_emoji_all():
    emoji_needs()
    if not GROUPS.exists():
        raise Skip("needs unicode-data")
    said, _ = run("data.py", "emoji", "--out", "a.safetensors")
    tensors, metadata = load("a.safetensors")
    counts = np.bincount(tensors["y"])
    assert len(tensors["x"]) > 1500 and (tensors["x"] != 255).any(axis=(1, 2, 3)).all(), "empty pictures"
    assert len(names(metadata)) == len(counts) == 9 and counts.min() > 50, counts
    for name, count in zip(names(metadata), counts):
        assert f"{count} {name}\n" in said, said


def make_folder():
    """Two classes of pictures, each of one colour but for what a centre crop must cut away."""
    for name in ("dog", 'cat "é"'):
        os.makedirs(f"pictures/{name}/deeper")
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (10, 200, 30)
    Image.fromarray(wide).save('pictures/cat "é"/1.png')
    tall = np.zeros((60, 20, 3), np.uint8)
    tall[20:40] = (200, 10, 30)
    Image.fromarray(tall).save('pictures/cat "é"/deeper/2.bmp')
    Image.new("RGBA", (30, 30), (0, 0, 255, 0)).save("pictures/dog/1.png")
    Image.new("L", (9, 9), 77).save("pictures/dog/2.png")
    Image.new("RGB", (300, 300), (50, 100, 150)).save("pictures/dog/4.jpg", quality=95)
    rotated = Image.new("RGB", (40, 20), (255, 0, 0))
    rotated.paste((0, 0, 255), (20, 0, 40, 20))
    exif = Image.Exif()
    exif[274] = 3  # shown upside down: blue is then on the left
    rotated.save("pictures/dog/5.png", exif=exif)
    Image.new("CMYK", (9, 9), (0, 255, 255, 0)).save("pictures/dog/6.jpg")
    Image.fromarray(np.full((9, 9), 77 * 257, np.uint16)).save("pictures/dog/7.png")
    Image.new("P", (9, 9), 0).save("pictures/dog/8.gif", transparency=0)
    Path("pictures/dog/3.png").write_bytes(Path("pictures/dog/2.png").read_bytes()[:40])
    Path("pictures/dog/notes.txt").write_text("not a picture")
    Path("pictures/dog/.hidden").write_text("")
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save("pictures/dog/9.tiff")


def test_folder_classes():
    make_folder()
    _, errors = run("data.py", "folder", "pictures", "--size", 8, "--out", "a.safetensors", "--workers", 2)
    others, broken, floats = errors.splitlines()
    assert "1 files are left out" in others and "skipped pictures/dog/3.png" in broken, errors
    assert "skipped pictures/dog/9.tiff: ValueError: pixels are floats" in floats, errors
    tensors, metadata = load("a.safetensors")
    assert names(metadata) == ['cat "é"', "dog"], metadata
    equal(tensors["y"], [0, 0, 1, 1, 1, 1, 1, 1, 1])
    x = tensors["x"].astype(int)
    for got, want in zip(x, [(10, 200, 30), (200, 10, 30), (255, 255, 255), (77, 77, 77), (50, 100, 150)]):
        assert np.abs(got[2:-2, 2:-2] - want).max() <= 3, f"{got[4, 4]}, want {want}"
    for got, want in zip(x[6:], [(255, 0, 0), (77, 77, 77), (255, 255, 255)]):
        assert np.abs(got - want).max() <= 3, f"{got[4, 4]}, want {want}"
    assert x[5, 4, 1, 2] > 200 and x[5, 4, -2, 0] > 200, "EXIF orientation"
    few_at_a_time(5 * 8 * 8 * 3, "folder", "pictures", "--size", 8)  # the unreadable 3.png is the fifth


def few_at_a_time(size, *args):
    """The same file as a.safetensors, from chunks of so many bytes."""
    with mock.patch("data.CHUNK", size):
        run("data.py", *args, "--out", "few.safetensors")
    assert Path("few.safetensors").read_bytes() == Path("a.safetensors").read_bytes(), "another file in chunks"


def test_folder_hidden():
    """Hidden folders and files are left out, at any depth."""
    for folder in ("flat", "classes/a", "classes/a/deeper", "classes/b"):
        os.makedirs(f"{folder}/.thumbs")
        Image.new("RGB", (9, 9)).save(f"{folder}/1.png")
        Image.new("RGB", (9, 9)).save(f"{folder}/.2.png")
        Image.new("RGB", (9, 9)).save(f"{folder}/.thumbs/1.png")
        Path(f"{folder}/.thumbs/notes.txt").write_text("")
    os.makedirs("classes/.c")
    Image.new("RGB", (9, 9)).save("classes/.3.png")
    for folder, labels in ("flat", [None]), ("classes", [0, 0, 1]):
        _, errors = run("data.py", "folder", folder, "--size", 8, "--out", "a.safetensors")
        tensors, _ = load("a.safetensors")
        assert not errors and len(tensors["x"]) == len(labels), (folder, len(tensors["x"]), errors)
    equal(tensors["y"], labels)


def test_folder_too_high():
    """A folder that holds only train/ and test/ is probably one level too high: a warning says so."""
    make_folder()
    os.rename("pictures/dog", "pictures/Train")
    _, errors = run("data.py", "folder", "pictures", "--size", 8, "--out", "a.safetensors")
    assert "became the classes" not in errors, errors
    os.rename('pictures/cat "é"', "pictures/test")
    _, errors = run("data.py", "folder", "pictures", "--size", 8, "--out", "a.safetensors")
    assert "Train, test became the classes; if the classes stand inside, give pictures/Train" in errors, errors


def test_progress():
    """Building says how far it is, but not more often than every two seconds."""
    import data
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        progress = data.Progress("pictures", 10)
        progress.step()
        progress.begin -= 20.5
        progress.shown -= 20.5
        progress.step()
        progress.step()
    assert said.getvalue() == "2/10 pictures, 1:22 left\n", said.getvalue()


def test_folder_flat_grey():
    make_folder()
    for path in Path("pictures/dog/deeper").iterdir():
        path.unlink()
    Path("pictures/dog/deeper").rmdir()
    grey = ("--size", 7, "--channels", 1, "--background", "black")
    run("data.py", "folder", "pictures/dog", *grey, "--out", "a.safetensors")
    tensors, metadata = load("a.safetensors")
    assert "y" not in tensors and "class_names" not in metadata
    assert tensors["x"].shape == (7, 7, 7, 1)
    assert (tensors["x"][0] == 0).all() and (tensors["x"][1] == 77).all()


def test_cifar10():
    records = rng.integers(256, size=(7, 3073), dtype=np.uint8)
    records[:, 0] = [3, 0, 9, 1, 1, 2, 5]
    os.mkdir("batches")
    records[:4].tofile("batches/data_batch_1.bin")
    records[4:].tofile("batches/data_batch_2.bin")
    records[:1].tofile("batches/test_batch.bin")
    run("data.py", "cifar10", "batches", "--out", "a.safetensors")
    tensors, metadata = load("a.safetensors")
    equal(tensors["y"], records[:, 0])
    equal(tensors["x"], records[:, 1:].reshape(7, 3, 32, 32).transpose(0, 2, 3, 1))
    assert names(metadata)[3] == "cat" and len(names(metadata)) == 10
    run("data.py", "cifar10", "batches/test_batch.bin", "--out", "b.safetensors")
    assert len(load("b.safetensors")[0]["y"]) == 1


def write_idx(path, values):
    raw = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    Path(path).write_bytes(gzip.compress(raw) if path.endswith(".gz") else raw)


def test_mnist():
    x, y = rng.integers(256, size=(5, 28, 28), dtype=np.uint8), np.array([9, 0, 3, 3, 1], np.uint8)
    write_idx("images.gz", x)
    write_idx("labels", y)
    run("data.py", "mnist", "images.gz", "labels", "--out", "a.safetensors")
    tensors, metadata = load("a.safetensors")
    equal(tensors["x"], x[..., None])
    equal(tensors["y"], y)
    assert names(metadata) == list("0123456789")
    clothes = "t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,boot"
    run("data.py", "mnist", "images.gz", "labels", "--size", 32, "--class_names", clothes, "--out", "b.safetensors")
    tensors, metadata = load("b.safetensors")
    equal(tensors["x"], np.pad(x, ((0, 0), (2, 2), (2, 2)))[..., None])
    assert names(metadata) == clothes.split(",")


def test_npy_pictures():
    x, y = rng.integers(256, size=(5, 6, 6, 3), dtype=np.uint8), np.array([1, 0, 2, 2, 1], np.int32)
    np.save("x.npy", x)
    np.save("grey.npy", x[..., 0])
    np.save("y.npy", y)
    Path("names.txt").write_text("one\ntwo, three\nfour\n")
    run("data.py", "npy", "x.npy", "--labels", "y.npy", "--class_names", "names.txt", "--out", "a.safetensors")
    tensors, metadata = load("a.safetensors")
    equal(tensors["x"], x)
    equal(tensors["y"], y)
    assert names(metadata) == ["one", "two, three", "four"] and metadata["dtype"] == "U8"
    few_at_a_time(2 * 6 * 6 * 3 * 4, "npy", "x.npy", "--labels", "y.npy", "--class_names", "names.txt")
    run("data.py", "npy", "grey.npy", "--out", "b.safetensors")
    tensors, metadata = load("b.safetensors")
    equal(tensors["x"], x[..., :1])
    assert "y" not in tensors


def test_npy_latents():
    x = rng.standard_normal((5, 4, 8, 8)).astype(np.float32)
    x[0, 0, 0, :4] = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], np.uint32).view(np.float32)
    np.save("x.npy", x)
    np.save("y.npy", np.arange(5))
    halves = {"F32": x, "F16": x.astype(np.float16), None: x.astype(np.float16)}
    for dtype, want in halves.items():
        option = ["--dtype", dtype] if dtype else []
        option += ["--labels", "y.npy", "--latent_scale", 0.18215]
        run("data.py", "npy", "x.npy", *option, "--out", "a.safetensors")
        tensors, metadata = load("a.safetensors")
        equal(tensors["x"], want)
        assert metadata["dtype"] == (dtype or "F16") and metadata["latent_scale"] == "0.18215"
    run("data.py", "npy", "x.npy", "--dtype", "BF16", "--out", "a.safetensors")
    got = load("a.safetensors")[0]["x"]
    assert (np.abs(got - x) <= 2.0**-8 * np.abs(x)).all(), "BF16 is further off than its rounding"
    # half way between two BF16 goes to the even one; above to the upper; below to the lower
    equal(got[0, 0, 0, :4].view(np.uint32), np.array([0x3F800000, 0x3F820000, 0x3F810000, 0x3F800000], np.uint32))


def make_features(count):
    x, y = rng.standard_normal((count, 4, 4, 4)).astype(np.float32), rng.integers(1000, size=count)
    os.makedirs("features")
    os.makedirs("labels")
    for i in range(count):  # as fast-DiT's extract_features.py saves them
        np.save(f"features/{i}.npy", x[i : i + 1])
        np.save(f"labels/{i}.npy", y[i : i + 1])
    return x, y


def test_npy_fast_dit():
    x, y = make_features(12)
    run("data.py", "npy", "features", "--labels", "labels", "--latent_scale", 0.18215, "--out", "a.safetensors")
    tensors, metadata = load("a.safetensors")
    equal(tensors["x"], x.astype(np.float16))  # 2.npy comes before 10.npy
    equal(tensors["y"], y)


def test_show():
    np.save("x.npy", rng.standard_normal((5, 4, 8, 8)))
    np.save("p.npy", rng.integers(256, size=(5, 8, 8, 3), dtype=np.uint8))
    np.save("y.npy", np.array([0, 0, 0, 2, 2]))
    for source, option in (("x.npy", ["--dtype", "BF16"]), ("x.npy", []), ("p.npy", ["--labels", "y.npy"])):
        run("data.py", "npy", source, *option, "--out", "a.safetensors")
        said, _ = run("data.py", "show", "a.safetensors", "--out", "sheet.png", "--columns", 4, "--zoom", 3)
        assert "(5, 8, 8, 3)" in said or "(5, 4, 8, 8)" in said, said
        assert Image.open("sheet.png").size == (3 * 42, 3 * 22), Image.open("sheet.png").size
    fails_on_full_disk("sheet.png", "data.py", "show", "a.safetensors", "--out", "sheet.png")


def test_data_broken_input():
    out = ("--out", "a.safetensors")
    x, y = rng.integers(256, size=(3, 6, 6, 3), dtype=np.uint8), np.array([0, 1, 2], np.uint8)
    for name, values in {"x": x, "y": y, "y2": y[:2], "minus": y.astype(int) - 1, "f": y * 0.5, "wide": x[:, :4],
                         "latent": np.full((1, 4, 2, 2), 1e6), "odd": x.astype(int)}.items():
        np.save(f"{name}.npy", values)
    Path("text.npy").write_text("hello")
    Path("text.png").write_text("hello")
    np.save("objects.npy", np.array([None]), allow_pickle=True)
    write_idx("images", x[..., 0])
    write_idx("classes", y)
    write_idx("classes2", y[:2])
    Path("short").write_bytes(Path("images").read_bytes()[:-1])
    Path("short.gz").write_bytes(gzip.compress(b"0123456789")[:-4])
    Path("wrong.gz").write_bytes(gzip.compress(b"0123456789")[:10] + b"0123456789")
    Path("wrong.npz").write_bytes(b"PK\3\4" + bytes(50))
    np.save("ids.npy", np.array([5, 2**31 - 1, 7]))
    np.save("nan.npy", np.full((1, 4, 2, 2), np.nan))
    os.makedirs(b"latin1/caf\xe9")
    Image.new("RGB", (8, 8)).save(b"latin1/caf\xe9/1.png".decode(errors="surrogateescape"))
    Path("latin1.txt").write_bytes("café".encode("latin1"))
    os.makedirs("empty")
    os.makedirs("broken/class")
    Path("broken/class/1.png").write_text("hello")
    make_features(3)

    fails("--size", "data.py", "emoji", "--size", 0, *out)
    fails("nocolour", "data.py", "emoji", "--background", "nocolour", *out)
    fails("no.ttf", "data.py", "emoji", "--font", "no.ttf", *out)
    both = "no.ttf and no.txt: not there; install Debian's fonts-noto-color-emoji, or a font with colour bitmaps as "
    fails(both + "--font and unicode-data", "data.py", "emoji", "--font", "no.ttf", "--groups", "no.txt", *out)
    if FONT.exists() and features.check("raqm"):
        fails("no.txt", "data.py", "emoji", "--groups", "no.txt", *out)
        fails("text.png", "data.py", "emoji", "--groups", "text.png", *out)
    fails("missing", "data.py", "folder", "missing", *out)
    fails("empty", "data.py", "folder", "empty", *out)
    fails("no/a.safetensors", "data.py", "mnist", "images", "classes", "--out", "no/a.safetensors")
    fails("missing.bin", "data.py", "cifar10", "missing.bin", *out)
    fails("empty", "data.py", "cifar10", "empty", *out)
    fails("images", "data.py", "cifar10", "images", *out)
    fails("classes", "data.py", "mnist", "classes", "images", *out)
    fails("classes2", "data.py", "mnist", "images", "classes2", *out)
    fails("short", "data.py", "mnist", "short", "classes", *out)
    fails("short.gz", "data.py", "mnist", "short.gz", "classes", *out)
    fails("wrong.gz", "data.py", "mnist", "wrong.gz", "classes", *out)
    fails("wrong.npz", "data.py", "npy", "wrong.npz", *out)
    fails("want 0..999998", "data.py", "npy", "x.npy", "--labels", "ids.npy", *out)
    fails("or give --dtype F32", "data.py", "npy", "nan.npy", *out)
    fails("correct them\n", "data.py", "npy", "nan.npy", "--dtype", "F32", *out)
    fails("not UTF-8; rename", "data.py", "folder", "latin1", *out)
    fails("--size", "data.py", "mnist", "images", "classes", "--size", 4, *out)
    fails("classes", "data.py", "mnist", "images", "classes", "--class_names", "a,b", *out)
    fails("missing.npy", "data.py", "npy", "missing.npy", *out)
    fails("text.npy", "data.py", "npy", "text.npy", *out)
    fails("objects.npy", "data.py", "npy", "objects.npy", *out)
    fails("empty", "data.py", "npy", "empty", *out)
    fails("latin1.txt", "data.py", "npy", "x.npy", "--class_names", "latin1.txt", *out)
    fails("odd.npy", "data.py", "npy", "odd.npy", *out)
    fails("wide.npy", "data.py", "npy", "wide.npy", *out)
    fails("--dtype", "data.py", "npy", "x.npy", "--dtype", "F16", *out)
    fails("y2.npy", "data.py", "npy", "x.npy", "--labels", "y2.npy", *out)
    fails("f.npy", "data.py", "npy", "x.npy", "--labels", "f.npy", *out)
    fails("minus.npy", "data.py", "npy", "x.npy", "--labels", "minus.npy", *out)
    fails("latent.npy", "data.py", "npy", "latent.npy", *out)
    fails("labels", "data.py", "npy", "x.npy", "--labels", "labels", *out)
    os.remove("labels/1.npy")
    fails("labels/1.npy", "data.py", "npy", "features", "--labels", "labels", *out)
    np.save("features/2.npy", np.zeros((1, 4, 8, 8), np.float32))
    fails("features/2.npy", "data.py", "npy", "features", *out)
    fails("text.npy", "data.py", "show", "text.npy")
    sheet = ("--out", "sheet.png")
    save("minus.safetensors", x, y.astype(int) - 1)
    fails("labels -1..1", "data.py", "show", "minus.safetensors", *sheet)
    save("short.safetensors", x, y[:2].astype(int))
    fails("(2,) of y", "data.py", "show", "short.safetensors", *sheet)
    save("three.safetensors", x, y.astype(int), class_names="3")
    fails("three.safetensors: TypeError", "data.py", "show", "three.safetensors", *sheet)
    save("grey.safetensors", x[..., 0])
    fails("(3, 6, 6) of x", "data.py", "show", "grey.safetensors", *sheet)
    Path("list.safetensors").write_bytes(struct.pack("<Q", 8) + b'["x", 1]')
    fails("list.safetensors: AttributeError", "data.py", "show", "list.safetensors", *sheet)
    write_idx("no_images", x[:0, ..., 0])
    write_idx("no_classes", y[:0])
    fails("no picture", "data.py", "mnist", "no_images", "no_classes", *out)
    np.savez("archive.npz", x=np.zeros((2, 8, 8, 3), np.uint8), more=np.zeros(2))
    fails("archive.npz: an archive of x, more", "data.py", "npy", "archive.npz", *out)
    np.save("bytes.npy", np.zeros((2, 8, 8, 3), np.uint8))
    fails("leave --dtype and --latent_scale away", "data.py", "npy", "bytes.npy", "--latent_scale", "0.5", *out)
    fails("--help", "data.py", "npy", "x.npy", "--nonsense", *out)
    done = subprocess.run([sys.executable, TOOLS / "data.py", "folder", "broken", *out], capture_output=True, text=True)
    assert done.returncode == 1 and "skipped broken/class/1.png" in done.stderr and "Traceback" not in done.stderr
    assert not list(Path().glob("a.safetensors*")), "left a file behind"


# ---- plot.py


def write_log(path, steps, scale=1.0):
    os.makedirs(Path(path).parent, exist_ok=True)
    with open(path, "w") as file:
        file.write("step,loss,mse,vb,grad_norm,lr,n,m,ms,images_per_s\n")
        for step in range(steps):
            loss = scale * (0.05 + np.exp(-step / 30)) * np.exp(0.2 * rng.standard_normal())
            file.write(f"{step},{loss:.6f},{loss:.6f},0,{'nan' if step == 5 else 3 * loss},1e-4,3,4,120,66.7\n")


def write_trace(path, steps):
    with open(path, "w") as file:
        file.write("step,t,iteration,residual\n")
        for step in range(steps):
            for k in range(1, 4 + step):
                file.write(f"{step},{round((steps - 1 - step) * 999 / max(1, steps - 1))},{k},{0.5**k}\n")


def is_plot(path):
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width >= 600 and picture.height >= 400, picture
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20, "the picture is empty"


def test_plot_logs():
    write_log("one/log.csv", 200)
    write_log("two/log.csv", 1, 2)
    with open("one/log.csv", "a") as file:
        file.write("200,0.1")  # as a program that is still running leaves it
    run("plot.py", "one/log.csv", "--out", "a.png")
    is_plot("a.png")
    _, figure, said = plotted("one/log.csv", "two/log.csv", "--names", "A,B", "--columns", "loss,grad_norm", "--smooth",
                              9, "--title", "T", "--out", "b.png")
    assert said == "b.png: log of A, B\n", said
    is_plot("b.png")
    log = np.genfromtxt("one/log.csv", delimiter=",", skip_header=1, max_rows=200)
    for axis, column in zip(figure.axes, (1, 4)):  # the gradient norm of one step is not a number
        every, mean, *other = (np.column_stack(line.get_data()) for line in axis.lines)
        assert len(other) == 2 and len(other[0]) == 1, other
        assert np.array_equal(every, log[:, [0, column]], equal_nan=True)
        assert np.allclose(mean[20, 1], log[16:25, column].mean()) and np.isfinite(mean).all()
        assert np.allclose(mean[3, 1], np.nanmean(log[:8, column])), mean[3]
    run("plot.py", "two/log.csv", "--out", "c.png")
    is_plot("c.png")
    fails_on_full_disk("c.png", "plot.py", "two/log.csv", "--out", "c.png")


def test_plot_traces():
    write_trace("x.csv", 12)
    write_trace("y.csv", 1)
    run("plot.py", "x.csv", "--out", "a.png")
    _, figure, _ = plotted("x.csv", "y.csv", "--out", "b.png")
    lines, heat = figure.axes[:2]
    assert len(lines.lines) == 12 and len(figure.axes[2].lines) == 1
    grid = np.ma.filled(heat.images[0].get_array(), 0)
    for step, line in enumerate(lines.lines):
        want = 0.5 ** np.arange(1, 4 + step)
        equal(line.get_ydata()[:len(want)], want)
        equal(grid[step], np.pad(want, (0, 11 - step)))
    run("plot.py", "y.csv", "--out", "c.png")
    for path in ("a.png", "b.png", "c.png"):
        is_plot(path)


def test_plot_side_by_side():
    first, second = (rng.integers(0, 256, (20, width, 3), dtype=np.uint8) for width in (30, 50))
    Image.fromarray(first).save("first.png")
    Image.fromarray(second).save("second.png")
    run("plot.py", "first.png", "second.png", "--names", "FPDM, 24 passes,DiT".replace(", ", " "), "--out", "both.png")
    both = np.asarray(Image.open("both.png"))
    assert (both[-20:, :30] == first).all() and (both[-20:, -50:] == second).all()
    fails("--names", "plot.py", "first.png", "second.png", "--names", "one", "--out", "c.png")
    for name in broken_pngs("first.png"):
        fails(f"{name}: ", "plot.py", "first.png", name, "--out", "c.png")


def broken_pngs(path):
    """Names of files that are not there, or that pillow fails to read: with OSError, SyntaxError, ValueError."""
    raw = Path(path).read_bytes()
    at = raw.index(b"IDAT")
    Path("cut.png").write_bytes(raw[:60])
    Path("chunk.png").write_bytes(raw[: at - 4] + struct.pack(">I", 9) + raw[at : at + 13] + bytes(12))
    Path("header.png").write_bytes(raw[:8] + struct.pack(">I", 5) + b"IHDR" + bytes(9))
    return "nothing.png", "cut.png", "chunk.png", "header.png"


def test_sample_strip():
    """The strip of sample_cpu against the same sampling in PyTorch: x_t and the x0 that each prediction stands for."""
    try:
        import torch
    except ImportError:
        raise Skip("needs torch") from None
    import reference

    subprocess.run(["make", "-s", "sample_cpu"], cwd=TOOLS.parent, check=True)
    S, n = 4, 2
    for case, shift in (("sample_x_reuse", 0), ("sample_x_reuse", 2), ("sample_flow_reuse", 0),
                        ("sample_flow_reuse", 1), ("sample_v_zero_snr_ddim", 0), ("sample_ddim_reuse", 0)):
        path = TOOLS.parent / "test" / "cases" / (case + ".safetensors")
        done = subprocess.run([TOOLS.parent / "sample_cpu", "--weights", path, "--n", str(n), "--steps", str(S),
                               "--iters", "2", "--cfg", "1", "--reuse", "0", "--seed", "7", "--t_shift", str(shift),
                               "--strip", "s.png", "--out", "g.png"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        strip = np.asarray(Image.open("s.png")).astype(int)

        contents, metadata = reference.load_file(path)
        fields = reference.dataclasses.fields(reference.Config)
        cfg = reference.Config(**{f.name: f.type(metadata[f.name]) for f in fields if f.name in metadata})
        model = reference.FPDM(cfg).double()
        model.load_state_dict({k: torch.from_numpy(contents[k]) for k in model.state_dict()})
        positions = [round(i * 999 / (S - 1)) for i in range(S)]
        edges = [shift * i / (S + (shift - 1) * i) for i in range(S + 1)] if shift else [i / S for i in range(S + 1)]
        ab = reference.Schedule.training(cfg).ab[torch.tensor(positions)].tolist()
        noise = [reference.normal(cfg.channels * cfg.image_size**2, b, reference.X_T, 7) for b in range(n)]
        x = torch.tensor(np.stack(noise)).double().view(n, cfg.channels, cfg.image_size, cfg.image_size)
        for column, i in enumerate(reversed(range(S))):
            t = min(round(1000 * edges[i + 1]), 999) if shift else positions[i]
            tau = edges[i + 1] if shift else t / 1000
            with torch.no_grad():
                out, _ = model(x, torch.full((n,), t), torch.arange(n) % cfg.classes, 0, 2)
            a, b = ab[i] ** 0.5, (1 - ab[i]) ** 0.5
            x0 = {"x": out, "flow": x + tau * out, "v": a * x - b * out, "eps": (x - b * out) / a}[cfg.prediction]
            for picture in range(n):
                for row, want in enumerate((x[picture], x0[picture])):
                    side = 3 * cfg.image_size
                    top, left = 2 + (2 * picture + row) * (side + 2), 2 + column * (side + 2)
                    got = strip[top : top + side : 3, left : left + side : 3]
                    want = np.floor(np.clip(127.5 * want.permute(1, 2, 0).numpy() + 128, 0, 255))
                    assert np.abs(got - want).max() <= 1, (case, shift, column, picture, row, np.abs(got - want).max())
            if cfg.prediction in ("x", "flow"):
                velocity = (x0 - x) / max(tau, 0 if shift else 0.05) if cfg.prediction == "x" else out
                x = x + (edges[i + 1] - edges[i]) * velocity
            else:
                before = ab[i - 1] if i else 1.0
                x = before**0.5 * x0 + (1 - before) ** 0.5 * (x - a * x0) / b


def test_plot_strip():
    tiles = rng.integers(0, 5, (4, 3, 12, 12, 3)).astype(np.uint8) * 50  # rows: x_t and x0 of two pictures; columns
    strip = np.full((4 * 14 + 2, 3 * 14 + 2, 3), 230, np.uint8)
    for row in range(4):
        for column in range(3):
            top, left = 2 + 14 * row, 2 + 14 * column
            strip[top : top + 12, left : left + 12] = tiles[row, column]
    Image.fromarray(strip).save("strip.png")
    said, _ = run("plot.py", "strip.png", "--out", "a.gif")
    assert said == "a.gif: 3 timesteps of 2 pictures\n", said
    with Image.open("a.gif") as film:
        assert film.n_frames >= 3 and film.info["loop"] == 0, film.n_frames
        for column in range(3):
            film.seek(column)
            frame = np.asarray(film.convert("RGB")).astype(int)
            assert frame.shape == (30, 30, 3), frame.shape
            for picture in range(2):
                for row in range(2):  # GIF: 256 colours
                    got = frame[2 + 14 * row : 14 + 14 * row, 2 + 14 * picture : 14 + 14 * picture]
                    error = np.abs(got - tiles[2 * picture + row, column]).mean()
                    other = np.abs(got - tiles[2 * picture + 1 - row, column]).mean()
                    assert error < 15 < other, (column, picture, row, error, other)
    Image.fromarray(strip[:-14]).save("odd.png")
    Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save("noise.png")
    for wrong in ("odd.png", "noise.png"):
        fails("not a strip", "plot.py", wrong, "--out", "b.gif")
    for name in broken_pngs("strip.png"):
        fails(f"{name}: ", "plot.py", name, "--out", "b.gif")
    fails("--strip", "plot.py", "nothing.png", "--out", "b.gif")


def plotted(*args):
    """plot.py's module, its figure, and what it printed."""
    said, _ = run("plot.py", *args)
    plot = importlib.import_module("plot")
    return plot, plot.plt.gcf(), said


def readable(figure, path, height):
    """The file has the README's size, and no words of the figure overlap or leave it."""
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.size == (1800, height), picture.size
        grey = np.asarray(picture.convert("L"))
        assert (grey > 230).mean() > 0.5 and (grey < 100).any(), "not dark on light"
    assert os.path.getsize(path) < 150_000, os.path.getsize(path)
    figure.canvas.draw()
    axes = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = [text for axis in axes for text in axis.get_ticklabels(which="both")]
    words = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and text not in ticks]
    places = [Text.get_window_extent(text) for text in words]  # not Annotation's, which has its arrow inside
    for i, (text, place) in enumerate(zip(words, places)):
        assert figure.bbox.fully_contains(*place.min) and figure.bbox.fully_contains(*place.max), text
        for other, at in zip(words[:i], places[:i]):
            assert not place.overlaps(at), f"{text} and {other} overlap"
    return words, places


def test_plot_fixed_point():
    evaluate()  # skips without torch
    root = TOOLS.parent
    weights = root / "weights" / "shapes.safetensors"
    subprocess.run(["make", "-s", "-C", root, "sample_cpu"], check=True)
    for reuse, name in enumerate(("cold", "warm")):
        subprocess.run([root / "sample_cpu", "--weights", weights, "--n", "1", "--cfg", "1", "--steps", "6",
                        "--iters", "5", "--reuse", str(reuse), "--trace", f"{name}.csv", "--out", f"{name}.png",
                        "--latents", f"{name}.safetensors"], check=True, capture_output=True)
    plot, figure, said = plotted("fixed_point", "cold.csv", "warm.csv", "--weights", weights, "--out", "a.png")
    readable(figure, "a.png", 840)
    lines, ways, image, near = figure.axes

    trace = {name: np.loadtxt(f"{name}.csv", delimiter=",", skiprows=1) for name in ("cold", "warm")}
    drawn = [line for line in lines.lines if len(line.get_xdata())]
    assert len(drawn) == 8 and [line.get_linestyle() for line in drawn] == ["-", "--"] * 4
    for line, step, name in zip(drawn, (1, 1, 2, 2, 4, 4, 5, 5), ("cold", "warm") * 4):
        equal(np.column_stack(line.get_data()), trace[name][trace[name][:, 0] == step][:, 2:])
    times = [text.get_text() for text in lines.get_legend().get_texts()]
    assert times == [f"t = {t:.0f}" for t in trace["cold"][[5, 10, 20, 25], 1]], times

    # z is PyTorch's; its first two components by another method, up to their signs
    assert "t = 400; " in said, said
    (z, _), (warm, _) = (plot.sample_solutions(weights, plot.read_csv(f"{name}.csv"), name == "warm")
                         for name in ("cold", "warm"))
    _, vectors = np.linalg.eigh(np.cov(z[3][-1].T.astype(float)))
    want, want_warm = ((part[3] - z[3][-1].mean(0)) @ vectors[:, [-1, -2]] for part in (z, warm))
    got = np.stack([np.column_stack(line.get_data()) for line in ways.lines[:36]], 1)
    want, want_warm = (part * np.sign((got[-1] * want[-1]).sum(0)) for part in (want, want_warm))
    assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()
    stars = [line for line in ways.lines if line.get_marker() == "*"]
    squares = [line for line in ways.lines if line.get_marker() == "s"]
    assert len(stars) == len(squares) == len(image.patches) == 5
    for star, square, patch in zip(stars, squares, image.patches):
        token = int(patch.get_y() + 0.5) // 4 * 6 + int(patch.get_x() + 0.5) // 4
        assert np.allclose([star.get_xydata()[0], square.get_xydata()[0]], [want[-1, token], want_warm[0, token]],
                           atol=1e-3 * np.abs(want).max())
    picture = np.clip(load("warm.safetensors")[0]["x"][0].transpose(1, 2, 0) / 2 + 0.5, 0, 1)
    assert np.abs(np.asarray(image.images[0].get_array()) - picture).max() < 1e-3, "not the picture of sample_cpu"
    (xlow, xhigh), (ylow, yhigh) = near.get_xlim(), near.get_ylim()
    x, y = near.lines[-1].get_xydata()[0]
    assert xlow < x < xhigh and ylow < y < yhigh and xhigh - xlow < 0.5 * np.ptp(ways.get_xlim())

    command = ("--weights", weights, "--out", "b.png")
    Path("changed.csv").write_text("".join(
        line.replace(",2,0.", ",2,0.9") for line in Path("cold.csv").read_text().splitlines(keepends=True)))
    write_log("log.csv", 3)
    write_trace("one.csv", 1)
    fails("warm.csv: not of this picture", "plot.py", "fixed_point", "warm.csv", "cold.csv", *command)
    fails("changed.csv: not of this picture", "plot.py", "fixed_point", "changed.csv", "warm.csv", *command)
    fails("two traces", "plot.py", "fixed_point", "cold.csv", *command)
    fails("log.csv: a log", "plot.py", "fixed_point", "log.csv", "warm.csv", *command)
    fails("one.csv: want", "plot.py", "fixed_point", "one.csv", "warm.csv", *command)
    for file in (root / "weights" / "cifar10_dit.safetensors", "none.safetensors", "cold.csv"):
        fails("--weights", "plot.py", "fixed_point", "cold.csv", "warm.csv", "--weights", file, "--out", "b.png")


def test_plot_architecture():
    _, figure, _ = plotted("architecture", "--out", "a.png")
    words, places = readable(figure, "a.png", 1040)
    said = [text.get_text().replace("\n", " ") for text in words]
    order = ["x$_t$", "patches → tokens", "pre blocks", "z$_0$", "n iterations without gradient",
             "m iterations with gradient", "z$_{n+m}$", "post blocks", "final layer", "out"]
    left = [places[said.index(name)].x0 for name in order]
    assert left == sorted(left), dict(zip(order, left))
    assert {"c = embed(t) + embed(y)", "embed(t)", "embed(y)", "inject", "inj", "h"} <= set(said)
    assert said.count("f") == 4 and any(name.startswith("reuse") for name in said), said
    (axes,) = figure.axes
    for line in axes.lines:
        path = line.get_transform().transform(line.get_xydata())
        along = np.concatenate([a + (b - a) * np.linspace(0, 1, 500)[:, None] for a, b in zip(path, path[1:])])
        for name, place in zip(said, places):
            inside = (along > place.min).all(1) & (along < place.max).all(1)
            assert not inside.any(), f"a line runs through {name!r}"
    boxes = [patch.get_window_extent() for patch in axes.patches if type(patch).__name__ == "FancyBboxPatch"]
    for name in ("patches → tokens", "pre blocks", "post blocks", "final layer", "inject", "embed(y)", "embed(t)",
                 "linear, gelu, linear", "LayerNorm, attention", "LayerNorm, MLP"):
        place = places[said.index(name)]
        assert any(box.x0 < place.x0 and place.x1 < box.x1 and box.y0 < place.y0 and place.y1 < box.y1 and
                   box.width < 300 for box in boxes), f"{name!r} does not fit into its box"


def test_plot_broken_input():
    write_log("log.csv", 3)
    write_trace("trace.csv", 2)
    Path("empty.csv").write_text("")
    Path("header.csv").write_text("step,loss\n")
    Path("other.csv").write_text("a,b\n1,2\n")
    Path("bad.csv").write_text("step,loss\n1,2\n2,x\n3,4\n")
    Path("zero.csv").write_text("step,t,iteration,residual\n0,999,1,0\n")
    Path("binary.csv").write_bytes(bytes(range(256)))
    for name in ("missing", "empty", "header", "other", "binary"):
        fails(f"{name}.csv", "plot.py", f"{name}.csv", "--out", "a.png")
    fails("bad.csv: row 3", "plot.py", "bad.csv", "--out", "a.png")
    fails("residual", "plot.py", "zero.csv", "--out", "a.png")
    fails("trace.csv", "plot.py", "log.csv", "trace.csv", "--out", "a.png")
    fails("--names", "plot.py", "log.csv", "--names", "a,b", "--out", "a.png")
    fails("nonsense", "plot.py", "log.csv", "--columns", "nonsense", "--out", "a.png")
    fails("--smooth", "plot.py", "log.csv", "--smooth", -3, "--out", "a.png")
    fails("no/a.png", "plot.py", "log.csv", "--out", "no/a.png")


# ---- latents.py; test_convert.py has the autoencoders of diffusers


def test_latents():
    """With an autoencoder of reduction 8 that takes means, where diffusers is not needed."""
    try:
        import torch
    except ImportError:
        raise Skip("needs torch") from None

    class Mean(torch.nn.Module):
        config = SimpleNamespace(block_out_channels=(1, 1, 1, 1), latent_channels=3, scaling_factor=0.5)

        def encode(self, x):
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=torch.nn.functional.avg_pool2d(x, 8)))

        def decode(self, z):
            return SimpleNamespace(sample=torch.nn.functional.interpolate(z, scale_factor=8))

    os.makedirs("vae")
    Path("vae/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    os.makedirs("pictures")
    colours = [(60, 120, 240), (255, 0, 0), (10, 20, 30)]
    for i, colour in enumerate(colours):
        Image.new("RGB", (16, 16), colour).save(f"pictures/{i}.png")
    diffusers = SimpleNamespace(AutoencoderKL=SimpleNamespace(from_pretrained=lambda folder, **options: Mean()),
                                utils=SimpleNamespace(logging=SimpleNamespace(set_verbosity_error=lambda: None)))
    encode = ("latents.py", "encode", "pictures", "--vae", "vae", "--batch", 2, "--dtype", "F32")
    decode = ("latents.py", "decode", "a.safetensors", "--vae", "vae", "--batch", 2)
    with mock.patch.dict(sys.modules, diffusers=diffusers), mock.patch("data.time.monotonic", iter(range(99)).__next__):
        _, errors = run(*encode, "--size", 16, "--flip", "--out", "a.safetensors")
        assert re.fullmatch(r"(\d/3 pictures, 0:0\d left\n)+", errors), errors
        x = load("a.safetensors")[0]["x"]
        assert x.shape == (6, 3, 2, 2)
        want = np.array(colours)[[0, 1, 0, 1, 2, 2]] / 255 - 0.5
        assert np.allclose(x, want[:, :, None, None], atol=1e-6), x[:, :, 0, 0]
        for size in 20, 36:  # 36, 18, 9, 4
            fails(f"--size {size}: give a multiple of 8", *encode, "--size", size, "--out", "b.safetensors")
        for name in "b.safetensors", "c.SAFETENSORS":
            _, errors = run(*decode, "--out", name)
            assert re.fullmatch(r"(\d/6 pictures, 0:0\d left\n)+", errors), errors
            equal(load(name)[0]["x"][4], np.full((16, 16, 3), colours[2]))
        run(*decode, "--out", "d.PNG")
        assert Image.open("d.PNG").size == (56, 38)


# ---- reference.py


def test_reference_broken_input():
    evaluate()  # skips without torch
    x = rng.integers(256, size=(4, 8, 8, 3), dtype=np.uint8)
    save("data.safetensors", x, np.zeros(4, np.int64))
    train = ("reference.py", "train", "--data", "data.safetensors", "--out", "run", "--width", 16, "--heads", 2)
    fails("--time_embedding", *train, "--time_embedding", "sti")
    for options in ("--no_grad_iters", 5), ("--grad_iters", "0,2"), ("--grad_iters", "3,2"), ("--batch", 0):
        fails(options[0], *train, *options)
    fails("--learn_sigma 1", *train, "--prediction", "flow", "--learn_sigma", 1)
    fails("image_size 8 is not a multiple of --patch 3", *train, "--patch", 3)
    fails("width 16 is not a multiple of --heads 3", *train, "--heads", 3)
    fails("--width 6", *train, "--width", 6)
    fails("see --help", "reference.py", "nonsense")
    fails("missing.safetensors", *train[:3], "missing.safetensors", *train[4:])


def test_interrupted():
    """Ctrl-C: one line and 130, whatever else the terminal stops."""
    evaluate()  # skips without torch
    save("data.safetensors", rng.integers(256, size=(4, 8, 8, 3), dtype=np.uint8), np.zeros(4, np.int64))
    for name in "make", "mpirun", "mpicc", "bench":  # what the tools run presses it
        Path(name).write_text("#!/bin/sh\nkill -INT 0; sleep 60\n")
        os.chmod(name, 0o755)
    work = ("--width", "16", "--heads", "2", "--patch", "2")
    train = ("train", "--data", "data.safetensors", "--out", "run", *work, "--steps", "99999")
    bench = ("--image_size", "8", *work, "--warmup", "1", "--threads", "1", "--no_compile", "--bench", "./bench")
    for tool, *args in ("scaling.py",), ("reference.py", *train), ("bench_torch.py", *bench):
        process = subprocess.Popen([sys.executable, TOOLS / tool, *args], stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.PIPE, start_new_session=True, env={**os.environ, "PATH":
                                   f"{os.getcwd()}:{os.environ['PATH']}"},
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        if tool == "reference.py":
            assert process.stdout.readline().startswith("step 0 ")
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=100)
        assert (process.returncode, errors) == (130, f"{tool}: stopped\n"), (tool, process.returncode, errors)


def test_reports_broken_input():
    for option, value in ("--parts", "nonsense"), ("--minutes", "two"), ("--models", "unet"), ("--target", "tpu"):
        fails(option, "report_gpu.py", option, value)
    Path("file").write_text("")
    for path in "file", "file/report":
        fails(f"{path}: ", "report_gpu.py", "--out", path)
    for tool, words, *args in (("report_hip.py", "no/clang++ not found", "no/clang++"),
                               ("report_memory.py", "needs the Python package torch")):
        done = subprocess.run([sys.executable, "-E", "-S", TOOLS / tool, *args], capture_output=True, text=True)
        assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, (tool, done.stderr)
    (torch := Path("old/torch")).mkdir(parents=True)
    (torch / "__init__.py").write_text("__version__ = '1.13.0a0'")
    done = subprocess.run([sys.executable, TOOLS / "report_memory.py"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": "old"})
    assert (done.returncode, done.stderr) == (
        1, "report_memory.py: torch 1.13.0a0 is too old for this; it needs 2.0 or newer\n"), done.stderr


def test_scaling_broken_input():
    for value in 0, -1, "two":
        fails("--rounds", "scaling.py", "--rounds", value)


# ---- evaluate.py


def evaluate():
    """The tool as a module."""
    if not importlib.util.find_spec("torch"):
        raise Skip("needs torch")
    importlib.import_module("torch").set_num_threads(1)  # more only wait for each other at work this small
    return importlib.import_module("evaluate")


def judged(*args):
    """The output, and the figures of --json."""
    code, said, errors = call("evaluate.py", *args, "--json", "figures.json")
    assert code == 0 and not errors, errors
    return said, json.loads(Path("figures.json").read_text())


def stripes(count, size=12):
    """Pictures of three classes, U8 (N,H,W,3): stripes across, down and along the diagonal, in any colours."""
    y = np.arange(count) % 3
    row, column = np.mgrid[:size, :size]
    along = np.stack([row, column, row + column])[y]
    wave = 0.5 + 0.5 * np.sin(along * rng.uniform(1, 1.6, (count, 1, 1)) + rng.uniform(0, 6, (count, 1, 1)))
    colours = rng.uniform(0, 255, (2, count, 1, 1, 3))
    x = colours[0] * wave[..., None] + colours[1] * (1 - wave[..., None])
    return x.astype(np.uint8), y.astype(np.int64)


def save(path, x, y=None, **metadata):
    from safetensors.numpy import save_file

    save_file({"x": np.ascontiguousarray(x)} | ({} if y is None else {"y": np.ascontiguousarray(y)}), path, metadata)


def as_samples(x):
    """U8 (N,H,W,C) as sample_* --latents writes pictures, F32 (N,C,H,W) in -1..1."""
    return (x.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)


STRIPES = {"class_names": '["across", "down", "diagonal"]'}


def test_evaluate_frechet():
    import torch

    tool = evaluate()
    x = rng.standard_normal((500, 6))
    x = np.linalg.qr(x - x.mean(0))[0] * np.sqrt(499)  # sample mean 0 and covariance 1, exactly
    a, b = rng.standard_normal((2, 6, 6))
    shift, wide = rng.standard_normal(6), rng.uniform(0, 3, 6)

    def distance(first, second):
        return tool.frechet(tool.Gaussian(torch.from_numpy(first)), tool.Gaussian(torch.from_numpy(second)))

    want = (shift**2).sum() + ((1 - wide) ** 2).sum()
    assert abs(distance(x, x * wide + shift) - want) < 1e-9 * want
    roots = np.sqrt(np.linalg.eigvals(a @ a.T @ b @ b.T).real).sum()
    want = np.trace(a @ a.T + b @ b.T) - 2 * roots
    assert abs(distance(x @ a.T, x @ b.T) - want) < 1e-6 * want, (distance(x @ a.T, x @ b.T), want)
    assert 0 <= distance(x @ a.T, x @ a.T) < 1e-6 and 0 <= distance(x[:3], x[:3]) < 1e-6
    same = np.repeat(x[:1], 5, 0)  # one picture again and again: no covariance
    want = 6 + (x[0] ** 2).sum()
    assert abs(distance(x, same) - want) < 1e-9 * want


def test_evaluate_manifold():
    import torch

    tool = evaluate()
    real, drawn = rng.standard_normal((40, 5)), 1.5 * rng.standard_normal((60, 5)) + 0.5  # some lie inside, some do not
    between = np.linalg.norm(drawn[:, None] - real[None], axis=2)
    radii = np.sort(np.linalg.norm(real[:, None] - real[None], axis=2), axis=1)[:, 3]  # the 0th is the point itself
    manifold = tool.Manifold(torch.from_numpy(real))
    order = [int(np.abs(real - point).sum(1).argmin()) for point in manifold.points.numpy()]
    assert np.allclose(manifold.radii.sqrt(), radii[order])
    want = (between <= radii).any(1).mean()
    assert 0 < want < 1 and abs(manifold.share(torch.from_numpy(drawn)) - want) < 1e-12


def test_evaluate():
    tool = evaluate()
    x, y = stripes(600)
    save("data.safetensors", x, y, **STRIPES)
    drawn, wanted = stripes(300)
    samples = as_samples(drawn)
    rough = samples + 0.15 * rng.standard_normal(samples.shape).astype(np.float32)
    save("good.safetensors", samples, wanted, **STRIPES)
    save("rough.safetensors", rough, wanted, **STRIPES)
    save("shuffled.safetensors", samples, np.roll(wanted, 1), **STRIPES)
    save("renamed.safetensors", samples, 2 - wanted, class_names='["diagonal", "down", "across"]')
    save("one.safetensors", np.repeat(samples[:1], 300, 0), np.repeat(wanted[:1], 300), **STRIPES)
    for i in range(300):
        path = Path("pngs", ("across", "down", "diagonal")[wanted[i]], f"{i:03}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn[i]).save(path)
    files = [f"{name}.safetensors" for name in ("good", "rough", "shuffled", "renamed", "one")] + ["pngs"]
    said, figures = judged("data.safetensors", *files)
    assert "training" in said and "floor" in said and "good.safetensors" in said, said
    good, rough, shuffled, renamed, one, pngs = (figures["pictures"][name] for name in files)
    floor, ceiling = figures["floor"], figures["ceiling"]
    assert figures["test_accuracy"] > 0.9 and good["recognised"] > 0.9 and ceiling["recognised"] < 0.6, figures
    assert good["fd"] < rough["fd"] < one["fd"] and good["fd"] < 0.1 * ceiling["fd"] > floor["fd"], figures
    assert good["precision"] > 0.7 and good["recall"] > 0.7 and floor["precision"] > 0.7, figures
    assert rough["precision"] < good["precision"] and one["recall"] < 0.05, figures
    assert ceiling["precision"] < floor["precision"] and ceiling["recall"] < 0.05, figures
    assert shuffled["recognised"] < 0.1 and shuffled["fd"] == good["fd"], figures
    assert renamed == good, (renamed, good)
    assert abs(pngs["fd"] - good["fd"]) < 1e-6 and pngs["recognised"] == good["recognised"], (pngs, good)

    (Path("pngs") / ".hidden").mkdir()
    for name in ("loose.png", "down/1.jpg", "down/2.PNG", "down/._3.png", ".hidden/4.png"):
        (Path("pngs") / name).write_text("no picture")
    said, noted = run("evaluate.py", "data.safetensors", *files, "--json", "again.json")  # from the cache, the same
    again = json.loads(Path("again.json").read_text())
    assert "pngs: 3 files are left out" in noted and "down/1.jpg, ..." in noted and noted.count("\n") == 1, noted
    assert figures["floor"]["n"] == again["floor"]["n"] == 120, again  # a fifth; the files have 300
    assert "training" not in said and again["network"] == figures["network"], said
    assert all(abs(again["pictures"][name]["fd"] - figures["pictures"][name]["fd"]) < 1e-4 for name in files), again
    copies = as_samples(np.ascontiguousarray(x[:40, :, ::-1]))  # learnt by heart, mirrored: found in the second row
    save("copies.safetensors", copies + np.float32(0.02), y[:40], **STRIPES)
    medians = []
    for name in ("copies", "good"):
        said, _ = run("evaluate.py", "data.safetensors", f"{name}.safetensors", "copies.safetensors", "--nearest",
                      "near.png")
        assert re.search("^ +40 .* floor: held out, against the other 480$", said, re.M), said
        medians += [list(map(float, re.search(r"median: ([\d.]+); of a real picture ([\d.]+)", said).groups()))]
    assert 0 < medians[0][0] < 4 < 0.5 * medians[0][1] and 0.5 < medians[1][0] / medians[1][1] < 2, medians
    flat = [part.reshape(len(part), -1).astype(float) for part in (drawn, x, x[:, :, ::-1])]
    far = [np.minimum(*(np.sqrt(((a[:, None] - b) ** 2).mean(2)) for b in flat[1:])) for a in flat[:2]]
    far[1][np.diag_indices(len(x))] = np.inf
    assert np.allclose(medians[1], [np.sort(d.min(1))[(len(d) - 1) // 2] for d in far], atol=0.06), medians  # torch's
    fails_on_full_disk("a.json", "evaluate.py", "data.safetensors", "good.safetensors", "--json", "a.json")
    sheet = np.asarray(Image.open("near.png"))
    side = x.shape[1] + 2
    assert sheet.shape == (9 * side, 30 * side, 3), sheet.shape
    Path("data.features.safetensors").write_bytes(b"broken")
    evaluator = tool.Evaluator("data.safetensors", log=lambda line: None)
    assert 0 < evaluator.floor(300)["fd"] < evaluator.ceiling["fd"] and evaluator.test_accuracy > 0.9
    found = evaluator.metrics(*tool.load_pictures("good.safetensors")[:2])
    assert abs(found["fd"] - good["fd"]) < 0.1 * ceiling["fd"] and found["recognised"] > 0.9, (found, good)
    save("data.safetensors", x[::-1], y[::-1], **STRIPES)
    epochs, tool.EPOCHS = tool.EPOCHS, 1
    assert "training" in judged("data.safetensors")[0], "used the cache of another dataset"
    tool.EPOCHS = epochs


def test_evaluate_floor():
    """What the network learns from, and by hand: the scale of the features, the reference and the floor."""
    import torch

    tool = evaluate()
    x, y = stripes(600)
    chosen = torch.randperm(600, generator=torch.Generator().manual_seed(1))[:400].numpy()
    held_out, rest = chosen[:80], chosen[80:]
    x[held_out], y[held_out] = rng.integers(256, size=(80, 12, 12, 3)), 3  # a class that the others lack
    save("data.safetensors", x, y)
    with mock.patch.multiple(tool, REFERENCE=400, MANIFOLD=50):
        evaluator = tool.Evaluator("data.safetensors", log=lambda line: None)
        floors = [evaluator.floor(n) for n in (40, 80, 1000)]
    assert evaluator.held_out.tolist() == held_out.tolist() and evaluator.rest.tolist() == rest.tolist()
    assert evaluator.test_accuracy < 0.1, f"learnt from what is held out: {evaluator.test_accuracy}"
    features = evaluator.scale * evaluator.features(evaluator.net.features, evaluator.data.x)
    assert abs(features[chosen].double().var(0).sum() - 100) < 1e-3
    assert evaluator.real.n == 400 and torch.allclose(evaluator.real.mean, features[chosen].double().mean(0), atol=1e-4)
    assert len(evaluator.manifold.points) == 50
    for n, floor in zip((40, 80, 80), floors):
        against = {size: tool.frechet(tool.Gaussian(features[real]), tool.Gaussian(features[held_out[:n]]))
                   for size, real in ((320, rest), (400, chosen))}
        assert floor["n"] == n and abs(floor["fd"] / against[320] - 1) < 1e-3, (floor, against)
        assert abs(against[400] / against[320] - 1) > 0.01, "this test cannot tell the others from all"


def test_evaluate_unlabelled():
    evaluate()
    x, _ = stripes(300, 16)
    save("grey.safetensors", x[..., :1], np.zeros(300, np.int64))
    save("samples.safetensors", as_samples(stripes(100, 16)[0][..., :1]), np.zeros(100, np.int64))
    said, figures = judged("grey.safetensors", "samples.safetensors")
    assert "rotations" in said and "fewer pictures than features" in said, said
    found = figures["pictures"]["samples.safetensors"]
    assert found["recognised"] is None and found["fd"] < 0.2 * figures["ceiling"]["fd"], figures

    y = rng.integers(5, size=400)
    latents = 4 * rng.standard_normal((400, 4, 8, 8)) + y[:, None, None, None]
    save("latents.safetensors", latents.astype(np.float16), y, latent_scale="0.2")
    save("samples.safetensors", latents[::2].astype(np.float32), y[::2])
    _, figures = judged("latents.safetensors", "samples.safetensors")
    found = figures["pictures"]["samples.safetensors"]
    assert found["precision"] == 1 and found["recognised"] > 0.5 > figures["ceiling"]["recognised"], figures


def test_evaluate_inception():
    import torch

    evaluate()

    network = torch.jit.ScriptModule()  # called as the TorchScript file of the FID network is
    network.define("""
def forward(self, img, return_features: bool = False):
    assert return_features and img.dtype == torch.uint8 and img.size(1) == 3
    return torch.nn.functional.adaptive_avg_pool2d(img.float(), [2, 2]).flatten(1)
""")
    network.save("inception.pt")
    x, y = stripes(300)
    save("data.safetensors", x, y, **STRIPES)
    drawn, wanted = stripes(200)
    save("samples.safetensors", as_samples(drawn), wanted, **STRIPES)
    use = ("data.safetensors", "samples.safetensors", "--inception")
    _, figures = judged(*use, "inception.pt")

    def pooled(pictures):
        return pictures.astype(float).reshape(-1, 2, 6, 2, 6, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(-1, 12)

    a, b = pooled(x), pooled(drawn)
    s, t = np.cov(a.T), np.cov(b.T)
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t) - 2 * np.sqrt(np.linalg.eigvals(s @ t).real).sum()
    got = figures["pictures"]["samples.safetensors"]
    assert abs(got["fd"] - want) < 1e-4 * want, (got["fd"], want)
    assert got["recognised"] > 0.9 and Path("data.inception.safetensors").exists()
    assert judged(*use, "inception.pt")[1] == figures, "the cached features give other figures"

    class InceptionV3(torch.nn.Module):  # as pytorch_fid has it
        def __init__(self, blocks):
            super().__init__()
            self.linear = torch.nn.Linear(12, 3)
            self.load_state_dict(package.inception.load_state_dict_from_url("https://"))

        def forward(self, x):
            assert 0 <= x.min() and x.max() <= 1
            return [self.linear(torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))[..., None, None]]

    package = SimpleNamespace(inception=SimpleNamespace(InceptionV3=InceptionV3))
    torch.save({"linear.weight": 255 * torch.eye(12)[:3], "linear.bias": torch.zeros(3)}, "right.pth")
    torch.save({"a": torch.zeros(3)}, "wrong.pth")
    torch.save([1], "list.pth")
    with mock.patch.dict(sys.modules, {"pytorch_fid": package}):
        got = judged(*use, "right.pth")[1]["pictures"]["samples.safetensors"]["fd"]
        s, t = s[:3, :3], t[:3, :3]
        want = ((a.mean(0) - b.mean(0))[:3] ** 2).sum() + np.trace(s + t)
        want -= 2 * np.sqrt(np.linalg.eigvals(s @ t).real).sum()
        assert abs(got - want) < 1e-3 * want, (got, want)
        fails("wrong.pth", "evaluate.py", *use, "wrong.pth")
        fails("list.pth", "evaluate.py", *use, "list.pth")
    Path("text.pt").write_text("hello")
    with mock.patch("torch.jit.load", side_effect=RuntimeError("\n")):
        fails("text.pt: RuntimeError", "evaluate.py", *use, "text.pt")
    fails("text.pt", "evaluate.py", *use, "text.pt")
    fails("missing.pt", "evaluate.py", *use, "missing.pt")


def test_evaluate_broken_input():
    evaluate()
    x, y = stripes(60)
    # Without names of classes a folder is called by its number; bytes are pictures whatever their channels
    save("numbers.safetensors", np.concatenate([x, x[..., :2]], 3), 5 * y)
    import torch

    data = evaluate().Dataset("numbers.safetensors")
    assert data.shape[0] == 5 and not data.latents
    os.makedirs("numbered")
    labels = data.labels(torch.tensor([0, 1, 2, 2]), ["0", "10", "5"], "numbered")
    assert labels.tolist() == [0, 10, 5, 5], labels
    assert data.labels(torch.tensor([5]), ["a"] * 11, "a file").tolist() == [5]

    samples = as_samples(x)
    save("data.safetensors", x, y, **STRIPES)
    for i, names_ in enumerate(('{"across": 0}', "[0, 1, 2]", "3", "[" * 100000)):
        save("names.safetensors", x, y, class_names=names_)
        fails("names.safetensors", "evaluate.py", *["data.safetensors"] * (i % 2), "names.safetensors")
    save("few.safetensors", x[:20], y[:20], **STRIPES)
    save("high.safetensors", x, y + 1, **STRIPES)
    save("wide.safetensors", x[:, :8], y, **STRIPES)
    save("small.safetensors", samples[..., :8, :8], y)
    save("grey.safetensors", samples[:, :1], y)
    save("three.safetensors", samples[:3], y[:3])
    save("minus.safetensors", samples, y - 1)
    save("other.safetensors", samples, y, class_names='["cat", "dog", "diagonal"]')
    save("nan.safetensors", np.where(samples > 0.9, np.float32("nan"), samples), y)
    save("double.safetensors", samples.astype(float), y)
    Path("text.safetensors").write_text("hello")
    Path("cut.safetensors").write_bytes(Path("data.safetensors").read_bytes()[:-1])
    os.makedirs("empty")
    os.makedirs("broken")
    os.makedirs("sizes")
    Path("broken/1.png").write_text("hello")
    Image.fromarray(x[0]).save("sizes/1.png")
    Image.fromarray(x[0, :8]).save("sizes/2.png")
    for name in ("missing", "text", "cut", "few", "high", "wide", "double"):
        fails(f"{name}.safetensors", "evaluate.py", f"{name}.safetensors")
    for name in ("missing", "text", "small", "grey", "three", "minus", "other", "nan"):
        fails(f"{name}.safetensors", "evaluate.py", "data.safetensors", f"{name}.safetensors")
    fails("empty", "evaluate.py", "data.safetensors", "empty")
    fails("broken/1.png", "evaluate.py", "data.safetensors", "broken")
    fails("sizes/2.png", "evaluate.py", "data.safetensors", "sizes")
    fails("no/a.json", "evaluate.py", "data.safetensors", "--json", "no/a.json")
    fails("no/a.png", "evaluate.py", "data.safetensors", "--nearest", "no/a.png")
    fails("--nearest", "evaluate.py", "data.safetensors", "--nearest", "a.png")
    fails("missing", "evaluate.py", "missing.safetensors")
    fails("--help", "evaluate.py", "data.safetensors", "--nonsense")


# ---- reproduce.py


def test_reproduce_rules():
    tool = importlib.import_module("reproduce")
    # Half the 95 % interval is 12.71 d of two changes m - d, m + d; 4.30 / sqrt(3) d of m - d, m, m + d;
    # 3.18 / sqrt(3) d of two m - d and two m + d
    for half, signs in (12.71, (-1, 1)), (4.30 / 3**0.5, (-1, 0, 1)), (3.18 / 3**0.5, (-1, -1, 1, 1)):
        for part, want in (0.99, "not told apart by these seeds"), (1.01, "higher"), (-1.01, "lower"):
            assert tool.direction([part * half + sign for sign in signs]) == want, (half, part)
    assert tool.direction([-1.0]) == "lower (one seed)"
    assert tool.apart((1, 0.4), (2, 0.5)) and tool.apart((2, 0.5), (1, 0.4))
    assert not tool.apart((1, 0.4), (2, 0.7)) and not tool.apart((2, 0.7), (1, 0.4))


def test_reproduce_arithmetic():
    """Every contender's training costs the same, counted by a file's matrices; and the page, of invented points."""
    tool = importlib.import_module("reproduce")
    with safetensors.safe_open(TOOLS.parent / "weights/shapes.safetensors", "np") as file:  # 36 tokens of 128 channels
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}

    def work(prefix):
        return sum(2 * 36 * shape[0] * shape[1] for name, shape in shapes.items()
                   if name.startswith(prefix) and len(shape) == 2 and "adaLN" not in name)

    block = work("blocks_pre.0.") + 2 * 2 * 36 * 36 * 128  # and queries by keys, weights by values
    half = work("block_fixed_point_projection_fc1.") / 2  # which sees z, and what is injected
    outside = 2 * block + work("block_pre_projection.") + half
    iteration = block + half + work("block_fixed_point_projection_fc2.")

    def cost(options):  # forward, and twice that backward
        if "--fixed_point" in options:
            return 3 * int(options["--depth"]) * block
        n, m = (np.mean([int(k) for k in options[f"--{name}_iters"].split(",")]) for name in ("no_grad", "grad"))
        return 3 * (outside + m * iteration) + n * iteration

    scale = {**tool.SCALES["hour"], "seeds": 2, "steps": 200, "tune_steps": 50, "budgets": [6, 12, 24]}
    args = SimpleNamespace(scale="hour", seeds=2, target="cpu", results="out")
    e = tool.Experiment(args, "shapes", "out", scale, tool.contenders(scale))
    trained, broken = [], 0

    def train(command, show=None):
        options = dict(zip(command[1::2], command[2::2]))
        trained.append(options)
        folder = Path(options["--out"])
        folder.mkdir()
        (folder / "log.csv").write_text("head\n" + "1,0.5,0,0,0,0,0,0,1\n" * int(options["--steps"]))
        (folder / "weights.safetensors").touch()
        (folder / "state.safetensors").touch()
        return ["1.5 million parameters", "in all 7 MB"]

    def measure(run, seed, **settings):
        passes = settings.get("budget") or settings["steps"] * e.runs[run][1].get("depth", 6)
        best = {"fpdm": {6: 1, 12: 5, 24: 3}, "dit3": {6: 2, 12: 4, 24: 3.3}}.get(run, {}).get(passes, 50)
        return {"fd": best + 0.2 * (-1) ** seed, "precision": 0.5, "recall": 0.5, "recognised": 0.5, "passes": passes,
                "gflop": passes, "broken": broken * (seed == 2)}

    e.call, e.measure, e.paper_scale = train, measure, lambda: None
    e.trace = lambda *_: {"t": [1], "residuals": [[0.1] * 16]}
    made = SimpleNamespace(returncode=0)
    with mock.patch.object(tool.subprocess, "run", return_value=made), contextlib.redirect_stdout(io.StringIO()):
        e.everything()
    first = cost(trained[0])
    assert {Path(options["--out"]).name.split("-")[0] for options in trained} == set(e.runs)
    for options in trained:
        run_, steps = Path(options["--out"]).name.split("-")[0], 50 if options["--seed"] == "100" else 200
        assert int(options["--steps"]) == round(steps * first / cost(options)), options
        assert abs(tool.flops(scale, e.runs[run_][1], 0)[1] / cost(options) - 1) < 1e-12, options
    assert abs(e.picture_flops("fpdm", {"steps": 4}, 16) / (4 * (outside + 2 * iteration)) - 1) < 1e-12
    assert abs(e.picture_flops("dit", {"steps": 4}, 24) / (24 * block) - 1) < 1e-12

    e.points.update(paper=[], evaluator={"floor": {"fd": 0.3, "n": 1000}, "ceiling": {"fd": 9}, "accuracy": 0.9})

    def claims():
        axis = mock.MagicMock()
        axis.get_ylim.return_value = 0, 1
        report = tool.Report(args, e, e, None)
        report.figure, report.pictures = lambda name, draw, columns=1: draw(*[axis] * columns), lambda: None
        with contextlib.redirect_stdout(io.StringIO()):
            report.write()
        assert axis.axhline.call_args[1]["label"] == "1,000 real pictures", axis.axhline.mock_calls
        return Path("out/claims.md").read_text()

    said = claims()
    for words in ("nearer to the data than the best DiT on shapes at 6 passes a picture (1 against 2).\n",
                  "DiT is nearer on shapes at 12 passes a picture (5 against 4).\n",
                  "less than their deviations over the seeds on shapes at 24 passes a picture (3 against 3.3).\n",
                  "that of 40 ways to draw (5 models × 8 settings) against 18 (3 × 6) on shapes, of fewer at small",
                  "1,000 real pictures, held out, against the four fifths that are not: 0.30, noise 9;"):
        assert words in said, words
    assert "roken" not in said
    broken = 0.25
    said = claims()
    for heading, cells in {"Quality": 3 * 21, "Smoothing": 7, "Reuse": 2 * 6, "Solvers": 4, "Training: ": 6,
                           "What holds": 27}.items():
        assert said.split(f"\n## {heading}")[1].split("\n## ")[0].count("(12.5 % broken) |") == cells, heading
    assert "*Broken* are" in said
    scale["seeds"] = e.scale["seeds"] = 1
    said = claims().split("\n## ")[1]
    assert said.count("(one seed: whether by more than chance is not known).") == 2 and "deviation" not in said, said
    large = tool.SCALES["gpu"]
    words, options = tool.plateau(large)["dit"]
    assert words.endswith("a DiT of 8") and options["depth"] == 8 and tool.plateau(scale)["dit"][1]["depth"] == 6


def test_reproduce_broken_input():
    if not importlib.util.find_spec("torch"):
        raise Skip("needs torch")
    tool = importlib.import_module("reproduce")
    use = ("reproduce.py", "--scale", "smoke", "--target", "cpu", "--out")
    tool.Experiment(SimpleNamespace(scale="smoke", target="cpu"), "shapes", "out", tool.SCALES["smoke"], {})
    setup = Path("out/setup.json").read_text()
    with mock.patch.object(tool.Experiment, "everything", side_effect=AssertionError("began the work")):
        fails("/etc/passwd/x", *use, "/etc/passwd/x")
        for results in "/etc/passwd", "/proc/x", "/proc":  # the last is a folder, in which nobody can write
            fails(results, *use, "out", "--results", results)
        for damaged in "hello", "[1]", "[" * 100000, setup[:-1]:
            Path("out/points.json").write_text(damaged)
            fails("out/points.json", *use, "out")
        Path("out/points.json").unlink()
        for damaged in "hello", "[1]", setup[:-1]:
            Path("out/setup.json").write_text(damaged)
            fails("out/setup.json", *use, "out")
    with mock.patch.object(tool.Experiment, "everything", side_effect=KeyboardInterrupt):
        assert call(*use, "other", "--results", "new/folder")[0] == 130 and os.listdir("new/folder") == []
    fails("--help", *use, "out", "--nonsense")
    said, _ = run("reproduce.py", "--help")
    assert "goes on where it stopped" in said and "--photographs" in said, said


def test_reproduce():
    """The smoke scale, stopped in the middle and gone on with, with a second seed; its report holds every claim and the
    runs' figures."""
    if not importlib.util.find_spec("torch"):
        raise Skip("needs torch")
    command = [sys.executable, TOOLS / "reproduce.py", "--scale", "smoke", "--target", "cpu", "--out", "out"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in first.stdout:
        if "train dit_deep" in line:
            first.send_signal(signal.SIGINT)
    assert first.wait() == 130 and "the same command goes on" in line, line
    done = json.loads(Path("out/points.json").read_text())
    assert 3 <= len(done) < 25 and all(key.startswith("train ") for key in done), done
    said, _ = run("reproduce.py", "--scale", "smoke", "--seeds", "2", "--target", "cpu", "--out", "out")
    points = json.loads(Path("out/points.json").read_text())
    assert all(points[key] == value for key, value in done.items()), "measured again what was measured already"
    claims = Path("out/claims.md").read_text()
    assert "A self-test" in claims and "`python3 tools/reproduce.py --scale smoke --seeds 2`" in claims
    for heading in ("When should I use a fixed-point model?", "Parameters, memory", "Quality against budget: shapes",
                    "Smoothing", "Reuse and allocation", "Solvers", "Training: S-JFB", "What holds it back"):
        assert f"## {heading}" in claims, heading
    for picture in ("claims", "claims_shapes", "claims_smoothing", "claims_residual", "claims_training"):
        assert f"({picture}.png)" in claims and is_plot(f"out/{picture}.png") is None
    sampler, drawn = {}, {}
    samplers = ("t_shift=0", "t_shift=1", "t_shift=1 order=2")
    rate = {key.split()[1]: key.split()[4] for key in points if re.match(r"train \w+ \w+ 1 ", key)}
    for run_, words in ("fpdm", "FPDM"), ("dit", "DiT, 6 blocks"), ("dit_deep", "DiT, 12 blocks"):
        # Both are those with the lowest distance at a budget in the middle.
        settings = "steps=4 budget=12 reuse=1 alloc=const" if run_ == "fpdm" else "steps=2"
        tried = {(name, i): points[f"{run_} {name} 1 {rate[run_]} {settings} {i}"]["fd"]
                 for name in ("logit_normal", "uniform") for i in samplers}
        drawn[run_], sampler[run_] = min(tried, key=tried.get)
        if run_ != "fpdm":  # of which the table may show more iterations
            said_ = sampler[run_].replace("t_shift=", "").replace(" order=2", "²")
            assert re.search(rf"\n\| {words} \|.* \(2, {said_}\) \|", claims), (run_, tried)
        best = {name: min(tried[name, i] for i in samplers) for name in ("logit_normal", "uniform")}
        assert ", ".join(f"{name} {fd:.3g}" for name, fd in best.items()) in claims, best
        assert len(list(Path("out").glob(f"{run_}-{drawn[run_]}-2-*"))) == 1, drawn  # the second seed trains so, too
    for run_ in ("fpdm", "dit"):  # the best rate is not the lowest or highest of those tried, or twice more were
        losses = {float(key.split()[4]): value["loss"] for key, value in points.items()
                  if key.startswith(f"train {run_} logit_normal 100 ")}
        best = min(losses, key=losses.get)
        assert min(losses) < best < max(losses) or len(losses) == 4, losses
        assert f"{min(lr for lr, loss in losses.items() if loss <= 1.02 * losses[best]):g}" == rate[run_], losses
    both = [points[f"fpdm {drawn['fpdm']} {seed} {rate['fpdm']} steps=4 budget=12 reuse=1 alloc=const t_shift=1"]
            for seed in (1, 2)]
    mean, deviation = np.mean([p["fd"] for p in both]), np.std([p["fd"] for p in both], ddof=1)
    assert f"{mean:.2f} ± {deviation:.2f} (4)" in claims, (mean, deviation)
    assert both[0]["passes"] == 12 and both[0]["fd"] != both[1]["fd"]
    assert points[f"dit {drawn['dit']} 1 {rate['dit']} steps=2 {sampler['dit']}"]["passes"] == 12
    answer = claims.split("## ")[1]  # names every budget once, and the nearer side's distance first or last
    budgets = re.findall(r"shapes at ([\d, ]+) passes a picture \((.*?)\)", answer)
    assert sorted(int(b) for found, _ in budgets for b in found.split(", ")) == [6, 12, 24], budgets
    for line in answer.splitlines():
        for ours, theirs in re.findall(r"([\d.e+]+) against ([\d.e+]+)", line):
            assert line.startswith("They differ") or (float(ours) <= float(theirs)) == line.startswith("Trained"), line
    weights = next(Path("out").glob(f"dit-{drawn['dit']}-2-*")) / "weights.safetensors"  # a point, measured by hand
    subprocess.run([TOOLS.parent / "sample_cpu", "--weights", weights, "--n", "100", "--batch", "100", "--cfg", "1",
                    "--seed", "1002", "--steps", "4", *(f"--{word}" for word in sampler["dit"].split()), "--latents",
                    "x.safetensors", "--out", "x.png"], check=True)
    run("evaluate.py", "out/real.safetensors", "x.safetensors", "--json", "x.json")
    want = json.loads(Path("x.json").read_text())["pictures"]["x.safetensors"]["fd"]
    assert abs(points[f"dit {drawn['dit']} 2 {rate['dit']} steps=4 {sampler['dit']}"]["fd"] - want) < 1e-6 * want
    assert points["evaluator"]["floor"]["fd"] < want and points["evaluator"]["floor"]["n"] == 100
    memory = {run: points[next(key for key in points if re.match(rf"train {run} \w+ 1 ", key))]["memory"]
              for run in ("one_step", "fpdm", "unroll")}
    assert memory["one_step"] < memory["fpdm"] == memory["unroll"], memory  # m is 1; 4 at most; 4
    run("reproduce.py", "--scale", "smoke", "--seeds", "2", "--target", "cpu", "--out", "out")
    assert Path("out/claims.md").read_text() == claims and json.loads(Path("out/points.json").read_text()) == points
    fails("another setup", "reproduce.py", "--scale", "laptop", "--target", "cpu", "--out", "out")
    fails("--seeds: at least 1", "reproduce.py", "--scale", "smoke", "--seeds", "0", "--target", "cpu", "--out", "out")
    fails("none.safetensors", "reproduce.py", "--photographs", "none.safetensors", "--target", "cpu")


# ---- sample_gpu on the CPU harness draws the pictures of sample_cpu: noise, batches, guidance, early stops, traces


def test_emulated_samples():
    if not shutil.which("g++"):
        raise Skip("needs g++")
    root = TOOLS.parent
    subprocess.run(["make", "-s", "-C", root, "sample_cpu", "sample_emu"], check=True)
    for case, options in (("sample_ddim_reuse", "--eta 0.5 --cfg 2 --cfg_channels 1 --iters 3"),
                          ("sample_ddpm_sigma", "--sampler ddpm --cfg 1.5 --iters 2,1,2,1 --trace {}.csv"),
                          ("sample_skip_anderson", "--solver anderson --cfg 1 --iters 4 --trace {}.csv"),
                          ("sample_x_reuse", "--t_shift 2 --iters 9 --tol 0.05 --trace {}.csv"),
                          ("sample_x_reuse", "--order 2 --t_shift 2 --iters 2 --cfg 2"),
                          ("sample_dit_ddpm_sigma_guided", "--sampler ddpm")):
        for kind in "cpu", "emu":
            subprocess.run([root / f"sample_{kind}", "--weights", root / f"test/cases/{case}.safetensors", "--dtype",
                            "fp32", "--n", "5", "--batch", "2", "--steps", "4", "--latents", f"{kind}.safetensors",
                            "--out", "a.png", *options.format(kind).split()], check=True, capture_output=True)
        got, want = (load(f"{kind}.safetensors")[0]["x"] for kind in ("emu", "cpu"))
        assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want), (case, np.abs(got - want).max())
        if "trace" in options:
            got, want = (np.loadtxt(f"{kind}.csv", delimiter=",", skiprows=1, ndmin=2) for kind in ("emu", "cpu"))
            assert got.shape == want.shape and np.allclose(got, want, rtol=1e-3, atol=1e-6), case


# ---- bench_torch.py


def test_bench_torch():
    if not importlib.util.find_spec("torch"):
        raise Skip("needs torch")
    Path("bench").write_text("#!/bin/sh\nprintf '%s ' \"$@\" > options\n"
                             "echo peak_gflops 9 GF/s; echo train_step_ms 5 ms; echo train_peak_mb 7 MB\n")
    Path("wrong").write_text("#!/bin/sh\necho peak_gflops 100 GFLOP/s\n")
    os.chmod("bench", 0o755)
    os.chmod("wrong", 0o755)
    work = ("--width", 16, "--heads", 2, "--image_size", 8, "--batch", 3, "--n", 0, "--m", 2, "--warmup", 1,
            "--rounds", 2, "--threads", 1, "--no_compile", "--post_depth", 2)
    said, _ = run("bench_torch.py", *work, "--bench", "./bench")
    assert said.count("\nround ") == 2 and "bench_cpu 5.0" in said, said
    assert "time of torch-eager / bench_cpu: median" in said, said
    assert Path("options").read_text().split() == (
        "--width=16 --heads=2 --patch=2 --image_size=8 --batch=3 --n=0 --m=2 --pre_depth=1 --post_depth=2 --skip=0 "
        "--gemm=0 --rounds=1 --dtype=fp32").split(), Path("options").read_text()
    fails("train_step_ms", "bench_torch.py", *work, "--bench", "./wrong")
    for option, value in ("channels", 4), ("fixed_point", 0), ("depth", 5), ("passes", 100):
        fails(f"--{option}: only with", "bench_torch.py", *work, f"--{option}", value)
    for option, value in ("heads", 3), ("width", 6), ("patch", 3), ("threads", 0), ("n", -1), ("batch", "two"):
        fails(f"--{option}", "bench_torch.py", *work, f"--{option}", value)


def test_bench_torch_step():
    """What PyTorch's process does in a turn: the work that ./bench_cpu is told to do."""
    evaluate()  # skips without torch
    import reference

    steps, training_step = [], reference.training_step

    def step(cfg, schedule, model, ema, optimizer, x0, noise, t, y, n, m):
        steps.append((n, m, tuple(x0.shape), cfg.width, cfg.heads, cfg.patch, cfg.pre_depth, cfg.post_depth, cfg.skip))
        return training_step(cfg, schedule, model, ema, optimizer, x0, noise, t, y, n, m)

    with mock.patch("reference.training_step", step), mock.patch("sys.stdin", ["step"]):
        said, _ = run("bench_torch.py", "--process", "torch-eager", "--width", 24, "--heads", 3, "--image_size", 12,
                      "--patch", 4, "--batch", 3, "--n", 2, "--m", 3, "--warmup", 2, "--threads", 1, "--post_depth", 2)
    assert steps[1:] == [(2, 3, (3, 3, 12, 12), 24, 3, 4, 1, 2, 0)] * 4, steps  # after the one that loads torch
    first, turn = map(json.loads, said.splitlines())
    assert first["first_ms"] > 0 and turn["ms"] > 0 and turn["peak_mb"] > 0, said


if __name__ == "__main__":
    testing.main(globals())
