#!/usr/bin/env bash
# E2B's own SDK, unmodified, with a sandbox on a kernel of its own. The whole suite
# on such sandboxes takes long where they are emulated: `make test-machines`.
# conformance: FR3.5 NFR1.1-2
set -euo pipefail
source ./_modules.sh
exec node --test --test-timeout=240000 suite/machine.mjs
