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

# fails NAME PATTERN CASE SED: the copy that sed makes of CASE fails with a line like PATTERN, and a good one then passes
fails() {
    local bad
    sed "$4" "$cases/$3.safetensors" > bad.safetensors
    "$program" --dtype=fp32 bad.safetensors "$cases/sample_ddpm.safetensors" > out 2> err
    bad=$?
    if ! cmp -s bad.safetensors "$cases/$3.safetensors" && [ $bad = 1 ] && [ ! -s err ] && grep -Eq "$2" out &&
        [ "$(tail -n 1 out)" = "1 passed, 1 failed" ]; then
        passed=$((passed + 1)) && printf '%-70s ok\n' "$1"
    else
        failed=$((failed + 1)) && printf '%-70s FAIL\n' "$1" && tail -n 4 out && cat err
    fi
}

fails "an activation of an iteration that never runs" 'act\.z\.9 +not compared +FAIL' forward_eps_acts \
    's/act\.z\.1/act.z.9/'
fails "an activation that nobody knows" 'act\.bin +not compared +FAIL' forward_eps_acts 's/act\.inj/act.bin/'
fails "a tensor that nobody knows" 'bct\.inj +unknown.* FAIL' forward_eps_acts 's/act\.inj/bct.inj/'
fails "an expected tensor that is missing" 'error: .*grad.x_embedder.proj.bias is missing' forward_eps_acts \
    's/grad\.x_embedder\.proj\.bias/grad.x_embedder.proj.bits/'
fails "inputs of another kind of case" 'error: .*is missing' forward_eps_acts 's/"case":"forward"/"case":"sample" /'
fails "a wrong prediction" 'expect.loss .* FAIL' forward_eps_acts 's/"prediction":"eps"/"prediction":"v"  /'
fails "an unknown sampler" 'error: .*sampler.*dimm.* is unknown' sample_ddim_reuse 's/"sampler":"ddim"/"sampler":"dimm"/'
fails "a sampler of other models" 'error: .*--sampler' sample_ddim_reuse 's/"sampler":"ddim"/"sampler":"flow"/'
fails "one timestep" 'error: .*steps.* 1, want 2' sample_ddpm_2_steps 's/"steps":"2"/"steps":"1"/'
fails "guidance between timesteps that are no numbers" "metadata 'cfg_interval': 'a50,800' is not a range" \
    sample_skip_interval_reuse 's/250,800/a50,800/'
[ "${1:-cpu}" = cpu ] || fails "a head size that the GPU program does not serve" 'error: .*head size 12' \
    forward_tokens25_gray_n0_m1 's/"heads":"3"/"heads":"2"/'

echo "$passed passed, $failed failed"
[ $failed = 0 ]
