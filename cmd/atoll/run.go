package main

import (
	"context"
	"fmt"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/node"
)

func (a *app) runCommand() *cobra.Command {
	var o createOptions
	var streams ioFlags
	var pull, entrypoint string
	cmd := &cobra.Command{
		Use: "run [flags] IMAGE [-- COMMAND [ARG...]]", Short: "Make a sandbox and run a command in it", Args: atLeast("an image"),
		Long: "Run makes a sandbox from an image and runs a command in it, or the image's own. It ends with the command's exit\n" +
			"code; 125 is a failure of atoll itself, 126 a command that cannot be executed, 127 one that does not exist.\n" +
			"IMAGE is `base`, `host` (this host's /usr, read-only), a template, an image of a registry, or the path of a git\n" +
			"repository. Without a daemon the sandbox lives as long as the command.",
		Example: "  atoll run --rm host -- uname -a\n  atoll run --rm -it base -- bash\n  atoll run -d --name web -p 8080:80 base -- python3 -m http.server 80\n" +
			"  atoll run --runtime worktree --name fix . -- claude",
		Annotations: map[string]string{"exit": "inner"},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := streams.check(a); err != nil {
				return err
			}
			req, err := o.request(args[0])
			if err != nil {
				return err
			}
			command := parseCommand(args[1:])
			if entrypoint != "" {
				command = append([]string{entrypoint}, command...)
			}
			open := a.open
			if streams.detach {
				open = a.openDaemon // else the sandbox would end with us
			}
			b, err := open(cmd.Context())
			if err != nil {
				return err
			}
			return a.run(cmd.Context(), b, node.RunRequest{Sandbox: req, Command: command}, pull, streams)
		},
	}
	cmd.Flags().SetInterspersed(false)
	streams.flags(cmd)
	o.flags(cmd)
	cmd.Flags().BoolVar(&o.remove, "rm", false, "remove the sandbox when the command has ended, or this client is gone")
	cmd.Flags().StringVar(&entrypoint, "entrypoint", "", "the `command`, instead of the image's")
	pullFlag(cmd, &pull)
	a.completes(cmd, 1, imageNames)
	return cmd
}

// run makes a sandbox and runs its main command. The node removes the sandbox
// after it, or after us, if that was asked for.
func (a *app) run(ctx context.Context, b native.Backend, req node.RunRequest, pull string, streams ioFlags) error {
	if err := a.fetch(ctx, b, req.Sandbox.Image, pull); err != nil {
		return err
	}
	req.Attach, req.Stdin = !streams.detach, streams.stdin && !streams.tty
	if streams.tty {
		req.Terminal, req.Env = a.terminal(nil)
	}
	if streams.detach {
		sb, err := b.Run(ctx, req, func(node.RunEvent) {})
		if err != nil {
			return startError(err)
		}
		fmt.Fprintln(a.stdout, sb.ID)
		return nil
	}
	// Once the command runs, an interrupt belongs to it and not to us.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	release := context.AfterFunc(ctx, end)
	s := session{a: a, streams: streams, end: end}
	sb, err := b.Run(life, req, func(ev node.RunEvent) {
		if ev.Started != nil {
			release()
			g := guestOf(b, *ev.Started)
			s.begin(life, g.Control(ev.Started.Main.PID))
			context.AfterFunc(life, g.CloseIdle)
		}
		s.write(a.stdout, ev.Stdout)
		s.write(a.stderr, ev.Stderr)
	})
	s.restore()
	switch {
	case s.broken:
		return exitError(128 + int(syscall.SIGPIPE))
	case err != nil && !s.begun:
		return startError(err)
	case err != nil:
		return withSandbox(err)
	}
	return a.ended(sb, sb.Main.ExitCode, sb.Main.Reason)
}
