package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
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
			return a.run(cmd.Context(), b, req, pull, command, streams)
		},
	}
	cmd.Flags().SetInterspersed(false)
	streams.flags(cmd)
	o.flags(cmd)
	cmd.Flags().BoolVar(&o.remove, "rm", false, "remove the sandbox when the command has ended")
	cmd.Flags().StringVar(&entrypoint, "entrypoint", "", "the `command`, instead of the image's")
	pullFlag(cmd, &pull)
	a.completes(cmd, 1, imageNames)
	return cmd
}

// run makes a sandbox, runs the command in it and, with --rm, removes it.
func (a *app) run(ctx context.Context, b native.Backend, req node.CreateRequest, pull string, command []string, streams ioFlags) (err error) {
	sb, err := a.create(ctx, b, req, pull)
	if err != nil {
		return err
	}
	// Creating may have been slow and ctrl-c have come; the sandbox is there now.
	if req.Lifecycle.Remove && !streams.detach {
		defer func() { err = errors.Join(err, removeAfter(ctx, b, sb.ID)) }()
	}
	if len(command) == 0 {
		command = sb.Command
	}
	if len(command) == 0 {
		if !streams.tty {
			return usageError(sb.Image, "write one after the image, for example `atoll run "+sb.Image+" -- ls`", "the image names no command")
		}
		command = loginShell
	}
	err = a.attach(ctx, b, sb, guestOf(b, sb), guest.Command{Args: command, Tag: wire.TagMain}, streams)
	if streams.detach {
		if err != nil {
			return errors.Join(err, removeAfter(ctx, b, sb.ID))
		}
		fmt.Fprintln(a.stdout, sb.ID)
		return nil
	}
	return err
}

// removeTimeout bounds the removal of a sandbox after its command.
const removeTimeout = 30 * time.Second

func removeAfter(ctx context.Context, b native.Backend, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	if err := b.Remove(ctx, id); !sandbox.Is(err, sandbox.NotFound) {
		return err
	}
	return nil // its time was up first
}
