#!/bin/sh
# Generates guest/gen from the .proto files next to this script. Needs only Go.
set -eu
cd "$(dirname "$0")"
rm -rf ../guest/gen
export GOFLAGS=-mod=mod CGO_ENABLED=0
go run github.com/bufbuild/buf/cmd/buf@v1.75.0 generate
