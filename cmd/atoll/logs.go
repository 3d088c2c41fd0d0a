package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/sandbox"
)

func (a *app) logsCommand() *cobra.Command {
	var f format
	var follow, all, times, console bool
	var tail int
	cmd := &cobra.Command{
		Use: "logs SANDBOX", Short: "Show what a sandbox's command, or a machine's console, wrote", Args: exact("a sandbox"),
		Long: "Logs shows the output of the command that `atoll run` started. The newest megabyte is kept, in the sandbox, and\n" +
			"goes along with its snapshots. With --all the starts and ends of every command are shown too. Of a machine that was\n" +
			"created from a disk image logs shows the console, of which the newest megabyte is kept; --console does so for others.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			b, sb, err := a.get(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if console || sb.Spec.Root.Kind == sandbox.RootDisk && sb.Main == nil {
				if f.form != "" || all || times {
					return usageError("logs "+args[0], "leave -o, --all and --timestamps out", "a console is text without times")
				}
				return a.printConsole(cmd.Context(), b, sb.ID, tail, follow)
			}
			g := guestOf(b, sb)
			defer g.CloseIdle()
			show := func(e wire.LogEntry) error { return a.printLog(&f, e, times || all) }
			var since uint64
			if tail >= 0 {
				var last []wire.LogEntry
				err := g.Logs(cmd.Context(), 0, false, func(e wire.LogEntry) error {
					since = e.Seq
					if all || isOutput(e) {
						last = append(last, e)
						last = slices.Delete(last, 0, max(0, len(last)-tail))
					}
					return nil
				})
				if err != nil {
					return err
				}
				for _, e := range last {
					if err := show(e); err != nil {
						return err
					}
				}
				if !follow {
					return nil
				}
			}
			err = g.Logs(cmd.Context(), since, follow, func(e wire.LogEntry) error {
				if !all && !isOutput(e) {
					return nil
				}
				return show(e)
			})
			if sandbox.Is(err, sandbox.Canceled) {
				return nil // ctrl-c is how one stops following
			}
			return a.whyLost(cmd.Context(), b, sb, err)
		},
	}
	f.flags(cmd, "")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what is written from now on")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "starts and ends of commands too")
	cmd.Flags().BoolVarP(&times, "timestamps", "t", false, "say when each line was written")
	cmd.Flags().BoolVar(&console, "console", false, "the console of a machine instead")
	cmd.Flags().IntVarP(&tail, "tail", "n", -1, "only the last `lines`")
	a.completes(cmd, 1, sandboxNames(sandbox.Running))
	return cmd
}

// consolePause is how often a console is read that is followed.
const consolePause = time.Second

// printConsole shows a machine's console: its last lines unless tail is negative, and
// with follow what comes then.
func (a *app) printConsole(ctx context.Context, b native.Backend, ref string, tail int, follow bool) error {
	c, err := b.Console(ctx, ref, 0)
	if err != nil {
		return err
	}
	if tail >= 0 {
		lines := bytes.SplitAfter(c.Text, []byte("\n"))
		if len(lines[len(lines)-1]) == 0 {
			lines = lines[:len(lines)-1]
		}
		c.Text = bytes.Join(lines[max(0, len(lines)-tail):], nil)
	}
	for {
		if _, err := a.stdout.Write(c.Text); err != nil || !follow {
			return err
		}
		select {
		case <-ctx.Done(): // ctrl-c is how one stops following
			return nil
		case <-time.After(consolePause):
		}
		next, err := b.Console(ctx, ref, c.Next)
		if err != nil {
			if sandbox.Is(err, sandbox.Canceled) {
				return nil
			}
			return err
		}
		c = next
	}
}

func isOutput(e wire.LogEntry) bool { return e.Event == wire.LogStdout || e.Event == wire.LogStderr }

// printLog prints a line to where the command wrote it.
func (a *app) printLog(f *format, e wire.LogEntry, times bool) error {
	switch f.form {
	case "json":
		return json.NewEncoder(a.stdout).Encode(e)
	case "yaml":
		fmt.Fprintln(a.stdout, "---")
		_, err := f.structured(a.stdout, e)
		return err
	}
	var w io.Writer = a.stdout
	if e.Event == wire.LogStderr {
		w = a.stderr
	}
	line := e.Line
	switch e.Event {
	case wire.LogStart:
		line = fmt.Sprintf("[%d] started by %s: %q", e.PID, e.User, e.Cmd)
	case wire.LogExit:
		line = fmt.Sprintf("[%d] %s", e.PID, first(e.Error, first(e.Status, "ended")))
	}
	if times {
		line = e.Time.Local().Format("2006-01-02 15:04:05.000") + "  " + line
	}
	_, err := fmt.Fprintln(w, line)
	return err
}
