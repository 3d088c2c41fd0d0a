package sentry

import _ "embed"

//go:generate go run ./filters filters_amd64.json

// compiledFilter is the sentry's seccomp filter, see the command in filters.
//
//go:embed filters_amd64.json
var compiledFilter []byte
