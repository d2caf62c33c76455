#!/bin/bash
# Tests test/test.c itself: damaged copies of good cases must fail, each with its reason, and the next case must run.
#
#   test/test_cases.sh         tests ./test_cpu;   test/test_cases.sh emu: ./test_emu; any other suffix likewise
#
# One line for each test, `name ok` or `name FAIL`; last `N passed, N failed`.

root=$(cd "$(dirname "$0")/.." && pwd)
program=$root/test_${1:-cpu}
cases=$root/test/cases
work=$(mktemp -d) && cd "$work" || exit 1
trap 'cd /; rm -rf "$work"' EXIT
export LC_ALL=C OMP_WAIT_POLICY=passive
passed=0 failed=0

# fails NAME PATTERN CASE CHANGE: the copy that sed, or a function of number PLACE BYTES, makes of CASE fails with a line
# like PATTERN, and a good one then passes
fails() {
    local bad
    if [[ $4 == number* ]]; then
        $4 "$cases/$3.safetensors"
    else
        sed "$4" "$cases/$3.safetensors" > bad.safetensors
    fi
    "$program" --dtype=fp32 bad.safetensors "$cases/sample_ddpm.safetensors" > out 2> err
    bad=$?
    if ! cmp -s bad.safetensors "$cases/$3.safetensors" && [ $bad = 1 ] && [ ! -s err ] && grep -Eq "$2" out &&
        [ "$(tail -n 1 out)" = "1 passed, 1 failed" ]; then
        passed=$((passed + 1)) && printf '%-70s ok\n' "$1"
    else
        failed=$((failed + 1)) && printf '%-70s FAIL\n' "$1" && tail -n 4 out && cat err
    fi
}

# number PLACE BYTES FILE: bad.safetensors has other bytes from PLACE on in the first number of expect.output
number() {
    local header begin
    header=$(od -An -tu8 -N8 "$3")
    begin=$(grep -ao '"expect.output":{[^}]*' "$3" | grep -o '"data_offsets":\[[0-9]*' | grep -o '[0-9]*$')
    cp "$3" bad.safetensors
    printf "$2" | dd of=bad.safetensors bs=1 seek=$((8 + header + begin + $1)) conv=notrunc status=none
}

fails "an activation of an iteration that never runs" 'act\.z\.9 +not compared +FAIL' forward_eps_acts \
    's/act\.z\.1/act.z.9/'
fails "an activation that nobody knows" 'act\.bin +not compared +FAIL' forward_eps_acts 's/act\.inj/act.bin/'
fails "a tensor that nobody knows" 'bct\.inj +unknown.* FAIL' forward_eps_acts 's/act\.inj/bct.inj/'
fails "an expected tensor that is missing" 'error: .*grad.x_embedder.proj.bias is missing' forward_eps_acts \
    's/grad\.x_embedder\.proj\.bias/grad.x_embedder.proj.bits/'
fails "inputs of another kind of case" 'error: .*is missing' forward_eps_acts 's/"case":"forward"/"case":"sample" /'
fails "a wrong prediction" 'expect.loss .* FAIL' forward_eps_acts 's/"prediction":"eps"/"prediction":"v"  /'
fails "a number that is off by 4e-5 of the norm" 'expect.output +[2-9]\.[0-9]+e-05 .*FAIL' forward_eps_acts 'number 2 \372'
fails "NaN" 'expect.output +-?nan .*FAIL' forward_eps_acts 'number 2 \300\177'
fails "an unknown sampler" 'error: .*sampler.*dimm.* is unknown' sample_ddim_reuse \
    's/"sampler":"ddim"/"sampler":"dimm"/'
fails "a sampler of other models" 'error: .*--sampler' sample_ddim_reuse 's/"sampler":"ddim"/"sampler":"flow"/'
fails "one timestep" 'error: .*steps.* 1, want 2' sample_ddpm_2_steps 's/"steps":"2"/"steps":"1"/'
fails "guidance between timesteps that are no numbers" "metadata 'cfg_interval': 'a50,800' is not a range" \
    sample_skip_interval_reuse 's/250,800/a50,800/'
[ "${1:-cpu}" = cpu ] || fails "a head size that the GPU program does not serve" 'error: .*head size 12' \
    forward_tokens25_gray_n0_m1 's/"heads":"3"/"heads":"2"/'

echo "$passed passed, $failed failed"
[ $failed = 0 ]
