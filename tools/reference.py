#!/usr/bin/env python3
"""The fixed-point diffusion model in PyTorch: the equations of arXiv:2401.08741 in executable form.

It makes the test cases that fpdm_cpu.c and fpdm.cu are compared with, and trains with the same random draws as they do.
Its defaults are the paper's, not theirs: test/compare_training.sh gives both the same options.

    python3 tools/reference.py cases                     write test/cases/*.safetensors
    python3 tools/reference.py check                     compute them again and compare with the committed files
    python3 tools/reference.py train --data cifar10.safetensors --width 64 --heads 2 --patch 4 --steps 50 --out /tmp/ref

Needs torch 1.13 or newer, numpy and safetensors (pip install safetensors: it needs numpy only).
"""
import argparse
import dataclasses
import json
import math
import os
import re
import sys
import zlib

try:
    import numpy as np
    import safetensors
    import safetensors.numpy
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
except ImportError as error:
    sys.exit(f"reference.py: needs the Python package {error.name}: pip install -r tools/requirements.txt")

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: the fields are the metadata of a weights file

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # layers, width, heads


@dataclasses.dataclass
class Config:
    image_size: int = 32
    channels: int = 3
    patch: int = 2
    width: int = 384
    heads: int = 6
    mlp_ratio: int = 4
    classes: int = 10
    learn_sigma: int = 0
    fixed_point: int = 1
    depth: int = 12
    pre_depth: int = 1
    post_depth: int = 1
    timestep_in_pre_post: int = 0
    prediction: str = "eps"  # eps, v, flow or x
    zero_terminal_snr: int = 0
    v_weight: str = "p2"  # p2 or 1
    diffusion_steps: int = 1000
    time_embedding: str = "dit"  # dit, sit or diffusers
    skip: int = 0  # ours: the post blocks get z + h

    @property
    def out_channels(self):
        return self.channels * (2 if self.learn_sigma else 1)

    def metadata(self):
        fields = dataclasses.asdict(self)
        for name, absent in ("time_embedding", "dit"), ("skip", 0):  # what a file without it means
            if fields[name] == absent:
                del fields[name]
        return {k: str(v) for k, v in fields.items()}

    @classmethod
    def from_metadata(cls, metadata):
        return cls(**{f.name: f.type(metadata[f.name]) for f in dataclasses.fields(cls) if f.name in metadata})


# ---------------------------------------------------------------------------------------------------------------------
# Files


def save_file(contents, path, metadata):
    """As safetensors' own save_file, but with sorted metadata, so that the same content gives the same bytes."""
    raw = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in contents.items()}, metadata)
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= size
    with open(path + ".tmp", "wb") as f:
        f.write(raw[:8] + text.ljust(size) + raw[8 + size :])
    os.replace(path + ".tmp", path)


def load_file(path):
    with safetensors.safe_open(path, "np") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


# ---------------------------------------------------------------------------------------------------------------------
# The model. Modules are registered in the order in which fpdm_cpu.c stores parameters; their names are the file's.


def attention(q, k, v):
    """softmax(q k^T / sqrt(head size)) v for (B, H, T, head size)."""
    if hasattr(F, "scaled_dot_product_attention"):  # torch 2.0 on
        return F.scaled_dot_product_attention(q, k, v)
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1) @ v


def modulate(x, shift, scale):
    """LN(x)·(1+scale)+shift for x (B, T, D) and shift, scale (B, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self, n_in, n_hidden, n_out):
        super().__init__()
        self.fc1 = nn.Linear(n_in, n_hidden)
        self.fc2 = nn.Linear(n_hidden, n_out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """DiT block with adaLN-Zero, arXiv:2212.09748 section 3.2."""

    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, mlp_ratio * width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(x, shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(x, shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width, n_out):
        super().__init__()
        self.linear = nn.Linear(width, n_out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale))


class PatchEmbedder(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, width, kind="dit"):
        super().__init__()
        self.kind = kind
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        i = torch.arange(128, dtype=torch.float64, device=t.device)
        f = torch.exp(-math.log(10000) * i / (127 if self.kind == "diffusers" else 128))
        time = 1 - t.double() / 1000 if self.kind == "sit" else t.double()
        angle = time.unsqueeze(1) * f
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)  # the last row is "no label"

    def forward(self, y):
        return self.embedding_table(y)


def position_embedding(width, grid):
    """(grid², width), float64: sine and cosine of the column, then of the row."""
    w = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = (p.reshape(-1, 1) * w for p in torch.meshgrid(*2 * [torch.arange(grid).double()], indexing="ij"))
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)


class FPDM(nn.Module):
    """With fixed_point=1: pre blocks, one block iterated, post blocks. With fixed_point=0: plain DiT."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        D = cfg.width
        blocks = lambda count: nn.ModuleList(Block(D, cfg.heads, cfg.mlp_ratio) for _ in range(count))
        self.register_buffer("pos", position_embedding(D, cfg.image_size // cfg.patch), persistent=False)
        self.x_embedder = PatchEmbedder(cfg.channels, D, cfg.patch)
        self.t_embedder = TimestepEmbedder(D, cfg.time_embedding)
        self.y_embedder = LabelEmbedder(cfg.classes, D)
        if cfg.fixed_point:
            self.blocks_pre = blocks(cfg.pre_depth)
            self.block_pre_projection = nn.Linear(D, D)
            self.block_fixed_point_projection_fc1 = nn.Linear(2 * D, 2 * D)
            self.block_fixed_point_projection_fc2 = nn.Linear(2 * D, D)
            self.block_fixed_point = Block(D, cfg.heads, cfg.mlp_ratio)
            self.blocks_post = blocks(cfg.post_depth)
        else:
            self.blocks = blocks(cfg.depth)
        self.final_layer = FinalLayer(D, cfg.patch**2 * cfg.out_channels)

    def iterate(self, z, inj, c):
        """One fixed-point iteration: z_k from z_{k-1}."""
        u = F.gelu(self.block_fixed_point_projection_fc1(torch.cat([z, inj], dim=-1)), approximate="tanh")
        return self.block_fixed_point(self.block_fixed_point_projection_fc2(u), c)

    def unpatch(self, x):
        """(B, T, p·p·Cout), each token as (row, column, channel), to (B, Cout, H, W)."""
        p, g = self.cfg.patch, self.cfg.image_size // self.cfg.patch
        x = x.view(len(x), g, g, p, p, self.cfg.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), self.cfg.out_channels, g * p, g * p)

    def forward(self, x, t, y, n=0, m=1, z=None, acts=None, window=0, mixing=1.0):
        """x (B,C,H,W), t (B), y (B) -> prediction (B,Cout,H,W) and the solution z_{n+m} (B,T,D).

        n iterations without gradient, then m through which gradients flow: S-JFB. z is z_0 when the solution of another
        timestep is to be reused. acts, a dict, receives the activations. window > 0: Anderson acceleration.
        """

        def keep(name, h):
            if acts is not None:
                acts[name] = h
            return h

        h = keep("tokens", self.x_embedder(x) + self.pos.to(x.dtype))
        t_emb, y_emb = self.t_embedder(t), self.y_embedder(y)
        c = t_emb + y_emb
        if not self.cfg.fixed_point:
            for block in self.blocks:
                h = block(h, c)
            return self.unpatch(self.final_layer(h, c)), None

        c_pp = c if self.cfg.timestep_in_pre_post else y_emb
        for block in self.blocks_pre:
            h = block(h, c_pp)
        before = keep("pre", h)
        inj = keep("inj", self.block_pre_projection(before))

        z, history = (h if z is None else z).detach(), []
        with torch.no_grad():
            for k in range(n):
                z = keep("z.%d" % (k + 1), self.iterate(z, inj, c))
        for k in range(n, n + m):
            last, z = z, keep("z.%d" % (k + 1), self.iterate(z, inj, c))
            if window:
                history = history[-window:] + [(last, z)]
                z = anderson(history, mixing if k + 1 < n + m else 1.0)

        h = z + before if self.cfg.skip else z
        for block in self.blocks_post:
            h = block(h, c_pp)
        return self.unpatch(self.final_layer(keep("post", h), c_pp)), z


def anderson(history, mixing):
    """Anderson acceleration, type II: the next z from the last pairs (z_i, g(z_i)), each (B,T,D)."""
    z, g = (torch.stack(parts, 1).flatten(2).double() for parts in zip(*history))  # (B,m,T·D)
    f = g - z
    gram = f @ f.transpose(1, 2)
    gram = gram + 1e-8 * torch.diag_embed(torch.diagonal(gram, dim1=1, dim2=2))
    a = torch.linalg.solve(gram, torch.ones_like(gram[:, :, :1]))
    a = a / a.sum(1, keepdim=True)
    return (a * (z + mixing * f)).sum(1).view_as(history[0][0]).to(history[0][0].dtype)


def load_model(cfg, weights, dtype):
    model = FPDM(cfg).to(dtype)
    model.load_state_dict({k: torch.as_tensor(v) for k, v in weights.items()})
    return model


def load_weights(path, dtype=torch.float32):
    """Configuration and model of a weight file, whatever its dtype."""
    with safetensors.safe_open(path, "pt") as f:
        cfg = Config.from_metadata(f.metadata())
        return cfg, load_model(cfg, {k: f.get_tensor(k) for k in f.keys() if k != "pos_embed"}, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion: schedule and loss


class Schedule:
    """Float64 tables of one sequence of timesteps, all from alpha_bar (the square of the signal's share)."""

    def __init__(self, alpha_bar):
        self.ab = alpha_bar
        self.ab_prev = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
        self.beta = 1 - self.ab / self.ab_prev
        # q(x_{t-1} | x_t, x_0): mean c1·x0 + c2·x_t; its variance at t=0 is zero, the value of t=1 takes its place
        self.c1 = self.beta * self.ab_prev.sqrt() / (1 - self.ab)
        self.c2 = (1 - self.ab_prev) * (1 - self.beta).sqrt() / (1 - self.ab)
        var = self.beta * (1 - self.ab_prev) / (1 - self.ab)
        self.log_var = torch.cat([var[1:2], var[1:]]).log()
        self.log_beta = self.beta.log()

    @classmethod
    def training(cls, cfg, device="cpu"):
        beta = torch.linspace(1e-4, 0.02, cfg.diffusion_steps, dtype=torch.float64, device=device)
        ab = torch.cumprod(1 - beta, dim=0)
        if cfg.zero_terminal_snr:
            s = ab.sqrt()
            ab = ((s - s[-1]) * s[0] / (s[0] - s[-1])) ** 2
        return cls(ab)


def at(table, t, x):
    """table[t] in x's dtype, to be broadcast over (B, C, H, W)."""
    return table[t].to(x.dtype).view(-1, 1, 1, 1)


def predict_x0(cfg, s, x, t, out):
    """x0_hat from the first C channels of the model's output; t indexes the schedule s."""
    a, b = at(s.ab.sqrt(), t, x), at((1 - s.ab).sqrt(), t, x)
    return (x - b * out) / a if cfg.prediction == "eps" else a * x - b * out


def learned_log_var(s, x, t, r):
    """Interpolates in the logarithm between the posterior's variance (r=-1) and beta (r=1)."""
    f = (r + 1) / 2
    return f * at(s.log_beta, t, x) + (1 - f) * at(s.log_var, t, x)


def gaussian_kl(difference, log_var1, log_var2):
    """KL of two Gaussians whose means differ by `difference`."""
    ratio = torch.exp(log_var1 - log_var2) + difference**2 * torch.exp(-log_var2)
    return 0.5 * (log_var2 - log_var1 - 1 + ratio)


def discretised_gaussian_nll(x, difference, log_var):
    """-log of the mass that a Gaussian with mean x + difference has in the bin of half-width 1/255 around x.

    The first and the last bin are open. The cdf is 0.5(1+tanh(q)), q = sqrt(2/pi)(u+0.044715u^3), which is sigmoid(2q):
    so written, small probabilities of either tail keep their precision in float32.
    """
    inv_std = torch.exp(-0.5 * log_var)
    logit = lambda u: 2 * math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)
    upper, lower = logit((1 / 255 - difference) * inv_std), logit((-1 / 255 - difference) * inv_std)
    side = torch.where(upper + lower > 0, -1.0, 1.0).to(x.dtype)  # the left tail, where both cdfs are small
    inside = (torch.sigmoid(side * upper) - torch.sigmoid(side * lower)).abs()
    p = torch.where(x < -0.999, torch.sigmoid(upper), torch.where(x > 0.999, torch.sigmoid(-lower), inside))
    return -p.clamp(min=1e-12).log()


def diffusion_loss(cfg, s, model, x0, noise, t, y, n=0, m=1, acts=None):
    """Loss of each sample (B), and the model's output. Gradients are taken of the mean.

    All follows from error = target - prediction, because x0_hat - x0 is sqrt(1-ab)·error for v and, for eps,
    sqrt((1-ab)/ab)·error. At small t the two are close: their float32 difference would have lost most of its digits.
    """
    per_sample = lambda e: e.flatten(1).mean(1)
    if cfg.prediction in ("flow", "x"):
        tau = (t.double() / cfg.diffusion_steps).to(x0.dtype).view(-1, 1, 1, 1)
        out, _ = model((1 - tau) * x0 + tau * noise, t, y, n, m, acts=acts)
        if cfg.prediction == "x":  # the error of the velocity (x0 - x_t)/tau
            return per_sample(((out - x0) / tau.clamp(min=0.05)) ** 2), out
        return per_sample((x0 - noise - out) ** 2), out

    a, b = at(s.ab.sqrt(), t, x0), at((1 - s.ab).sqrt(), t, x0)
    out, _ = model(a * x0 + b * noise, t, y, n, m, acts=acts)
    error = (noise if cfg.prediction == "eps" else a * noise - b * x0) - out[:, : cfg.channels]
    loss = per_sample(error**2)
    if cfg.prediction == "v" and cfg.v_weight == "p2":  # ab/sqrt(1-ab) · mean((x0 - x0_hat)²)
        loss = loss * (s.ab * (1 - s.ab).sqrt())[t].to(x0.dtype)

    if cfg.learn_sigma:  # variational bound in bits; only the variance learns from it
        x0_error = error.detach() * (b / a if cfg.prediction == "eps" else b)
        difference = at(s.c1, t, x0) * x0_error  # of the means; at t=0 c1 is 1 and the mean is x0_hat
        log_var = learned_log_var(s, x0, t, out[:, cfg.channels :])
        kl = gaussian_kl(difference, at(s.log_var, t, x0), log_var)
        nll = discretised_gaussian_nll(x0, difference, log_var)
        loss = loss + per_sample(torch.where(t.view(-1, 1, 1, 1) == 0, nll, kl)) / math.log(2)
    return loss, out


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Muon(torch.optim.AdamW):
    """Muon (Jordan and others 2024; its size as in arXiv:2502.16982) for the matrices that tokens go through, qkv's
    three apart; AdamW for the others."""

    def __init__(self, model, **options):
        named = dict(model.named_parameters())
        hidden = [k for k, p in named.items() if re.search(r"\.(attn|mlp)\.|_projection", k) and p.ndim == 2
                  and not k.startswith("t_embedder")]
        self.matrices = {k: (named[k], torch.zeros_like(named[k])) for k in hidden}  # with their momenta
        super().__init__([p for k, p in named.items() if k not in hidden], **options)

    @torch.no_grad()
    def step(self):
        super().step()
        lr, decay = (self.param_groups[0][k] for k in ("lr", "weight_decay"))
        for name, (p, momentum) in self.matrices.items():
            momentum.mul_(0.95).add_(p.grad)
            update = p.grad + 0.95 * momentum
            parts = update.chunk(3) if name.endswith("attn.qkv.weight") else [update]
            size = 0.2 * max(parts[0].shape) ** 0.5
            p.mul_(1 - lr * decay).add_(torch.cat([self.orthogonal(u) for u in parts]), alpha=-lr * size)

    @staticmethod
    def orthogonal(u):
        """About U·V^T of u = U·S·V^T: five steps of Newton and Schulz's iteration."""
        x = u / u.norm() if u.any() else u
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
        return x


def make_optimizer(model, lr=1e-4, beta1=0.9, beta2=0.999, adam_eps=1e-8, weight_decay=0.0, optimizer="adamw"):
    options = dict(lr=lr, betas=(beta1, beta2), eps=adam_eps, weight_decay=weight_decay)
    return Muon(model, **options) if optimizer == "muon" else torch.optim.AdamW(model.parameters(), **options)


def clip_gradients(model, clip):
    """Scales all gradients by clip/(norm+1e-6) when their global norm exceeds clip (0: never). Returns the norm."""
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    if clip and norm > clip:
        for p in model.parameters():
            p.grad *= clip / (norm + 1e-6)
    return norm


@torch.no_grad()
def update_ema(ema, model, decay):
    for e, p in zip(ema.parameters(), model.parameters()):
        e.mul_(decay).add_(p, alpha=1 - decay)


def training_step(cfg, s, model, ema, optimizer, x0, noise, t, y, n, m, clip=0.0, decay=0.9999):
    """One step of S-JFB training; returns the batch's loss and the gradient norm before clipping."""
    model.zero_grad(set_to_none=True)
    loss = diffusion_loss(cfg, s, model, x0, noise, t, y, n, m)[0].mean()
    loss.backward()
    norm = clip_gradients(model, clip)
    optimizer.step()
    update_ema(ema, model, decay)
    return loss.detach(), norm


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def sampling_positions(diffusion_steps, steps):
    """Timesteps 0..diffusion_steps-1 evenly, rounded half to even (as round() does)."""
    return [round(i * (diffusion_steps - 1) / (steps - 1)) for i in range(steps)]


@torch.no_grad()
def sample(cfg, model, x, y, z_noise, sampler, steps, iters, eta=0.0, cfg_scale=1.0, cfg_channels=3, reuse=False,
           t_shift=0.0, order=1, cfg_interval=(0, 999), **solver):
    """x (B,C,H,W) noise -> sample. z_noise (steps,B,C,H,W); iters: iterations of each step, first the largest t.
    t_shift: 0, or for flow and x timesteps that match the noise in x. order: 2 for Adams and Bashforth's two-step
    method (flow and x). cfg_interval: the timesteps that are guided, first and last. solver: window and mixing of
    Anderson acceleration."""
    C, B, positions = cfg.channels, len(x), sampling_positions(cfg.diffusion_steps, steps)
    tau = [max(t / cfg.diffusion_steps, 0.05) for t in positions]
    dt = [1 / steps] * steps
    if t_shift:
        edges = [t_shift * i / (steps + (t_shift - 1) * i) for i in range(steps + 1)]  # of the noise's share
        tau, dt = edges[1:], [after - before for before, after in zip(edges, edges[1:])]
        positions = [min(round(cfg.diffusion_steps * t), cfg.diffusion_steps - 1) for t in tau]
    s = Schedule(Schedule.training(cfg).ab[torch.tensor(positions)])
    solution = before = None  # before: the velocity at the timestep before
    for k, i in enumerate(reversed(range(steps))):
        guided = cfg_scale != 1 and cfg_interval[0] <= positions[i] <= cfg_interval[1]
        rows = 2 * B if guided else B
        z0 = solution[:rows] if reuse and solution is not None and len(solution) >= rows else None
        full = lambda value, count: torch.full((count,), value, dtype=torch.int64)
        if not guided:
            out, solution = model(x, full(positions[i], rows), y, 0, iters[k], z0, **solver)
        else:
            labels = torch.cat([y, torch.full_like(y, cfg.classes)])
            out, solution = model(torch.cat([x, x]), full(positions[i], rows), labels, 0, iters[k], z0, **solver)
            out, uncond = out.chunk(2)
            g = min(cfg_channels, C)
            guided = uncond[:, :g] + cfg_scale * (out[:, :g] - uncond[:, :g])
            out = torch.cat([guided, out[:, g:]], dim=1)

        pred, t = out[:, :C], full(i, B)
        if sampler == "flow":
            v = (pred - x) / tau[i] if cfg.prediction == "x" else pred
            x = x + dt[i] * v
            if order == 2 and before is not None:  # the integral over the step of the line through both velocities
                x = x + dt[i] ** 2 / 2 * (v - before) / dt[i + 1]
            before = v
            continue
        x0_hat = predict_x0(cfg, s, x, t, pred)
        if sampler == "ddpm":
            mean = at(s.c1, t, x) * x0_hat + at(s.c2, t, x) * x
            log_var = learned_log_var(s, x, t, out[:, C:]) if cfg.learn_sigma else at(s.log_beta, t, x)
            x = mean + (torch.exp(0.5 * log_var) * z_noise[k] if i > 0 else 0)
        else:
            ab, ab_prev = s.ab[i].item(), s.ab_prev[i].item()
            eps_hat = pred if cfg.prediction == "eps" else math.sqrt(ab) * pred + math.sqrt(1 - ab) * x
            sigma = eta * math.sqrt((1 - ab_prev) / (1 - ab)) * math.sqrt(1 - ab / ab_prev)
            x = math.sqrt(ab_prev) * x0_hat + math.sqrt(max(0.0, 1 - ab_prev - sigma**2)) * eps_hat
            x = x + (sigma * z_noise[k] if i > 0 else 0)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers of the C programs: Philox4x32-10 (Salmon et al. 2011). A draw depends on its counter alone.

INIT, DATA, TIME, NOISE, DROP, ITERATIONS, X_T, Z, AUGMENT = range(9)  # streams


def philox(index, step, stream, seed):
    """Words (4, len(index)) of the counters (index, step, stream, 0) under the 64-bit key `seed`."""
    low32 = np.uint64(0xFFFFFFFF)
    c = [np.asarray(index, np.uint64)] + [np.full(len(index), v, np.uint64) for v in (step, stream, 0)]
    return np.stack(philox_rounds(c, seed & 0xFFFFFFFF, seed >> 32)) & low32


def philox_rounds(c, key0, key1):
    low32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for r in range(10):
        k0 = np.uint64((key0 + r * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint64((key1 + r * 0xBB67AE85) & 0xFFFFFFFF)
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> shift) ^ c[1] ^ k0, p1 & low32, (p0 >> shift) ^ c[3] ^ k1, p0 & low32]
    return c


def philox_self_test():
    """The known answers that Random123 ships; an empty string if they come out."""
    known = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]
    for counter, key, want in known:
        if [int(w[0]) for w in philox_rounds([np.array([v], np.uint64) for v in counter], *key)] != want:
            return "known answer not met"
    return ""


def uniform(words):
    return (words + 0.5) * 2.0**-32


def below(words, n):
    """Integers 0..n-1; n may be an array."""
    return ((words * np.asarray(n, np.uint64)) >> np.uint64(32)).astype(np.int64)


def elements(words, count):
    """Element e is word e%4 of call e//4."""
    return words.T.reshape(-1)[:count]


def normal(count, step, stream, seed):
    """Box-Muller: words 0 and 1 of a call give its elements 0 and 1, words 2 and 3 give 2 and 3."""
    u = uniform(philox(np.arange((count + 3) // 4), step, stream, seed))
    radius, angle = np.sqrt(-2 * np.log(u[0::2])), 2 * np.pi * u[1::2]
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)  # (pair, which, call)
    return elements(z.reshape(4, -1), count).astype(np.float32)


def start_noise(cfg, n, seed):
    """The noise (n,C,H,W) from which sample_* draws n pictures."""
    shape = cfg.channels, cfg.image_size, cfg.image_size
    return torch.from_numpy(np.stack([normal(math.prod(shape), i, X_T, seed).reshape(shape) for i in range(n)]))


def initial_weights(cfg, seed):
    """The k-th parameter in the model's order draws from step k of its stream."""
    weights = {}
    for k, (name, p) in enumerate(FPDM(cfg).named_parameters()):
        shape, count = tuple(p.shape), p.numel()
        if name.endswith("bias") or "adaLN" in name or name == "final_layer.linear.weight":
            w = np.zeros(shape, np.float32)
        elif "embedding_table" in name or name.startswith("t_embedder"):
            w = 0.02 * normal(count, k, INIT, seed)
        else:
            fan_out, fan_in = shape[0], count // shape[0]
            u = uniform(elements(philox(np.arange((count + 3) // 4), k, INIT, seed), count))
            w = (2 * u - 1) * math.sqrt(6 / (fan_in + fan_out))
        weights[name] = w.reshape(shape).astype(np.float32)
    return weights


class Data:
    """A dataset file, and the order in which training goes through it."""

    def __init__(self, path, batch, hflip, seed):
        with safetensors.safe_open(path, "pt") as f:
            labelled = "y" in f.keys()
            self.x = f.get_tensor("x")
            self.y = f.get_tensor("y") if labelled else torch.zeros(len(self.x), dtype=torch.int64)
            self.class_names = (f.metadata() or {}).get("class_names") if labelled else None
        numbered = int(self.y.max()) + 1 if labelled else 0
        self.classes = len(json.loads(self.class_names)) if self.class_names else numbered
        self.pixels = self.x.dtype == torch.uint8
        self.channels, self.image_size = (self.x.shape[3] if self.pixels else self.x.shape[1]), self.x.shape[2]
        self.batch, self.hflip, self.seed, self.orders = batch, hflip, seed, {}

    def order(self, epoch):
        """Fisher-Yates from the identity."""
        if epoch not in self.orders:
            order, i = list(range(len(self.x))), np.arange(len(self.x))
            for a, b in reversed(list(enumerate(below(philox(i, epoch, DATA, self.seed)[0], i + 1)))):
                order[a], order[b] = order[b], order[a]
            self.orders = {epoch: order}
        return self.orders[epoch]

    def load(self, step):
        """x0 (B,C,H,W) in -1..1 and labels (B)."""
        N, first = len(self.x), step * self.batch
        rows = [self.order(g // N)[g % N] for g in range(first, first + self.batch)]
        x, y = self.x[rows], self.y[rows]
        x = x.permute(0, 3, 1, 2).double() / 127.5 - 1 if self.pixels else x.double()
        if self.hflip:
            flip = philox(np.arange(self.batch), step, AUGMENT, self.seed)[0] & np.uint64(1)
            x = torch.where(torch.from_numpy(flip == 1).view(-1, 1, 1, 1), x.flip(3), x)
        return x.float(), y


def draw_timesteps(words, diffusion_steps, args):
    """uniform: word 0 below diffusion_steps. logit_normal: tau = sigmoid of a normal number of words 0 and 1."""
    if args.t_sampling == "uniform":
        return below(words[0], diffusion_steps)
    u, angle = uniform(words[0]), 2 * np.pi * uniform(words[1])
    logit = args.t_mean + args.t_std * np.sqrt(-2 * np.log(u)) * np.cos(angle)
    return np.minimum(diffusion_steps - 1, np.floor(diffusion_steps / (1 + np.exp(-logit)))).astype(np.int64)


def learning_rate(args, step):
    """Linear warm-up, then constant or falling to zero at args.steps."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / (args.steps - args.warmup)
    return args.lr * {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[args.lr_schedule]


def command_train(args):
    """Trains with the draws of train_cpu and train_gpu; log.csv is to agree with theirs up to rounding."""
    from data import die

    dtype = getattr(torch, args.dtype)
    data = Data(args.data, args.batch, args.hflip, args.seed)
    sizes = {}
    if args.model:
        letters, patch = args.model.split("/")
        sizes = dict(zip(("depth", "width", "heads"), SIZES[letters]), patch=int(patch))
    options = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}
    options.update(sizes, channels=data.channels, image_size=data.image_size, classes=data.classes)
    cfg = Config(**options)
    for side, part in ("image_size", "patch"), ("width", "heads"):
        if getattr(cfg, side) % getattr(cfg, part):
            die(f"{side} {getattr(cfg, side)} is not a multiple of --{part} {getattr(cfg, part)}")
    if cfg.width % 4:
        die(f"--width {cfg.width}: not a multiple of 4")
    if cfg.learn_sigma and cfg.prediction in ("flow", "x"):
        die("--learn_sigma 1: needs --prediction eps or v, not flow or x")

    start = initial_weights(cfg, args.seed)
    model, ema, s = load_model(cfg, start, dtype), load_model(cfg, start, dtype), Schedule.training(cfg)
    optimizer = make_optimizer(model, lr=args.lr, weight_decay=args.weight_decay, optimizer=args.optimizer)
    B, (n_low, n_high), (m_low, m_high) = args.batch, args.no_grad_iters, args.grad_iters
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "log.csv"), "w") as log:
        log.write("step,loss,n,m\n")
        for step in range(args.steps):
            draw = lambda stream, count: philox(np.arange(count), step, stream, args.seed)
            x0, y = data.load(step)
            t = torch.from_numpy(draw_timesteps(draw(TIME, B), cfg.diffusion_steps, args))
            noise = torch.from_numpy(normal(x0.numel(), step, NOISE, args.seed)).view(x0.shape)
            y[torch.from_numpy(uniform(draw(DROP, B)[0]) < args.label_drop)] = cfg.classes
            words = draw(ITERATIONS, 1)
            n = n_low + int(below(words[0], n_high - n_low + 1)[0])
            m = m_low + int(below(words[1], m_high - m_low + 1)[0])

            decay = min(args.ema, (1 + step) / (10 + step)) if args.ema_warmup else args.ema
            optimizer.param_groups[0]["lr"] = learning_rate(args, step)
            batch = x0.to(dtype), noise.to(dtype), t, y
            loss, norm = training_step(cfg, s, model, ema, optimizer, *batch, n, m, args.grad_clip, decay)
            log.write("%d,%.9g,%d,%d\n" % (step, loss, n, m))
            log.flush()
            print("step %d  loss %.6f  gradient norm %.6f  n %d  m %d" % (step, loss, norm, n, m), flush=True)
    metadata = {**cfg.metadata(), **({"class_names": data.class_names} if data.class_names else {})}
    weights = {k: p.detach().float().numpy() for k, p in ema.named_parameters()}
    save_file(weights, os.path.join(args.out, "weights.safetensors"), metadata)


# ---------------------------------------------------------------------------------------------------------------------
# Test cases. A case is made in two halves: make_* draws weights and inputs (F32), run_* computes what is expected of
# them in a chosen precision. The half that makes a case in float64 so also says how near float32 arithmetic can come.

FLOAT32_HEADROOM = {"expect": 2e-6, "grad": 2e-5, "act": 2e-5, "final": 2e-5, "ema": 2e-5}


def draw_weights(cfg, rng):
    """Random weights at the scale of a trained model, nothing zero, so that every gradient is nonzero too."""
    weights = {}
    for name, p in FPDM(cfg).named_parameters():
        if name.endswith("bias"):
            std = 0.2
        elif "embedding_table" in name:
            std = 0.7
        else:  # (out, in...)
            std = p[0].numel() ** -0.5
        weights[name] = (std * rng.standard_normal(tuple(p.shape))).astype(np.float32)
        if name == "block_fixed_point_projection_fc1.weight":
            weights[name][:, : cfg.width] *= 0.65  # the half that multiplies z: the iteration is to converge
        if name == "final_layer.linear.weight" and cfg.learn_sigma:
            weights[name].reshape(-1, cfg.out_channels, cfg.width)[:, cfg.channels :] *= 0.5  # variances about -1..1
    return weights


def draw_images(cfg, rng, shape):
    """Latents (4 channels): normal. Pixels: the 256 levels, a quarter of them saturated at -1 or 1."""
    if cfg.channels == 4:
        return rng.standard_normal(shape).astype(np.float32)
    return (np.clip(np.round(rng.normal(127.5, 110, shape)), 0, 255) / 127.5 - 1).astype(np.float32)


def tensors(inputs, dtype):
    """numpy to torch; floats in dtype, integers as they are."""
    return {k: torch.from_numpy(v).to(dtype if v.dtype == np.float32 else torch.int64) for k, v in inputs.items()}


def make_forward(rng, cfg, t, n, m, y=None):
    B = len(t)
    shape = (B, cfg.channels, cfg.image_size, cfg.image_size)
    inputs = {
        "x0": draw_images(cfg, rng, shape),
        "noise": rng.standard_normal(shape).astype(np.float32),
        "t": np.array(t, np.int64),
        "y": rng.integers(cfg.classes + 1, size=B) if y is None else np.array(y, np.int64),
    }
    return inputs, {"n": n, "m": m}


def run_forward(cfg, weights, inputs, meta, dtype, acts=None):
    model, v, s = load_model(cfg, weights, dtype), tensors(inputs, dtype), Schedule.training(cfg)
    loss, out = diffusion_loss(cfg, s, model, v["x0"], v["noise"], v["t"], v["y"], meta["n"], meta["m"], acts)
    loss.mean().backward()
    result = {"expect.output": out, "expect.loss": loss}
    result.update({"grad." + k: p.grad for k, p in model.named_parameters()})
    result.update({"act." + k: h for k, h in (acts or {}).items()})
    return result


def make_train(rng, cfg, B, n, m, **settings):
    steps = len(n)
    shape = (steps, B, cfg.channels, cfg.image_size, cfg.image_size)
    inputs = {
        "x0": draw_images(cfg, rng, shape),
        "noise": rng.standard_normal(shape).astype(np.float32),
        "t": rng.integers(cfg.diffusion_steps, size=(steps, B)),
        "y": rng.integers(cfg.classes + 1, size=(steps, B)),
    }
    meta = {"steps": steps, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "adam_eps": 1e-8, "weight_decay": 0.0}
    meta.update({"grad_clip": 0.0, "ema_decay": 0.9, **settings})
    meta.update({"n.%d" % k: n[k] for k in range(steps)})
    meta.update({"m.%d" % k: m[k] for k in range(steps)})
    return inputs, meta


def run_train(cfg, weights, inputs, meta, dtype):
    model, ema, v = load_model(cfg, weights, dtype), load_model(cfg, weights, dtype), tensors(inputs, dtype)
    options = ("lr", "beta1", "beta2", "adam_eps", "weight_decay", "optimizer")
    optimizer = make_optimizer(model, **{k: meta[k] for k in options if k in meta})
    s, losses = Schedule.training(cfg), []
    for k in range(meta["steps"]):
        batch = [v[name][k] for name in ("x0", "noise", "t", "y")]
        n, m, clip, decay = meta["n.%d" % k], meta["m.%d" % k], meta["grad_clip"], meta["ema_decay"]
        losses.append(training_step(cfg, s, model, ema, optimizer, *batch, n, m, clip, decay)[0])
    result = {"expect.loss": torch.stack(losses)}
    result.update({"final." + k: p for k, p in model.named_parameters()})
    result.update({"ema." + k: p for k, p in ema.named_parameters()})
    return result


def make_sample(rng, cfg, B, sampler, steps, iters, eta=0.0, cfg_scale=1.0, cfg_channels=3, reuse=0, **solver):
    shape = (B, cfg.channels, cfg.image_size, cfg.image_size)
    inputs = {
        "x_T": rng.standard_normal(shape).astype(np.float32),
        "y": rng.integers(cfg.classes, size=B),
        "z": rng.standard_normal((steps,) + shape).astype(np.float32),
    }
    meta = {"sampler": sampler, "steps": steps, "eta": eta, "cfg_scale": cfg_scale, "cfg_channels": cfg_channels}
    return inputs, {**meta, "reuse": reuse, "iters": iters, **solver}


def run_sample(cfg, weights, inputs, meta, dtype):
    v, options = tensors(inputs, dtype), dict(meta)
    iters = [int(k) for k in options.pop("iters").split(",")]
    options["iters"] = iters * meta["steps"] if len(iters) == 1 else iters
    if "cfg_interval" in meta:
        options["cfg_interval"] = [int(t) for t in meta["cfg_interval"].split(",")]
    return {"expect.sample": sample(cfg, load_model(cfg, weights, dtype), v["x_T"], v["y"], v["z"], **options)}


MAKE = {"forward": make_forward, "train": make_train, "sample": make_sample}
RUN = {"forward": run_forward, "train": run_train, "sample": run_sample}


def tiny(**fields):
    """Config of a case: 8x8x3 images, 16 tokens, two heads of 8, one pre and one post block, unless said otherwise."""
    base = dict(image_size=8, channels=3, patch=2, width=16, heads=2, classes=4, depth=6)
    return Config(**{**base, **fields})


def case_table():
    """name -> (kind, config, arguments of make_*). Names with `acts` also hold the activations."""
    p = lambda pre, post: dict(pre_depth=pre, post_depth=post)
    dit = lambda depth: dict(fixed_point=0, depth=depth, **p(0, 0))
    latent = dict(channels=4, image_size=4)
    table = {}

    def add(name, cfg, **arguments):
        table[name] = (name.split("_")[0], cfg, arguments)

    # Forward and backward. The first cases to try in a port: everything small, with activations.
    add("forward_eps_acts", tiny(**p(1, 1)), t=[17, 803], n=2, m=2)
    add("forward_dit_acts", tiny(**dit(2)), t=[0, 999], n=0, m=1)
    add("forward_eps_n10_m12", tiny(**p(0, 0)), t=[250, 777, 999], n=10, m=12)
    add("forward_eps_sigma_t0_t1", tiny(**p(1, 1), learn_sigma=1), t=[0, 1, 400, 0], n=0, m=2)
    add("forward_v_p2_pre0_post3", tiny(**p(0, 3), prediction="v", timestep_in_pre_post=1), t=[0, 333, 750], n=0, m=3)
    add("forward_v_sigma", tiny(**p(1, 0), prediction="v", v_weight="1", learn_sigma=1), t=[0, 1, 500], n=3, m=1)
    zero = dict(prediction="v", zero_terminal_snr=1)
    add("forward_v_zero_snr_sigma", tiny(**p(0, 1), **zero, v_weight="1", learn_sigma=1), t=[999, 998, 0], n=1, m=1)
    add("forward_v_zero_snr_p2", tiny(**p(0, 0), **zero), t=[999, 998, 20], n=0, m=2)
    flow = dict(prediction="flow", timestep_in_pre_post=1)
    add("forward_flow_pre3_post0", tiny(**p(3, 0), **flow), t=[0, 512, 999], n=1, m=1)
    odd = dict(prediction="x", image_size=9, patch=3, heads=1)  # 9 tokens; tau is clamped below t = 50
    add("forward_x_tokens9_acts", tiny(**p(1, 1), **odd, classes=1), t=[0, 49, 51, 999, 730], n=1, m=2)
    add("forward_x_dit_gray", tiny(**dit(2), prediction="x", channels=1), t=[50, 3, 640], n=0, m=1)
    add("forward_dit_sigma", tiny(**dit(1), **latent, learn_sigma=1), t=[0, 300, 1], n=0, m=1)
    add("forward_dit_head72_tokens9", tiny(**dit(1), image_size=6, width=72, heads=1), t=[640, 2], n=0, m=1)
    add("forward_dit_head64", tiny(**dit(1), width=64, heads=1), t=[980, 55], n=0, m=1)
    add("forward_head16_patch4_tokens9", tiny(**p(0, 0), image_size=12, patch=4, heads=1), t=[100, 900], n=2, m=1)
    add("forward_tokens25_gray_n0_m1", tiny(**p(0, 0), image_size=10, channels=1, width=24, heads=3), t=[401], n=0, m=1)
    add("forward_tokens49_patch1_acts", tiny(**p(0, 0), image_size=7, patch=1, channels=1), t=[60, 300], n=1, m=2)
    one = dict(image_size=8, patch=8, channels=1, classes=1)
    add("forward_token1_patch8_class1", tiny(**p(0, 0), **one), t=[130, 999, 4], n=1, m=2, y=[0, 1, 0])
    add("forward_dit_flow_sit_time", tiny(**dit(1), prediction="flow", time_embedding="sit"), t=[0, 999, 321], n=0, m=1)
    add("forward_diffusers_time", tiny(**p(0, 0), time_embedding="diffusers"), t=[999, 5], n=1, m=1)
    add("forward_skip_acts", tiny(**p(1, 1), **flow, skip=1), t=[17, 803, 400], n=1, m=2)
    add("forward_skip_pre0_post0", tiny(**p(0, 0), **odd, skip=1), t=[3, 970], n=0, m=1)
    add("forward_skip_pre2_post0", tiny(**p(2, 0), **flow, skip=1), t=[5, 640], n=2, m=2)
    add("forward_skip_pre0_post2", tiny(**p(0, 2), skip=1), t=[5, 640], n=0, m=2)
    add("forward_tokens169_v_p2_sigma", tiny(**p(0, 1), prediction="v", learn_sigma=1, image_size=13, channels=4,
        patch=1, width=24, heads=1, skip=1, timestep_in_pre_post=1), t=[0, 640], n=1, m=2)
    add("forward_batch19_unlabelled", tiny(**p(1, 1), channels=4, image_size=4, classes=0),
        t=[53 * i % 1000 for i in range(19)], n=1, m=2)
    many = dict(**latent, classes=1000, learn_sigma=1)
    add("forward_classes1000_sigma", tiny(**p(0, 0), **many), t=[10, 700, 350], n=1, m=1, y=[999, 1000, 0])

    # Five steps of training. adam_eps is larger than usual because Adam would blow the key bias's gradient, which is
    # nothing but rounding error, up to full steps. grad_clip of the first lies between its norms, of the last above.
    settings = dict(lr=3e-3, adam_eps=1e-4)
    n, m = [0, 2, 1, 0, 3], [1, 1, 2, 3, 2]
    add("train_eps_clip_decay", tiny(**p(1, 0)), B=2, n=n, m=m, grad_clip=5.0, weight_decay=0.1, **settings)
    add("train_v_zero_snr_sigma", tiny(**p(0, 0), **zero, v_weight="1", learn_sigma=1), B=3, n=n, m=m, **settings)
    add("train_dit_flow", tiny(**dit(1), prediction="flow"), B=2, n=[0] * 5, m=[1] * 5, grad_clip=100.0, **settings,
        beta1=0.8, beta2=0.95, ema_decay=0.75, weight_decay=0.03)

    add("train_x_decay", tiny(**p(0, 1), **odd, timestep_in_pre_post=1), B=3, n=n, m=m, weight_decay=0.05, lr=3e-3,
        adam_eps=1e-2)  # the velocity's error is up to 400 times as large
    add("train_x_dit_clip", tiny(**dit(1), prediction="x"), B=2, n=[0] * 5, m=[1] * 5, grad_clip=3.0, **settings)

    add("train_skip", tiny(**p(2, 1), **flow, skip=1), B=3, n=n, m=m, grad_clip=2.0, **settings)
    add("train_muon_decay", tiny(**p(1, 1), **flow, skip=1), B=3, n=n, m=m, grad_clip=2.0, weight_decay=0.1,
        adam_eps=1e-4, lr=1e-2, optimizer="muon")
    add("train_muon_dit", tiny(**dit(2), prediction="flow"), B=2, n=[0] * 5, m=[1] * 5, adam_eps=1e-4, lr=1e-2,
        optimizer="muon")
    add("train_muon_deep", tiny(**dit(5), prediction="flow"), B=2, n=[0] * 2, m=[1] * 2, adam_eps=1e-4, lr=1e-2,
        optimizer="muon")  # more matrices of a shape than a GPU updates at once

    # Samplers
    sigma = dict(learn_sigma=1)
    add("sample_ddpm", tiny(**p(2, 1), timestep_in_pre_post=1), B=2, sampler="ddpm", steps=4, iters="3")
    add("sample_ddpm_sigma", tiny(**p(0, 1), **sigma), B=2, sampler="ddpm", steps=5, iters="2,1,3,1,2")
    add("sample_ddpm_2_steps", tiny(**p(0, 0)), B=1, sampler="ddpm", steps=2, iters="1,4")
    add("sample_ddim_reuse", tiny(**p(1, 0)), B=2, sampler="ddim", steps=6, iters="4,3,2,2,1,1", reuse=1)
    add("sample_ddim_eta_sigma", tiny(**p(0, 0), **sigma), B=2, sampler="ddim", steps=4, iters="1,2,3,4", eta=0.5)
    add("sample_flow_reuse", tiny(**p(0, 0), prediction="flow"), B=2, sampler="flow", steps=4, iters="2", reuse=1)
    add("sample_flow_guided_2_steps", tiny(**p(1, 0), prediction="flow"), B=1, sampler="flow", steps=2, iters="3,1",
        cfg_scale=2.5)
    add("sample_x_reuse", tiny(**p(1, 1), prediction="x", timestep_in_pre_post=1), B=2, sampler="flow", steps=6,
        iters="3,2,2,1,1,2", reuse=1)
    add("sample_x_guided_3of4", tiny(**p(0, 1), **latent, prediction="x"), B=2, sampler="flow", steps=23, iters="1",
        cfg_scale=3.0)
    add("sample_x_dit_guided_odd", tiny(**dit(2), **odd), B=3, sampler="flow", steps=3, iters="1", cfg_scale=1.5)
    add("sample_x_shift_reuse", tiny(**p(1, 1), **odd), B=2, sampler="flow", steps=5, iters="2,1,2,1,1", reuse=1,
        t_shift=2.5)
    add("sample_flow_shift_guided", tiny(**dit(1), prediction="flow"), B=1, sampler="flow", steps=3, iters="1",
        cfg_scale=2.0, t_shift=0.7)
    add("sample_x_anderson_reuse", tiny(**p(1, 0), **odd), B=1, sampler="flow", steps=4, iters="4,3,3,2", reuse=1,
        window=2, mixing=0.9)
    add("sample_ddpm_sigma_guided_3of4", tiny(**p(1, 1), **latent, **sigma), B=2, sampler="ddpm", steps=4, iters="2",
        cfg_scale=4.0)
    add("sample_ddim_guided_all_reuse", tiny(**p(0, 0), **latent, timestep_in_pre_post=1), B=2, sampler="ddim", steps=5,
        iters="3,2,2,1,1", eta=0.5, cfg_scale=1.5, cfg_channels=4, reuse=1)
    add("sample_v_zero_snr_ddim", tiny(**p(0, 0), **zero), B=2, sampler="ddim", steps=5, iters="2")
    add("sample_v_zero_snr_ddpm_sigma", tiny(**p(0, 0), **zero, **sigma), B=2, sampler="ddpm", steps=5,
        iters="1,2,2,1,3")
    add("sample_v_guided", tiny(**p(0, 0), prediction="v"), B=2, sampler="ddpm", steps=3, iters="1", cfg_scale=1.5)
    add("sample_gray_guided_sigma", tiny(**p(1, 0), image_size=20, patch=4, channels=1, learn_sigma=1), B=2,
        sampler="ddim", steps=3, iters="2", eta=0.3, cfg_scale=2.0)  # one channel, of which cfg_channels guides 3
    add("sample_v_ddim_eta_head32", tiny(**p(0, 0), prediction="v", width=32, heads=1), B=2, sampler="ddim", steps=7,
        iters="1", eta=1.0)
    add("sample_ddim_anderson", tiny(**p(1, 1)), B=2, sampler="ddim", steps=3, iters="6,5,1", window=3, mixing=1.0)
    add("sample_flow_anderson_reuse_guided", tiny(**p(0, 1), prediction="flow"), B=2, sampler="flow", steps=4,
        iters="3,2,5,4", cfg_scale=2.0, reuse=1, window=1, mixing=0.7)
    add("sample_skip_reuse_guided", tiny(**p(1, 1), **flow, skip=1), B=2, sampler="flow", steps=4, iters="2,1,3,1",
        cfg_scale=2.0, reuse=1, t_shift=1.0)
    add("sample_flow_order2", tiny(**p(1, 0), **flow), B=2, sampler="flow", steps=5, iters="2,1,1,3,1", reuse=1,
        order=2)
    add("sample_x_order2_shift_guided", tiny(**p(0, 1), **odd), B=2, sampler="flow", steps=6, iters="1", cfg_scale=2.0,
        reuse=1, t_shift=1.5, order=2)
    add("sample_dit_flow_order2_2_steps", tiny(**dit(2), **flow), B=1, sampler="flow", steps=2, iters="1", order=2)
    add("sample_skip_anderson", tiny(**p(0, 2), skip=1), B=1, sampler="ddim", steps=3, iters="4,1,3", window=2,
        mixing=0.9)
    add("sample_skip_interval_reuse", tiny(**p(1, 1), **flow, skip=1), B=2, sampler="flow", steps=6,
        iters="2,1,1,3,1,2", cfg_scale=2.5, cfg_interval="250,800", reuse=1, t_shift=1.5,
        order=2)  # without, with, without guidance
    add("sample_ddpm_sigma_interval_3of4", tiny(**p(0, 1), **latent, **sigma), B=2, sampler="ddpm", steps=4, iters="2",
        cfg_scale=3.0, cfg_interval="333,999", reuse=1)  # t = 999, 666, 333 with guidance
    add("sample_dit_ddpm_sigma_guided", tiny(**dit(2), **sigma), B=1, sampler="ddpm", steps=3, iters="1", cfg_scale=1.5)
    return table


def make_case(name, kind, cfg, arguments):
    """Everything of a case but what is expected: weights, inputs, settings."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    weights = draw_weights(cfg, rng)
    inputs, meta = MAKE[kind](rng, cfg, **arguments)
    return weights, inputs, meta


def run_case(name, kind, cfg, weights, inputs, meta, dtype):
    options = {"acts": {}} if name.endswith("_acts") else {}
    result = RUN[kind](cfg, weights, inputs, meta, dtype, **options)
    return {k: v.detach().double().numpy() for k, v in result.items()}


# What only the reader of the metadata has to cope with
MORE_METADATA = {
    "forward_eps_acts": {"class_names": json.dumps(["cat", '"dog"', "back\\slash", "größer"], ensure_ascii=False)},
    "forward_classes1000_sigma": {"latent_scale": "0.18215"},
}


def case_file(name, kind, cfg, arguments):
    """Tensors and metadata of the file, and the expected tensors in float64."""
    weights, inputs, meta = make_case(name, kind, cfg, arguments)
    exact = run_case(name, kind, cfg, weights, inputs, meta, torch.float64)
    expected = {k: v.astype(np.float32) for k, v in exact.items()}
    metadata = {**cfg.metadata(), "case": kind, **MORE_METADATA.get(name, {})}
    metadata.update({k: str(v) for k, v in meta.items()})
    return {**weights, **inputs, **expected}, metadata, exact


def relative_error(got, want):
    """Relative L2 error; a NaN in either makes it infinite."""
    norm, difference = np.linalg.norm(want), np.linalg.norm(got.astype(np.float64) - want)
    error = difference / norm if norm else difference
    return math.inf if np.isnan(error) else error


def command_cases(args):
    os.makedirs(args.out, exist_ok=True)
    total = 0
    print("%-36s %8s  %s" % ("case", "bytes", "float32 against float64: worst relative L2 error of each kind"))
    for name, (kind, cfg, arguments) in case_table().items():
        contents, metadata, exact = case_file(name, kind, cfg, arguments)
        path = os.path.join(args.out, name + ".safetensors")
        save_file(contents, path, metadata)
        total += os.path.getsize(path)

        single = run_case(name, kind, cfg, *make_case(name, kind, cfg, arguments), torch.float32)
        worst = {}
        for k, want in exact.items():
            worst[k.split(".")[0]] = max(worst.get(k.split(".")[0], (0, "")), (relative_error(single[k], want), k))
        notes = ["%s %.1e%s" % (k, e, " TOO MUCH: " + key if not e < FLOAT32_HEADROOM[k] else "")
                 for k, (e, key) in worst.items()]
        print("%-36s %8d  %s" % (name, os.path.getsize(path), "  ".join(notes)), flush=True)
    print("total %d bytes" % total)


def compare_case(path, contents, metadata):
    """What differs between the file and what was computed now; an empty string if nothing does."""
    if not os.path.exists(path):
        return "file missing"
    committed, committed_metadata = load_file(path)
    if committed_metadata != metadata:
        return "metadata differ"
    signature = lambda ts: {k: (v.dtype, v.shape) for k, v in ts.items()}
    if signature(committed) != signature(contents):
        return "names, types or shapes of tensors differ"
    worst, name = max((relative_error(contents[k], committed[k].astype(np.float64)), k) for k in committed)
    return "" if worst < 1e-6 else "%s has relative L2 error %.1e" % (name, worst)


def command_check(args):
    table, failed = case_table(), 0
    reports = {"philox4x32-10": philox_self_test()}
    for name, (kind, cfg, arguments) in table.items():
        path = os.path.join(args.cases, name + ".safetensors")
        reports[name] = compare_case(path, *case_file(name, kind, cfg, arguments)[:2])
    for name in sorted(f[: -len(".safetensors")] for f in os.listdir(args.cases) if f.endswith(".safetensors")):
        reports.setdefault(name, "no such case in this program")
    for name, problem in reports.items():
        print("%-36s %s" % (name, "FAIL: " + problem if problem else "ok"))
        failed += bool(problem)
    print("%d passed, %d failed" % (len(reports) - failed, failed))
    sys.exit(1 if failed else 0)


def pair(least):
    """The type of an option LOW,HIGH."""
    def parse(text):
        match = re.fullmatch("([0-9]+),([0-9]+)", text)
        if not match or not least <= int(match[1]) <= int(match[2]):
            raise argparse.ArgumentTypeError(f"{text!r} is not LOW,HIGH with {least} <= LOW <= HIGH")
        return int(match[1]), int(match[2])

    return parse


def main():
    from data import Parser, die, main_of, positive  # here, as it needs pillow, which the model does not

    torch.set_num_threads(1)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    here = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "test", "cases")

    cases = commands.add_parser("cases", help="write the test cases")
    cases.add_argument("--out", default=here)
    cases.set_defaults(run=command_cases)

    check = commands.add_parser("check", help="compute the test cases and compare with the files")
    check.add_argument("--cases", default=here)
    check.set_defaults(run=command_check)

    train = commands.add_parser("train", help="train with the random draws of the C programs")
    train.set_defaults(run=command_train)
    train.add_argument("--data", required=True, help="a dataset file")
    train.add_argument("--out", required=True, help="folder for log.csv and weights.safetensors (the EMA)")
    models = ["%s/%d" % (size, patch) for size in SIZES for patch in (2, 4, 8)]
    train.add_argument("--model", choices=models, metavar="NAME",
                       help="S/2 ... XL/8, instead of depth, width, heads and patch")
    for field in dataclasses.fields(Config):  # the image's and the classes' come from the data
        if field.name not in ("image_size", "channels", "classes", "mlp_ratio", "diffusion_steps"):
            kind = positive if field.name in ("patch", "width", "heads", "depth") else field.type
            choices = {"prediction": ("eps", "v", "flow", "x"), "v_weight": ("p2", "1"),
                       "time_embedding": ("dit", "sit", "diffusers")}.get(field.name)
            train.add_argument("--" + field.name, type=kind, default=field.default, choices=choices)
    train.add_argument("--no_grad_iters", type=pair(0), default=(0, 10), metavar="LOW,HIGH")
    train.add_argument("--grad_iters", type=pair(1), default=(1, 12), metavar="LOW,HIGH")
    train.add_argument("--batch", type=positive, default=16)
    train.add_argument("--steps", type=positive, default=100)
    train.add_argument("--lr", type=float, default=1e-4)
    train.add_argument("--warmup", type=int, default=0, help="steps over which lr grows to its value")
    train.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    train.add_argument("--lr_schedule", choices=("constant", "linear", "cosine"), default="constant")
    train.add_argument("--t_sampling", choices=("uniform", "logit_normal"), default="uniform")
    train.add_argument("--t_mean", type=float, default=0.0)
    train.add_argument("--t_std", type=float, default=1.0)
    train.add_argument("--weight_decay", type=float, default=0.0)
    train.add_argument("--grad_clip", type=float, default=0.0)
    train.add_argument("--ema", type=float, default=0.9999)
    train.add_argument("--ema_warmup", type=int, default=0)
    train.add_argument("--label_drop", type=float, default=0.1)
    train.add_argument("--hflip", type=int, default=0)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--dtype", choices=("float32", "float64"), default="float32")

    args = parser.parse_args()
    try:
        main_of(args.run, args)
    except safetensors.SafetensorError as error:
        die(error)


if __name__ == "__main__":
    main()
