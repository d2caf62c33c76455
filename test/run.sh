#!/bin/bash
# Runs test programs one after the other and adds up what they report.
#
#   test/run.sh COMMAND...      each argument is one command line
#
# A command counts what its last line `N passed, N failed` says; without such a line it is itself one test, by its exit
# status. Ends with the sum over all; exit status 1 if anything failed.

export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # spinning threads would slow each other down on a busy machine
log=$(mktemp)
trap 'rm -f "$log"' EXIT
passed=0 failed=0 summary=
for command in "$@"; do
    echo "== $command"
    start=$SECONDS
    bash -c "$command" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]} p=0 f=0
    total=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
    if [ -n "$total" ]; then read -r p _ f _ <<< "$total"; fi
    if [ "$status" != 0 ] && [ "$f" = 0 ]; then f=1; fi # it stopped before its end
    if [ "$status" = 0 ] && [ -z "$total" ]; then p=1; fi
    passed=$((passed + p)) failed=$((failed + f))
    summary+=$(printf '%-40s %5d passed %4d failed %5d s' "$command" "$p" "$f" $((SECONDS - start)))$'\n'
done
printf '\n%s%d passed, %d failed\n' "$summary" "$passed" "$failed"
[ "$failed" = 0 ]
