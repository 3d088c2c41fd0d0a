// Command atoll is the whole of Atoll in one program: the command line, the
// daemon, and the helpers that it starts as copies of itself.
package main

import (
	"context"
	"math"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/daemon"
	"github.com/atoll-run/atoll/runtime/microvm/pager"
	"github.com/atoll-run/atoll/runtime/worktree"
)

func main() {
	// A copy that was started as a part of a sandbox must do nothing else
	// first: its start is on the path of every sandbox.
	if worktree.IsReexec() {
		worktree.Main()
	}
	if pager.IsReexec() {
		pager.Main()
	}
	// What a careless parent left open is not passed on to programs that we
	// start. A kernel before 5.11 does not know how, and nothing else depends on it.
	_ = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	// Commands that forward signals take them over; all others end at the
	// first and, should that hang, die at the second.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop)
	_, interactive := isTerminal(os.Stderr)
	a := &app{
		stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, interactive: interactive,
		home: string(daemon.DefaultHome()), addr: os.Getenv("ATOLL_ADDR"), key: os.Getenv("ATOLL_API_KEY"),
	}
	os.Exit(execute(ctx, a, os.Args[1:]))
}
