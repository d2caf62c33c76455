#!/bin/bash
# Runs test programs one after the other and adds up what they report.
#
#   test/run.sh COMMAND...      each argument is one command line; `skipped: REASON` stands for one that cannot run here
#
# A command counts what its last line `N passed, N failed` says; without such a line it is itself one test, by its exit
# status. Of what the commands print, failures and sums are shown; with V=1 in the environment, everything. Ends with the
# sum over all; exit status 1 if anything failed.

export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # waiting threads would slow each other down on a busy machine
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# Leaves out `name ok` and what stands indented above it; above a failure, its title and what stands indented are shown.
failures() {
    awk '/ ok$/ { details = ""; next }
        /FAIL|skipped|^[0-9]+ passed|[0-9]+ passed +[0-9]+ failed/ { printf "%s%s\n", /FAIL/ ? title details : "", $0
            title = details = ""; fflush(); next }
        /^ / { details = details $0 "\n"; next }
        { title = $0 "\n" }'
}

passed=0 failed=0 summary=
for command in "$@"; do
    if [[ $command == skipped:* ]]; then
        summary+=$command$'\n'
        continue
    fi
    echo "== $command"
    start=$SECONDS
    bash -c "$command" 2>&1 | tee "$log" | if [ -n "$V" ]; then cat; else failures; fi
    status=${PIPESTATUS[0]} p=0 f=0
    total=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
    if [ -n "$total" ]; then read -r p _ f _ <<< "$total"; fi
    if [ "$status" != 0 ] && [ "$f" = 0 ]; then # it stopped before its end
        f=1
        [ -n "$V" ] || tail -n 30 "$log"
    fi
    if [ "$status" = 0 ] && [ -z "$total" ]; then p=1; fi
    passed=$((passed + p)) failed=$((failed + f))
    summary+=$(printf '%-40s %5d passed %4d failed %5d s' "$command" "$p" "$f" $((SECONDS - start)))$'\n'
done
printf '\n%s%d passed, %d failed\n' "$summary" "$passed" "$failed"
[ "$failed" = 0 ]
