// Command atoll is the whole of Atoll in one program: the command line, the
// daemon, and the helpers that it starts as copies of itself.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/atoll-run/atoll/daemon"
	"github.com/atoll-run/atoll/runtime/gvisor"
	"github.com/atoll-run/atoll/runtime/worktree"
)

func main() {
	// A copy that was started as a part of a sandbox must do nothing else
	// first: its start is on the path of every sandbox.
	if gvisor.IsReexec() {
		gvisor.Main()
	}
	if worktree.IsReexec() {
		worktree.Main()
	}
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
