# Sourced by the scripts of this folder.
set -euo pipefail

fail() {
	printf 'FAILED at line %s: %s\n' "${BASH_LINENO[1]:-?}" "$*" >&2
	exit 1
}

# equal GOT WANT
equal() { [[ $1 == "$2" ]] || fail "got '$1', want '$2'"; }

# has TEXT PATTERN: the extended regular expression occurs in the text.
has() { grep -qE -- "$2" <<<"$1" || fail "'$2' does not occur in: $1"; }

# fails CODE PATTERN COMMAND...: it ends with the code and its errors match.
fails() {
	local code=$1 pattern=$2 got=0 errors
	shift 2
	errors=$("$@" 2>&1 >/dev/null </dev/null) || got=$?
	[[ $got == "$code" ]] || fail "'$*' ended with $got, not $code: $errors"
	has "$errors" "$pattern"
}

# sandbox NAME [FLAGS]: makes one of the image base that ends with the script.
sandbox() {
	local name=$1
	shift
	atoll create base --name "$name" "$@" >/dev/null
	made+=("$name")
}
made=()
trap 'atoll rm -f "${made[@]}" >/dev/null 2>&1 || true' EXIT
