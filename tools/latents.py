#!/usr/bin/env python3
"""Pictures to an autoencoder's latents, on which a model is trained, and latents to pictures.

    python3 tools/latents.py encode PICTURES --size 256 --vae sd-vae-ft-mse --out latents.safetensors
    ./train_cpu --data latents.safetensors --out run
    ./sample_cpu --weights run/weights.safetensors --latents drawn.safetensors
    python3 tools/latents.py decode drawn.safetensors --vae sd-vae-ft-mse --out pictures.png

--vae is a folder on this machine with AutoencoderKL or AutoencoderTiny of diffusers (config.json and weights; or a
pipeline that holds one in vae/). PICTURES holds pictures, or a folder of them for each class. Latents are stored times
its scaling_factor, as the metadata's latent_scale says.
decode writes a PNG grid, or with --out NAME.safetensors a dataset of pictures, which tools/evaluate.py takes.
Needs torch, diffusers, safetensors, numpy and pillow.
"""
import argparse
import contextlib
import json
import math
import os
import sys
from pathlib import Path

try:
    import numpy as np
    import safetensors.torch
    import torch
    from PIL import Image

    import data
    from data import Parser, die, main_of, note, positive, replace_file
except ImportError as error:
    sys.exit(f"latents.py: needs the Python package {error.name}: pip install -r tools/requirements.txt")


class Autoencoder:
    """Latents are (N,C,h,w), times scale; pictures (N,H,W,3), bytes."""

    def __init__(self, args):
        folder = Path(args.vae)
        folder = folder / "vae" if (folder / "vae" / "config.json").exists() else folder
        try:
            config = json.loads((folder / "config.json").read_text())
            kind = config["_class_name"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            die(f"--vae {folder}: {error!r}; want a folder with config.json and the weights of an autoencoder")
        if kind not in ("AutoencoderKL", "AutoencoderTiny"):
            die(f"--vae {folder}: is a {kind}; want an AutoencoderKL or AutoencoderTiny")
        try:
            import diffusers
        except ImportError:
            die("needs the Python package diffusers: pip install -r tools/requirements.txt")
        diffusers.utils.logging.set_verbosity_error()
        try:
            load = getattr(diffusers, kind).from_pretrained
            self.model = load(folder, local_files_only=True, low_cpu_mem_usage=False)
        except Exception as error:  # a broken folder raises whatever its reader ran into
            die(f"--vae {folder}: {' '.join(str(error).split())[:300]}")
        if config.get("shift_factor") or config.get("latents_mean"):
            die(f"--vae {folder}: its latents are shifted as well as scaled, which metadata cannot say")
        self.scale = self.model.config.scaling_factor
        self.tiny, self.sample, self.batch = kind == "AutoencoderTiny", getattr(args, "sample", False), args.batch
        if self.tiny and self.sample:
            die(f"--sample: an {kind} has no distribution to draw from")
        try:
            self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.model = self.model.to(self.device).eval()
            self.random = torch.Generator(self.device).manual_seed(args.seed if self.sample else 0)
        except (RuntimeError, AssertionError) as error:
            die(f"--device {args.device}: {str(error).splitlines()[0]}")

    @torch.no_grad()
    def encode(self, pictures):
        found = self.model.encode(torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2) / 127.5 - 1)
        if self.tiny:
            latents = found.latents
        else:
            latents = found.latent_dist.sample(self.random) if self.sample else found.latent_dist.mean
        return (self.scale * latents).cpu().numpy()

    @torch.no_grad()
    def decode(self, latents):
        pictures = self.model.decode(latents.float().to(self.device) / self.scale).sample
        return (127.5 * pictures + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


# ---- encode


def encode(args):
    vae = Autoencoder(args)
    reduction = 2 ** (len(vae.model.config.block_out_channels) - 1)
    if args.size % reduction:
        die(f"--size {args.size}: give a multiple of {reduction}, the autoencoder's reduction")
    shape = vae.encode(np.zeros((1, args.size, args.size, 3), np.uint8)).shape[1:]

    class Latents(data.Writer):
        """Takes pictures, writes latents: of each picture, and with --flip of its mirror image."""

        def __init__(self, path, count, picture_shape, labelled, class_names):
            self.copies = 2 if args.flip else 1
            super().__init__(path, self.copies * count, shape, args.dtype, labelled, class_names, vae.scale)

        def add(self, x, y=None, where=""):
            for flipped in range(self.copies):
                super().add(vae.encode(np.ascontiguousarray(x[:, :, :: -1 if flipped else 1])), y, where)

    args.channels = 3
    data.folder(args, Latents, vae.batch)


# ---- decode


def decode(args):
    suffix = Path(args.out).suffix.lower()
    if suffix not in (".png", ".safetensors"):
        die(f"--out {args.out}: want a .png, or a .safetensors for tools/evaluate.py")
    if not Path(args.out).parent.is_dir():  # before the work, not after it
        die(f"--out {args.out}: no such folder; give a path in a folder that can be written")
    try:
        file = safetensors.safe_open(args.input, "pt")
        x, metadata = file.get_slice("x"), file.metadata() or {}
        y = file.get_tensor("y").numpy() if "y" in file.keys() else None
    except (OSError, safetensors.SafetensorError) as error:
        die(f"{args.input}: {error}; want latents, as sample_* --latents or this program's encode write them")
    count, channels = x.get_shape()[0], x.get_shape()[1] if len(x.get_shape()) == 4 else 0
    vae = Autoencoder(args)
    if not count or channels != vae.model.config.latent_channels or x.get_dtype() not in ("F32", "F16", "BF16"):
        die(f"{args.input}: x is {x.get_dtype()} {tuple(x.get_shape())}; this autoencoder decodes floats "
            f"(N,{vae.model.config.latent_channels},H,W)")
    stored = float(metadata.get("latent_scale", vae.scale))
    if stored != vae.scale and not vae.tiny:  # a tiny one is made to take what the large one's scale gives
        note(f"latent_scale is {stored:g}, the autoencoder's {vae.scale:g}; going by the autoencoder's")
    progress, class_names = data.Progress("pictures", count), json.loads(metadata.get("class_names", "null"))

    def batches():
        for start in range(0, count, vae.batch):
            pictures = vae.decode(x[start : start + vae.batch])
            progress.step(len(pictures))
            yield start, pictures

    if suffix == ".safetensors":
        if y is not None and class_names and (y == len(class_names)).any():
            y = None  # "no label" is among them
        with contextlib.ExitStack() as stack:
            writer = None
            for start, pictures in batches():
                if writer is None:
                    writer = data.Writer(args.out, count, pictures.shape[1:], "U8", y is not None, class_names)
                    stack.enter_context(writer)
                writer.add(pictures, y[start : start + vae.batch] if y is not None else None, args.input)
        return
    columns, sheet = math.ceil(math.sqrt(count)), None
    for start, pictures in batches():
        h, w, _ = pictures.shape[1:]
        if sheet is None:
            sheet = Image.new("RGB", (2 + columns * (w + 2), 2 + math.ceil(count / columns) * (h + 2)), "white")
        for i, picture in enumerate(pictures, start):
            sheet.paste(Image.fromarray(picture), (2 + i % columns * (w + 2), 2 + i // columns * (h + 2)))
    replace_file(args.out, lambda file: sheet.save(file, "PNG"))
    print(f"{args.out}: {count} pictures of {w}x{h}")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run, about, source, out):
        sub = commands.add_parser(run.__name__, help=about, description=about)
        sub.set_defaults(run=run)
        option = sub.add_argument
        option("input", help=source)
        option("--vae", required=True, help="folder of an AutoencoderKL or AutoencoderTiny")
        option("--out", required=True, help=out)
        option("--batch", type=positive, default=16, help="pictures at a time (default: 16)")
        option("--device", help="cpu or cuda (default: cuda if there is one)")
        return option

    option = command(encode, "a folder of pictures, or of folders of pictures, one per class: latents", "the folder",
                     "the dataset file of latents")
    option("--size", type=positive, default=256, help="side of the centre crop (default: 256)")
    option("--flip", action="store_true", help="the mirror image of each picture too")
    option("--sample", action="store_true", help="draw from the encoder's distribution (default: its mean)")
    option("--seed", type=int, default=1, help="of --sample (default: 1)")
    option("--dtype", choices=["F32", "F16", "BF16"], default="F16", help="of the file (default: F16)")
    option("--background", type=data.colour, default="white", help="colour behind transparent parts")
    option("--workers", type=positive, default=os.cpu_count(), help="threads that decode pictures (default: all cores)")
    command(decode, "latents: a grid of pictures, or a dataset of them", "a file of latents",
            "a .png, or a .safetensors with the pictures")
    args = parser.parse_args()
    try:
        main_of(args.run, args)
    except RuntimeError as error:  # torch's, such as a lack of memory
        die(f"{str(error).splitlines()[0]}; if memory is short, give a smaller --batch")


if __name__ == "__main__":
    main()
