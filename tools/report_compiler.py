#!/usr/bin/env python3
"""What the compiler says of fpdm.cu's kernels, without a GPU: registers, shared memory, spills, occupancy, and how many
operations they do for a byte. Prints the report, Markdown. nvcc compiles for two architectures: about a minute.

    make compiler                                  writes test/results/compiler.md
    python3 tools/report_compiler.py [NVCC]        prints it
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile

ARCHS = {"sm_90a": 228, "sm_80": 164}  # KiB of shared memory of a multiprocessor; 64 warps, 32 blocks, 65536 registers
PEAK, MEMORY, SMS = 989e12, 4.8e12, 132  # H200: dense bf16 FLOP/s and bytes/s of its data sheet; multiprocessors
SIZES = {"S": (384, 6), "B": (768, 12), "XL": (1152, 16)}
BATCH, TOKENS = 64, 256
EPILOGUES = ("STORE", "FLOAT", "GELU", "GATED", "DGELU", "WEIGHT")


def launch(name, args, room):
    """Threads of a block and bytes of dynamic shared memory, as fpdm.cu launches this kernel where a block may have
    `room` bytes; attention at 256 tokens, layernorm_backward_kernel at XL's width."""
    if name == "matmul_bf16":
        return 128, 2 * 3 * int(args[0]) * 32 * 2
    if name == "matmul_wgmma":  # four steps of both tiles, ones, what eight warps stage, barriers
        return 384, 2 * (4 * (128 + 192) * 64 + 8 * 64) + 4 * 8 * 16 * 104 + 8 * 10
    if name == "matmul_fp32":
        return 128, 2 * 16 * 68 * 4
    if name == "layernorm_backward_kernel":  # two stages of as many rows as let two blocks live side by side, at most 8
        D = SIZES["XL"][0]
        row = D * 2 * (4 + (2 if args[0] == "bf16" else 4))
        return 32 * min(16, -(-D // 128)), max(1, min(8, (room - 1024) // 2 // (2 * row + 16))) * (2 * row + 16)
    if name.startswith("attention"):
        size, row, small = tiles(*args)
        if name == "attention_kernel":  # rows, and two tiles of columns: k and v
            warps, columns = (8, 64) if small else (4, 32)
            return 32 * warps, size * row * (16 * warps + 4 * columns)
        keys, queries = 32 if small else 16, 128 // size  # of a warp; of a tile
        shared = lambda warps: 8 * 256 + size * ((4 if small else 2) * queries * row +
                                                 warps * keys * (2 * row + queries + 8))
        choices = [warps for warps in (8, 4, 2, 1) if warps * keys >= 32]
        warps = next((warps for warps in choices if shared(warps) <= room), choices[-1])
        return 32 * warps, shared(warps)
    return {"residual_kernel": (1024, 256), "loss_kernel": (512, 256),
             "anderson_products_kernel": (512, 256), "norm_kernel": (256, 256), "muon_momentum_kernel": (256, 256),
             "muon_start_kernel": (256, 256),
             "condition_backward_kernel": (128, 0), "column_sums_kernel": (128, 0),
             "patches_kernel": (256, 16384)}.get(name, (256, 0))


def tiles(dtype, HD):
    """Of attention's Tiles: bytes of an element, elements in a row of a tile, whether registers allow large ones."""
    HD, size = int(HD), 2 if dtype == "bf16" else 4
    return size, HD + (0 if HD * size // 16 % 2 else 16 // size), size == 2 and HD <= 72


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


def compiled(nvcc, arch, cubin):
    """Compiles fpdm.cu; returns what ptxas says."""
    code = f"arch={arch.replace('sm', 'compute')},code={arch}"
    done = subprocess.run([nvcc, "-x", "cu", "-std=c++17", "-O3", "-gencode", code, "-cubin", "-Xptxas", "-v",
                           "-DPROGRAM=TRAIN", "fpdm.cu", "-o", cubin], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    return done.stdout if done.returncode == 0 else sys.exit(f"{done.stdout}report_compiler.py: {nvcc} failed")


def kernels(text):
    """What ptxas says -> (name, arguments) -> registers, static shared memory, stack, spilled bytes."""
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
        if name == "matmul_wgmma" and arch != "sm_90a":
            continue  # empty there
        threads, dynamic = launch(name, args, 1024 * (ARCHS[arch] - 1))
        blocks = occupancy(ARCHS[arch], threads, registers, static + dynamic)
        shown = list(args)
        if name.startswith("matmul"):
            shown[-1] = EPILOGUES[int(shown[-1])]
        rows.append((name + (f"<{', '.join(shown)}>" if shown else ""), threads, registers, static, dynamic,
                     f"{stack} / {spills}", blocks, blocks * threads // 32))
    return table(("kernel", "threads", "registers", "static B", "dynamic B", "stack / spilled B", "blocks an SM",
                  "warps an SM"), rows)


def schedule(form, m, n, k, D):
    """How matmul() shares a product out on Hopper: rows and columns of what one or two multiprocessors work on, splits,
    the share of their time that is used in the waves begun, waves, the share of a tile that lies in the matrix,
    and the share of all tiles that is split."""
    count = lambda rows, columns: -(-m // rows) * -(-n // columns)
    down, across = -(-m // 128), -(-n // 192)
    pairs, whole = down // 2 * across + down % 2 * -(-across // 2), 0
    large = m >= 128 and n >= 128 if form == "dw" else count(128, 128) >= SMS
    if large and (form == "dw" or 2 * pairs >= SMS):
        rows, columns, slots, tiles = 256, 192, SMS // 2, pairs
        whole = tiles // slots * slots
    else:
        rows = columns = 128 if large else 64
        slots, tiles = SMS * (2 if large else 4), count(rows, columns)
    splits, best, room = 1, 1e9, max(16 * D * (D + 1), 2 * SMS * 128 * 130)
    for s in range(1, 33 if form == "dw" else 2):
        if s > 1 and (s * (m * n + m) > room or s * 256 > k):
            break
        time = whole / slots + -(-(tiles - whole) * s // slots) / s
        if s > 1:  # partial sums come and go, at 200 operations a byte
            time += s * 800 * m * n * (tiles - whole) / (k * rows * columns * tiles * slots)
        if time < best / 1.05:
            best, splits = time, s
    area, waves = tiles * rows * columns, whole / slots + -(-(tiles - whole) * splits // slots) / splits
    split = 0 if splits == 1 else 1 - whole / tiles
    return rows, columns, splits, tiles / slots / waves, tiles / slots, m * n / area, split


def matmuls():
    """Forward, dx and dw of every layer: FLOP for a byte when memory is read and written once, and between L2 and the
    multiprocessors, where every tile, or pair of tiles, reads its rows of both operands."""
    rows, M = [], BATCH * TOKENS
    for size, (D, _) in SIZES.items():
        for what, N, K in (("qkv", 3 * D, D), ("proj", D, D), ("fc1", 4 * D, D), ("fc2", D, 4 * D)):
            for form, m, n, k, out in (("forward", M, N, K, 2), ("dx", M, K, N, 2), ("dw", N, K, M, 8)):
                tm, tn, splits, full, waves, inside, _ = schedule(form, m, n, k, D)
                flop, memory = 2 * m * n * k, 2 * (m * k + n * k) + out * m * n
                l2 = 2 * -(-m // tm) * -(-n // tn) * (tm + tn) * k + out * m * n
                rows.append((f"{size} {what} {form}", f"{m}x{n}x{k}", f"{tm}x{tn}", splits, f"{waves:.2f}",
                             f"{100 * full:.0f} %", f"{100 * inside:.0f} %", f"{flop / memory:.0f}", f"{flop / l2:.0f}",
                             f"{1e6 * max(flop / PEAK, memory / MEMORY):.0f}"))
    return table(("product", "MxNxK", "tile", "splits", "waves", "full", "inside", "FLOP/B memory", "FLOP/B L2",
                  "floor, us"), rows)


def estimate():
    """A training step of FPDM XL/2, batch 64, n 5, m 6 on an H100: every kernel of it with what it does and moves."""
    D, H, M, n, m, params = 1152, 16, BATCH * TOKENS, 5, 6, 85e6
    wgmma, mma_sync, attention, memory, gap = 650e12, 400e12, 0.7, 0.85 * 3.35e12, 1e-6  # the assumptions
    N, forward, backward = M * D, n + m + 2, m + 2  # blocks: pre, post and the iterations
    kept = m + 2  # forward passes that keep what goes into gelu and gates
    rows, total = [], [0, 0, 0]

    def add(name, count, size, form="", a=0, b=0, extra=0, done=0, least=0):
        """A product of a·D by b·D with M, in D x D; size: bytes an element of (B,T,D); or a kernel that takes at least
        so many seconds for what it has done."""
        flop, moved = 2 * M * D * D * a * b + done, size * N + extra + (2 * D * D * a * b if form else 0)
        fast = slow = max(least, moved / memory)
        sums = 0
        if form:
            shape = (a * D, b * D, M) if form == "dw" else (M, a * D, b * D)
            tm, tn, splits, full, _, inside, split = schedule(form, *shape, D)
            result = 4 * D * D * a * b if form == "dw" else 0
            moved += result * (split * splits + 2 * (1 - split))
            sums = result * split * (splits + 2) / memory
            fast, slow = (max(flop / rate, moved / memory) + sums for rate in (wgmma * full * inside, mma_sync * 0.9))
        total[0] += count * fast
        total[1] += count * slow
        total[2] += count * (2 if sums else 1)
        rows.append((name, f"{count:g}", f"{flop / 1e9:.0f}" if flop else "", f"{moved / 1e6:.0f}", f"{1e6 * fast:.0f}",
                     f"{1e3 * count * fast:.2f}", f"{1e3 * count * slow:.2f}"))

    def linear(name, count, size, out, into, form="forward"):
        add(name, count, size, form, out, into)

    keep = kept / forward  # bytes that only the passes with gradient write, spread over all
    add("layernorm_modulate", 2 * forward, 6)
    linear("qkv", forward, 2 + 6, 3, 1)
    busy = lambda back: max(attention_units(D, H, back)[1]) / attention
    add("attention", forward, 8, done=attention_units(D, H, False)[0], least=busy(False))
    linear("proj, GATED", forward, 2 + 8 + 2 * keep, 1, 1)
    linear("fc1, GELU", forward, 2 + 8 + 8 * keep, 4, 1)
    linear("fc2, GATED", forward, 8 + 8 + 2 + 2 * keep, 1, 4)
    linear("fp1, GELU and add", n + m, 2 + 8 + 4 + 4 * m / (n + m), 2, 1)
    linear("fp2, FLOAT", n + m, 4 + 4, 1, 2)
    add("layernorm_backward, gate alone", m + 1, 8)
    linear("dx of fc2, DGELU", backward, 2 + 24, 4, 1, "dx")
    linear("dw of fc2", backward, 2 + 8, 1, 4, "dw")
    linear("dx of fc1", backward, 8 + 2, 1, 4, "dx")
    linear("dw of fc1", backward, 8 + 2, 4, 1, "dw")
    add("layernorm_backward with the gate below", backward, 20)
    add("layernorm_backward", backward, 16 + (2 * m + 4) / backward)  # a copy for fp2; the gate of the last iteration
    add("column_sums", 3 * backward, 0.4)
    linear("dx of proj", backward, 4, 1, 1, "dx")
    linear("dw of proj", backward, 4, 1, 1, "dw")
    add("attention_backward", backward, 16, done=attention_units(D, H, True)[0], least=busy(True))
    linear("dx of qkv", backward, 6 + 2, 1, 3, "dx")
    linear("dw of qkv", backward, 6 + 2, 3, 1, "dw")
    linear("dx of fp2, DGELU and sum", m, 2 + 4 + 16 + 8, 2, 1, "dx")
    linear("dw of fp2", m, 2 + 4, 1, 2, "dw")
    add("convert h, du_sum", 5, 6)
    linear("dw of fp1", m, 4 + 2, 2, 1, "dw")
    linear("dx of fp1, FLOAT", m - 1, 4 + 4, 1, 2, "dx")
    linear("injection: forward", 1, 4, 1, 1)
    linear("injection: its part of fp1", 1, 2 + 8, 2, 1)
    linear("injection: dx", 1, 4 + 2, 1, 2, "dx")
    linear("injection: dw", 1, 4 + 2, 2, 1, "dw")
    add("gradients zeroed, norm, AdamW and EMA", 3, 0, extra=params * (4 + 4 + 38) / 3)
    rows.append(("all of these", f"{total[2]:g}", "", "", "", f"{1e3 * total[0]:.1f}", f"{1e3 * total[1]:.1f}"))
    rows.append(("with 1 us between kernels", "", "", "", "", f"{1e3 * (total[0] + gap * total[2]):.1f}",
                 f"{1e3 * (total[1] + gap * total[2]):.1f}"))
    return ["## Estimate of a training step, not a measurement", "",
            "Since 2026-11-26 there is a measurement on an H100: `test/results/nvidia-h100-80gb-hbm3.md`. "
            f"FPDM XL/2, batch {BATCH}, {TOKENS} tokens, n {n}, m {m}, one pre and one post block, on an H100. Time of "
            f"a kernel = max(FLOP / rate, bytes / {memory / 1e12:.2f} TB/s). Assumed: {wgmma / 1e12:.0f} TFLOP/s for "
            f"`wgmma`, times the shares of full waves and of tiles inside above; {mma_sync / 1e12:.0f} for "
            f"`mma.sync`, times 0.9; attention at {attention:.0%} of what limits it above; memory at 85 % of its data "
            "sheet. Bytes: each operand and result once; a weight gradient's partial sums, written by the product, are "
            "read and added by a kernel of their own, which is in the product's time. Left out: conditioning, patch "
            "and final layers, what does not overlap at the ends of kernels, clocks that fall under load.", "",
            *table(("kernel", "launches", "GFLOP", "MB", "us", "ms a step, wgmma", "ms a step, mma.sync"), rows)]


def attention_units(D, H, backward):
    """FLOP done, and seconds that tensor cores, shared memory and exponentials need for it, for all heads of the batch.
    Of a warp: mma (16x8x16; one of 8 channels counts half) and fragments of 512 bytes (ldmatrix): forward for 16 rows
    and 64 columns, backward for 32 keys and 32 queries, with their part of dq, which is made 16 queries and half of the
    channels at a time."""
    HD = next(h for h in (32, 64, 72) if D // H <= h)
    K, N = -(-HD // 16), HD // 8
    if backward:
        mma, fragments, scores = 8 * N + 8 * N + 4 * N, 2 * K * 4 + 2 * N + 8 + 2 * N + 4, 32 * 32  # 4: dS is stored
    else:
        mma, fragments, scores = 4 * N + 4 * N, K * 5 + 2 * N, 16 * 64
    times = BATCH * H * TOKENS * TOKENS / scores
    clock = PEAK / (SMS * 4096)
    return times * mma * 4096, (times * mma * 4096 / (PEAK * 2 / 3), times * fragments * 4 / SMS / clock,
                                times * scores / 16 / SMS / clock)


def attentions():
    rows, T = [], TOKENS
    for size, (D, H) in SIZES.items():
        # T²·hd multiply-adds needed; arrays (B,T,D): in memory; read and written by a block, as rows of tiles
        for form, useful, arrays, tiled in (("forward", 4, 4, 2 + 2 * T / 128), ("backward", 10, 8, 9)):
            units = attention_units(D, H, form == "backward")[1]
            flop = BATCH * H * T * T * (D // H) * useful
            memory = BATCH * T * D * 2 * arrays
            rows.append((f"{size} {form}", f"{BATCH}x{T}x{D}x{H}", f"{flop / memory:.0f}",
                         f"{flop / (BATCH * T * D * 2 * tiled):.0f}",
                         *(f"{1e6 * unit:.0f}" for unit in units), f"{1e6 * memory / MEMORY:.0f}"))
    return table(("attention", "BxTxDxH", "FLOP/B memory", "FLOP/B L2", "tensor cores, us",
                  "shared memory, us", "exponentials, us", "memory, us"), rows)


def epilogues(nvcc, cubin):
    """Instructions that a warp of matmul_wgmma executes for the results of a tile, 64 rows in two halves by 192
    columns over four warps: from the wait for the last product to the next tile, but for the loops over a matrix's
    last rows."""
    cuobjdump = shutil.which("cuobjdump") or os.path.join(os.path.dirname(shutil.which(nvcc) or nvcc), "cuobjdump")
    if not os.path.exists(cuobjdump):
        return ["cuobjdump was not found: the epilogues' instructions are not counted.", ""]
    sass = subprocess.run([cuobjdump, "-sass", cubin], stdout=subprocess.PIPE, text=True, check=True).stdout
    rows = []
    for function in re.split(r"Function : ", sass):
        name = re.match(r"_Z12matmul_wgmmaILb(.)ELb(.)ELi(.)", function)
        if not name:
            continue
        code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", function, re.M)
        place = {int(address, 16): i for i, (address, _) in enumerate(code)}
        jumps = {i: place[int(to.group(1), 16)] for i, (_, text) in enumerate(code)
                 if (to := re.search(r"BRA.* 0x([0-9a-f]+)", text))}
        begin = max(i for i, (_, text) in enumerate(code) if "WARPGROUP.DEPBAR" in text)
        end = min(i for i, to in jumps.items() if i > begin > to + 50)
        inside = set(range(begin, end))
        for i, to in jumps.items():
            if begin < to < i < end:
                inside -= set(range(to, i + 1))
        operation = lambda text: re.sub(r"^@\S+ ", "", text).split()[0].split(".")[0]
        count = lambda *names: sum(operation(code[i][1]) in names for i in inside)
        rows.append((f"{EPILOGUES[int(name[3])]}, {['forward', 'dx', 'dw'][int(name[1]) + int(name[2])]}", len(inside),
                     count("FADD", "FMUL", "FFMA", "FMNMX", "MUFU"), count("F2FP"), count("LDG"), count("STG"),
                     count("LDS", "STS")))
    return table(("epilogue", "instructions", "arithmetic", "to bf16", "loads", "stores", "shared memory"),
                 sorted(rows))


def main():
    nvcc = sys.argv[1] if len(sys.argv) > 1 else "nvcc"
    if not shutil.which(nvcc):
        sys.exit(f"report_compiler.py: {nvcc} not found: say make compiler NVCC=/path/to/nvcc")
    version = re.search(r"release.*", subprocess.run([nvcc, "--version"], stdout=subprocess.PIPE, text=True).stdout)
    folder = tempfile.TemporaryDirectory()
    cubins = {arch: os.path.join(folder.name, arch + ".cubin") for arch in ARCHS}
    found = {arch: kernels(compiled(nvcc, arch, cubins[arch])) for arch in ARCHS}
    lines = ["# What the compiler says of fpdm.cu", "", f"`make compiler`; nvcc {version.group()}. No GPU took part: "
             "all of this is read off the compiler's output or counted, nothing is timed.", "",
             "## Work for a byte, bf16", "", f"{BATCH} pictures of {TOKENS} tokens. An H200 does {PEAK / 1e12:.0f} "
             f"dense bf16 TFLOP/s (with `wgmma`; `mma.sync` reaches about 2/3) and moves {MEMORY / 1e12:.1f} TB/s: "
             f"below {PEAK / MEMORY:.0f} FLOP/B memory is the limit. FLOP/B memory: every operand once; FLOP/B L2: "
             "what the tiles read and write (256x192: a pair of `matmul_wgmma`'s). Floor: the longer of both times at "
             "these rates. Waves: blocks over those "
             f"that {SMS} multiprocessors hold at once; full: of what they could do in the waves begun; inside: "
             "of what the tiles cover.", ""]
    lines += matmuls() + attentions()
    lines += ["Time of each unit alone: `mma.sync` at 2/3 of the peak, "
              "128 bytes of shared memory and 16 exponentials a cycle.", ""]
    lines += estimate()
    lines += ["## Epilogues of matmul_wgmma", "", "Instructions of a warp for the results of one tile, 192 a lane. On "
              "the H100 a warp issued one in about six cycles there, while the other warpgroup multiplied for about "
              "11 us (K = 1152).", ""]
    lines += epilogues(nvcc, cubins["sm_90a"])
    for arch in ARCHS:
        lines += [f"## Kernels on {arch}", "", "matmul: tile, first and second operand with k as the slow dimension, "
                  "epilogue; attention: type, padded head size. layernorm_backward_kernel: as at XL's width, 1152.", ""]
        lines += resources(found[arch], arch)
    print("\n".join(lines).rstrip())


if __name__ == "__main__":
    main()
