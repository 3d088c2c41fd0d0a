#!/usr/bin/env bash
# OpenAI's client for Node.js, unmodified, against a real small model.
# conformance: L1
set -euo pipefail

. ./_model.sh
node -e 'process.exit(Number(process.versions.node.split(".")[0]) >= 20 ? 0 : 1)' 2>/dev/null || {
	echo "Node.js 20 or later is not installed"
	exit 77
}
if [[ ! -d node_modules/openai ]]; then
	npm install --no-package-lock --no-audit --no-fund --ignore-scripts --loglevel=error || {
		echo "OpenAI's package could not be downloaded"
		exit 77
	}
fi
exec node suite/client.mjs
