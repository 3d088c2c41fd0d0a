//go:build !amd64

package sentry

// keepCPUID has nothing to do where there is no such instruction.
func keepCPUID() {}
