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
# One line for each run, `name ok` or `name FAIL`; last `N passed, N failed`. About 25 minutes of one core, on two at a time.

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

# run NAME TARGET ARGUMENT...: must end well; a fault makes it end with another status, in a test case the case
run() {
    local name=$1 status
    shift
    "$simulator/run.sh" "$root" "$@" > "$name.log" 2>&1
    status=$?
    [ $status = 0 ] || grep -vE '^ptxsim: launch' "$name.log" | tail -n 8
    result $status "$name: $(grep -E 'passed,|^step|pictures in|^attention backward' "$name.log" | tail -n 1)"
}

plain() {
    for sms in $([ "$QUICK" ] || echo 3) 132; do
        export PTXSIM_SMS=$sms
        run cases_$sms test_gpu
        run kernels_$sms test_kernels_gpu
        [ ! "$QUICK" ] || continue
        run train_$sms train_gpu --steps "${STEPS:-20}" --sample_steps 4 --out "$work/out_$sms"
        run sample_$sms sample_gpu --n 4 --steps 4 --cfg 2 --out "$work/sample_$sms.png"
    done
    DEFINES='-diag-suppress 177' PTXSIM_SMS=4 run report test/report_cublas.cu 64 2 16 2 1 # what measures on a GPU
}
hopper() {
    export PTXSIM_SMS=132 ARCH=compute_90a FPDM_WGMMA=2 BUILD=$BUILD.hopper
    run cases_hopper test_gpu --dtype=bf16 # nothing of fp32 differs
    run kernels_hopper test_kernels_gpu
    [ "$QUICK" ] || run train_hopper train_gpu --steps 2 --sample_steps 4 --out "$work/out_hopper"
    [ "$QUICK" ] || run sample_hopper sample_gpu --n 4 --steps 4 --cfg 2 --out "$work/sample_hopper.png"
    for program in TRAIN SAMPLE; do
        "$nvcc" -ptx -gencode=arch=$ARCH,code=$ARCH -x cu -std=c++17 -DPROGRAM=$program "$root/fpdm.cu" -o $program.ptx ||
            echo "any: $program does not compile" # so one that no test launches
        grep -oP '\.entry \K\w+' $program.ptx | c++filt | sed -E 's/^void //; s/\(.*//'
    done | names > has
}
names() { sed -E 's/__nv_bfloat16/bf16/g; s/ //g' | sort -u; } # of kernels, without the spaces
hopper > hopper.txt & # a core each
plain | tee plain.txt
wait
cat hopper.txt

sed -nE 's/.*launch [0-9]+: (.*) <<<.*/\1/p' cases_*.log kernels_*.log | names > launched
comm -23 has launched > missed
sed 's/^/    never launched: /' missed
[ -s has ] && [ ! -s missed ]
result $? "tests launch all $(wc -l < has) kernels of train_gpu and sample_gpu" | tee kernels.txt

passed=$(cat plain.txt hopper.txt kernels.txt | grep -c ' ok$') failed=$(cat plain.txt hopper.txt kernels.txt | grep -c ' FAIL$')
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 4 ]
