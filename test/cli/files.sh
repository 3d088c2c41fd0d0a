#!/usr/bin/env bash
# conformance: FR2.4
# Files and directories go in and come out as they were, whatever their names.
. ./_lib.sh

sandbox files
dir=$TMPDIR/tree
mkdir -p "$dir/sub/empty"
printf 'plain\n' >"$dir/plain"
head -c 5000000 /dev/urandom >"$dir/sub/binary"
printf 'x' >"$dir/sub/run" && chmod 755 "$dir/sub/run"
ln -s sub/binary "$dir/link"
printf 'odd' >"$dir/"$'new\nline "quote" \\ \xff\xfe ü'

atoll cp "$dir" files:/tmp/in
atoll cp files:/tmp/in "$TMPDIR/out"
diff -r --no-dereference "$dir" "$TMPDIR/out"
equal "$(stat -c %a "$TMPDIR/out/sub/run")" 755

atoll cp "$dir/sub/binary" files:/tmp/one
equal "$(atoll exec files -- sh -c 'cksum </tmp/one')" "$(cksum <"$dir/sub/binary")"

# Ten thousand files in a directory.
mkdir "$TMPDIR/many"
(cd "$TMPDIR/many" && seq 10000 | xargs touch)
atoll cp "$TMPDIR/many" files:/tmp/many
equal "$(atoll exec files -- sh -c 'ls /tmp/many | wc -l')" 10000

# Half a gigabyte, without ever being held in memory.
truncate -s 512M "$TMPDIR/large"
printf 'end' >>"$TMPDIR/large"
atoll cp "$TMPDIR/large" files:/home/user/large
equal "$(atoll exec files -- sh -c 'stat -c %s large; tail -c 3 large')" "$((512 * 1024 * 1024 + 3))
end"

fails 1 'no-such' atoll cp files:/no-such "$TMPDIR/x"
fails 1 'no-such' atoll cp "$TMPDIR/no-such" files:/tmp/x
fails 1 'nobody' atoll cp nobody:/etc/passwd "$TMPDIR/x"
