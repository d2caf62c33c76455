#!/usr/bin/env python3
"""Turns other people's diffusion transformers into weights of fpdm.c, and back.

    python3 tools/convert.py DiT-XL-2-256x256.pt --out dit.safetensors
    python3 tools/convert.py SiT-XL-2-256x256.pt --from sit --out sit.safetensors
    python3 tools/convert.py checkpoints/0400000.pt --out fpdm.safetensors      # of the fixed-point paper's training
    python3 tools/convert.py DiT-XL-2-256 --out dit.safetensors                 # a folder of diffusers
    python3 tools/convert.py dit.safetensors --to diffusers --out folder        # also: dit, sit, fpdm, into a .pt

The layout is recognised by the tensors' names; those of SiT are DiT's, so --from sit says it, where the training
arguments in the file do not. A .pt may hold the tensors under `ema` or `model`, as training scripts write them.

Numbers are moved, never computed: what comes back has the same bits. What the layouts mean differently is metadata:
DiT's network sees the timestep t, SiT's 1 - t/1000 (its time runs from noise at 0 to data at 1, so that its velocity,
data - noise, is the target of our flow), and diffusers divides the index of its frequencies by 127 where DiT has 128:
`time_embedding`. What cannot be kept is said, with the number that differs. SiT's files may have variance channels,
which SiT never uses; they are zero in what it trained, and are left out and put back.

.pt and .bin need torch and are opened with weights_only: nothing in them is executed. Needs numpy and pillow.
"""
import argparse
import contextlib
import inspect
import json
import math
import re
import struct
import sys
import zipfile
from pathlib import Path

try:
    import numpy as np
except ImportError as error:
    sys.exit(f"convert.py: needs the Python package {error.name}: pip install -r tools/requirements.txt")

from data import Parser, die, main_of, positive, replace_file  # of this folder

STORED_AS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
SIZES = {384: ("S", 12, 6), 768: ("B", 12, 12), 1024: ("L", 24, 16), 1152: ("XL", 28, 16)}  # by width: layers, heads
NAMES = {"dit": "DiT", "sit": "SiT", "fpdm": "the fixed-point paper's", "diffusers": "diffusers"}


def note(message):
    print(f"note: {message}")


class Tensor:
    """Parts of one dtype that make a tensor when they are joined along the first axis; mapped, not read."""

    def __init__(self, dtype, *parts):
        self.dtype, self.parts = dtype, [np.atleast_1d(part) for part in parts]
        self.shape = (sum(map(len, self.parts)), *self.parts[0].shape[1:])

    def array(self):
        return self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts)

    def floats(self):
        array = self.array()
        return (array.astype("<u4") << 16).view("<f4") if self.dtype == "BF16" else array.astype("<f4")


# ---- files


def read_safetensors(path):
    """Tensors by name, mapped, and the metadata."""
    try:
        raw = np.memmap(path, np.uint8, "c")
        start = 8 + int(raw[:8].view("<u8")[0])
        header = json.loads(bytes(raw[8:start]))
        metadata = header.pop("__metadata__", {})
        places = {name: (t["dtype"], tuple(t["shape"]), *t["data_offsets"]) for name, t in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        die(f"{path}: {error!r}; this is not a safetensors file")
    tensors = {}
    for name, (dtype, shape, begin, end) in places.items():
        if dtype not in STORED_AS:
            die(f"{path}: tensor {name} is {dtype}; want F32, F16 or BF16")
        size = math.prod(shape) * STORED_AS[dtype].itemsize
        if not 0 <= begin <= end <= len(raw) - start or end - begin != size:
            die(f"{path}: tensor {name} of {size} bytes at {begin}..{end} of {len(raw) - start}; the file is damaged")
        tensors[name] = Tensor(dtype, raw[start + begin : start + end].view(STORED_AS[dtype]).reshape(shape))
    return tensors, metadata


def import_torch():
    try:
        import torch
    except ImportError:
        die("needs the Python package torch for .pt and .bin: pip install -r tools/requirements.txt")
    return torch


def read_torch(path):
    """What torch.save wrote: tensors stay on the disk where torch can map them (2.1 and newer)."""
    torch = import_torch()
    options = {"map_location": "cpu", "weights_only": True}
    if "mmap" in inspect.signature(torch.load).parameters and zipfile.is_zipfile(path):
        options["mmap"] = True
    allow = getattr(torch.serialization, "safe_globals", lambda _: contextlib.nullcontext())
    try:
        with allow([argparse.Namespace]):  # training arguments: names and plain values
            return torch.load(str(path), **options)  # which 2.1 and 2.2 want for mmap
    except Exception as error:  # a broken file raises whatever its decoder ran into
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        if "argparse.Namespace" in str(error):
            why = f"torch {torch.__version__} cannot open the training arguments in it safely; 2.5 or newer can"
        die(f"{path}: {why[:300]}; want tensors that torch.save wrote")


def tensor_of_torch(value, name, path):
    torch = import_torch()
    dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}.get(getattr(value, "dtype", None))
    if dtype is None:
        die(f"{path}: {name} is {getattr(value, 'dtype', type(value).__name__)}; want a float32, float16 or bfloat16"
            + (f", or --key {name}, if the tensors stand in there" if isinstance(value, dict) else ""))
    value = value.detach().contiguous()
    array = value.view(torch.int16).numpy().view(STORED_AS[dtype]) if dtype == "BF16" else value.numpy()
    return Tensor(dtype, array)


def read_checkpoint(path, key):
    """Tensors by name, and the training's arguments, of a .pt."""
    content, arguments = read_torch(path), {}
    if not isinstance(content, dict):
        die(f"{path}: holds a {type(content).__name__}; want tensors by name")
    if isinstance(content.get("args"), (dict, argparse.Namespace)):
        arguments = content["args"] if isinstance(content["args"], dict) else vars(content["args"])
    for inner in [key] if key else ["ema", "model"]:
        if isinstance(content.get(inner), dict):
            content = content[inner]
            note(f"the tensors under '{inner}'")
            break
    else:
        if key:
            die(f"{path}: holds no '{key}'")
    plain = {re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): value for name, value in content.items()}
    return {name: tensor_of_torch(value, name, path) for name, value in plain.items()}, arguments


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        die(f"{path}: {error}; want a folder that diffusers wrote")


def write_safetensors(path, tensors, metadata):
    header, end = {"__metadata__": metadata}, 0
    for name, t in tensors.items():
        begin, end = end, end + math.prod(t.shape) * STORED_AS[t.dtype].itemsize
        header[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust((len(text) + 7) // 8 * 8)

    def write(file):
        file.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            for part in t.parts:
                file.write(np.ascontiguousarray(part).reshape(-1))

    replace_file(path, write)


class KeepsError:
    """A file for torch.save, which aborts the process when a write fails: the first error waits in `error`."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, part):
        try:
            if not self.error:
                self.file.write(part)
        except OSError as error:
            self.error = error
        return len(part)

    def flush(self):
        pass


def write_torch(path, content):
    """content: tensors by name, or dicts of such."""
    torch = import_torch()

    def convert(value):
        if isinstance(value, dict):
            return {name: convert(inner) for name, inner in value.items()}
        if not isinstance(value, Tensor):
            return value
        array = value.array()
        half = value.dtype == "BF16"
        return torch.from_numpy(array.view("<i2")).view(torch.bfloat16) if half else torch.from_numpy(array)

    def write(file):
        keeper = KeepsError(file)
        torch.save(convert(content), keeper)
        if keeper.error:
            raise keeper.error

    replace_file(path, write)


# ---- the model, and where the other layouts have its tensors


def parameters(c):
    """Name and shape of every tensor of a weight file (SPEC 4)."""
    D, p, channels = c["width"], c["patch"], c["channels"]
    found = [("x_embedder.proj.weight", (D, channels, p, p)), ("x_embedder.proj.bias", (D,))]

    def linear(name, n, k):
        found.extend([(f"{name}.weight", (n, k)), (f"{name}.bias", (n,))])

    def block(name):
        for inside, n, k in (("attn.qkv", 3 * D, D), ("attn.proj", D, D), ("mlp.fc1", 4 * D, D), ("mlp.fc2", D, 4 * D),
                             ("adaLN_modulation.1", 6 * D, D)):
            linear(f"{name}.{inside}", n, k)

    linear("t_embedder.mlp.0", D, 256)
    linear("t_embedder.mlp.2", D, D)
    found.append(("y_embedder.embedding_table.weight", (c["classes"] + 1, D)))
    if c["fixed_point"]:
        for i in range(c["pre_depth"]):
            block(f"blocks_pre.{i}")
        linear("block_pre_projection", D, D)
        linear("block_fixed_point_projection_fc1", 2 * D, 2 * D)
        linear("block_fixed_point_projection_fc2", D, 2 * D)
        block("block_fixed_point")
        for i in range(c["post_depth"]):
            block(f"blocks_post.{i}")
    else:
        for i in range(c["depth"]):
            block(f"blocks.{i}")
    linear("final_layer.linear", p * p * channels * (1 + c["learn_sigma"]), D)
    linear("final_layer.adaLN_modulation.1", 2 * D, D)
    return found


OF_DIFFUSERS = {"x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out_2",
                "final_layer.adaLN_modulation.1": "proj_out_1"}
IN_EVERY_BLOCK = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2",
                  "y_embedder.embedding_table": "class_embedder.embedding_table"}
IN_ITS_BLOCK = {"attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"], "attn.proj": ["attn1.to_out.0"],
                "mlp.fc1": ["ff.net.0.proj"], "mlp.fc2": ["ff.net.2"], "adaLN_modulation.1": ["norm1.linear"]}


def names_in(layout, name, depth):
    """Where a layout has our tensor: lists of names, each of which, joined, is the whole tensor."""
    if layout != "diffusers":
        return [[name]]
    layer, kind = name.rsplit(".", 1)
    if layer in OF_DIFFUSERS:
        return [[f"{OF_DIFFUSERS[layer]}.{kind}"]]
    if layer in IN_EVERY_BLOCK:
        return [[f"transformer_blocks.{i}.norm1.emb.{IN_EVERY_BLOCK[layer]}.{kind}"] for i in range(depth)]
    _, block, inside = layer.split(".", 2)
    return [[f"transformer_blocks.{block}.{part}.{kind}" for part in IN_ITS_BLOCK[inside]]]


def position_embedding(c):
    """(1,T,D) as DiT's files have it: sine and cosine of the column, then of the row."""
    D, grid = c["width"], c["image_size"] // c["patch"]
    w = 1 / 10000 ** (np.arange(D // 4, dtype=np.float64) / (D / 4))
    row, column = (p.reshape(-1, 1) * w for p in np.meshgrid(*2 * [np.arange(grid, dtype=np.float32)], indexing="ij"))
    return np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], 1)[None].astype("<f4")


def time_embedding(c, tensors, divisor):
    """The embedding of every timestep (1000,D), with the frequencies 10000^(-i/divisor)."""
    angle = np.arange(1000)[:, None] * 10000.0 ** (-np.arange(128) / divisor)
    value = np.concatenate([np.cos(angle), np.sin(angle)], 1)
    for i in (0, 2):
        weight, bias = (tensors[f"t_embedder.mlp.{i}.{kind}"].floats() for kind in ("weight", "bias"))
        value = value @ weight.T.astype(np.float64) + bias
        if i == 0:
            value = value / (1 + np.exp(-value))
    return value


# ---- in


def recognise(tensors, path):
    """diffusers, fpdm or dit, by the names."""
    for layout, sign in (("diffusers", "transformer_blocks.0."), ("fpdm", "block_fixed_point."), ("dit", "blocks.0.")):
        if any(name.startswith(sign) for name in tensors):
            return layout
    first = next(iter(tensors), "nothing")
    die(f"{path}: {first} is in no layout of a diffusion transformer that this program knows")


def shape_of(tensors, name, dims, path):
    """The shape of a tensor that says how large the model is."""
    if name not in tensors:
        die(f"{path}: tensor {name} is missing")
    if len(tensors[name].shape) != dims or 0 in tensors[name].shape:
        die(f"{path}: tensor {name} has the shape {tensors[name].shape}; want {dims} dimensions")
    return tensors[name].shape


def count_blocks(tensors, prefix):
    """Blocks PREFIX.0, PREFIX.1, ...: one more than the largest number, so that a hole shows as a missing tensor."""
    found = [re.match(rf"{prefix}\.(\d+)\.", name) for name in tensors]
    return max((int(match[1]) for match in found if match), default=-1) + 1


def sizes_from_tensors(tensors, layout, path):
    there = lambda name: names_in(layout, name, 1)[0][0]
    width, channels, patch, _ = shape_of(tensors, there("x_embedder.proj.weight"), 4, path)
    rows, _ = shape_of(tensors, there("y_embedder.embedding_table.weight"), 2, path)
    name = there("final_layer.linear.weight")
    outputs = shape_of(tensors, name, 2, path)[0] / (patch**2 * channels)
    if outputs not in (1, 2):
        die(f"{path}: tensor {name} has {outputs:g} outputs for each of {channels} channels; want 1 or 2")
    letter, layers, heads = SIZES.get(width, ("", 12, 0))
    c = {"channels": channels, "patch": patch, "width": width, "heads": heads, "mlp_ratio": 4, "classes": rows - 1,
         "learn_sigma": int(outputs) - 1, "fixed_point": int(layout == "fpdm"), "depth": layers, "pre_depth": 0,
         "post_depth": 0, "timestep_in_pre_post": 0, "prediction": "eps", "zero_terminal_snr": 0, "v_weight": "p2",
         "diffusion_steps": 1000, "time_embedding": "diffusers" if layout == "diffusers" else "dit"}
    if layout == "fpdm":
        c.update(pre_depth=count_blocks(tensors, "blocks_pre"), post_depth=count_blocks(tensors, "blocks_post"))
    else:
        c["depth"] = count_blocks(tensors, "transformer_blocks" if layout == "diffusers" else "blocks")
    return c


def apply_arguments(c, arguments, layout, path):
    """What training scripts keep beside the tensors: DiT's, SiT's and the fixed-point paper's."""
    if "path_type" in arguments:
        if (arguments["path_type"], arguments.get("prediction")) != ("Linear", "velocity"):
            die(f"{path}: path_type {arguments['path_type']}, prediction {arguments.get('prediction')}; our flow is "
                "Linear, velocity")
        layout = "sit"
    if "flow" in arguments:  # the fixed-point paper's
        c["prediction"] = "flow" if arguments["flow"] else "v" if arguments.get("predict_v") else "eps"
        c["zero_terminal_snr"] = int(arguments.get("use_zero_terminal_snr", False))
        c["timestep_in_pre_post"] = int(arguments.get("fixed_point_pre_post_timestep_conditioning", False))
    size = re.match(r"[DS]iT-(\w+)/", str(arguments.get("model", "")))
    if size and layout == "fpdm":  # in the others it is the number of blocks
        c["depth"] = next((layers for letter, layers, _ in SIZES.values() if letter == size[1]), c["depth"])
    if isinstance(arguments.get("image_size"), int):
        c["image_size"] = arguments["image_size"] // 8  # of the autoencoder's latents
    return layout


def apply_config(c, folder, config):
    """config.json of diffusers' transformer, and what stands beside it in a pipeline's folder."""
    path = folder / "config.json"
    for key, want in {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True,
                      "norm_elementwise_affine": False}.items():
        if config.get(key, want) != want:
            die(f"{path}: {key} is {config[key]}; want {want}, or it is another network")
    c["heads"] = config.get("num_attention_heads", 16)
    c["image_size"] = config.get("sample_size", 32)
    eps = config.get("norm_eps", 1e-5)
    if eps != 1e-6:
        note(f"norm3 of diffusers adds {eps:g} to the variance, ours 1e-06: where the variance of a token is v, the "
             f"input of its MLP differs by {(eps - 1e-6) / 2:.2g}/v of itself")
    note("diffusers divides the index of the frequencies by 127, DiT by 128: kept as time_embedding diffusers; for "
         "weights that DiT's own code trained, --time_embedding dit is what they saw then")
    if c["channels"] > 3:
        note(f"diffusers guides all {c['channels']} channels, DiT and sample_* three: --cfg_channels {c['channels']}")
    scheduler, index = folder.parent / "scheduler" / "scheduler_config.json", folder.parent / "model_index.json"
    if scheduler.exists():
        s = read_json(scheduler)
        for key, want in {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02,
                          "num_train_timesteps": 1000}.items():
            if s.get(key, want) != want:
                die(f"{scheduler}: {key} is {s[key]}; want {want}: our schedule is the one that DiT was trained with")
        kinds = {"epsilon": "eps", "v_prediction": "v"}
        if s.get("prediction_type", "epsilon") not in kinds:
            die(f"{scheduler}: prediction_type is {s['prediction_type']}; want epsilon or v_prediction")
        c["prediction"] = kinds[s.get("prediction_type", "epsilon")]
        c["zero_terminal_snr"] = int(s.get("rescale_betas_zero_snr", False))
    labels = read_json(index).get("id2label", {}) if index.exists() else {}
    if len(labels) == c["classes"] and all(str(i) in labels for i in range(len(labels))):
        names = [str(labels[str(i)]).split(",")[0] for i in range(len(labels))]
        c["class_names"] = json.dumps(names, ensure_ascii=False)


def check_positions(c, tensors, path):
    """Learned or scaled positions cannot be kept: ours are fixed."""
    for name in ("pos_embed", "pos_embed.pos_embed"):
        found = tensors.pop(name, None)
        if found is None:
            continue
        tokens = found.shape[1] if len(found.shape) == 3 else 0
        c.setdefault("image_size", math.isqrt(tokens) * c["patch"])
        want = position_embedding(c)
        if found.shape != want.shape:
            die(f"{path}: tensor {name} has the shape {found.shape}; image_size {c['image_size']} wants {want.shape}")
        worst = np.abs(found.floats() - want).max()
        if not worst < (1e-5 if found.dtype == "F32" else 1e-2):
            die(f"{path}: tensor {name} differs by {worst:.3g} from the fixed sines and cosines, which are all that a "
                "weight file can have")


def our_tensors(c, tensors, layout, path):
    """The tensors under our names; dies at the first that is missing, of another shape, or left over."""
    ours = {}
    for name, shape in parameters(c):
        groups, first = names_in(layout, name, c["depth"]), None
        for group in groups:
            part_shape = (shape[0] // len(group), *shape[1:])
            for there in group:
                if there not in tensors:
                    die(f"{path}: tensor {there} is missing")
                if tensors[there].shape != part_shape:
                    die(f"{path}: tensor {there} has the shape {tensors[there].shape}; the others ask for {part_shape}")
            parts = [tensors.pop(there) for there in group]
            if len({part.dtype for part in parts}) > 1:
                die(f"{path}: tensor {group[0]} and the {len(group) - 1} that belong to it are of different dtypes")
            joined = Tensor(parts[0].dtype, *(array for part in parts for array in part.parts))
            if first is None:
                first = joined
            elif first.dtype != joined.dtype or first.array().tobytes() != joined.array().tobytes():
                die(f"{path}: tensor {group[0]} is not {groups[0][0]}, of which diffusers keeps a copy in every block")
        ours[name] = first
    for name in tensors:
        die(f"{path}: tensor {name} is none of a {NAMES[layout]} of {c['depth']} blocks, width {c['width']}")
    return ours


def drop_variance(c, tensors):
    """SiT's network has variance channels only because DiT's has: its forward pass throws them away."""
    C, out = c["channels"], c["patch"] ** 2
    for kind in ("weight", "bias"):
        name = f"final_layer.linear.{kind}"
        rows = tensors[name].array().reshape(out, 2, C, -1)
        dropped = np.abs(Tensor(tensors[name].dtype, rows[:, 1]).floats()).max()
        if dropped:
            note(f"the variance channels, which SiT never uses, are left out; {name} is up to {dropped:.3g} there, so "
                 "--to sit, which puts back zeros, will not give the same bits")
        kept = rows[:, 0].reshape(out * C, *tensors[name].shape[1:])
        tensors[name] = Tensor(tensors[name].dtype, np.ascontiguousarray(kept))
    c["learn_sigma"] = 0


def load_source(args):
    """Tensors by name, arguments of the training, and for diffusers the folder of the network and its config."""
    path = Path(args.source)
    if not path.exists():
        die(f"{path}: no such file or folder")
    if not path.is_dir():
        if path.suffix == ".safetensors":
            tensors, metadata = read_safetensors(path)
            if "fixed_point" in metadata:
                die(f"{path}: is a weight file of fpdm.c; say what it shall become: --to {'|'.join(NAMES)}")
            return tensors, {}, None, None
        return (*read_checkpoint(path, args.key), None, None)
    folder = path / "transformer" if (path / "transformer" / "config.json").exists() else path
    config = read_json(folder / "config.json")
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        die(f"{folder}: no .safetensors and no .bin inside; want a folder that diffusers wrote")
    tensors = {}
    for file in files:
        tensors.update(read_safetensors(file)[0] if file.suffix == ".safetensors" else read_checkpoint(file, None)[0])
    return tensors, {}, folder, config


def convert_in(args):
    tensors, arguments, folder, config = load_source(args)
    layout = recognise(tensors, args.source)
    if (folder is None) == (layout == "diffusers"):
        die(f"{args.source}: tensors of {NAMES[layout]}; only diffusers' come as a folder, with config.json")
    c = sizes_from_tensors(tensors, layout, args.source)
    read_as = layout
    if folder:
        apply_config(c, folder, config)
    else:
        read_as = apply_arguments(c, arguments, layout, args.source)
    if args.layout:
        if (args.layout == "sit" and layout != "dit") or (args.layout != "sit" and args.layout != layout):
            die(f"--from {args.layout}: the tensors in {args.source} are named as {NAMES[layout]} names them")
        read_as = args.layout
    if args.image_size:
        c["image_size"] = args.image_size
    if c.get("image_size", 0) % c["patch"]:
        die(f"{args.source}: an input of side {c['image_size']} is not whole patches of side {c['patch']}; give "
            "another --image_size")
    check_positions(c, tensors, args.source)
    if "image_size" not in c:
        die(f"{args.source}: does not say how large its input is; give --image_size (32 for 256x256 pictures)")
    if read_as == "sit":
        c.update(prediction="flow", time_embedding="sit")
    for key in ("heads", "prediction", "time_embedding", "timestep_in_pre_post", "zero_terminal_snr"):
        if getattr(args, key) is not None:
            c[key] = getattr(args, key)
    if not c["heads"]:
        die(f"{args.source}: the number of heads of width {c['width']} is in no tensor; give --heads")
    if c["width"] % c["heads"]:
        die(f"{args.source}: width {c['width']} is not a multiple of heads {c['heads']}; give --heads")
    ours = our_tensors(c, tensors, layout, args.source)
    if read_as == "sit" and c["learn_sigma"]:
        drop_variance(c, ours)
    if c["prediction"] in ("flow", "x") and c["learn_sigma"]:
        die(f"{args.source}: variance channels beside prediction {c['prediction']}; it is no SiT (--from sit) and "
            "nothing that we can sample")
    if c["prediction"] == "x" and c["zero_terminal_snr"]:
        die(f"{args.source}: zero_terminal_snr 1 beside prediction x; nothing that we can sample")
    scale = args.latent_scale if args.latent_scale is not None else 0.18215 if c["channels"] == 4 else 0
    if scale:
        c["latent_scale"] = repr(scale)
    write_safetensors(args.out, ours, {key: str(value) for key, value in c.items()})
    count = sum(math.prod(t.shape) for t in ours.values())
    blocks = f"{c['pre_depth']} + 1 + {c['post_depth']}" if c["fixed_point"] else c["depth"]
    print(f"{args.out}: read as {NAMES[read_as]}; {blocks} blocks, width {c['width']}, {c['heads']} heads, patch "
          f"{c['patch']}, {c['channels']}x{c['image_size']}x{c['image_size']}, {c['classes']} classes, prediction "
          f"{c['prediction']}, {count / 1e6:.1f} million parameters")


# ---- out


def config_from_metadata(metadata, path):
    try:
        c = {key: int(metadata[key]) for key in ("image_size", "channels", "patch", "width", "heads", "classes",
                                                 "learn_sigma", "fixed_point", "depth", "pre_depth", "post_depth",
                                                 "timestep_in_pre_post", "zero_terminal_snr")}
    except (KeyError, ValueError) as error:
        die(f"{path}: metadata {error}; --to wants a weight file of fpdm.c")
    if c["fixed_point"] and metadata.get("skip", "0") != "0":
        die(f"{path}: has a skip connection around the fixed point, which the published code has not; train with "
            "--skip 0")
    return {**c, "prediction": metadata.get("prediction"), "time_embedding": metadata.get("time_embedding", "dit")}


def put_variance_back(c, tensors):
    C, out = c["channels"], c["patch"] ** 2
    for kind in ("weight", "bias"):
        t = tensors[f"final_layer.linear.{kind}"]
        rows = t.array().reshape(out, 1, C, -1)
        rows = np.concatenate([rows, np.zeros_like(rows)], 1).reshape(2 * out * C, *t.shape[1:])
        tensors[f"final_layer.linear.{kind}"] = Tensor(t.dtype, rows)


def check_target(c, tensors, to, path):
    """Dies where the layout cannot hold the model, and says what it leaves out."""
    if c["fixed_point"] != (to == "fpdm"):
        kind = "a fixed-point model: --to fpdm" if c["fixed_point"] else "a plain DiT: --to dit, sit or diffusers"
        die(f"{path}: is {kind}")
    if to == "fpdm" and c["prediction"] == "x":
        die(f"{path}: prediction x, which the published code has not; it knows eps, v and flow")
    seen = {"sit": "sit", "diffusers": "diffusers"}.get(to, "dit")
    if to == "diffusers" and c["time_embedding"] == "dit":
        have, get = (time_embedding(c, tensors, divisor) for divisor in (128, 127))
        worst = (np.linalg.norm(get - have, axis=1) / np.linalg.norm(have, axis=1)).max()
        note("diffusers divides the index of the frequencies by 127, this model's by 128: the smallest is 1.000e-04 "
             f"there and 1.075e-04 here, and the embedding of a timestep differs there by up to {100 * worst:.3g} %")
    elif c["time_embedding"] != seen:
        die(f"{path}: time_embedding {c['time_embedding']}: its network sees another time than that of the layout {to}")
    if to == "sit" and c["prediction"] != "flow":
        die(f"{path}: prediction {c['prediction']}; SiT's is our flow")
    if to in ("dit", "diffusers") and (c["prediction"] != "eps" or c["zero_terminal_snr"]):
        note(f"the layout {to} does not say prediction {c['prediction']}, zero_terminal_snr {c['zero_terminal_snr']}: "
             "remember it for sampling")


def convert_out(args):
    tensors, metadata = read_safetensors(args.source)
    c = config_from_metadata(metadata, args.source)
    ours = our_tensors(c, tensors, "fpdm" if c["fixed_point"] else "dit", args.source)
    check_target(c, ours, args.to, args.source)
    if args.to == "sit" and args.learn_sigma:
        put_variance_back(c, ours)
    if args.to != "diffusers":
        state = {"pos_embed": Tensor("F32", position_embedding(c)), **ours}
        same_width_first = sorted(SIZES.items(), key=lambda size: size[0] != c["width"])
        letter = next((letter for _, (letter, layers, _) in same_width_first if layers == c["depth"]), "XL")
        arguments = {"model": f"DiT-{letter}/{c['patch']}", "num_classes": c["classes"],
                     "image_size": 8 * c["image_size"], "flow": c["prediction"] == "flow",
                     "predict_v": c["prediction"] == "v",
                     "use_zero_terminal_snr": bool(c["zero_terminal_snr"]), "fixed_point": True,
                     "fixed_point_pre_depth": c["pre_depth"], "fixed_point_post_depth": c["post_depth"],
                     "fixed_point_pre_post_timestep_conditioning": bool(c["timestep_in_pre_post"])}
        write_torch(args.out, {"ema": state, "args": arguments} if args.to == "fpdm" else state)
        print(f"{args.out}: {NAMES[args.to]} layout, {len(state)} tensors")
        return
    there = {}
    for name, t in ours.items():
        for group in names_in("diffusers", name, c["depth"]):
            array, rows = t.array(), t.shape[0] // len(group)
            there.update({n: Tensor(t.dtype, array[i * rows : (i + 1) * rows]) for i, n in enumerate(group)})
    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        die(f"--out {folder}: is a file; diffusers' layout is a folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", there, {"format": "pt"})
    config = {"_class_name": "DiTTransformer2DModel", "activation_fn": "gelu-approximate", "attention_bias": True,
              "attention_head_dim": c["width"] // c["heads"], "in_channels": c["channels"], "norm_eps": 1e-6,
              "norm_elementwise_affine": False, "norm_type": "ada_norm_zero", "num_attention_heads": c["heads"],
              "num_embeds_ada_norm": c["classes"], "num_layers": c["depth"], "patch_size": c["patch"],
              "out_channels": c["channels"] * (1 + c["learn_sigma"]), "sample_size": c["image_size"]}
    replace_file(folder / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))
    print(f"{folder}: {NAMES[args.to]} layout, {len(there)} tensors")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("source", help="a .pt or .safetensors, or a folder of diffusers (the pipeline's or the transformer's)")
    option("--out", required=True, help="the weight file; with --to a .pt, or diffusers' folder")
    option("--to", choices=NAMES, help="write this layout; the source is then a weight file of fpdm.c")
    option("--from", dest="layout", choices=NAMES, help="what the source is (default: by its tensors and arguments)")
    option("--key", help="which tensors of a training's .pt (default: ema, or else model)")
    option("--image_size", type=positive, help="side of the input: 32 for 256x256 (default: as in the file)")
    option("--heads", type=positive, help="attention heads (default: DiT's of that width)")
    option("--prediction", choices=["eps", "v", "flow", "x"], help="default: as the arguments say, or else eps")
    option("--time_embedding", choices=["dit", "sit", "diffusers"], help="what the sines see (default: the layout's)")
    option("--timestep_in_pre_post", type=int, choices=[0, 1], help="default: as the arguments say, or else 0")
    option("--zero_terminal_snr", type=int, choices=[0, 1], help="default: as the arguments say, or else 0")
    option("--latent_scale", type=float, help="0: pictures, no latents (default: 0.18215 for 4 channels, or else 0)")
    option("--learn_sigma", type=int, choices=[0, 1], default=1, help="--to sit: with its unused channels (default: 1)")
    args = parser.parse_args()
    main_of(convert_out if args.to else convert_in, args)


if __name__ == "__main__":
    main()
