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

# --rm leaves nothing, and no terminal is needed.
equal "$(atoll ls -q)" ''
