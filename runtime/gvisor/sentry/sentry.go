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
	"strconv"

	"golang.org/x/sys/unix"
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
	dropInherited()
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

// dropInherited closes the files that we have from our parent but were not given. gVisor's control sockets hold one in the parent
// that exec does not close, and the kernel fails where a descriptor that it wants for itself, such as 254, is taken.
func dropInherited() {
	given, err := strconv.Atoi(os.Getenv(orders.EnvFiles))
	if err != nil {
		return // the process that unmounts
	}
	files, _ := os.ReadDir("/proc/self/fd")
	for _, f := range files {
		fd, err := strconv.Atoi(f.Name())
		if err != nil || fd < 3+given {
			continue
		}
		// What Go has opened for itself is closed at exec, so it cannot have come from there.
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			_ = unix.Close(fd)
		}
	}
}
