#!/usr/bin/env python3
"""Tries to make the programs lose work, hang, crash or go wrong without a word: kills, full disks, failed allocations,
damaged files, wild options, two runs at once, signals. Needs Python's standard library and a C compiler, no GPU.

    test/torture.py                      about a minute, each part in turn
    test/torture.py --minutes 60         longer; --seed: other moments and damages
    test/torture.py kills signals        these parts alone
    test/torture.py --suffix cpu_asan    ./train_cpu_asan and so on

A line for each part: what was tried how often, what went wrong. Last `N passed, N failed`, a part counting one.
"""
import argparse
import fcntl
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = ("--width 16 --heads 2 --image_size 8 --patch 4 --batch 2 --depth 3 --warmup 0 --lr_schedule constant "
         "--sample_steps 2 --save_every 5 --sample_every 4 --steps 24").split()
SIGNALS = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE]


class Wrong(Exception):
    pass


def require(condition, *what):
    if not condition:
        raise Wrong(" ".join(str(w) for w in what))


def start(program, *options, limit=None, ignore=None, **more):
    """Starts a program; limit: (which, bytes) of setrlimit; ignore: a signal."""
    def before():
        if ignore:
            signal.signal(ignore, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if limit:
            resource.setrlimit(limit[0], (limit[1], limit[1]))
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([f"{ROOT}/{program}_{args.suffix}", *options], preexec_fn=before, **{**pipes, **more})


def finish(process, allowed=(0, 1), seconds=120):
    """Waits for a program: its exit status is one of `allowed`, and 1 means one line on standard error."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise Wrong("hangs:", *process.args)
    out, err = (out or b"").decode("utf-8", "replace"), (err or b"").decode("utf-8", "replace")
    status = process.returncode
    require(status in allowed, f"status {status}, {err[-300:]!r}:", *process.args)
    one_line = err.count("\n") == 1 and err.endswith("\n") or err.startswith("\nlibgomp: ")  # which is not ours
    require(status != 1 or one_line, f"{err[:300]!r} is not one line:", *process.args)
    require(status != 0 or not err, f"status 0, but says {err[:300]!r}:", *process.args)
    return status, out, err


def run(program, *options, **more):
    return finish(start(program, *options, **more))


def listing(folder):
    """What a run leaves: bytes of every file, and the log without its times."""
    files = {}
    for name in os.listdir(folder):
        with open(f"{folder}/{name}", "rb") as f:
            files[name] = f.read()
    if "log.csv" in files:
        files["log.csv"] = [line.split(b",")[:8] for line in files["log.csv"].split(b"\n")]
    return files


def same_run(folder):
    """The folder holds what the undisturbed run left, to the bit, and nothing else."""
    got, want = listing(folder), reference
    require(sorted(got) == sorted(want), f"{folder} holds {sorted(got)}, not {sorted(want)}")
    for name in want:
        require(got[name] == want[name], f"{folder}/{name} differs from the undisturbed run's")


def train_options(folder):
    """Goes on with the run in `folder`, or starts it."""
    return ["--resume", folder] if os.path.exists(f"{folder}/state.safetensors") else ["--out", folder, *SMALL]


def complete(folder):
    """Lets the run come to its end, and once more, which must change nothing."""
    for _ in range(2):
        status, _, err = run("train", *train_options(folder))
        require(status == 0, f"does not go on: {err!r}")
        same_run(folder)


def fresh(name="run"):
    shutil.rmtree(name, ignore_errors=True)
    return name


def kills(rng):
    """random moments; the run, resumed as often as it takes, ends as the undisturbed one"""
    folder, killed = fresh(), 0
    while True:
        process = start("train", *train_options(folder))
        try:
            process.wait(rng.uniform(0, whole * 1.1) ** rng.choice([1, 2]))
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        if finish(process, (0, -9))[0] == 0:
            break
    complete(folder)
    return killed


def signals(rng):
    """SIGHUP, SIGINT, SIGTERM, SIGPIPE or a closed pipe: what was computed is saved"""
    folder = fresh()
    for sent in range(1, 1000):
        process = start("train", *train_options(folder))
        which = rng.choice(SIGNALS + ["close"])
        process.stdout.readline()
        time.sleep(rng.uniform(0, whole))
        if which == "close":
            process.stdout.close()
            process.stdout = None
        else:
            process.send_signal(which)
        status, out, _ = finish(process, (0, 1, 130) if which == "close" else (0, 130))
        if status == 130 and which != "close":
            said = re.search(r"stopped after step (\d+); go on with", out)
            require(said, f"signal {which}: does not say how to go on: {out!r}")
            with open(f"{folder}/state.safetensors", "rb") as f:
                require(b'"step":"%s"' % said[1].encode() in f.read(20000), "the state is of another step")
        if status == 0:
            break
    complete(folder)
    ignoring = start("train", "--out", fresh("nohup"), *SMALL, "--log_every", "1", ignore=signal.SIGHUP)
    ignoring.stdout.readline()
    ignoring.send_signal(signal.SIGHUP)
    finish(ignoring, (0,))
    return sent


def disks(rng):
    """a disk (tmpfs, for root) or a limit on the size of files is full at a random byte; then there is room again"""
    folder, tried = fresh("disk"), 0
    os.mkdir(folder)
    total = sum(os.path.getsize(f"straight/{name}") for name in os.listdir("straight"))
    pages = rng.randrange(1, total // 4096 * 2)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * pages}k", "none", folder],
                             stderr=subprocess.DEVNULL).returncode == 0
    if not mounted:
        skipped.add("no tmpfs without root: disks are limits on the size of files")
    try:
        for _ in range(3):
            biggest = max(os.path.getsize(f"straight/{name}") for name in os.listdir("straight"))
            limit = (resource.RLIMIT_FSIZE, rng.randrange(biggest)) if not mounted or rng.random() < 0.5 else None
            status, _, err = run("train", *train_options(f"{folder}/run"), limit=limit)
            require(status == 0 or "cannot" in err, err)
            tried += 1
            left = [name for name in os.listdir(f"{folder}/run") if name.endswith("tmp")] if status else []
            require(not left, f"left behind: {left}")
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        complete(f"{folder}/run")
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)
    with open("/dev/full", "wb") as full:
        status, _, err = run("sample", "--weights", "straight/weights.safetensors", "--n", "1", "--steps", "2",
                             stdout=full)
        require(status == 1 and "cannot" in err, "/dev/full as standard output passes unnoticed")
    return tried


FAILING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
static long left(void) {
    static long n;
    static int known;
    if (!known) {
        known = 1;
        n = getenv("FAIL_AT") ? atol(getenv("FAIL_AT")) : -1;
    }
    return n;
}
static int fails(void) {
    static long count;
    if (__atomic_fetch_add(&count, 1, __ATOMIC_RELAXED) != left()) return 0;
    errno = ENOMEM;
    return 1;
}
void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void *malloc(size_t n) { return fails() ? NULL : __libc_malloc(n); }
void *calloc(size_t n, size_t s) { return fails() ? NULL : __libc_calloc(n, s); }
void *realloc(void *p, size_t n) { return fails() ? NULL : __libc_realloc(p, n); }
"""


def memory(rng):
    """one allocation of the program fails, or its address space is limited: one line, or it goes well"""
    if "asan" in args.suffix:
        skipped.add("no failing allocations beside AddressSanitizer's own")
        return 0
    if not os.path.exists("failing.so"):
        with open("failing.c", "w") as f:
            f.write(FAILING)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", "failing.so", "failing.c"], check=True)
    training = rng.random() < 0.7
    program = ["train", *train_options("run")] if training else \
        ["sample", "--weights", "straight/weights.safetensors", "--n", "2", "--steps", "2", "--out", "x.png",
         "--latents", "x.safetensors", "--trace", "x.csv", "--labels", "heart"]
    env, limit = dict(os.environ), None
    if rng.random() < 0.8:
        env.update(LD_PRELOAD=os.path.abspath("failing.so"), FAIL_AT=str(int(rng.uniform(0, 45) ** 2)))
    else:
        limit = (resource.RLIMIT_AS, rng.randrange(8 << 20, 64 << 20))
    # 127: the loader found no room for the program
    status, _, _ = finish(start(*program, env=env, limit=limit), (0, 1, 127) if limit else (0, 1))
    if training and rng.random() < 0.1:
        if status != 0:
            complete("run")
        fresh("run")
    return 1


def damaged(rng, text):
    """A safetensors file changed at random: mostly its header, at times its data, its lengths, its end."""
    (length,) = struct.unpack("<Q", text[:8])
    header, data = bytearray(text[8:8 + length]), bytearray(text[8 + length:])
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at, kind = rng.randrange(len(header)), rng.randrange(9)
        numbers = [m.span() for m in re.finditer(rb"\d+", header)]
        if kind == 0:
            header[at] = rng.randrange(256)
        elif kind == 1:
            header[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del header[at:at + rng.randrange(30)]
        elif kind == 3:
            header[at:at] = header[rng.randrange(len(header)):][:rng.randrange(30)]
        elif kind in (4, 5) and numbers:
            begin, end = rng.choice(numbers)
            header[begin:end] = rng.choice([b"0", b"-1", b"1", b"3", b"64", b"9223372036854775807", b"18446744073709551617",
                                            b"1e9", b"nan", b"", b"x", b"4294967296", b"null", b"\"", b"\\u0000"])
        elif kind == 6 and data:
            del data[rng.randrange(len(data)):]
        elif kind == 7 and data:
            at = rng.randrange(len(data)) & ~3
            data[at:at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\0\xc0\xff"])
        elif kind == 8:
            length = rng.choice([0, 1, len(header) + len(data), 1 << 40, (1 << 64) - 1, 100000001])
            return struct.pack("<Q", length) + header + data
    return struct.pack("<Q", len(header)) + header + data


def files(rng):
    """damaged weights, states and datasets: one line that names the file, or it goes well"""
    which = rng.choice(["weights", "state", "data"])
    source = {"weights": "straight/weights.safetensors", "state": "straight/state.safetensors", "data": "data.safetensors"}
    with open(source[which], "rb") as f:
        text = damaged(rng, f.read())
    fresh("bad")
    os.mkdir("bad")
    path = {"weights": "bad/w.safetensors", "state": "bad/state.safetensors", "data": "bad/d.safetensors"}[which]
    with open(path, "wb") as f:
        f.write(text)
    again = ["--steps", "25", "--batch", "2", "--micro_batch", "0", "--sample_steps", "2", "--grad_iters", "1,4",
             "--no_grad_iters", "0,3", "--save_every", "100", "--sample_every", "0", "--log_every", "50"]
    program = {"weights": ["sample", "--weights", path, "--n", "1", "--steps", "2", "--iters", "2", "--out", "bad/x.png"],
               "state": ["train", "--resume", "bad", *again],
               "data": ["train", "--data", path, "--out", "bad/run", *SMALL, "--steps", "2"]}[which]
    status, _, err = finish(start(*program), (0, 1), 60)
    require(status == 0 or "bad" in err or re.match(r"error: (step|option|class_names|this model)", err),
            f"names no file: {err!r}")
    if status == 0 and which == "state":
        complete_state("bad")
    return 1


def complete_state(folder):
    """What was saved can be read again."""
    status, _, err = run("train", "--resume", folder, "--steps", "26")
    require(status == 0, f"what was saved cannot be resumed: {err!r}")


def options(rng):
    """options and values at random, in any number: one line that says what is wrong, or it goes well"""
    program = rng.choice(["train", "sample"])
    names = re.findall(r"^  --(\w+) ", run(program, "--help")[1], re.M)
    big = {"steps", "sample_steps", "rounds", "n", "budget", "iters", "window"}
    values = ["", "0", "1", "2", "3", "4", "8", "-1", "x", "1e18", "nan", "inf", "0x10", "1,2", "2,1", ",", "1,", "%s%n",
              "\u202e\x9b\x1b[31m", "A" * 5000, "99999999999999999999", "shapes", "eps", "v", "flow", "S/2", "S/64",
              "/", "/dev/null", "/dev/full", "/dev/zero", "no/such", ".", "--", "=", "true", "1e-320", "0.5"]
    small = SMALL + ["--out", "wild/run"] if program == "train" else \
        ["--weights", os.path.abspath("straight/weights.safetensors"), "--n", "1", "--steps", "2", "--out", "wild/x.png"]
    command = list(small)
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        name, value = rng.choice(names), rng.choice(values)
        if name in big and value == "1e18":
            continue
        command += rng.choice([[f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [f"--{name[:-1]}", value]])
    fresh("wild")
    os.mkdir("wild")
    finish(start(program, *command, "--steps=2", limit=(resource.RLIMIT_AS, 4 << 30)), (0, 1), 60)
    return 1


def pairs(rng):
    """two runs with one --out, or two that resume it: one does it all, the other gets one line"""
    folder = fresh()
    for begun in range(2):
        if begun:
            run("train", "--out", folder, *SMALL, "--steps", "8")
        two = []
        for _ in range(2):
            two.append(start("train", *(["--resume", folder, "--steps", "24"] if begun else train_options(folder))))
            time.sleep(rng.choice([0, 0, rng.uniform(0, whole)]))
        results = [finish(process) for process in two]
        for status, _, err in results:
            require(status == 0 or re.search(r"another program|stored here", err), f"the second says {err!r}")
        require(any(status == 0 for status, _, _ in results), "both are refused")
        same_run(folder)
        fresh()
    return 2


def truncation(rng):
    """a dataset is cut or gets other labels while it is being read: one line that names it"""
    shutil.copy("data.safetensors", "cut.safetensors")
    process = start("train", "--data", "cut.safetensors", "--out", fresh("cut"), *SMALL, "--steps", "1000000", "--log_every", "1",
                    "--sample_every", "0")
    for _ in range(rng.randrange(4, 8)):
        process.stdout.readline()
    if rng.random() < 0.5:
        os.truncate("cut.safetensors", rng.randrange(0, 4096))
    else:
        with open("cut.safetensors", "r+b") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            f.seek(8 + length)
            f.write(struct.pack("<q", rng.choice([-1, 1 << 40, 11])) * 400)
    status, _, err = finish(process)
    require(status == 1 and "cut.safetensors" in err, f"status {status}, says {err!r}")
    require(os.path.exists("cut/log.csv"), "the folder is gone")
    return 1


def footprint(rng):
    """training takes the memory that it prints, saving included; less than that is refused before the work"""
    if "asan" in args.suffix:
        skipped.add("no measure of memory beside AddressSanitizer's own")
        return 0
    large = ["--width", "384", "--heads", "6", "--steps", "2"]
    process = start("train", "--out", fresh(), *SMALL, *large, stderr=None)
    said = process.stdout.read().decode()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = status
    printed = float(re.search(r"in all ([\d.]+) MB", said)[1])
    peak = used.ru_maxrss * 1024e-6
    require(status == 0 and peak < 1.03 * printed + 20, f"prints {printed} MB and takes {peak:.0f} MB")
    limit = (resource.RLIMIT_AS, int(0.9e6 * printed))
    status, _, err = run("train", "--out", fresh(), *SMALL, *large, limit=limit)
    require(status == 1 and "this process may use" in err, f"at 90 % of its memory: {err!r}")
    return 1


def terminal(rng):
    """on a terminal the pictures of --show are no wider than it, and progress is one line that is written over"""
    pid, screen = os.forkpty()
    if pid == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width := rng.randrange(6, 200), 0, 0))
        print(width, flush=True)
        os.execv(f"{ROOT}/train_{args.suffix}", ["train", "--out", fresh("shown"), *SMALL, "--show"])
    said = b""
    try:
        while piece := os.read(screen, 65536):
            said += piece
    except OSError:  # the other end is closed
        pass
    require(os.waitpid(pid, 0)[1] == 0, said[-300:])
    lines = re.sub(rb"\x1b\[[0-9;]*m", b"", said).decode().split("\r\n")
    widest = max(line.count("\u2580") for line in lines)
    require(0 < widest <= int(lines[0]), f"{widest} columns on a terminal of {lines[0]}")
    require(re.search(r"step 1/24 [^\n]* left\r\x1b\[K", said.decode()), "progress is not written over")
    return 1


PARTS = [kills, signals, disks, memory, files, options, pairs, truncation, footprint, terminal]


def main():
    global args, reference, whole, skipped
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="of " + ", ".join(part.__name__ for part in PARTS))
    parser.add_argument("--minutes", type=float, default=1, help="of all parts together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--suffix", default="cpu", help="of the programs")
    args = parser.parse_args()
    parts = [part for part in PARTS if not args.parts or part.__name__ in args.parts]
    os.environ.update(OMP_NUM_THREADS="1", LC_ALL="C", ASAN_OPTIONS="detect_leaks=0:exitcode=99")
    skipped, failed = set(), 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        begin = time.monotonic()
        status, _, err = run("train", "--out", "straight", *SMALL)
        require(status == 0, err)
        whole, reference = time.monotonic() - begin, listing("straight")
        require(run("train", "--export", "data.safetensors", *SMALL, "--steps", "200")[0] == 0, "no dataset")
        for part in parts:
            until = time.monotonic() + 60 * args.minutes / len(parts)
            rng, tried, rounds, wrong = random.Random(f"{args.seed} {part.__name__}"), 0, 0, []
            while rounds == 0 or time.monotonic() < until:
                try:
                    tried += part(rng)
                except Wrong as reason:
                    wrong.append(f"    round {rounds}: {reason}")
                rounds += 1
            print(f"{part.__name__}: {tried} in {rounds} rounds, {len(wrong)} wrong: {part.__doc__}",
                  "FAIL" if wrong else "ok", *wrong[:5], sep="\n" if wrong else " ", flush=True)
            failed += bool(wrong)
        os.chdir(ROOT)
    for reason in sorted(skipped):
        print("skipped:", reason)
    print(f"{len(parts) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


main()
