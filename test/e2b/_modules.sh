# Sourced by the scripts of this folder: finds Node.js and E2B's packages, of the
# versions in package.json, and says where the volumes' content is.

node -e 'process.exit(Number(process.versions.node.split(".")[0]) >= 20 ? 0 : 1)' 2>/dev/null || {
	echo "Node.js 20 or later is not installed"
	exit 77
}
if [[ ! -d node_modules/e2b || ! -d node_modules/@e2b/cli ]]; then
	npm install --no-package-lock --no-audit --no-fund --ignore-scripts --loglevel=error || {
		echo "E2B's packages could not be downloaded"
		exit 77
	}
fi
export E2B_VOLUME_API_URL=$E2B_API_URL
