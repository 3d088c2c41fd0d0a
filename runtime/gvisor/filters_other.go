//go:build !amd64

package gvisor

// compiledFilter is missing: the sentry compiles its filter itself.
var compiledFilter []byte
