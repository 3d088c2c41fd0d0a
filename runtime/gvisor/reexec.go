package gvisor

import (
	"os"
	"slices"

	"gvisor.dev/gvisor/runsc/cli"
	"gvisor.dev/gvisor/runsc/cmd"
	"gvisor.dev/gvisor/runsc/cmd/sentry/sentrycmd"
	"gvisor.dev/gvisor/runsc/cmd/util"
)

// The names under which our executable is started again. gVisor itself starts
// "/proc/self/exe umount" once from inside the sentry.
const (
	argSentry = "atoll-sentry"
	argGofer  = "atoll-gofer"
)

// IsReexec reports whether this process was started to be a part of a sandbox.
// Such a process must call Main before it does anything else.
func IsReexec() bool {
	name := os.Args[0]
	return name == argSentry || name == argGofer ||
		name == "/proc/self/exe" && slices.Contains(os.Args[1:], "umount")
}

// Main runs the part for which this process was started. It never returns.
func Main() {
	if slices.Contains(os.Args, "boot") {
		useCompiledFilter()
	}
	cli.Run(nil, map[util.SubCommand]string{
		new(bootCommand):      "",
		new(sentrycmd.Umount): "",
		new(cmd.Gofer):        "",
	}, nil)
}
