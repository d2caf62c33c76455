#!/usr/bin/env python3
"""Tests convert.py and latents.py of tools/ against the classes that other people's files are made for.

    python3 test/test_convert.py           # everything
    python3 test/test_convert.py sit       # the tests with "sit" in their name

Each layout: a model of its class with random weights is saved as its own scripts save it, converted, and written with
what the class computes (in float64 where it can) into a test case of SPEC 5, which ./test_cpu then runs: output, loss
and every gradient, a DDPM and a DDIM run (SiT: flow). Then it is converted back and compared bit for bit. The classes
of diffusers are diffusers' own; those of DiT, SiT and the fixed-point paper, which no package has, are put together
here from timm's parts, as theirs are. Needs the C programs (make), torch, safetensors and pillow; what needs diffusers
or timm is skipped without them.
"""
import argparse
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")  # other people's packages about other people's packages

import numpy as np
import safetensors.torch  # which diffusers wants
import torch
from torch import nn
from torch.nn import functional as F
from PIL import Image

import testing
from testing import TOOLS, Skip, fails, fails_on_full_disk, run
import convert
import reference

ROOT = TOOLS.parent


def needs(package):
    try:
        return __import__(package, fromlist=["x"])
    except ImportError:
        raise Skip(f"needs the Python package {package}: pip install -r tools/requirements.txt")


def program(name, *args):
    """Standard output of one of the C programs, which must succeed."""
    done = subprocess.run([ROOT / name, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, f"{name}: exit {done.returncode}: {(done.stdout + done.stderr).strip()[-800:]}"
    return done.stdout


# ---- the published models, of timm's parts


def published(**sizes):
    """DiT, SiT or, with pre and post, the fixed-point paper's network, with random weights."""
    timm = needs("timm.models.vision_transformer")

    class Block(nn.Module):
        def __init__(self, D, heads):
            super().__init__()
            self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
            self.attn = timm.Attention(D, num_heads=heads, qkv_bias=True)
            self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
            self.mlp = timm.Mlp(D, 4 * D, act_layer=lambda: nn.GELU(approximate="tanh"), drop=0)
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

        def forward(self, x, c):
            m = [v[:, None] for v in self.adaLN_modulation(c).chunk(6, dim=1)]
            x = x + m[2] * self.attn(self.norm1(x) * (1 + m[1]) + m[0])
            return x + m[5] * self.mlp(self.norm2(x) * (1 + m[4]) + m[3])

    class FinalLayer(nn.Module):
        def __init__(self, D, outputs):
            super().__init__()
            self.norm_final = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
            self.linear = nn.Linear(D, outputs)
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    class Embedder(nn.Module):
        pass

    class Network(nn.Module):
        def __init__(self, size=8, patch=2, channels=4, D=32, heads=4, depth=3, classes=10, sigma=True, fpdm=None):
            super().__init__()
            self.patch, self.out, self.fpdm = patch, channels * (2 if sigma else 1), fpdm
            self.x_embedder = timm.PatchEmbed(size, patch, channels, D, bias=True)
            self.t_embedder, self.y_embedder = Embedder(), Embedder()
            self.t_embedder.mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
            self.y_embedder.embedding_table = nn.Embedding(classes + 1, D)
            grid = np.stack(np.meshgrid(np.arange(size // patch), np.arange(size // patch))).reshape(2, -1)
            angles = np.einsum("am,d->amd", grid, 10000 ** (-np.arange(D // 4) / (D // 4)))
            pos = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
            self.pos_embed = nn.Parameter(torch.tensor(pos).float()[None], requires_grad=False)
            blocks = lambda n: nn.ModuleList(Block(D, heads) for _ in range(n))
            if fpdm:
                self.blocks_pre, self.blocks_post = blocks(fpdm[0]), blocks(fpdm[1])
                self.block_fixed_point = Block(D, heads)
                self.block_pre_projection = nn.Linear(D, D)
                self.block_fixed_point_projection_fc1 = nn.Linear(2 * D, 2 * D)
                self.block_fixed_point_projection_fc2 = nn.Linear(2 * D, D)
            else:
                self.blocks = blocks(depth)
            self.final_layer = FinalLayer(D, patch**2 * self.out)

        def forward(self, x, t, y, iterations=(0, 1)):
            f = torch.exp(-np.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
            angle = t[:, None].float() * f
            t = self.t_embedder.mlp(torch.cat([angle.cos(), angle.sin()], 1).to(x.dtype))
            y = self.y_embedder.embedding_table(y)
            x, c = self.x_embedder(x) + self.pos_embed, t + y
            if self.fpdm:
                c_outer = t + y if self.fpdm[2] else y
                for block in self.blocks_pre:
                    x = block(x, c_outer)
                injection, x = self.block_pre_projection(x), x.detach()
                for k in range(sum(iterations)):
                    if k == iterations[0]:
                        x = x.detach()
                    u = self.block_fixed_point_projection_fc1(torch.cat([x, injection], -1))
                    u = self.block_fixed_point_projection_fc2(F.gelu(u, approximate="tanh"))
                    x = self.block_fixed_point(u, c)
                for block in self.blocks_post:
                    x = block(x, c_outer)
                c = c_outer
            else:
                for block in self.blocks:
                    x = block(x, c)
            shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, dim=1)
            x = self.final_layer.norm_final(x) * (1 + scale[:, None]) + shift[:, None]
            x, p, g = self.final_layer.linear(x), self.patch, int(x.shape[1] ** 0.5)
            x = torch.einsum("nhwpqc->nchpwq", x.reshape(len(x), g, g, p, p, self.out))
            return x.reshape(len(x), self.out, g * p, g * p)

    return randomise(Network(**sizes))


def randomise(model):
    """Weights as large as those of a trained model, and nothing zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.normal_(0, 0.1 if p.ndim == 1 else (0.5 if "norm1.linear" in name or "adaLN" in name else 1)
                          * p[0].numel() ** -0.5)
    return model.eval()


# ---- what the class computes as a test case, and what ./test_cpu says of it


def load(path):
    tensors, metadata = convert.read_safetensors(path)
    return {name: t.floats() for name, t in tensors.items()}, metadata


def mapped_gradients(model, cfg, layout):
    """The gradients of the class under our names: parts joined, copies of one tensor added up."""
    there = {name: p.grad for name, p in model.named_parameters()}
    c = dict(vars(cfg))
    return {f"grad.{name}": sum(torch.cat([there[n] for n in group])
                                for group in convert.names_in(layout, name, cfg.depth)).numpy()
            for name, _ in convert.parameters(c)}


def check_case(name, weights, inputs, metadata):
    reference.save_file({**weights, **inputs}, f"{name}.safetensors", {k: str(v) for k, v in metadata.items()})
    command = [ROOT / "test_cpu", "--dtype=fp32", f"{name}.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True)
    wrong = [line.strip() for line in done.stdout.splitlines() if line.endswith("FAIL")]
    assert done.stdout.endswith("\n1 passed, 0 failed\n"), f"{name}: {wrong[:3] or done.stdout[-200:] + done.stderr}"
    errors = re.findall(r"expect\.(?:output|sample) +(\S+)", done.stdout)
    return max(map(float, errors))


def check_against(path, model, layout, call, samplers=("ddpm", "ddim"), iterations=(0, 1), t=(0, 999, 437)):
    """The converted file against the class, whose forward pass is call(network, x, t, y, n, m); the worst error."""
    weights, metadata = load(path)
    cfg = reference.Config.from_metadata(metadata)
    model, rng = copy.deepcopy(model).double(), np.random.default_rng(0)
    network = lambda x, t, y, n=0, m=1, z=None, acts=None: (call(model, x, t, y, n, m), None)
    shape = (len(t), cfg.channels, cfg.image_size, cfg.image_size)
    x0, noise = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    t, y = torch.tensor(t), torch.tensor([0, cfg.classes, 1])
    loss, output = reference.diffusion_loss(cfg, reference.Schedule.training(cfg), network, torch.tensor(x0).double(),
                                            torch.tensor(noise).double(), t, y, *iterations)
    loss.mean().backward()
    expected = {"expect.output": output.detach().numpy(), "expect.loss": loss.detach().numpy(),
                **(mapped_gradients(model, cfg, layout) if layout != "sit" else sit_gradients(model, cfg))}
    inputs = {"x0": x0, "noise": noise, "t": t.numpy(), "y": y.numpy(),
              **{key: value.astype(np.float32) for key, value in expected.items()}}
    worst = check_case("forward", weights, inputs,
                       {**metadata, "case": "forward", "n": iterations[0], "m": iterations[1]})
    for sampler in samplers:
        steps, eta = 5, 0.4 if sampler == "ddim" else 0.0
        z, x_T = rng.standard_normal((steps, *shape)).astype(np.float32), x0
        sample = reference.sample(cfg, network, torch.tensor(x_T).double(), y, torch.tensor(z).double(), sampler, steps,
                                  [sum(iterations)] * steps, eta=eta, cfg_scale=1.5)
        worst = max(worst, check_case(sampler, weights, {
            "x_T": x_T, "y": y.numpy(), "z": z, "expect.sample": sample.numpy().astype(np.float32)
        }, {**metadata, "case": "sample", "sampler": sampler, "steps": steps, "eta": eta, "cfg_scale": 1.5,
            "cfg_channels": 3, "reuse": 0, "iters": sum(iterations)}))
    return worst


def sit_gradients(model, cfg):
    """Those of the file have no variance channels."""
    grads = mapped_gradients(model, cfg, "dit")
    for kind in ("weight", "bias"):
        g = grads[f"grad.final_layer.linear.{kind}"]
        rows = g.reshape(cfg.patch**2, 2, cfg.channels, -1)
        assert not rows[:, 1].any(), "SiT's network used its variance channels"
        grads[f"grad.final_layer.linear.{kind}"] = rows[:, 0].reshape(-1, *g.shape[1:])
    return grads


def same_bits(got, want):
    assert got.keys() == want.keys(), f"names differ: {sorted(got.keys() ^ want.keys())[:3]}"
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), f"{name} differs"


# ---- layouts


def test_dit():
    model = published()
    torch.save(model.state_dict(), "dit.pt")
    said, _ = run("convert.py", "dit.pt", "--heads", 4, "--out", "a.safetensors")
    assert "read as DiT; 3 blocks, width 32, 4 heads, patch 2, 4x8x8, 10 classes, prediction eps" in said, said
    worst = check_against("a.safetensors", model, "dit", lambda net, x, t, y, n, m: net(x, t, y))
    run("convert.py", "a.safetensors", "--to", "dit", "--out", "back.pt")
    same_bits(torch.load("back.pt"), model.state_dict())
    assert load("a.safetensors")[1]["latent_scale"] == "0.18215"
    return worst


def test_dit_trained():
    """As training scripts save it: EMA, weights, optimiser and arguments; compiled, distributed; half precision."""
    model = published(sigma=False)
    ema = {name: value + 1 for name, value in model.state_dict().items() if name != "pos_embed"}
    arguments = argparse.Namespace(model="DiT-B/2", image_size=64, num_classes=10)
    if hasattr(torch.serialization, "safe_globals"):
        torch.save({"model": model.state_dict(), "ema": ema, "opt": {}, "args": arguments}, "run.pt")
    else:
        torch.save({"args": arguments}, "old.pt")
        fails("2.5", "convert.py", "old.pt", "--out", "a.safetensors")
        torch.save({"model": model.state_dict(), "ema": ema, "opt": {}, "args": vars(arguments)}, "run.pt")
    run("convert.py", "run.pt", "--heads", 4, "--out", "a.safetensors")
    weights, metadata = load("a.safetensors")
    assert metadata["image_size"] == "8", metadata
    assert all((weights[name] == ema[name].numpy()).all() for name in weights), "not the EMA"
    run("convert.py", "run.pt", "--heads", 4, "--key", "model", "--out", "a.safetensors")
    assert all((value == model.state_dict()[name].numpy()).all() for name, value in load("a.safetensors")[0].items())
    for dtype in (torch.bfloat16, torch.float16):
        state = {f"module._orig_mod.{name}": value.to(dtype) for name, value in model.state_dict().items()}
        torch.save(state, "half.pt", _use_new_zipfile_serialization=dtype == torch.float16)
        run("convert.py", "half.pt", "--heads", 4, "--out", "a.safetensors")
        run("convert.py", "a.safetensors", "--to", "dit", "--out", "back.pt")
        back, want = torch.load("back.pt"), {name: value.to(dtype) for name, value in model.state_dict().items()}
        same_bits({**back, "pos_embed": back["pos_embed"].to(dtype)}, want)


def test_sit():
    for sigma in (True, False):
        model = published(sigma=sigma)
        if sigma:  # as SiT's training leaves what it never uses
            for p in model.final_layer.linear.parameters():
                p.data.view(4, 2, 4, -1)[:, 1] = 0
        torch.save({"ema": model.state_dict(), "args": {"path_type": "Linear", "prediction": "velocity"}}, "sit.pt")
        said, _ = run("convert.py", "sit.pt", "--heads", 4, "--out", "a.safetensors")
        assert "read as SiT" in said and "prediction flow" in said, said

        def call(net, x, t, y, n, m):  # SiT's time runs from noise at 0 to data at 1; its velocity is data - noise
            return net(x, 1 - t / 1000, y)[:, :4]

        worst = check_against("a.safetensors", model, "sit" if sigma else "dit", call, ["flow"])
        run("convert.py", "a.safetensors", "--to", "sit", "--learn_sigma", int(sigma), "--out", "back.pt")
        same_bits(torch.load("back.pt"), model.state_dict())
    torch.save(model.state_dict(), "plain.pt")
    run("convert.py", "plain.pt", "--heads", 4, "--from", "sit", "--out", "b.safetensors")
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    other = save({"args": {"path_type": "GVP", "prediction": "velocity"}, "ema": model.state_dict()})
    fails("Linear", "convert.py", other, "--heads", 4, "--out", "c.safetensors")
    fails("time_embedding sit", "convert.py", "a.safetensors", "--to", "dit", "--out", "c.pt")
    return worst


def test_sit_euler():
    """SiT's own Euler steps from noise to data are those of --t_shift 1, but that the first sees s = 0.001 for 0."""
    model = published(sigma=False)
    run("convert.py", save(model.state_dict()), "--heads", 4, "--from", "sit", "--out", "a.safetensors")
    weights, metadata = load("a.safetensors")
    noise, y, steps = torch.randn(2, 4, 8, 8), torch.tensor([3, 10]), 20
    with torch.no_grad():
        x, x_exact, net = noise.double(), noise.double(), model.double()
        for k in range(steps):
            s = torch.full((2,), k / steps, dtype=torch.float64)
            x = x + net(x, s.clamp(min=0.001), y) / steps
            x_exact = x_exact + net(x_exact, s, y) / steps
    inputs = {"x_T": noise.numpy(), "y": y.numpy(), "z": np.zeros((steps, 2, 4, 8, 8), np.float32)}
    worst = check_case("euler", weights, {**inputs, "expect.sample": x.numpy().astype(np.float32)},
                       {**metadata, "case": "sample", "sampler": "flow", "steps": steps, "eta": 0, "cfg_scale": 1,
                        "cfg_channels": 3, "reuse": 0, "iters": 1, "t_shift": 1})
    difference = ((x - x_exact).norm() / x_exact.norm()).item()
    assert worst < 1e-5 and difference < 1e-3, (worst, difference)
    return difference


def test_sit_path():
    """SiT's training pair (x_t, velocity) at its time s is ours at t = 1000(1 - s)."""
    x0, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    t = torch.tensor([0, 250, 999])
    seen = []
    target = lambda x, t, y, n, m, acts: (seen.append(x) or x0 - noise, None)
    cfg = reference.Config(channels=4, prediction="flow")
    loss, _ = reference.diffusion_loss(cfg, reference.Schedule.training(cfg), target, x0, noise, t, None)
    s = (1 - t.double() / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(seen[0], s * x0 + (1 - s) * noise, atol=1e-12) and loss.abs().max() == 0


def test_fpdm():
    worst = 0
    for pre, post, timestep, arguments in ((1, 1, 0, {}), (2, 0, 1, {"predict_v": True})):
        model = published(fpdm=(pre, post, timestep))
        arguments = {"model": "DiT-XL/2", "image_size": 64, "num_classes": 10, "flow": False, "predict_v": False,
                     "use_zero_terminal_snr": False, "fixed_point": True, "fixed_point_pre_depth": pre,
                     "fixed_point_post_depth": post, "fixed_point_pre_post_timestep_conditioning": bool(timestep),
                     **arguments}
        torch.save({"model": {}, "ema": model.state_dict(), "opt": {}, "args": arguments, "train_steps": 5}, "fpdm.pt")
        run("convert.py", "fpdm.pt", "--heads", 4, "--out", "a.safetensors")
        metadata = load("a.safetensors")[1]
        assert metadata["depth"] == "28" and metadata["timestep_in_pre_post"] == str(timestep), metadata
        assert metadata["prediction"] == ("v" if arguments["predict_v"] else "eps"), metadata
        worst = max(worst, check_against("a.safetensors", model, "fpdm",
                                         lambda net, x, t, y, n, m: net(x, t, y, (n, m)), iterations=(2, 2)))
        run("convert.py", "a.safetensors", "--to", "fpdm", "--out", "back.pt")
        back = torch.load("back.pt")
        same_bits(back["ema"], model.state_dict())
        assert back["args"] == arguments, back["args"]
    return worst


def diffusers_model(**config):
    diffusers = needs("diffusers")
    return randomise(diffusers.DiTTransformer2DModel(**{
        "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 3,
        "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_eps": 1e-6, **config}))


def share_embedders(model):
    """One timestep and label embedder in all blocks, as in a DiT that was put into diffusers' layout."""
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def call_diffusers(net, x, t, y, n, m):
    return net(x, timestep=t, class_labels=y).sample


def test_diffusers():
    diffusers = needs("diffusers")
    model = share_embedders(diffusers_model())
    model.save_pretrained("pipeline/transformer")
    os.makedirs("pipeline/scheduler")
    Path("pipeline/scheduler/scheduler_config.json").write_text(json.dumps(
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "epsilon"}))
    Path("pipeline/model_index.json").write_text(json.dumps({"id2label": {str(i): f"class {i}, x" for i in range(10)}}))
    said, _ = run("convert.py", "pipeline", "--out", "a.safetensors")
    assert "time_embedding diffusers" in said and "--cfg_channels 4" in said and "norm3" not in said, said
    metadata = load("a.safetensors")[1]
    assert json.loads(metadata["class_names"])[9] == "class 9" and metadata["time_embedding"] == "diffusers", metadata
    worst = check_against("a.safetensors", model, "diffusers", call_diffusers)
    run("convert.py", "a.safetensors", "--to", "diffusers", "--out", "back")
    back = diffusers.DiTTransformer2DModel.from_pretrained("back", low_cpu_mem_usage=False)
    same_bits(back.state_dict(), model.state_dict())
    known = lambda m: {k: v for k, v in m.config.items() if not k.startswith("_")}
    assert known(back) == known(model), (known(back), known(model))
    model.save_pretrained("bin", safe_serialization=False)
    run("convert.py", "bin", "--out", "b.safetensors")
    assert load("b.safetensors")[0].keys() == load("a.safetensors")[0].keys()
    return worst


def test_diffusers_old():
    """Transformer2DModel, the class of older folders; norm3 with its usual eps, and how far that is from ours."""
    diffusers = needs("diffusers")
    model = share_embedders(randomise(diffusers.Transformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_type="ada_norm_zero", activation_fn="gelu-approximate",
        attention_bias=True, norm_elementwise_affine=False)))
    model.save_pretrained("old")
    said, _ = run("convert.py", "old", "--out", "a.safetensors")
    assert "norm3 of diffusers adds 1e-05" in said and "4.5e-06/v" in said, said
    return check_against("a.safetensors", model, "diffusers", call_diffusers)


def test_dit_to_diffusers():
    """DiT's frequencies are not those of diffusers: the tool says by how much, and that is what the class does."""
    diffusers = needs("diffusers")
    model = published()
    torch.save(model.state_dict(), "dit.pt")
    run("convert.py", "dit.pt", "--heads", 4, "--out", "a.safetensors")
    said, _ = run("convert.py", "a.safetensors", "--to", "diffusers", "--out", "folder")
    percent = float(re.search(r"by up to (\S+) %", said)[1])
    net = diffusers.DiTTransformer2DModel.from_pretrained("folder", low_cpu_mem_usage=False).double().eval()
    t, y, x = torch.arange(1000), torch.zeros(1000, dtype=torch.long), torch.randn(1, 4, 8, 8)
    emb = net.transformer_blocks[0].norm1.emb
    there = emb(t, y, hidden_dtype=torch.float64) - emb.class_embedder(y)
    f = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    here = emb.timestep_embedder(torch.cat([torch.cos(t[:, None] * f), torch.sin(t[:, None] * f)], 1))
    worst = ((there - here).norm(dim=1) / here.norm(dim=1)).max().item()
    assert abs(100 * worst / percent - 1) < 0.01, (worst, percent)
    emb.time_proj.downscale_freq_shift = 0  # the one number that differs
    got = net(x.double(), timestep=t[7:8], class_labels=y[:1]).sample
    for block in net.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    got = net(x.double(), timestep=t[7:8], class_labels=y[:1]).sample
    want = model.double()(x.double(), t[7:8], y[:1])
    assert (got - want).norm() / want.norm() < 1e-6, "differs in more than the frequencies"


def save(content, path="broken.pt"):
    torch.save(content, path)
    return path


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_broken():
    out = ("--heads", 4, "--out", "a.safetensors")
    state = published().state_dict()
    change = lambda **c: save({**state, **{k.replace("__", "."): v for k, v in c.items()}})
    without = lambda name: save({k: v for k, v in state.items() if k != name})
    fails("no such file", "convert.py", "missing.pt", *out)
    fails("final_layer.linear.bias is missing", "convert.py", without("final_layer.linear.bias"), *out)
    fails("blocks.1.attn.qkv.weight is missing", "convert.py", without("blocks.1.attn.qkv.weight"), *out)
    fails("x_embedder.proj.weight is missing", "convert.py", without("x_embedder.proj.weight"), *out)
    fails("blocks.0.attn.q_norm.weight is none", "convert.py",
          change(blocks__0__attn__q_norm__weight=torch.ones(8)), *out)
    fails("blocks.2.mlp.fc1.weight has the shape (96, 32)", "convert.py",
          change(blocks__2__mlp__fc1__weight=torch.ones(96, 32)), *out)
    fails("final_layer.linear.weight has 3 outputs", "convert.py",
          change(final_layer__linear__weight=torch.ones(48, 32)), *out)
    fails("pos_embed differs by", "convert.py", change(pos_embed=state["pos_embed"] + 0.1), *out)
    fails("image_size", "convert.py", without("pos_embed"), *out)
    fails("--heads", "convert.py", change(), "--out", "a.safetensors")
    fails("not a multiple of heads 5", "convert.py", change(), "--heads", 5, "--out", "a.safetensors")
    fails("int64", "convert.py", change(pos_embed=torch.ones(3, dtype=torch.int64)), *out)
    fails("a list", "convert.py", save([1, 2]), *out)
    fails("layer1.weight", "convert.py", save({"layer1.weight": torch.ones(2, 2)}), *out)
    fails("--from fpdm", "convert.py", change(), "--from", "fpdm", *out)
    fails("no 'average'", "convert.py", change(), "--key", "average", *out)
    fails("or --key state_dict", "convert.py", save({"state_dict": state}), *out)
    run("convert.py", save({"ema": state, "args": None}), *out)
    fails("3 is int;", "convert.py", save({3: 5}), *out)
    fails("is not whole patches", "convert.py", without("pos_embed"), "--image_size", 33, *out)
    fails("--heads", "convert.py", change(), "--heads", -4, "--out", "a.safetensors")
    save(state)
    Path("short.pt").write_bytes(Path("broken.pt").read_bytes()[:-500])
    fails("short.pt", "convert.py", "short.pt", *out)
    Path("text.pt").write_text("hello")
    fails("text.pt", "convert.py", "text.pt", *out)
    for new in (True, False):
        torch.save({"ema": Malicious()}, "evil.pt", _use_new_zipfile_serialization=new)
        fails("evil.pt", "convert.py", "evil.pt", *out)
        assert not Path("executed").exists(), "code in a checkpoint was executed"
    run("convert.py", change(), *out)
    fails("--to", "convert.py", "a.safetensors", "--out", "b.safetensors")
    fails("is a plain DiT", "convert.py", "a.safetensors", "--to", "fpdm", "--out", "b.pt")
    fails("is a file", "convert.py", "a.safetensors", "--to", "diffusers", "--out", "broken.pt")
    fails_on_full_disk("b.pt", "convert.py", "a.safetensors", "--to", "dit", "--out", "b.pt")
    fails_on_full_disk("b.safetensors", "convert.py", "broken.pt", "--heads", 4, "--out", "b.safetensors")
    raw = Path("a.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(raw[:-100])
    fails("tensor final_layer.adaLN_modulation.1.bias", "convert.py", "cut.safetensors", "--to", "dit", "--out", "b.pt")
    Path("cut.safetensors").write_bytes(raw[:100])
    fails("not a safetensors file", "convert.py", "cut.safetensors", "--to", "dit", "--out", "b.pt")
    fails("no/b.safetensors", "convert.py", "broken.pt", "--heads", 4, "--out", "no/b.safetensors")


def test_broken_diffusers():
    needs("diffusers")
    diffusers_model().save_pretrained("apart")
    fails("transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight is not transformer_blocks.0", "convert.py",
          "apart", "--out", "a.safetensors")
    share_embedders(diffusers_model()).save_pretrained("good")
    config = json.loads(Path("good/config.json").read_text())
    Path("good/config.json").write_text(json.dumps({**config, "activation_fn": "geglu"}))
    fails("activation_fn is geglu", "convert.py", "good", "--out", "a.safetensors")
    Path("good/config.json").write_text("{")
    fails("config.json", "convert.py", "good", "--out", "a.safetensors")
    os.makedirs("empty")
    fails("empty/config.json", "convert.py", "empty", "--out", "a.safetensors")
    run("convert.py", save(published().state_dict()), "--heads", 4, "--from", "dit", "--out", "b.safetensors")
    fails("folder", "convert.py", "apart/diffusion_pytorch_model.safetensors", "--heads", 4, "--out", "a.safetensors")

# ---- latents.py


def make_pictures():
    """Two classes of 16x16 pictures; one is not square, and its middle is what a centre crop keeps."""
    rng = np.random.default_rng(3)
    pictures = rng.integers(256, size=(5, 16, 16, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        os.makedirs(f"pictures/{'cat' if i < 3 else 'dog'}", exist_ok=True)
        whole = np.pad(picture, ((0, 0), (4, 4), (0, 0))) if i == 4 else picture
        Image.fromarray(whole).save(f"pictures/{'cat' if i < 3 else 'dog'}/{i}.png")
    return pictures


def make_vae(kind):
    diffusers = needs("diffusers")
    if kind == "AutoencoderKL":
        vae = diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, layers_per_block=1)
    else:
        vae = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1))
    torch.manual_seed(2)
    for p in vae.parameters():
        p.data += 0.1 * torch.randn_like(p)
    vae.save_pretrained(kind)
    return vae.eval()


def vae_pictures(vae, latents):
    with torch.no_grad():
        x = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample
    return (127.5 * x + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def close(got, want, limit):
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert got.shape == want.shape and error < limit, f"{got.shape}, want {want.shape}; relative error {error}"


def test_latents_kl():
    vae, pictures = make_vae("AutoencoderKL"), make_pictures()
    with torch.no_grad():
        found, mirror = (vae.encode(torch.from_numpy(x.copy()).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
                         for x in (pictures, pictures[:, :, ::-1]))
    common = ("latents.py", "encode", "pictures", "--vae", "AutoencoderKL", "--size", 16, "--batch", 2,
              "--dtype", "F32")
    said, _ = run(*common, "--out", "a.safetensors")
    assert "x F32 (5, 4, 8, 8)" in said and "3 cat" in said, said
    tensors, metadata = reference.load_file("a.safetensors")
    close(tensors["x"], 0.18215 * found.mean.numpy(), 1e-5)
    assert tensors["y"].tolist() == [0, 0, 0, 1, 1] and metadata["latent_scale"] == "0.18215", metadata
    run(*common, "--sample", "--out", "b.safetensors")
    drawn = (reference.load_file("b.safetensors")[0]["x"] / 0.18215 - found.mean.numpy()) / found.std.numpy()
    assert abs(drawn.mean()) < 0.1 and abs(drawn.std() - 1) < 0.1, "not drawn from the distribution"
    run(*common, "--flip", "--out", "c.safetensors")
    flipped, metadata = reference.load_file("c.safetensors")
    order = [0, 1, 5, 6, 2, 3, 7, 8, 4, 9]  # each batch, then its mirror images
    close(flipped["x"], 0.18215 * np.concatenate([found.mean.numpy(), mirror.mean.numpy()])[order], 1e-5)
    assert flipped["y"].tolist() == [0, 0, 0, 0, 0, 1, 0, 1, 1, 1]
    run("latents.py", "decode", "a.safetensors", "--vae", "AutoencoderKL", "--batch", 3, "--out", "d.safetensors")
    decoded, metadata = reference.load_file("d.safetensors")
    want = vae_pictures(vae, tensors["x"])
    assert np.abs(decoded["x"].astype(int) - want).max() <= 1 and decoded["y"].tolist() == [0, 0, 0, 1, 1]
    assert json.loads(metadata["class_names"]) == ["cat", "dog"]
    said, _ = run("latents.py", "decode", "a.safetensors", "--vae", "AutoencoderKL", "--out", "d.png")
    grid = np.asarray(Image.open("d.png")).astype(int)
    assert grid.shape == (38, 56, 3) and np.abs(grid[20:36, 2:18] - want[3]).max() <= 1, grid.shape


def test_latents_tiny():
    vae, pictures = make_vae("AutoencoderTiny"), make_pictures()
    os.makedirs("pipeline")
    os.rename("AutoencoderTiny", "pipeline/vae")
    for path in list(Path("pictures").glob("*/*")):  # all in one folder: unlabelled
        path.rename(Path("pictures") / path.name)
    for name in ("cat", "dog"):
        os.rmdir(f"pictures/{name}")
    common = ("--vae", "pipeline", "--batch", 2)
    run("latents.py", "encode", "pictures", *common, "--size", 16, "--dtype", "F16", "--out", "a.safetensors")
    tensors, metadata = reference.load_file("a.safetensors")
    with torch.no_grad():
        want = vae.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1).latents.numpy()
    close(tensors["x"].astype(np.float32), want, 1e-3)
    assert "y" not in tensors and metadata["latent_scale"] == "1.0" and tensors["x"].dtype == np.float16, metadata
    run("latents.py", "decode", "a.safetensors", *common, "--out", "d.safetensors")
    assert np.abs(reference.load_file("d.safetensors")[0]["x"].astype(int)
                  - vae_pictures(vae, tensors["x"].astype(np.float32))).max() <= 1
    fails("distribution", "latents.py", "encode", "pictures", *common, "--sample", "--out", "b.safetensors")


def test_latents_model():
    """From a folder of pictures to decoded samples, labelled and unlabelled, and what the evaluator makes of them."""
    make_vae("AutoencoderKL")
    rng = np.random.default_rng(4)
    for name in ("a", "b"):
        os.makedirs(f"pictures/{name}")
        for i in range(30):
            Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(f"pictures/{name}/{i}.png")
    for source, classes in (("pictures", 2), ("pictures/a", 0)):
        run("latents.py", "encode", source, "--vae", "AutoencoderKL", "--size", 16, "--out", "x.safetensors")
        program("train_cpu", "--data", "x.safetensors", "--width", 16, "--heads", 2, "--patch", 2, "--steps", 4,
                "--batch", 8, "--sample_steps", 2, "--out", f"run{classes}")
        metadata = load(f"run{classes}/weights.safetensors")[1]
        assert metadata["classes"] == str(classes) and metadata["latent_scale"] == "0.18215", metadata
        said = program("sample_cpu", "--weights", f"run{classes}/weights.safetensors", "--n", 60, "--steps", 2,
                       "--latents", f"drawn{classes}.safetensors", "--out", "latents.png")
        assert f"latents.py decode drawn{classes}.safetensors --vae" in said, said
        run("latents.py", "decode", f"drawn{classes}.safetensors", "--vae", "AutoencoderKL", "--out",
            f"d{classes}.safetensors")
    run("data.py", "folder", "pictures", "--size", 16, "--out", "real.safetensors")
    said, _ = run("evaluate.py", "real.safetensors", "d2.safetensors")
    assert re.search(r"^ +60 +[\d.]+ +.*  d2\.safetensors$", said, re.M), said


def test_latents_broken():
    make_vae("AutoencoderKL"), make_pictures()
    encode = lambda *more: ("latents.py", "encode", "pictures", "--out", "a.safetensors", *more)
    fails("--vae no:", *encode("--vae", "no"))
    fails("--size 15", *encode("--vae", "AutoencoderKL", "--size", 15))
    fails("pictures2: not a folder", "latents.py", "encode", "pictures2", "--vae", "AutoencoderKL", "--size", 16,
          "--out", "a.safetensors")
    fails("--device", *encode("--vae", "AutoencoderKL", "--device", "abacus"))
    run(*encode("--vae", "AutoencoderKL", "--size", 16))
    decode = lambda *more: ("latents.py", "decode", *more, "--vae", "AutoencoderKL")
    fails("missing.safetensors", *decode("missing.safetensors", "--out", "a.png"))
    fails("want a .png", *decode("a.safetensors", "--out", "a.jpg"))
    fails("no such folder", *decode("a.safetensors", "--out", "no/a.png"))
    fails_on_full_disk("a.png", *decode("a.safetensors"), "--out", "a.png")
    reference.save_file({"x": np.ones((2, 3, 8, 8), np.float32)}, "three.safetensors", {})
    fails("(N,4,H,W)", *decode("three.safetensors", "--out", "a.png"))
    weights = Path("AutoencoderKL/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-50])
    fails("--vae AutoencoderKL", *encode("--vae", "AutoencoderKL", "--size", 16))
    Path("AutoencoderKL/config.json").write_text('{"_class_name": "UNet2DModel"}')
    fails("is a UNet2DModel", *encode("--vae", "AutoencoderKL", "--size", 16))


# ---- starting from weights, and ours in PyTorch


def started(*options):
    """The model's weights after a step of training that changes nothing, by name."""
    program("train_cpu", *options, "--lr", 0, "--steps", 1, "--batch", 2, "--sample_steps", 2, "--out", "run")
    tensors, metadata = reference.load_file("run/state.safetensors")
    shutil.rmtree("run")
    return {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}, metadata


def test_init():
    run("convert.py", save(published(channels=3).state_dict()), "--heads", 4, "--out", "dit.safetensors")
    dit, _ = reference.load_file("dit.safetensors")
    images = {"x": np.zeros((6, 8, 8, 3), np.uint8), "y": np.array([0, 1, 2, 0, 1, 2])}
    reference.save_file(images, "three.safetensors", {})
    got, metadata = started("--init", "dit.safetensors", "--image_size", 8)
    assert got.keys() == dit.keys() and all((got[name] == dit[name]).all() for name in dit)
    assert metadata["prediction"] == "eps" and metadata["learn_sigma"] == "1", metadata

    table = "y_embedder.embedding_table.weight"
    got, _ = started("--init", "dit.safetensors", "--data", "three.safetensors")
    assert all((got[name] == dit[name]).all() for name in dit if name != table)
    assert got[table].shape == (4, 32) and (got[table][3] == dit[table][10]).all(), "the row of no label is another"
    fresh = reference.initial_weights(reference.Config(width=32, heads=4, classes=3, fixed_point=0, depth=1), 1)
    assert np.allclose(got[table][:3], fresh[table][:3], 1e-6), "the other rows are not drawn as for a fresh start"

    got, metadata = started("--init", "dit.safetensors", "--image_size", 8, "--fixed_point", 1,
                            "--timestep_in_pre_post", 1)
    fresh = reference.initial_weights(reference.Config.from_metadata(metadata), 1)
    assert got.keys() == fresh.keys()
    for name, value in got.items():
        there = name.replace("blocks_pre.0", "blocks.0").replace("blocks_post.0", "blocks.2")
        there = there.replace("block_fixed_point.", "blocks.1.")
        want = dit.get(there, fresh[name])
        assert (there in dit) != ("projection" in name), name
        assert (value == want).all() if there in dit else np.allclose(value, want, 1e-6), name


def test_missing_packages():
    """Every tool says in one line what it lacks: here it is run by a Python without its packages."""
    for tool in sorted(path.name for path in TOOLS.glob("*.py")):
        if tool.startswith("report_") or tool == "scaling.py":  # they need none, or are run by make
            continue
        options = ["--scale", "smoke"] if tool == "reproduce.py" else []
        done = subprocess.run([sys.executable, "-E", "-S", TOOLS / tool, *options], capture_output=True, text=True)
        line = rf"{tool}: needs the Python package \w+: pip install -r tools/requirements.txt\n"
        assert done.returncode == 1 and re.fullmatch(line, done.stderr), f"{tool}: {done.stderr.strip()}"


def test_readme():
    """The README's script in Python draws what sample_cpu draws."""
    script = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    if not script:
        raise Skip("the README has no script")
    script = script[1].replace('"tools"', repr(str(TOOLS))).replace('"weights/', f'"{ROOT}/weights/')
    weights = ROOT / "weights/shapes.safetensors"
    program("sample_cpu", "--weights", weights, "--latents", "x.safetensors", "--out", "x.png")
    there = {}
    exec(script, there)
    close(there["x"].numpy(), reference.load_file("x.safetensors")[0]["x"], 1e-4)
    assert Image.open("pytorch.png").size == (240, 96)
    weights = ROOT / "weights/emoji.safetensors"
    program("sample_cpu", "--weights", weights, "--n", 6, "--steps", 3, "--iters", 6, "--latents", "x.safetensors",
            "--out", "x.png")
    script = script.split("sheet =")[0].replace("weights/shapes", "weights/emoji").replace("40", "6").replace("20", "3")
    exec(script, there)
    close(there["x"].numpy(), reference.load_file("x.safetensors")[0]["x"], 1e-4)


if __name__ == "__main__":
    testing.main(globals())
