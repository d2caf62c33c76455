#!/usr/bin/env python3
"""Compiles fpdm.cu's kernels for AMD's GPUs, without ROCm and without a GPU, and prints what the compiler says of each:
Markdown. Fails if one does not compile, or is missing. Needs a clang that knows the architectures: 19 knows all three,
14 gfx90a alone. A minute of a core.

    make hip                                  prints it, and writes test/results/hip.md
    python3 tools/report_hip.py [CLANG]
"""
import re
import shutil
import subprocess
import sys

from report_compiler import EPILOGUES, decode, launch, table

ARCHS = {"gfx90a": 64, "gfx942": 64, "gfx1100": 32}  # lanes of a wave
LDS = 65536  # bytes that a block may have, on all three


def kernels(clang, arch):
    """(name, arguments) -> the fields of its metadata; None if clang does not know the architecture."""
    run = subprocess.run([clang, "-x", "hip", "-std=c++17", "-O3", f"--offload-arch={arch}", f"-DWARP={ARCHS[arch]}",
                          "-nogpuinc", "-nogpulib", "--cuda-device-only", "-Wno-unknown-pragmas", "-DPROGRAM=TRAIN",
                          "-S", "fpdm.cu", "-o", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if re.search("unsupported HIP gpu architecture|[Ii]nvalid target ID", run.stderr):
        return None
    if run.returncode:
        sys.exit(f"error: {arch}: {run.stderr.strip()}")
    sys.stderr.write(run.stderr)  # warnings
    found = {}
    for entry in re.split(r"\n  - ", run.stdout[run.stdout.index("\namdhsa.kernels:"):])[1:]:
        fields = dict(re.findall(r"\.(\w+): +(\S+)", entry))
        if "symbol" in fields:
            name, args = decode(fields["name"])
            found[name, tuple(args)] = {k: int(v) for k, v in fields.items() if v.isdigit()}
    return found


def main():
    known = [c for c in ("clang++-19", "clang++-18", "clang++-17", "clang++") if shutil.which(c)]
    clang = sys.argv[1] if len(sys.argv) > 1 else known[0] if known else "clang++"
    if not shutil.which(clang):
        sys.exit(f"error: {clang} not found: say make hip CLANG=/path/to/clang++")
    version = subprocess.run([clang, "--version"], stdout=subprocess.PIPE, text=True).stdout.splitlines()[0]
    found = {arch: kernels(clang, arch) for arch in ARCHS}
    compiled = {arch: have for arch, have in found.items() if have}
    for arch in set(ARCHS) - set(compiled):
        print(f"skipped: {arch}, which {clang} does not know", file=sys.stderr)
    if not compiled:
        sys.exit(1)
    with open("fpdm.cu") as file:
        wanted = set(re.findall(r"__global__ void (?:__launch_bounds__\([^\n]*\))?\s*(\w+)\(", file.read()))
    wanted -= {"matmul_wgmma"}  # Hopper's
    for arch, have in compiled.items():
        if {name for name, _ in have} != wanted:
            sys.exit(f"error: {arch}: missing {wanted - {name for name, _ in have}}, or more than "
                     "tools/report_hip.py finds in the source")
    rows, spilled = [], {arch: 0 for arch in compiled}
    for name, args in sorted(set().union(*compiled.values())):
        shown = list(args)
        if name.startswith("matmul"):
            shown[-1] = EPILOGUES[int(shown[-1])]
        cells, static = [], 0
        for arch, have in compiled.items():
            k = have[name, args]
            spill, static = k["vgpr_spill_count"] + k["sgpr_spill_count"], k["group_segment_fixed_size"]
            spilled[arch] += spill > 0
            cells.append(f"{k['vgpr_count']} / {k['sgpr_count']} / {spill}")
        lds = static + launch(name, args, LDS)[1]
        rows.append((name + (f"<{', '.join(shown)}>" if shown else ""), f"{lds}{' **too much**' if lds > LDS else ''}",
                     *cells))
    print("# fpdm.cu compiled for AMD's GPUs\n\nBy `make hip`, with " + version + ": " + ", ".join(
        f"{arch} {len(have)} kernels, {spilled[arch]} with spills" for arch, have in compiled.items())
        + ". None has run on such a GPU. `loss_kernel` and `sample_step_kernel` call exp, log and tanh in double from "
        f"ROCm's library: their registers are a guess. A block has at most {LDS} bytes of LDS: what is marked is "
        "refused at its launch.\n\nIn each column: VGPRs (on CDNA with AGPRs) / SGPRs / registers spilled.\n")
    print("\n".join(table(("kernel", "LDS", *compiled), rows)), end="")


if __name__ == "__main__":
    main()
