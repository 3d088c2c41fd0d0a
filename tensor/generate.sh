#!/bin/sh
# Writes the kernels again. Needs only Go.
set -eu
cd "$(dirname "$0")"
tool=$(mktemp)
trap 'rm -f "$tool"' EXIT
(cd _asm && GOFLAGS=-mod=mod go build -buildvcs=false -o "$tool" .)
"$tool" -out kernels_amd64.s -stubs kernels_amd64.go -pkg tensor
