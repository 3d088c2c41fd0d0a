#!/usr/bin/env bash
# E2B's own SDK, unmodified, does all that it can do with a sandbox.
# conformance: SPEC2 FR3.5 FR5.1 FR5.2 FR5.3
set -euo pipefail
source ./_modules.sh
shopt -s extglob
# Two files at a time: most of a test is waiting for a sandbox.
exec node --test --test-concurrency=2 --test-timeout=240000 suite/!(cli).test.mjs
