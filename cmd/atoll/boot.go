package main

import (
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/sandbox"
)

// bootOptions are the flags that say how a machine of a disk image comes up.
type bootOptions struct {
	userData, networkConfig string
	noAgent                 bool
	timeout                 ttl
}

func (o *bootOptions) flags(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&o.userData, "user-data", "", "of a disk image: a `file` for cloud-init, #cloud-config or a script")
	fl.StringVar(&o.networkConfig, "network-config", "", "of a disk image: a `file` for cloud-init, in place of the sandbox's address")
	fl.BoolVar(&o.noAgent, "no-agent", false, "of a disk image: put no agent in; nothing can be run in it from outside then")
	fl.Var(&o.timeout, "boot-timeout", "of a disk image: how long its agent may take to answer, for example 5m")
}

// request is what the flags ask for; nil when they say nothing.
func (o *bootOptions) request() (*sandbox.Boot, error) {
	b := &sandbox.Boot{NoAgent: o.noAgent, Timeout: time.Duration(o.timeout)}
	for _, f := range []struct {
		flag, path string
		to         *[]byte
	}{{"--user-data", o.userData, &b.UserData}, {"--network-config", o.networkConfig, &b.NetworkConfig}} {
		if f.path == "" {
			continue
		}
		data, err := readSmall(f.path, sandbox.MaxBootData)
		if err != nil {
			return nil, usageError(f.flag+" "+f.path, "name a file that cloud-init takes", "cannot read it: %v", err)
		}
		*f.to = data
	}
	if len(b.UserData)+len(b.NetworkConfig) == 0 && !b.NoAgent && b.Timeout == 0 {
		return nil, nil
	}
	return b, nil
}

// readSmall reads at most one byte more than a file may have.
func readSmall(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, most+1))
}
