#!/usr/bin/env python3
"""Judges pictures against the dataset that they should look like: Fréchet distance, precision, recall, classes.

    ./sample_cpu --weights weights/cifar10.safetensors --n 2000 --batch 200 --cfg 1 --latents a.safetensors
    python3 tools/evaluate.py cifar10.safetensors a.safetensors              # what sample_* --latents wrote
    python3 tools/evaluate.py cifar10.safetensors a.safetensors b.safetensors folder_of_pngs --json figures.json
    python3 tools/evaluate.py cifar10.safetensors a.safetensors --inception inception-2015-12-05.pt
    python3 tools/evaluate.py cifar10.safetensors a.safetensors --nearest near.png     # is anything learnt by heart?

distance    Fréchet distance between Gaussians fitted to the features of the pictures and of the dataset
precision   share of pictures that lie within the manifold of real ones (k nearest neighbours, arXiv:1904.06991)
recall      share of real pictures that lie within the manifold of the pictures
recognised  share of pictures that the classifier takes for the class that was asked for

`floor` are real pictures that the network was not trained on, as many as the smallest file has (at most a fifth of the
reference), against the other four fifths; `ceiling` is noise. The reference, of `ceiling` and of the pictures, is the
whole dataset, of larger ones 50,000 pictures drawn by the seed. Compare distances only where N, the reference and the
network are the same: a smaller N alone makes them larger.

--nearest draws ten of the first 500 pictures, those nearest to the dataset, above the real picture that is nearest in
pixels (mirrored ones count too) and the one whose features are, and compares their distances with those between real
pictures.

The features are what a small convolutional classifier, trained here on four fifths of the dataset, sees in a picture:
the channels of its last three stages, averaged over all places: 224 numbers, scaled to a total variance of 100 over the
dataset. Without labels it learns by how far pictures were turned, and there is no `recognised`. Where real pictures are
free of noise it sees the least trace of noise: precision near 0 then says that a picture can be told from real ones,
not that it is bad. The network is kept beside the dataset as NAME.features.safetensors (or in ~/.cache/fpdm) until
dataset or seed change; torch's sums depend on the number of threads, so another machine trains another network, with
about the same figures.

--inception takes the standard FID network, and distances are then FIDs: either inception-2015-12-05.pt, the TorchScript
file of StyleGAN2-ADA, or pt_inception-2015-12-05-6726825d.pth, whose code is the package pytorch_fid. Its features of
the dataset are kept as NAME.inception.safetensors.

A folder holds PNGs, or a folder of PNGs for each class. Needs torch (1.13 or newer), safetensors, numpy and pillow.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import sys
import time
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

try:
    import numpy as np
    import safetensors
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from torch import nn
    from torch.nn import functional as F
except ImportError as error:
    sys.exit(f"evaluate.py: needs the Python package {error.name}: pip install -r tools/requirements.txt")

from data import CLASSES, Parser, die, flatten, main_of, note, replace_file  # of this folder

VERSION = "1"  # of everything that the cached network and features depend on: another one, another cache
REFERENCE = 50_000  # of a larger dataset, as many pictures are used
MANIFOLD = 5_000  # pictures on each side of precision and recall
NEIGHBOURS = 3
FEWEST = 10  # pictures that are judged at all
BATCH = 256
TRAINED, EPOCHS = 96_000, 50  # pictures that the network sees in training, and how often each one at most


class Progress:
    """Says every ten seconds how far a long loop is and how long it will still take."""

    def __init__(self, what, total, log):
        self.what, self.total, self.log = what, total, log
        self.start = self.last = time.monotonic()

    def __call__(self, done):
        now = time.monotonic()
        if now - self.last > 10 and done < self.total:
            left = round((now - self.start) * (self.total - done) / done)
            self.log(f"{self.what}: {100 * done // self.total} %, {left // 60} min {left % 60} s left")
            self.last = now


# ---- pictures


def read_file(path):
    """x (N,C,H,W) uint8 or float, y or None, class names or None, whether they are latents. x is mapped, not read."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("x", "y") if name in file.keys()}
            metadata = file.metadata() or {}
        names = json.loads(metadata.get("class_names", "null"))
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("class_names is no list of names")
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        die(f"{path}: {error}; want a dataset of tools/data.py, or what sample_* --latents wrote")
    x, y = tensors.get("x"), tensors.get("y")
    floats = (torch.float32, torch.float16, torch.bfloat16)
    if x is None or x.ndim != 4 or 0 in x.shape or x.dtype not in (torch.uint8, *floats):
        die(f"{path}: want x, U8 (N,H,W,C) or F32, F16, BF16 (N,C,H,W); this is no dataset of tools/data.py")
    if y is not None and (y.dtype != torch.int64 or y.shape != x.shape[:1]):
        die(f"{path}: y is {y.dtype} {tuple(y.shape)}; want int64, a label for each of {len(x)} pictures")
    x = x.permute(0, 3, 1, 2) if x.dtype == torch.uint8 else x
    return x, y, names, x.dtype != torch.uint8 and ("latent_scale" in metadata or x.shape[1] not in (1, 3))


def read_folder(path):
    """The PNGs in a folder, or in a folder per class: x uint8 (N,C,H,W), y or None, class names."""
    shown = "[!.]*.png"
    names = sorted(entry.name for entry in path.glob("[!.]*") if entry.is_dir() and any(entry.glob(shown)))
    files = [(file, label) for label, name in enumerate(names or ["."]) for file in sorted((path / name).glob(shown))]
    if not files:
        die(f"{path}: no .png inside; want a folder of PNGs, or a folder of PNGs for each class")
    taken = {file for file, _ in files}
    others = sorted(file for file in path.rglob("[!.]*") if file not in taken and file.is_file()
                    and not any(part.startswith(".") for part in file.relative_to(path).parts))
    if others:
        note(f"{path}: {len(others)} files are left out, as they are not .png or not where the others are: "
             f"{others[0]}{', ...' if others[1:] else ''}")

    def load(entry):
        try:
            with Image.open(entry[0]) as picture:
                grey, picture = picture.mode[0] in "1LI", flatten(picture, "white")
                return np.atleast_3d(np.asarray(picture.convert("L") if grey else picture))
        except (OSError, ValueError, SyntaxError) as error:  # SyntaxError: what pillow calls a broken PNG
            return f"{entry[0]}: {error}; remove it, or write it again"

    with ThreadPool() as pool:
        pictures = pool.map(load, files)
    for (file, _), picture in zip(files, pictures):
        if isinstance(picture, str):
            die(picture)
        if picture.shape != pictures[0].shape:
            die(f"{file}: {picture.shape} where {files[0][0]} has {pictures[0].shape}; all must have one size")
    y = torch.tensor([label for _, label in files]) if names else None
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), y, names or None


def load_pictures(path):
    """x (N,C,H,W) uint8 or float, y (N) or None, class names or None: of a safetensors file or a folder of PNGs."""
    return read_folder(Path(path)) if Path(path).is_dir() else read_file(path)[:3]


class Dataset:
    """The pictures x (N,C,H,W) of a dataset file, their labels y or None, and what others must be like to compare."""

    def __init__(self, path):
        self.path = path
        self.x, self.y, self.class_names, self.latents = read_file(path)
        self.shape = tuple(self.x.shape[1:])
        if len(self.x) < 50 or self.shape[1] != self.shape[2]:
            die(f"{path}: {len(self.x)} pictures of {self.shape[1:]}; want 50 or more, as high as wide")
        top = len(self.class_names) if self.class_names else CLASSES
        if self.y is not None and not 0 <= self.y.min() <= self.y.max() < top:
            die(f"{path}: labels {self.y.min()}..{self.y.max()}, want 0..{top - 1}; make it again with tools/data.py")
        self.labelled = self.y is not None and bool(self.y.min() < self.y.max())
        self.classes = (len(self.class_names or []) or int(self.y.max()) + 1) if self.labelled else 0

    def check(self, x, y, where):
        """Dies where the pictures cannot be compared with the dataset."""
        if x.ndim != 4 or tuple(x.shape[1:]) != self.shape:
            die(f"{where}: (channels, height, width) {tuple(x.shape[1:])} where {self.path} has {self.shape}; "
                "give pictures of the same size")
        if len(x) < FEWEST:
            die(f"{where}: {len(x)} pictures; want {FEWEST} or more, best thousands")
        if self.labelled and y is not None and not (len(y) == len(x) and 0 <= y.min() <= y.max() < self.classes):
            die(f"{where}: labels {y.min()}..{y.max()} of {len(y)} for {len(x)} pictures of {self.classes} classes")
        if x.is_floating_point() and not torch.isfinite(x).all():
            die(f"{where}: values that are not finite numbers; the model that drew them is broken")

    def labels(self, y, names, where):
        """Labels y that number the classes `names`, as labels that number the dataset's classes."""
        if y is not None and (y == (len(names) if names else self.classes)).any():
            return None  # "no label" is among them
        if not self.labelled or y is None or not names or names == self.class_names:
            return y
        if not self.class_names:  # then a file's numbers are the dataset's, and a folder is called by its number
            if Path(where).is_dir() and not all(name.isdecimal() for name in names):
                die(f"{where}: folders of classes by name where {self.path} has numbers; call them so")
            return torch.tensor([int(name) for name in names])[y] if Path(where).is_dir() else y
        strange = [name for name in names if name not in self.class_names]
        if strange:
            die(f"{where}: class {strange[0]} is none of {self.path}; give pictures of the same classes")
        if not 0 <= y.min() <= y.max() < len(names):
            die(f"{where}: labels {y.min()}..{y.max()} for {len(names)} class names")
        return torch.tensor([self.class_names.index(name) for name in names])[y]

    def prepare(self, x):
        """Pictures as the networks take them: -1..1, in the 256 steps of a PNG; latents as they are."""
        if self.latents:
            return x.float().contiguous()
        x = x.float() if x.dtype == torch.uint8 else (127.5 * x.float() + 128).clamp(0, 255).floor()
        return x.contiguous() / 127.5 - 1

    def noise(self, n, generator):
        """Uniform bytes, or for latents a normal distribution as wide as they are."""
        if not self.latents:
            return torch.randint(256, (n, *self.shape), generator=generator, dtype=torch.uint8)
        some = self.x[:1000].float()
        return some.std() * torch.randn((n, *self.shape), generator=generator) + some.mean()


# ---- the network


class Network(nn.Module):
    """Four convolutions; what it sees in a picture are the last three's channels, averaged over all places."""

    def __init__(self, channels, size, outputs):
        super().__init__()
        stride = max(1, size // 32)  # of the first, so that large pictures cost as much as small ones
        stages = [(channels, 32, stride + 2, stride), (32, 64, 3, 2), (64, 96, 3, 2), (96, 64, 3, 1)]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, width, kernel, s, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            for c, width, kernel, s in stages
        )
        self.head = nn.Linear(sum(width for _, width, _, _ in stages[1:]), outputs)

    def features(self, x):
        means = []
        for stage in self.stages:
            x = stage(x)
            means.append(x.mean((2, 3)))
        return torch.cat(means[1:], 1)

    def forward(self, x):
        return self.head(self.features(x))


def load_inception(path):
    """A function from pictures (n,C,H,W) in -1..1 to the 2048 features of the FID network in the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer torch calls TorchScript deprecated; the file is what it is
            network = torch.jit.load(path, map_location="cpu").eval()
        return lambda x: network((127.5 * x + 128).to(torch.uint8).expand(-1, 3, -1, -1), return_features=True)
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        from pytorch_fid import inception
        inception.load_state_dict_from_url = lambda *args, **kwargs: state  # the file instead of a download
        network = inception.InceptionV3([3]).eval()
    except ImportError:
        die(f"--inception {path}: a file of pytorch_fid, which is not installed; pip install pytorch_fid")
    except Exception:  # torch.load raises whatever the bytes led it to, another network's file what its names are
        die(f"--inception {path}: {reason}; want inception-2015-12-05.pt or pt_inception-2015-12-05-6726825d.pth")
    return lambda x: network(x.expand(-1, 3, -1, -1) / 2 + 0.5)[0].flatten(1)


# ---- the measures


class Gaussian:
    """Mean and covariance of features (N,D), in float64."""

    def __init__(self, features):
        self.n = len(features)
        self.mean = features.double().mean(0)
        centred = features.double() - self.mean
        self.cov = centred.T @ centred / max(1, self.n - 1)

    @functools.cached_property
    def root(self):
        values, vectors = torch.linalg.eigh(self.cov)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet(a, b):
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^1/2), arXiv:1706.08500.

    The last trace is the sum of the square roots of the eigenvalues of the symmetric root_a cov_b root_a.
    """
    values = torch.linalg.eigvalsh(a.root @ b.cov @ a.root)
    distance = ((a.mean - b.mean) ** 2).sum() + a.cov.trace() + b.cov.trace() - 2 * values.clamp(min=0).sqrt().sum()
    return max(0.0, distance.item())  # rounding alone makes it negative


class Manifold:
    """At most MANIFOLD of the features (N,D), each with a ball that reaches to its k-th nearest neighbour."""

    def __init__(self, features):
        drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(1))[:MANIFOLD]
        self.points = features[drawn].double()
        self.radii = torch.cat([d.kthvalue(min(NEIGHBOURS + 1, d.shape[1]), 1)[0] for d in self.distances(self.points)])

    def distances(self, points):
        """Squared distances of points, some at a time, to all of its own; in float64 little is lost by cancellation."""
        for some in points.split(1000):
            yield (some.square().sum(1, True) + self.points.square().sum(1) - 2 * some @ self.points.T).clamp(min=0)

    def share(self, points):
        """The share of the points that lie in at least one ball."""
        return torch.cat([(d <= self.radii).any(1) for d in self.distances(points.double())]).double().mean().item()


class Evaluator:
    """Trains or loads the network for a dataset; then metrics(x, y) judges pictures against it.

    test_accuracy: of the classifier on the pictures held out (on their rotations where there are no labels). ceiling:
    metrics of noise. network: a fingerprint of its weights.
    """

    def __init__(self, dataset_path, seed=1, inception=None, cache=None, log=print):
        self.seed, self.log = seed, log
        self.data = data = Dataset(dataset_path)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(data.x), generator=generator)[:REFERENCE]
        self.chosen, self.held_out, self.rest = chosen, chosen[: len(chosen) // 5], chosen[len(chosen) // 5 :]
        noise = data.noise(min(2000, len(chosen)), generator)
        key = hashlib.sha256(f"{VERSION} {seed} {os.path.getsize(dataset_path)}".encode())
        with open(dataset_path, "rb") as file:  # the header, and blocks all over the file
            for start in range(0, os.path.getsize(dataset_path), max(1 << 16, os.path.getsize(dataset_path) >> 10)):
                file.seek(start)
                key.update(file.read(1 << 16))

        if inception and data.latents:
            die(f"--inception: {dataset_path} holds latents, which that network cannot see; leave it out")
        standard = load_inception(inception) if inception else None  # first, as it may be the wrong file
        cache = Path(cache or Path(dataset_path).parent) / Path(dataset_path).stem
        state = self.cached(f"{cache}.features.safetensors", key.hexdigest(), self.train)
        self.network = hashlib.sha256(b"".join(t.numpy().tobytes() for t in state.values())).hexdigest()[:12]
        self.test_accuracy = state.pop("test_accuracy").item()
        self.net = Network(*data.shape[:2], data.classes or 4).eval()
        self.net.load_state_dict(state)
        self.extract, self.scale = self.net.features, 1.0
        if inception:
            self.extract = standard
            self.network = hashlib.sha256(Path(inception).read_bytes()).hexdigest()[:12]
            key.update(self.network.encode())

        def features():
            return {"real": self.features(self.extract, data.x, chosen, "features of the dataset"),
                    "noise": self.features(self.extract, noise, what="features of noise")}

        known = self.cached(f"{cache}.inception.safetensors", key.hexdigest(), features) if inception else features()
        if not torch.isfinite(known["real"]).all():
            die(f"{dataset_path}: features that are not finite numbers; look for such numbers in the dataset")
        if not inception:  # whose distances are known by their numbers
            self.scale = (100 / known["real"].double().var(0).sum().clamp(min=1e-12)).sqrt().item()
        real = self.scale * known["real"]
        self.sides = real.split([len(self.held_out), len(self.rest)])
        self.real, self.manifold = Gaussian(real), Manifold(real)
        wanted = torch.arange(len(noise)) % max(1, data.classes)
        self.ceiling = self.metrics(noise, wanted, known["noise"])

    def cached(self, path, key, make):
        """The tensors in the file, if it was written for this key; otherwise those of make(), which it then writes."""
        paths = [Path(path), Path.home() / ".cache" / "fpdm" / Path(path).name]
        for candidate in paths:
            try:
                with safetensors.safe_open(candidate, "pt") as file:
                    if (file.metadata() or {}).get("key") == key:
                        return {name: file.get_tensor(name) for name in sorted(file.keys())}
            except (OSError, safetensors.SafetensorError):
                pass  # none yet, or a broken one
        tensors = make()
        for candidate in paths:
            temporary = candidate.with_name(f"{candidate.name}.{os.getpid()}.tmp")
            try:
                candidate.parent.mkdir(parents=True, exist_ok=True)
                save_file(tensors, temporary, {"key": key})
                os.replace(temporary, candidate)
                self.log(f"kept for the next time: {candidate}")
                break
            except (OSError, safetensors.SafetensorError):
                with contextlib.suppress(OSError):
                    temporary.unlink()
        return dict(sorted(tensors.items()))

    def batch(self, index):
        """Pictures of the dataset and what the network is to say: their classes, or by how far they were turned."""
        x = self.data.prepare(self.data.x[index])
        if self.data.labelled:
            return x, self.data.y[index]
        quarters = x.chunk(4)
        turned = torch.cat([torch.rot90(quarter, k, (2, 3)) for k, quarter in enumerate(quarters)])
        return turned, torch.cat([torch.full((len(quarter),), k) for k, quarter in enumerate(quarters)])

    def train(self):
        data, steps, shift = self.data, min(TRAINED, EPOCHS * len(self.rest)) // 128, max(1, self.data.shape[1] // 12)
        what = f"{data.classes} classes" if data.labelled else "rotations, as the dataset has no classes"
        self.log(f"training the network on {len(self.rest)} pictures: {what}")
        progress = Progress("training", steps, self.log)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = Network(*data.shape[:2], data.classes or 4)
            optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
            rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
            for step in range(steps):
                x, y = self.batch(self.rest[torch.randint(len(self.rest), (128,))])
                top, left = torch.randint(2 * shift + 1, (2,)).tolist()
                x = F.pad(x, (shift,) * 4, mode="replicate")[..., top:, left:][..., : data.shape[1], : data.shape[2]]
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
                rate.step()
                progress(step + 1)
        net.eval()
        with torch.no_grad():
            right = [net(x).argmax(1) == y for x, y in map(self.batch, self.held_out.split(BATCH))]
        return {**net.state_dict(), "test_accuracy": torch.cat(right).double().mean()}

    def features(self, extract, x, index=None, what="features"):
        """What extract makes of the pictures (N,C,H,W), or of those in index: (N,D)."""
        index = torch.arange(len(x)) if index is None else index
        progress, out = Progress(what, len(index), self.log), []
        with torch.no_grad():
            for some in index.split(BATCH):
                out.append(extract(self.data.prepare(x[some])).float())
                progress(BATCH * len(out))
        return torch.cat(out)

    def nearest(self, x, path):
        """Draws ten pictures of x above those of the dataset that are nearest in pixels, and by features, into a PNG.
        Returns (of x, of real pictures), the median distance in pixels, root mean square of 0..255, to the nearest."""
        def pool(index):
            return self.data.prepare(self.data.x[self.chosen[index]])

        some, own = self.data.prepare(x[:500]), torch.arange(0, len(self.chosen), max(1, len(self.chosen) // 500))
        asked = torch.cat([some, pool(own)])
        both = torch.stack([asked, asked.flip(3)]).flatten(2)
        squares = both.square().sum(2, True)
        far, which = torch.full((len(asked),), math.inf), torch.zeros(len(asked), dtype=torch.long)
        for part in torch.arange(len(self.chosen)).split(2000):  # of a large dataset not all at a time
            flat = pool(part).flatten(1)
            d = (squares + flat.square().sum(1) - 2 * both @ flat.T).amin(0).clamp(min=0).sqrt()
            themselves = torch.isin(own, part)
            d[len(some) + themselves.nonzero()[:, 0], own[themselves] - part[0]] = math.inf
            nearest = d.min(1)
            which = torch.where(nearest.values < far, part[nearest.indices], which)
            far = torch.minimum(far, nearest.values)
        far, real = far.split([len(some), len(own)])
        show = far.argsort()[:10]
        features = torch.cdist(self.features(self.net.features, x[show]),
                               self.features(self.net.features, self.data.x, self.chosen)).argmin(1)
        rows = torch.stack([some[show], pool(which[show]), pool(features)])  # (3, 10, C, H, W)
        sheet = F.pad(rows, (1, 1, 1, 1), value=1).permute(0, 3, 1, 4, 2)
        sheet = sheet.reshape(3 * sheet.shape[1], -1, sheet.shape[-1]).add(1).mul(127.5).round().byte().numpy()
        picture = Image.fromarray(sheet if sheet.shape[2] == 3 else sheet[..., 0])
        picture = picture.resize((3 * picture.width, 3 * picture.height), Image.Resampling.NEAREST)
        replace_file(path, lambda file: picture.save(file, "PNG"), "--nearest")
        scale = 127.5 / math.sqrt(both.shape[2])
        return far.median().item() * scale, real.median().item() * scale

    def floor(self, n):
        """Metrics of n of the pictures held out, or of all where they are fewer, against the others."""
        held_out, rest = self.sides
        recognised = self.test_accuracy if self.data.labelled else None  # of all
        return {**self.judge(held_out[:n], Gaussian(rest), Manifold(rest)), "recognised": recognised}

    def judge(self, features, real, manifold):
        return {
            "n": len(features),
            "fd": frechet(real, Gaussian(features)),
            "precision": manifold.share(features),
            "recall": Manifold(features).share(manifold.points),
        }

    def metrics(self, x, y=None, features=None):
        """n, fd, precision, recall and recognised (None without labels) of pictures x (N,C,H,W) with labels y (N)."""
        self.data.check(x, y, "pictures")
        own = self.features(self.net.features, x)
        if features is None:
            features = own if self.extract == self.net.features else self.features(self.extract, x)
        if not torch.isfinite(features).all():
            die("pictures: features that are not finite numbers; the model that drew them is broken")
        figures = self.judge(self.scale * features, self.real, self.manifold)
        figures["recognised"] = None
        if self.data.labelled and y is not None:
            with torch.no_grad():
                figures["recognised"] = (self.net.head(own).argmax(1) == y).double().mean().item()
        return figures


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="dataset file: of tools/data.py, or of train_* --export")
    parser.add_argument("pictures", nargs="*", help="files that sample_* --latents wrote, or folders of PNGs")
    parser.add_argument("--inception", help="weights of the standard FID network, to use it instead of our own")
    parser.add_argument("--seed", type=int, default=1, help="of the network, and of what is held out (default: 1)")
    parser.add_argument("--cache", help="folder for the network (default: the one of the dataset)")
    parser.add_argument("--nearest", metavar="PNG", help="draw pictures of the first file above the nearest real ones")
    parser.add_argument("--json", help="also write the figures into this file")
    main_of(evaluate, parser.parse_args())


def evaluate(args):
    data, judged = Dataset(args.dataset), []
    for path in args.pictures:
        x, y, names = load_pictures(path)
        y = data.labels(y, names, path)
        data.check(x, y, path)
        judged.append((path, x, y))
    for option, path in ("--json", args.json), ("--nearest", args.nearest):
        if path and not Path(path).parent.is_dir():
            die(f"{option} {path}: no such folder; give a path in a folder that can be written")
    if args.nearest and (data.latents or not judged):
        die("--nearest: wants pictures, of a dataset of pictures")
    evaluator = Evaluator(args.dataset, args.seed, args.inception, args.cache, lambda line: print(line, flush=True))
    share = "classes" if data.labelled else "rotations"
    print(f"reference: {evaluator.real.n} of {len(data.x)} pictures of {args.dataset}")
    print(f"network: {evaluator.network}, {len(evaluator.real.mean)} features; our own tells {share} of the "
          f"{len(evaluator.held_out)} held-out pictures with an accuracy of {evaluator.test_accuracy:.4f}")

    names = ("n", "fd", "precision", "recall", "recognised")
    print(f"{'N':>7}{'distance':>12}{'precision':>11}{'recall':>9}{'recognised':>12}")
    figures = {"dataset": args.dataset, "seed": args.seed, "network": evaluator.network, "reference": evaluator.real.n,
               "test_accuracy": evaluator.test_accuracy, "pictures": {}}

    def row(name, found):
        n, fd, precision, recall, recognised = (found[key] for key in names)
        share = "-" if recognised is None else f"{recognised:.4f}"
        print(f"{n:7}{fd:12.4f}{precision:11.4f}{recall:9.4f}{share:>12}  {name}", flush=True)

    floor = evaluator.floor(min((len(x) for _, x, _ in judged), default=len(evaluator.held_out)))
    row(f"floor: held out, against the other {len(evaluator.rest)}", floor)
    for path, x, y in judged:
        figures["pictures"][path] = evaluator.metrics(x, y)
        row(path, figures["pictures"][path])
    row("ceiling: noise", evaluator.ceiling)
    figures.update(floor=floor, ceiling=evaluator.ceiling)
    for path, found in figures["pictures"].items():
        if found["n"] <= len(evaluator.real.mean):
            print(f"{path}: fewer pictures than features, so its distance is far too large; draw more")
    if args.json:
        replace_file(args.json, lambda file: file.write((json.dumps(figures, indent=1) + "\n").encode()), "--json")
    if args.nearest:
        ours, real = evaluator.nearest(judged[0][1], args.nearest)
        print(f"nearest real picture, root mean square in 0..255, median: {ours:.1f}; of a real picture {real:.1f}: "
              f"{args.nearest}")


if __name__ == "__main__":
    main()
