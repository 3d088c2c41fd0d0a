#!/usr/bin/env bash
# OpenAI's client for Python, unmodified, against a real small model.
# conformance: L1 L8
set -euo pipefail

version=3.54.0
. ./_model.sh
python3 -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
	echo "Python 3.10 or later with venv is not installed"
	exit 77
}
if ! venv/bin/python -c "from importlib.metadata import version; assert version('openai') == '$version'" 2>/dev/null; then
	rm -rf venv
	python3 -m venv venv && venv/bin/pip install -q --disable-pip-version-check "openai==$version" || {
		rm -rf venv
		echo "OpenAI's package could not be downloaded"
		exit 77
	}
fi
exec venv/bin/python suite/client.py
