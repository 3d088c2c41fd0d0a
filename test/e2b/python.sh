#!/usr/bin/env bash
# E2B's SDK for Python, unmodified, by both of its interfaces.
# conformance: SPEC2
set -euo pipefail

version=2.45.0
python3 -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
	echo "Python 3.10 or later with venv is not installed"
	exit 77
}
if ! venv/bin/python -c "from importlib.metadata import version; assert version('e2b') == '$version'" 2>/dev/null; then
	rm -rf venv
	python3 -m venv venv && venv/bin/pip install -q --disable-pip-version-check "e2b==$version" || {
		rm -rf venv
		echo "E2B's package could not be downloaded"
		exit 77
	}
fi
export E2B_VOLUME_API_URL=$E2B_API_URL
exec venv/bin/python suite/smoke.py
