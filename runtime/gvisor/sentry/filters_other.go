//go:build !amd64

package sentry

// compiledFilter is missing: the sentry compiles its filter itself.
var compiledFilter []byte
