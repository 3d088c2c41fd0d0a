#!/usr/bin/env bash
# Runs the suite of this folder: E2B's own SDK and command line, as package.json pins
# them, against the node.
set -euo pipefail

command -v node >/dev/null && command -v npm >/dev/null || { echo "node and npm are not installed"; exit 77; }
(($(node -p 'process.versions.node.split(".")[0]') >= 20)) || { echo "E2B's SDK needs node 20, this is $(node --version)"; exit 77; }
[[ -d node_modules/e2b && -d node_modules/@e2b/cli ]] || npm install --no-audit --no-fund --no-package-lock --loglevel=error
exec node --test --test-concurrency=1 suite/*.test.mjs
