#!/usr/bin/env bash
# conformance: SPEC2
# Runs a command and passes on what goes in and comes out of it.
. ./_lib.sh

equal "$(atoll run --rm base -- echo hello)" hello
equal "$(atoll run --rm base -- python3 -c 'print(6 * 7)')" 42
equal "$(atoll run --rm base -- whoami)" user
equal "$(atoll run --rm -e GREETING='two words' base -- sh -c 'echo "$GREETING"')" 'two words'
equal "$(atoll run --rm -w /tmp base -- pwd)" /tmp
equal "$(echo in | atoll run --rm -i base -- cat)" in

# Output is bytes, and errors stay apart from it.
head -c 3000000 /dev/urandom >"$TMPDIR/bytes"
equal "$(atoll run --rm -i base -- cat <"$TMPDIR/bytes" | cksum)" "$(cksum <"$TMPDIR/bytes")"
equal "$(atoll run --rm base -- sh -c 'echo out; echo err >&2' 2>/dev/null)" out
equal "$(atoll run --rm base -- sh -c 'echo out; echo err >&2' 2>&1 >/dev/null)" err

# Exit codes are the command's own, or docker's for what never ran.
fails 7 '' atoll run --rm base -- sh -c 'exit 7'
fails 137 '' atoll run --rm base -- sh -c 'kill -9 $$'
fails 127 'no-such-command' atoll run --rm base -- no-such-command
fails 126 '' atoll run --rm base -- /etc/passwd
fails 125 'no-such-image' atoll run --rm no-such-image:never -- true
fails 125 'flag' atoll run --no-such-flag base -- true
fails 125 '1.5x|memory' atoll run --rm --memory 1.5x base -- true

# The node sees how a command ends, and what becomes of its client.
atoll run -d --name job base -- sh -c 'exit 3' >/dev/null
made+=(job)
equal "$(atoll wait job)" 3
has "$(atoll ls)" 'exited 3'
atoll rm -f job >/dev/null
atoll run --rm base -- sh -c 'echo begun; sleep 1000' >"$TMPDIR/begun" &
client=$!
until [[ -s $TMPDIR/begun ]]; do sleep 0.1; done
kill -9 "$client"
wait "$client" || true
until [[ -z $(atoll ls -a -q --state running) ]]; do sleep 0.1; done
fails 125 '/no/such' atoll run --rm -w /no/such base -- true
fails 125 'cores' atoll run --rm --cpus nan base -- true

# --rm leaves nothing, and no terminal is needed.
equal "$(atoll ls -q)" ''
