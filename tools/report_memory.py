#!/usr/bin/env python3
"""Device memory of a training step at XL/2, without a GPU: what fpdm.cu allocates, by its own accounting, beside what
PyTorch would keep for the same model, counted tensor by tensor. Prints Markdown; needs g++ and torch 2. Two minutes.

    make memory                                 writes test/results/memory.md
    python3 tools/report_memory.py              prints it
"""
import os
import subprocess
import tempfile

from bench_torch import die, needs_torch_2  # of this folder

try:
    import torch
except ImportError as error:
    die(f"needs the Python package {error.name}: pip install -r tools/requirements.txt")
needs_torch_2(torch)
from torch._subclasses.fake_tensor import FakeTensorMode

import reference

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODELS = {"FPDM XL/2, m 12": dict(fixed_point=1, m=12), "FPDM XL/2, m 6": dict(fixed_point=1, m=6),
          "DiT XL/2": dict(fixed_point=0, m=1)}
BATCHES = (32, 64)

# The sizes that model_create adds up before it allocates, with the harness in place of CUDA, an H100's multiprocessors
PROGRAM = r"""
#include "fpdm.cu"
int main(int argc, char **argv) {
    Options o;
    Model m = {};
    options_default(&o, BENCH);
    options_parse(&o, BENCH, argc, argv, "");
    gpu_open();
    gpu.sms = 132;
    m.config = o.model, m.batch = o.batch, m.max_m = o.bench_m, m.recompute = o.recompute, m.training = m.half = 1;
    m.a.layer = (Layer *)xcalloc(config_blocks(&m.config) + m.max_m + 1, sizeof *m.a.layer, "layers");
    m.n_params = params_point(&m.p, &m.config, NULL, NULL).size;
    size_t activations = activations_point(&m, NULL);
    printf("%zu %zu\n", params_bytes(&m) + workspace_floats(m.config.width) * sizeof(float), activations);
}
"""


def build(folder):
    source, program = os.path.join(folder, "memory.cpp"), os.path.join(folder, "memory")
    with open(source, "w") as f:
        f.write(PROGRAM)
    subprocess.run(["g++", "-x", "c++", "-std=c++17", "-w", "-I", ROOT, source,
                    os.path.join(ROOT, "test", "cuda_emu.cpp"), "-o", program], check=True)
    return program


def ours(program, fixed_point, m, batch, recompute):
    """GB of parameters of all kinds and the workspace; of activations."""
    options = dict(width=1152, heads=16, depth=28, patch=2, image_size=32, channels=4, classes=1000, learn_sigma=0,
                   fixed_point=fixed_point, m=m, batch=batch, recompute=recompute)
    words = subprocess.run([program, *(f"--{k}={v}" for k, v in options.items())], check=True, stdout=subprocess.PIPE,
                           text=True).stdout.split()
    return [int(word) / 1e9 for word in words]


def theirs(fixed_point, m, batch):
    """GB of weights, gradients, Adam's moments and the EMA; of what autograd saves for the backward pass: every storage
    once, parameters left out. Nothing is computed: tensors are fake."""
    cfg = reference.Config(image_size=32, channels=4, width=1152, heads=16, classes=1000, depth=28, prediction="flow",
                           fixed_point=fixed_point)
    storages = {}
    with FakeTensorMode(), torch.device("cpu"):
        model = reference.FPDM(cfg)
        x0, noise = torch.randn(2, batch, 4, 32, 32)
        t, y = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                storages[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as tools/bench_torch.py
                loss = reference.diffusion_loss(cfg, None, model, x0, noise, t, y, 0, m)[0].mean()
        count = sum(p.numel() for p in model.parameters())
        saved = sum(storage.nbytes() for storage in storages.values())
        del loss
    return 5 * 4 * count / 1e9, saved / 1e9


def main():
    lines = ["# Device memory of a training step", "",
             f"`make memory`; torch {torch.__version__}. Latents 32x32x4, 256 tokens, bf16, GB (1e9 bytes). No GPU "
             "took part. fpdm.cu: what it allocates, all of it before the first step. PyTorch, an estimate: fp32 "
             "weights, gradients, Adam's moments and the EMA, and the tensors that autograd saves under bf16 autocast "
             "with flash attention, each storage once; without what lives for a moment only, the allocator's gaps and "
             "CUDA's own. `torch.compile` saves less than that. m: iterations with gradient.", "",
             "| model | batch | fpdm.cu: parameters | activations | in all | with --recompute 1 | "
             "PyTorch: parameters | saved | in all | fpdm.cu / PyTorch |", "|" + "---|" * 10]
    with tempfile.TemporaryDirectory() as folder:
        program = build(folder)
        for name, model in MODELS.items():
            for batch in BATCHES:
                kept, again = ours(program, batch=batch, recompute=0, **model), ours(program, batch=batch, recompute=1,
                                                                                    **model)
                torch_s = theirs(batch=batch, **model)
                figures = [*kept, sum(kept), sum(again), *torch_s, sum(torch_s)]
                lines.append(f"| {name} | {batch} | " + " | ".join(f"{x:.1f}" for x in figures)
                             + f" | {sum(kept) / sum(torch_s):.2f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
