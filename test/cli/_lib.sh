# Sourced by the scripts of this folder.
set -euo pipefail

fail() {
	printf '%s\nFAILED at line %s\n' "$*" "${BASH_LINENO[1]:-?}" >&2 # last, for of a long text only the end is shown
	exit 1
}

# equal GOT WANT
equal() { [[ $1 == "$2" ]] || fail "got '$1', want '$2'"; }

# has TEXT PATTERN: the extended regular expression occurs in the text.
has() { grep -qE -- "$2" <<<"$1" || fail "in: $1"$'\n'"'$2' does not occur there"; }

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
