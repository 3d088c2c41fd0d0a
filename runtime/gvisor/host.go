package gvisor

import "github.com/atoll-run/atoll/sandbox"

type hostRoot struct {
	image string
	binds []sandbox.Mount
}

func makeHostRoot(dir string) (hostRoot, error) { return hostRoot{}, nil }
