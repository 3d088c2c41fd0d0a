#!/usr/bin/env bash
# conformance: Q2
# Runs the commands of README.md and of the guides: every block fenced as "sh", the
# blocks of one document in one shell. Blocks that are not to be run are "console".
set -euo pipefail

for doc in "$ATOLL_ROOT"/README.md "$ATOLL_ROOT"/docs/guide-*.md; do
	[[ -e $doc ]] || continue
	name=$(basename "$doc" .md)
	mkdir "$TMPDIR/$name"
	{
		echo 'set -euxo pipefail'
		awk '/^```/ { inside = $0 == "```sh"; next } inside' "$doc"
	} >"$TMPDIR/$name.sh"
	echo "== $name"
	(cd "$TMPDIR/$name" && bash "$TMPDIR/$name.sh") || { echo "a command of $doc fails"; exit 1; }
	atoll rm --all -f >/dev/null
done
