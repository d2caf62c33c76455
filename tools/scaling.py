#!/usr/bin/env python3
"""How training scales over ranks: measured on this machine's cores, and a model for 8 to 512 GPUs. Prints Markdown.

    make scaling       writes test/results/scaling.md; needs Open MPI and two minutes, in which nothing else runs

Measured: one process without MPI, then 2 and 4 ranks, a thread each, in turn, the same batch for all of them; and the
all-reduce alone. n and m are fixed, so that every step is the same work.
"""
import argparse
import csv
import os
import platform
import re
import shutil
import statistics
import subprocess
import tempfile

from bench_torch import die, main_of, positive  # of this folder

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
N, M = 1, 2  # iterations without and with gradient where it is measured
MODELS = {  # name: options, batch, steps of a run
    "default, D 128, 36 tokens": (dict(image_size=24, width=128, heads=4, patch=4), 32, 30),
    "D 384, 256 tokens": (dict(image_size=32, width=384, heads=6, patch=2), 8, 5),
}
REDUCE = r"""
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv) {
    int rank, count = argc > 1 ? atoi(argv[1]) : 0;
    MPI_Init(NULL, NULL);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    float *values = calloc(count, sizeof *values);
    for (int i = 0; i < 20; i++) {
        MPI_Barrier(MPI_COMM_WORLD);
        double begin = MPI_Wtime();
        MPI_Allreduce(MPI_IN_PLACE, values, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
        if (rank == 0) printf("%g\n", 1e3 * (MPI_Wtime() - begin));
    }
    MPI_Finalize();
}
"""
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
                   OMPI_MCA_rmaps_base_oversubscribe="1", OMPI_MCA_mpi_yield_when_idle="1")

# NVIDIA's data sheets: H100 SXM (989 dense bf16 TFLOP/s; NVLink 900 GB/s, both directions together), DGX H100 (8 GPUs,
# 8 ConnectX-7 of 400 Gb/s); 100 Gb/s Ethernet, one port a machine
PEAK, USED = 989e12, 0.4
NVLINK, LATENCY, BATCH, GPUS = 450e9, 5e-6, 512, 8
NETWORKS = {"8 x 400 Gb/s a machine": 400e9, "1 x 100 Gb/s a machine": 12.5e9}


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, **options)
    if done.returncode:
        die(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def parameters(D, blocks, classes, fixed_point, channels, patch, outputs):
    """All of them, and those whose gradient is there before the fixed-point block's: post block and final layer."""
    block = 18 * D * D + 15 * D
    final = patch * patch * outputs * (D + 1) + 2 * D * D + 2 * D
    ends = D * (patch * patch * channels + 1) + 257 * D + D * D + D + (classes + 1) * D + final
    return ends + blocks * block + fixed_point * (7 * D * D + 4 * D), block + final


def flops(D, T, blocks, n, m, channels, patch, outputs, fixed_point):
    """Of a training step with one picture: model_flops in fpdm_cpu.c"""
    block, projection = T * (24 * D * D + 4 * T * D), T * 8 * D * D
    ends = T * 2 * D * patch * patch * (channels + outputs)
    modulation = 2 * D * (6 * D * blocks + 2 * D) + 2 * (256 * D + D * D)
    pixels = T * 2 * D * patch * patch * channels
    if not fixed_point:
        return 3 * (ends + modulation + blocks * block) - pixels
    layers = (blocks - 1 + m) * block + m * projection + T * 6 * D * D
    return 3 * (ends + modulation + layers) - pixels - T * 4 * D * D + n * (block + projection)


def sent(count, R):
    """Bytes that a rank sends in a ring all-reduce of fp32"""
    return 2 * (R - 1) / R * 4 * count


def measure(rounds):
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name in "Makefile", "fpdm_cpu.c":
            os.symlink(f"{ROOT}/{name}", f"{folder}/{name}")
        run("make", "train_cpu", cwd=folder)
        os.rename(f"{folder}/train_cpu", f"{folder}/one")
        run("make", "train_cpu", "MPI=1", cwd=folder)
        with open(f"{folder}/reduce.c", "w") as file:
            file.write(REDUCE)
        run("mpicc", "-O2", "reduce.c", "-o", "reduce", cwd=folder)
        for name, (sizes, batch, steps) in MODELS.items():
            ms, reduce = {1: [], 2: [], 4: []}, {2: [], 4: []}
            options = [f"--{key}={value}" for key, value in sizes.items()]
            options += [f"--batch={batch}", f"--steps={steps}", f"--no_grad_iters={N},{N}", f"--grad_iters={M},{M}",
                        "--sample_every=0", "--sample_steps=2", "--depth=3", "--warmup=0", "--optimizer=adamw"]
            for k in range(rounds):
                for R in ms:
                    out = f"{folder}/{sizes['width']}_{k}_{R}"
                    start = ["./one"] if R == 1 else ["mpirun", "-q", "-np", str(R), "./train_cpu"]
                    said = run(*start, *options, f"--out={out}", cwd=folder)
                    with open(f"{out}/log.csv") as file:
                        ms[R].append(statistics.median([float(row["ms"]) for row in csv.DictReader(file)][1:]))
                    count, _ = parameters(sizes["width"], 3, 10, 1, 3, sizes["patch"], 3)
                    assert f"{count / 1e6:.2f} million" in said, (count, said)
                    if R > 1:
                        times = run("mpirun", "-q", "-np", str(R), "./reduce", str(count), cwd=folder).split()
                        reduce[R].append(statistics.median(map(float, times[1:])))
            for R in ms:
                ratio = statistics.median(a / b for a, b in zip(ms[1], ms[R]))
                low, high = min(a / b for a, b in zip(ms[1], ms[R])), max(a / b for a, b in zip(ms[1], ms[R]))
                lines.append(f"| {name}, batch {batch} | {R} | {statistics.median(ms[R]):.1f} | " + (
                    "1 | 0 | |" if R == 1 else f"{ratio:.2f} ({low:.2f} to {high:.2f}) | {sent(count, R) / 1e6:.2f} | "
                    f"{statistics.median(reduce[R]):.2f} |"))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.error = lambda message: die(f"{message}; see --help")
    rounds = parser.parse_args().rounds
    if not shutil.which("mpirun") or not shutil.which("mpicc"):
        die("needs Open MPI: apt-get install libopenmpi-dev openmpi-bin")
    measured = measure(rounds)
    with open("/proc/cpuinfo") as file:
        found = re.search(r"model name\s*: (.*)", file.read())
    processor = found.group(1) if found else platform.machine()
    D, T, latent = 1152, 256, dict(channels=4, patch=2, outputs=8)
    fpdm, early = parameters(D, 3, 1000, 1, **latent)
    dit, _ = parameters(D, 28, 1000, 0, **latent)
    work = (flops(D, T, 3, 5, 6.5, fixed_point=1, **latent), flops(D, T, 28, 0, 0, fixed_point=0, **latent))
    print(f"""# Data parallel: measured, and on paper

`make scaling`

## Measured: ranks on the cores of one machine

{processor}, {os.cpu_count()} cores; a thread a rank; n {N}, m {M}; the same batch whatever the number of ranks.
Medians of {rounds} rounds in which 1 (one process, built without MPI), 2 and 4 ranks take turns; the speed-up is the
median of the rounds' ratios, with its range. More ranks than cores: oversubscribed, which shows that it works, not what
it gains. Sent: bytes of gradient that a rank sends in a ring, 2 (R-1)/R · 4 · parameters. All-reduce: `MPI_Allreduce`
of so many floats alone.

| model | ranks | ms a step | speed-up | MB sent a rank and step | all-reduce alone, ms |
|---|---|---|---|---|---|""")
    print(*measured, sep="\n")
    print(f"""
## On paper: 8 to 512 GPUs. An estimate, nothing here was run

XL/2 on latents of 32x32x4, 1000 labels, {BATCH} pictures a step in all. By the formula of `tools/scaling.py`, which the
models above check: FPDM {fpdm / 1e6:.1f} M parameters, DiT {dit / 1e6:.1f} M: {dit / fpdm:.1f} times as many to reduce.

- compute = {BATCH}/R · arithmetic of a picture / ({USED} · {PEAK / 1e12:.0f} TFLOP/s):
  FPDM {work[0] / 1e12:.2f} TFLOP (the mean over n in 0..10 and m in 1..12), DiT {work[1] / 1e12:.2f}, by `model_flops`.
  {USED} is an assumption, and optimistic for a few pictures a GPU.
- all-reduce = 2 (R-1)/R · 4 bytes · parameters / bandwidth + 2 (R-1) · {LATENCY * 1e6:.0f} us (a ring; the latency is
  an assumption; NCCL takes trees where latency rules).
- bandwidth: up to {GPUS} GPUs NVLink's {NVLINK / 1e9:.0f} GB/s in one direction (H100 SXM data sheet: 900 GB/s in
  both); between machines the lower of that and what a machine's ports carry, {GPUS} rings sharing them: 400 GB/s (DGX
  H100 data sheet: 8 ConnectX-7 of 400 Gb/s) or 12.5 GB/s (one port of 100 Gb/s).
- efficiency = compute / (compute + all-reduce): the program does not overlap the two.
""")
    for network, ports in NETWORKS.items():
        print(f"**{network}**\n\n| GPUs | pictures a GPU | compute ms, FPDM / DiT | all-reduce ms, FPDM / DiT | "
              "efficiency, FPDM / DiT |\n|---|---|---|---|---|")
        for R in 8, 16, 32, 64, 128, 256, 512:
            bandwidth = NVLINK if R <= GPUS else min(NVLINK, ports)
            compute = [BATCH / R * w / (USED * PEAK) for w in work]
            reduce = [sent(count, R) / bandwidth + 2 * (R - 1) * LATENCY for count in (fpdm, dit)]
            pairs = [" / ".join(f"{1e3 * x:.1f}" for x in pair) for pair in (compute, reduce)]
            efficiency = " / ".join(f"{100 * c / (c + r):.0f} %" for c, r in zip(compute, reduce))
            print(f"| {R} | {BATCH // R} | {pairs[0]} | {pairs[1]} | {efficiency} |")
        print()
    print(f"""Overlapping the all-reduce with the backward pass could hide at most {100 * early / fpdm:.0f} % of FPDM's
bytes behind the iterations: the final layer's and the post block's. The gradients of the block that is iterated are
complete only after all m iterations, when the pre block's backward pass alone is left. There is no machinery for
it.""")


if __name__ == "__main__":
    main_of(main)
