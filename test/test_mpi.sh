#!/bin/bash
# Tests data parallel training: R ranks against one process, and everything that can go wrong with one of them. Needs
# Open MPI (libopenmpi-dev openmpi-bin).
#
#   test/test_mpi.sh           tests train_cpu;  test/test_mpi.sh emu: train_emu, fpdm.cu on the CPU, less of it
#
# One line for each test, `name ok` or `name FAIL`; last `N passed, N failed`.

root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d) && cd "$work" || exit 1
trap '[ $BASHPID != $$ ] || { cd /; rm -rf "$work"; }' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 TMPDIR=/tmp
export OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_btl=self,vader OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive LC_ALL=C
passed=0 failed=0

result() { # STATUS NAME
    if [ "$1" = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    printf '%-70s %s\n' "$2" "$([ "$1" = 0 ] && echo ok || echo FAIL)"
}
check() { # NAME COMMAND...
    local name=$1 status
    shift
    "$@" > out 2> err < /dev/null
    status=$?
    [ $status = 0 ] || { echo "    status $status: $*"; tail -n 5 out err | sed 's/^/    /'; }
    result $status "$name"
}
# refuses NAME PATTERN COMMAND...: fails within ten seconds, with one line of ours on standard error, which matches.
refuses() {
    local name=$1 pattern=$2 status ok=1 start=$SECONDS
    shift 2
    "$@" > out 2> err < /dev/null
    status=$?
    [ $status != 0 ] && [ $((SECONDS - start)) -le 10 ] && [ "$(grep -c '^error:' err)" = 1 ] &&
        grep -Eq "^error: $pattern" err && ok=0
    [ $ok = 0 ] || { echo "    status $status, $((SECONDS - start)) s, wanted '$pattern': $*"; sed 's/^/    /' err; }
    result $ok "$name"
}

kind=${1:-cpu}
build() { # NAME ARGUMENT-OF-MAKE...: the program, built in a folder of its own
    mkdir $1.build && ln -s "$root"/{Makefile,fpdm_cpu.c,fpdm.cu,test} $1.build &&
        make -s -C $1.build WERROR=-Werror train_$kind "${@:2}" && mv $1.build/train_$kind $1
}
both() { # SUFFIX ARGUMENT-OF-MAKE...: the program without MPI and with it, at the same time: a core each
    build one$1 "${@:2}" &
    local other=$!
    build train$1 "${@:2}" MPI=1 && wait $other
}
both "" $([ $kind = cpu ] || echo ARCH=-O1) || exit 1 # compiling takes longer than running
[ $kind != cpu ] || both 64 CFLAGS='-O3 -DREAL=double' || exit 1 # the same in double
one=$work/one train=$work/train
on() { local R=$1; shift; timeout -s KILL 100 mpirun -q -np "$R" "$train" "$@"; } # RANKS OPTION...

small="--optimizer adamw --image_size 8 --width 32 --heads 2 --patch 2 --batch 8 --lr 3e-4 --warmup 20
    --lr_schedule constant --sample_steps 2 --sample_every 0 --log_every 50"
near() { # FOLDER FOLDER: every step's loss is the same to `limit`
    paste -d, <(cut -d, -f1,2 "$1/log.csv") <(cut -d, -f1,2 "$2/log.csv") | awk -F, -v limit=$limit 'NR > 1 {
        off = $2 / $4 - 1; if (off < 0) off = -off; if (off > worst) worst = off; bad += $1 != NR - 2 || $1 != $3 }
        END { print NR - 1, "steps, largest difference", worst + 0; exit NR < 2 || bad || worst > limit }' | tee -a worst
    return ${PIPESTATUS[1]}
}
same() { cmp "$1/weights.safetensors" "$2/weights.safetensors" && cmp "$1/state.safetensors" "$2/state.safetensors"; }

# ---- The same losses for every number of ranks

# In double to the last digit that log.csv holds. In fp32 training itself multiplies what rounding begins: here from 1e-8
# at 100 steps to 1e-7 to 2e-6 at 200, so fewer of them are compared there.
steps=6 counts=2 limit=1e-6
learned="--prediction v --learn_sigma 1"
if [ $kind = cpu ]; then
    steps=200 counts="2 4" limit=3e-9 one=$work/one64 train=$work/train64
    settings=("--optimizer muon" "$learned --v_weight p2 --label_drop 0.5"
        "--prediction eps --learn_sigma 1 --t_sampling logit_normal"
        "--prediction x --timestep_in_pre_post 0" "--fixed_point 0 --depth 3" "--micro_batch 3"
        "--batch 5 --hflip 1 --data d.safetensors"
        "--optimizer muon --recompute 1 --ema_warmup 0 --grad_clip 0 --weight_decay 0.1")
else
    settings=("--dtype fp32 --optimizer muon" "--dtype fp32 --batch 5 --micro_batch 2 $learned")
fi
"$one" --export d.safetensors --image_size 8 --steps 2 --batch 37 > one.out || exit 1 # epochs end inside a batch
ranks_against_one() { # with the options `set`
    rm -rf one_* r[0-9]*
    check "one process: $set" "$one" $small --steps $steps $set --out one_
    for R in $counts; do
        check "R=$R: trains" on $R $small --steps $steps $set --out r$R
        check "R=$R: the losses of one process: $set" near one_ r$R
        [ $R != 1 ] || check "R=1: the same bytes" same one_ r1
    done
    check "R=2: the same files" diff <(ls one_) <(ls r2)
}
for set in "${settings[@]}"; do ranks_against_one; done
if [ $kind = cpu ]; then
    steps=100 counts="1 2 4" limit=1e-6 one=$work/one train=$work/train
    ranks_against_one
fi
check "R=2: again" on 2 $small --steps $steps $set --out again2
check "R=2: the same bytes every time" same r2 again2
if [ $kind = cpu ]; then
    check "R=4: again" on 4 $small --steps $steps $set --out again4
    check "R=4: the same bytes every time" same r4 again4
fi

# ---- Resuming, with as many ranks or others; what only rank 0 does

half=$((steps / 2))
check "R=2: half of the steps" on 2 $small --steps $half $set --out part
cp -r part part1
check "R=2: goes on" on 2 --resume part --steps $steps
check "R=2: the bytes of the whole run" same r2 part # but for --steps
check "R=2, then one process" "$one" --resume part1 --steps $steps
check "R=2, then one process: the losses" near one_ part1

finish() {
    sort -gk 6 worst | tail -n 1
    echo "$passed passed, $failed failed"
    [ $failed = 0 ]
    exit
}
[ $kind = cpu ] || finish

# ---- Faults; what they end in stands in the shared blocks

# The noise of a rank becomes NaN, or its weights others, after so many calls.
cat > fault.c <<'END'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <stdlib.h>
static int calls;
static int due(const char *name) { return getenv(name) && ++calls > atoi(getenv(name)); }
void sincos(double x, double *s, double *c) {
    void (*real)(double, double *, double *) = dlsym(RTLD_NEXT, "sincos");
    real(x, s, c);
    if (due("FAULT_NAN")) *c = NAN;
}
double pow(double x, double y) {
    double (*real)(double, double) = dlsym(RTLD_NEXT, "pow");
    return real(x, y) * (x == 0.9 && due("FAULT_POW") ? 1.001 : 1); // beta1^step
}
END
cc -shared -fPIC -fno-builtin -o fault.so fault.c -ldl || exit 1
fault="env LD_PRELOAD=$work/fault.so"
run="$small --steps 100000 --out"
two() { # OPTIONS-OF-BOTH: rank 0 as given, rank 1 with `differently` before and `more` behind it
    timeout -s KILL 60 mpirun -q -np 1 ${first_dir:+--wdir $first_dir} "$train" "$@" : \
        -np 1 ${second_dir:+--wdir $second_dir} $differently "${other:-$train}" "$@" $more
}
saved() { head -c 30000 "$1/state.safetensors" | grep -ao '"step":"[0-9]*"' | tr -dc 0-9; } # FOLDER: the step
whole() { "$one" --resume "$1" --steps $(($(saved "$1") + 5)) > /dev/null; } # FOLDER: what is saved there can go on

refuses "an unknown option" "rank 0 of 2: unknown option --lrr" on 2 --lrr 3
refuses "a batch smaller than the ranks" "rank 0 of 4: option --batch: 3 pictures" on 4 $small --batch 3 --out few
refuses "no folder to resume" "rank 0 of 2: nowhere" on 2 --resume nowhere
more="--lr 2e-3" refuses "another option" "rank 1 of 2: .* other options than rank 0" two $run f1
cp train train2 && echo >> train2
other=$work/train2 refuses "another program" "rank 1 of 2: .* another program than rank 0" two $run f2
mkdir -p a b c
"$one" --export a/d.safetensors --image_size 8 --steps 4 > /dev/null
cp a/d.safetensors b && printf '\x07' | dd of=b/d.safetensors bs=1 seek=5000 conv=notrunc status=none
data="--data d.safetensors"
first_dir=a second_dir=b refuses "other data" "rank 1 of 2: .* other data than rank 0" two $run $work/f3 $data
first_dir=a second_dir=c refuses "no data" "rank 1 of 2: d.safetensors: cannot open" two $run $work/f4 $data
second_dir=a first_dir=c refuses "no data on rank 0" "rank 0 of 2: d.safetensors: cannot open" two $run $work/f4 $data
"$one" $small --steps 1 --out init > /dev/null
cp init/weights.safetensors a/w && cp a/w b/w && printf '\x07' | dd of=b/w bs=1 seek=20000 conv=notrunc status=none
first_dir=a second_dir=b refuses "other initial weights" "rank 1 of 2: .* other weights than rank 0" \
    two --batch 8 --out $work/f5 --init w
check "none of these left a file" [ -z "$(find few f? -type f 2> /dev/null)" ]

saving="$small --steps 100000 --save_every 10 --out"
differently="$fault FAULT_NAN=40000" \
    refuses "NaN" "rank 1 of 2: step [0-9]+: the loss is -?nan .* keeps the state of step" two $saving g1
check "NaN: what was saved goes on" whole g1
differently="$fault FAULT_POW=31" refuses "weights that drift apart" "rank 1 of 2: .* other weights" two $saving g2
check "weights that drift apart: the last save was before" [ "$(saved g2)" = 30 ]
check "weights that drift apart: what was saved goes on" whole g2

background() { # OPTION... FOLDER: starts two ranks, waits until they have saved; `ranks`: the processes
    mpirun -q -np 2 "$train" "$@" > out 2> err < /dev/null &
    job=$!
    for ((i = 0; i < 200; i++)); do sleep 0.1; [ ! -e "${!#}/weights.safetensors" ] || break; done
    ranks=($(pgrep -P $job))
}
ends() { # SECONDS: the run in the background, within them
    for ((i = 0; i < 10 * $1; i++)); do kill -0 $job 2> /dev/null || break; sleep 0.1; done
    ! kill -0 $job 2> /dev/null || { kill -KILL $job; return 1; }
}
for victim in 0 1; do
    background $saving k$victim
    kill -KILL ${ranks[$victim]}
    check "rank $victim is killed: all end" ends 10
    check "rank $victim is killed: what was saved goes on" whole k$victim
done

# stops NAME FOLDER COMMAND...: the command is to end the run with one save, from which it goes on to the same bits.
stops() {
    local name=$1 folder=$2 last
    shift 2
    background $saving $folder
    "$@"
    check "$name: all end" ends 10
    last=$(saved $folder)
    check "$name: says so once" [ "$(grep -c "^stopped after step $last;" out)" = 1 ]
    check "$name: goes on" on 2 --resume $folder --steps $((last + 9))
    rm -rf straight
    check "$name: the same without it" on 2 $saving straight --steps $((last + 9))
    check "$name: the same bytes" same $folder straight
}
signal_one() { kill -INT ${ranks[1]}; }
signal_all() { kill -TERM ${ranks[@]}; }
signal_mpirun() { kill -INT $job; }
stops "Ctrl-C at one rank" s1 signal_one
stops "SIGTERM to all ranks" s2 signal_all
stops "Ctrl-C at mpirun" s3 signal_mpirun
finish
