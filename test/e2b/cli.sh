#!/usr/bin/env bash
# E2B's own command line, unmodified.
# conformance: SPEC2 FR3.5
set -euo pipefail
source ./_modules.sh
exec node --test --test-timeout=240000 suite/cli.test.mjs
