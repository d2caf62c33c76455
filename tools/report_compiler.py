#!/usr/bin/env python3
"""What the compiler says of fpdm.cu's kernels, without a GPU: registers, shared memory, spills, occupancy, and how many
operations they do for a byte. Prints the report, Markdown. nvcc compiles for two architectures: about a minute.

    make compiler                                  writes test/results/compiler.md
    python3 tools/report_compiler.py [NVCC]        prints it
"""
import re
import subprocess
import sys
import tempfile

ARCHS = {"sm_90a": 228, "sm_80": 164}  # KiB of shared memory of a multiprocessor; 64 warps, 32 blocks, 65536 registers
PEAK, MEMORY, SMS = 989e12, 4.8e12, 132  # H200: dense bf16 FLOP/s and bytes/s of its data sheet; multiprocessors
SIZES = {"S": (384, 6), "B": (768, 12), "XL": (1152, 16)}
BATCH, TOKENS = 64, 256
EPILOGUES = ("STORE", "FLOAT", "GELU", "GATED", "DGELU", "WEIGHT")


def launch(name, args):
    """Threads of a block and bytes of dynamic shared memory, as fpdm.cu launches this kernel."""
    if name == "matmul_bf16":
        return 128, 2 * 3 * int(args[0]) * 32 * 2
    if name == "matmul_fp32":
        return 128, 2 * 16 * 68 * 4
    if name.startswith("attention") and len(args) > 1:
        rows, size = (64, 2) if args[0] == "bf16" else (32, 4)
        row, backward = int(args[1]) * size + 16, len(args) == 3
        return 2 * rows, row * rows * (4 if backward else 3) + (8 * rows if backward and args[2] == "true" else 0)
    return {"residual_kernel": (1024, 256), "loss_kernel": (512, 256),
            "anderson_products_kernel": (512, 256), "norm_kernel": (256, 256),
            "condition_backward_kernel": (128, 0), "column_sums_kernel": (128, 0)}.get(name, (256, 0))


def occupancy(shared_kib, threads, registers, shared):
    """Blocks of a multiprocessor: registers come in 256 a warp, warps in fours, shared memory in 128 bytes, and every
    block takes 1 KiB more of it."""
    warps = threads // 32
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4 // warps
    by_shared = shared_kib * 1024 // (-(-shared // 128) * 128 + 1024)
    return min(32, 64 // warps, by_registers, by_shared)


def decode(symbol):
    """_Z11matmul_bf16ILi64ELb0EE... -> its name and template arguments."""
    length, rest = re.match(r"_Z(\d+)(.*)", symbol).groups()
    name, rest = rest[:int(length)], rest[int(length):]
    if not rest.startswith("I"):
        return name, []
    args, rest = [], rest[1:]
    while not rest.startswith("E"):
        part = re.match(r"Li(\d+)E|Lb([01])E|(13__nv_bfloat16)|(f)", rest)
        number, boolean, half, _ = part.groups()
        args.append(number or (boolean and ("false", "true")[int(boolean)]) or ("bf16" if half else "fp32"))
        rest = rest[part.end():]
    return name, args


def kernels(nvcc, arch):
    """(name, arguments) -> registers, static shared memory, stack, spilled bytes."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"arch={arch.replace('sm', 'compute')},code={arch}"
        text = subprocess.run([nvcc, "-x", "cu", "-std=c++17", "-O3", "-gencode", code, "-cubin", "-Xptxas", "-v",
                               "-DPROGRAM=TRAIN", "fpdm.cu", "-o", folder + "/fpdm.cubin"], check=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    found = {}
    for symbol, body in re.findall(r"Compiling entry function '(\w+)'(.*?Used \d+ registers[^\n]*)", text, re.S):
        read = lambda pattern: sum(map(int, re.findall(pattern, body)))
        name, args = decode(symbol)
        found[name, tuple(args)] = (read(r"Used (\d+) registers"), read(r"(\d+) bytes smem"),
                                    read(r"(\d+) bytes stack frame"), read(r"(\d+) bytes spill"))
    return found


def table(header, rows):
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header),
            *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def resources(found, arch):
    rows = []
    for (name, args), (registers, static, stack, spills) in sorted(found.items()):
        threads, dynamic = launch(name, args)
        blocks = occupancy(ARCHS[arch], threads, registers, static + dynamic)
        shown = list(args)
        if name.startswith("matmul"):
            shown[-1] = EPILOGUES[int(shown[-1])]
        rows.append((name + (f"<{', '.join(shown)}>" if shown else ""), threads, registers, static, dynamic,
                     f"{stack} / {spills}", blocks, blocks * threads // 32))
    return table(("kernel", "threads", "registers", "static B", "dynamic B", "stack / spilled B", "blocks an SM",
                  "warps an SM"), rows)


def matmuls(found):
    """Forward, dx and dw of every layer: FLOP for a byte when memory is read and written once, and between L2 and the
    multiprocessors, where every tile reads its rows of both operands."""
    rows, M = [], BATCH * TOKENS
    for size, (D, _) in SIZES.items():
        for what, N, K in (("qkv", 3 * D, D), ("proj", D, D), ("fc1", 4 * D, D), ("fc2", D, 4 * D)):
            for form, m, n, k, out, epilogue in (("forward", M, N, K, 2, ("false", "false", "0")),
                                                 ("dx", M, K, N, 2, ("false", "true", "0")),
                                                 ("dw", N, K, M, 8, ("true", "true", "5"))):
                tiles = lambda t: -(-m // t) * -(-n // t)
                t = 128 if form == "dw" or tiles(128) >= SMS else 64
                registers, static, _, _ = found["matmul_bf16", (str(t), *epilogue)]
                threads, dynamic = launch("matmul_bf16", (t,))
                slots = SMS * occupancy(ARCHS["sm_90a"], threads, registers, static + dynamic)
                splits = 1
                if form == "dw":  # as matmul() chooses
                    best, room = 0, max(16 * D * D, 2 * SMS * 128 * 130)
                    for s in range(1, 17):
                        if s * (m * n + m) > room or s * 256 > k:
                            break
                        waves = tiles(t) * s / (SMS * (2 if t == 128 else 4))
                        if waves / -(-waves // 1) > 1.05 * best:
                            best, splits = waves / -(-waves // 1), s
                flop, waves = 2 * m * n * k, tiles(t) * splits / slots
                memory = 2 * (m * k + n * k) + out * m * n
                l2 = 2 * tiles(t) * 2 * t * k + out * m * n
                rows.append((f"{size} {what} {form}", f"{m}x{n}x{k}", t, splits, f"{waves:.2f}",
                             f"{100 * waves / -(-waves // 1):.0f} %", f"{flop / memory:.0f}", f"{flop / l2:.0f}",
                             f"{1e6 * max(flop / PEAK, memory / MEMORY):.0f}"))
    return table(("product", "MxNxK", "tile", "splits", "waves", "full", "FLOP/B memory", "FLOP/B L2", "floor, us"),
                 rows)


def attentions():
    rows, T = [], TOKENS
    for size, (D, H) in SIZES.items():
        hd = D // H
        HD = next(h for h in (32, 64, 80, 128) if hd <= h)
        # T²·hd multiply-adds: needed, done; arrays (B,T,D): in memory; read and written by a block, as rows of tiles
        for form, useful, done, arrays, tiles in (("forward", 4, 4, 4, 2 + 2 * T / 64),
                                                  ("backward", 10, 14, 8, 7 + 4 * T / 64)):
            flop = BATCH * H * T * T * hd * useful
            memory = BATCH * T * D * 2 * arrays
            l2 = BATCH * T * D * 2 * tiles
            rows.append((f"{size} {form}", f"{BATCH}x{T}x{D}x{H}", f"{100 * useful * hd / done / HD:.0f} %",
                         f"{flop / memory:.0f}", f"{flop / l2:.0f}",
                         f"{1e6 * max(BATCH * H * T * T * HD * done / PEAK, memory / MEMORY):.0f}"))
    return table(("attention", "BxTxDxH", "useful FLOP", "FLOP/B memory", "FLOP/B L2", "floor, us"), rows)


def main():
    nvcc = sys.argv[1] if len(sys.argv) > 1 else "nvcc"
    version = re.search(r"release.*", subprocess.run([nvcc, "--version"], stdout=subprocess.PIPE, text=True).stdout)
    found = {arch: kernels(nvcc, arch) for arch in ARCHS}
    lines = ["# What the compiler says of fpdm.cu", "", f"`make compiler`; nvcc {version.group()}. No GPU took part: "
             "all of this is read off the compiler's output or counted, nothing is timed.", "",
             "## Work for a byte, bf16", "", f"{BATCH} pictures of {TOKENS} tokens. An H200 does {PEAK / 1e12:.0f} "
             f"dense bf16 TFLOP/s (with `wgmma`; `mma.sync` reaches about 2/3) and moves {MEMORY / 1e12:.1f} TB/s: "
             f"below {PEAK / MEMORY:.0f} FLOP/B memory is the limit. FLOP/B memory: every operand once; FLOP/B L2: "
             "what the tiles read and write. Floor: the longer of both times at these rates. Waves: blocks over those "
             f"that {SMS} multiprocessors hold at once; full: of what they could do in the waves begun.", ""]
    lines += matmuls(found["sm_90a"]) + attentions()
    lines += ["Useful FLOP: the rest is padding of the head size (72 to 80) and, in the backward pass, scores that "
              "both kernels make.", ""]
    for arch in ARCHS:
        lines += [f"## Kernels on {arch}", "", "matmul: tile, first and second operand with k as the slow dimension, "
                  "epilogue; attention: type, padded head size, whether rows are keys.", ""]
        lines += resources(found[arch], arch)
    print("\n".join(lines).rstrip())


if __name__ == "__main__":
    main()
