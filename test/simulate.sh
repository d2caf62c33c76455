#!/bin/bash
# Runs fpdm.cu as nvcc compiles it, in the simulator of PTX that stands beside the project: every test case and kernel
# test, twenty training steps at the default size, sampling with graphs; on 3 multiprocessors and on 132, then with every
# product of bf16 by Hopper's wgmma; and the program that times products on a GPU. Any fault that the simulator finds ends
# its program. Last, every kernel that the programs have must have been launched by the tests.
#
#   test/simulate.sh [FOLDER]     the simulator's, ../shared/ptxsim otherwise
#   STEPS=2 test/simulate.sh      fewer training steps;  QUICK=1: cases and kernel tests alone, on 132 multiprocessors,
#                                 without the largest products
#
# One line for each run, `name ok` or `name FAIL`; last `N passed, N failed`. About 25 minutes of one core, on two at a time;
# QUICK: 6.

root=$(cd "$(dirname "$0")/.." && pwd)
simulator=$(cd "${1:-$root/../shared/ptxsim}" && pwd) || exit 1
nvcc=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
work=$(mktemp -d) && cd "$work" || exit 1
trap 'cd /; rm -rf "$work"' EXIT
[ ! "$QUICK" ] || export EMU_QUICK=1
export RUN_IN=$root PTXSIM_TRACE=1 BUILD=${BUILD:-$work/build} OMP_NUM_THREADS=1

result() { # STATUS NAME
    printf '%-70s %s\n' "$2" "$([ "$1" = 0 ] && echo ok || echo FAIL)"
}

# check NAME COMMAND...: must end well; a fault makes it end with another status, in a test case the case
check() {
    local name=$1 status
    shift
    (cd "$root" && "$@") > "$name.log" 2>&1
    status=$?
    [ $status = 0 ] || grep -vE '^ptxsim: launch' "$name.log" | tail -n 8
    result $status "$name: $(grep -E 'passed,|^step|pictures in|^attention backward' "$name.log" | tail -n 1)"
}
run() { check "$1" "$simulator/run.sh" "$root" "${@:2}"; } # NAME TARGET ARGUMENT...
build() { BUILD_ONLY=1 "$simulator/run.sh" "$root" "$1"; } # TARGET; prints the program's path

plain() {
    for sms in $([ "$QUICK" ] || echo 3) 132; do
        export PTXSIM_SMS=$sms
        run cases_$sms test_gpu
        run kernels_$sms test_kernels_gpu
        [ ! "$QUICK" ] || continue
        run train_$sms train_gpu --steps "${STEPS:-20}" --sample_steps 4 --out "$work/out_$sms"
        run sample_$sms sample_gpu --n 4 --steps 4 --cfg 2 --out "$work/sample_$sms.png"
    done
    [ "$QUICK" ] || DEFINES='-diag-suppress 177' PTXSIM_SMS=4 run report test/report_cublas.cu 64 2 16 2 1 # measures on a GPU
}

# hopper TARGET 'FILE OPTION...' ARGUMENT...: the same program, its kernels compiled for Hopper
hopper() {
    local target=$1 source=$2 arch=compute_90a
    shift 2
    (cd "$root" && "$nvcc" -ptx -gencode=arch=$arch,code=$arch -lineinfo -x cu -std=c++17 -O3 -diag-suppress 177 $source \
        -o "$work/$target.ptx")
    check ${target}_hopper env PTXSIM_SMS=132 FPDM_WGMMA=2 PTXSIM_PTX="$work/$target.ptx" "$(build $target)" "$@"
}
names() { sed -E 's/__nv_bfloat16/bf16/g; s/ //g' | sort -u; } # of kernels, without the spaces
for target in test_gpu test_kernels_gpu $([ "$QUICK" ] || echo train_gpu sample_gpu); do build $target; done > built
{
    hopper test_gpu '-DGPU test/test.c' --dtype=bf16 # nothing of fp32 differs
    hopper test_kernels_gpu test/emu_kernels.cpp
    [ "$QUICK" ] || hopper train_gpu '-DPROGRAM=TRAIN fpdm.cu' --steps 2 --sample_steps 4 --out "$work/out_hopper"
    [ "$QUICK" ] || hopper sample_gpu '-DPROGRAM=SAMPLE fpdm.cu' --n 4 --steps 4 --cfg 2 --out "$work/sample_hopper.png"
} > hopper.txt & # a core each
plain | tee plain.txt
wait
cat hopper.txt

# test.c is fpdm.cu and uses its kernels as the programs do: those of its PTX are theirs.
grep -oP '\.entry \K\w+' test_gpu.ptx | c++filt | sed -E 's/^void //; s/\(.*//' | names > has
sed -nE 's/.*launch [0-9]+: (.*) <<<.*/\1/p' cases_*.log kernels_*.log test_*_hopper.log | names > launched
comm -23 has launched > missed
sed 's/^/    never launched: /' missed
[ -s has ] && [ ! -s missed ]
result $? "tests launch all $(wc -l < has) kernels of train_gpu and sample_gpu" | tee kernels.txt

passed=$(cat plain.txt hopper.txt kernels.txt | grep -c ' ok$') failed=$(cat plain.txt hopper.txt kernels.txt | grep -c ' FAIL$')
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 4 ]
