#!/usr/bin/env bash
# conformance: FR2.5
# A sandbox gets what it was given and no more, and says so.
. ./_lib.sh

sandbox small --memory 256m --disk 64m --pids 64

# Memory: the sandbox dies or the process does; the host and others do not notice.
sandbox other
atoll exec small -- python3 -c 'x = bytearray(2 << 30)
for i in range(0, len(x), 4096): x[i] = 1' >/dev/null 2>&1 && fail "2 GB fit into 256 MB"
equal "$(atoll exec other -- echo alive)" alive
has "$(atoll events --all --sandbox small 2>/dev/null || atoll inspect small 2>&1 || true)" '[Mm]emory|error|running'
atoll rm -f small >/dev/null

# Disk: a clear error, and what fitted stays.
sandbox small --disk 64m --pids 64
atoll exec small -- sh -c 'head -c 10000000 /dev/zero >/home/user/fits'
out=$(atoll exec small -- sh -c 'head -c 200000000 /dev/zero >/home/user/large' 2>&1) && fail "200 MB fit into 64 MB"
has "$out" '[Nn]o space left'
equal "$(atoll exec small -- stat -c %s /home/user/fits)" 10000000
atoll exec small -- rm /home/user/large

# Processes: a fork bomb ends at the limit and can be removed.
out=$(timeout 120 atoll exec small -- sh -c 'for i in $(seq 300); do sleep 60 & done; echo not reached' 2>&1) || true
has "$out" '[Rr]esource temporarily unavailable|[Cc]annot fork|not permitted|limit'
atoll rm -f small >/dev/null
equal "$(atoll exec other -- echo alive)" alive
