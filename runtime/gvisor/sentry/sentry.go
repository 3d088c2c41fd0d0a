// Package sentry is the kernel of a sandbox: gVisor with the few calls that we add
// to it, as the main program of an executable of its own.
//
// The executable is apart from atoll's, inside which it is shipped, because each
// of the two starts in half the time without the other: commands have no gVisor
// to initialise, sandboxes no database and no registry.
package sentry

import (
	"os"
	"slices"

	"gvisor.dev/gvisor/runsc/cli"
	"gvisor.dev/gvisor/runsc/cmd"
	"gvisor.dev/gvisor/runsc/cmd/sentry/sentrycmd"
	"gvisor.dev/gvisor/runsc/cmd/util"

	"github.com/atoll-run/atoll/runtime/gvisor/orders"
)

// Wanted reports whether this process was started to be a part of a sandbox.
// Such a process must call Main before it does anything else. gVisor itself
// starts "/proc/self/exe umount" once from inside the sentry.
func Wanted() bool {
	name := os.Args[0]
	return name == orders.ArgSentry || name == orders.ArgGofer ||
		name == "/proc/self/exe" && slices.Contains(os.Args[1:], "umount")
}

// Main runs the part for which this process was started. It never returns.
func Main() {
	// We are executed by a descriptor, whose number the kernel takes for our name.
	_ = os.WriteFile("/proc/self/comm", []byte(orders.ArgSentry), 0)
	if slices.Contains(os.Args, "boot") {
		useCompiledFilter()
		keepCPUID()
	}
	cli.Run(nil, map[util.SubCommand]string{
		new(bootCommand):      "",
		new(sentrycmd.Umount): "",
		new(cmd.Gofer):        "",
	}, nil)
}
