package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// ioFlags are -i, -t and -d.
type ioFlags struct {
	stdin, tty, detach bool
}

func (f *ioFlags) flags(cmd *cobra.Command) {
	cmd.Flags().BoolVarP(&f.stdin, "interactive", "i", false, "pass standard input on")
	cmd.Flags().BoolVarP(&f.tty, "tty", "t", false, "give the command a terminal")
	cmd.Flags().BoolVarP(&f.detach, "detach", "d", false, "start it and return")
}

func (f *ioFlags) check(a *app) error {
	if f.detach && (f.stdin || f.tty) {
		return usageError("", "leave out -i and -t", "-d starts the command without you: there is nothing to type into it")
	}
	if _, terminal := isTerminal(a.stdin); f.tty && f.stdin && !terminal {
		return usageError("", "leave out -t", "the input is not a terminal")
	}
	return nil
}

// guestOf returns a client of a sandbox's guest over whatever backend there is.
func guestOf(b native.Backend, sb node.Sandbox) *guest.Client {
	return guestAs(b, sb, sb.User)
}

func guestAs(b native.Backend, sb node.Sandbox, user string) *guest.Client {
	dial := func(ctx context.Context) (net.Conn, error) { return b.Dial(ctx, sb.ID, sandbox.GuestPort) }
	return guest.New(dial, guest.Options{Token: sb.GuestToken, User: user})
}

func (a *app) execCommand() *cobra.Command {
	var streams ioFlags
	var env, envFiles []string
	var user, workdir string
	cmd := &cobra.Command{
		Use: "exec [flags] SANDBOX -- COMMAND [ARG...]", Short: "Run a command in a sandbox", Args: atLeast("a sandbox"),
		Long: "Exec runs a command in a running sandbox and ends with its exit code; 125 is a failure of atoll itself, 126 a\n" +
			"command that cannot be executed, 127 one that does not exist. A pipe's input is passed on with -i.",
		Example:     "  atoll exec work -- python3 -c 'print(2+2)'\n  atoll exec -it work -- bash\n  tar c . | atoll exec -i work -- tar x -C /tmp",
		Annotations: map[string]string{"exit": "inner"},
		RunE: func(cmd *cobra.Command, args []string) error {
			command := parseCommand(args[1:])
			if len(command) == 0 {
				return usageError("", "usage: "+cmd.UseLine(), "the command is missing")
			}
			if err := streams.check(a); err != nil {
				return err
			}
			o := createOptions{env: env, envFiles: envFiles}
			var req node.CreateRequest
			if err := o.fill(&req); err != nil {
				return err
			}
			b, sb, err := a.get(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if user == "" {
				user = sb.User
			}
			return a.attach(cmd.Context(), b, sb, guestAs(b, sb, user), guest.Command{Args: command, Env: req.Env, Dir: workdir}, streams)
		},
	}
	cmd.Flags().SetInterspersed(false)
	streams.flags(cmd)
	cmd.Flags().StringArrayVarP(&env, "env", "e", nil, "set a variable: `KEY=VALUE`, or KEY for this shell's value")
	cmd.Flags().StringArrayVar(&envFiles, "env-file", nil, "set the variables in a `file`")
	cmd.Flags().StringVarP(&user, "user", "u", "", "who to be")
	cmd.Flags().StringVarP(&workdir, "workdir", "w", "", "the `directory` to start in")
	a.completes(cmd, 1, sandboxNames(sandbox.Running))
	return cmd
}

// loginShell is the best shell that a sandbox has, as a login shell.
var loginShell = []string{"/bin/sh", "-c", "command -v bash >/dev/null 2>&1 && exec bash -l || exec sh -l"}

func (a *app) shellCommand() *cobra.Command {
	var user, workdir string
	cmd := &cobra.Command{
		Use: "shell SANDBOX", Aliases: []string{"sh"}, Short: "Open a shell in a sandbox", Args: exact("a sandbox"),
		Annotations: map[string]string{"exit": "inner"},
		RunE: func(cmd *cobra.Command, args []string) error {
			b, sb, err := a.get(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if user == "" {
				user = sb.User
			}
			_, terminal := isTerminal(a.stdin)
			return a.attach(cmd.Context(), b, sb, guestAs(b, sb, user), guest.Command{Args: loginShell, Dir: workdir}, ioFlags{stdin: true, tty: terminal})
		},
	}
	cmd.Flags().StringVarP(&user, "user", "u", "", "who to be")
	cmd.Flags().StringVarP(&workdir, "workdir", "w", "", "the `directory` to start in")
	a.completes(cmd, 1, sandboxNames(sandbox.Running))
	return cmd
}

// attach starts a command and carries its input, output and signals until it
// ends. It returns an exitError with the command's exit code unless that is 0.
func (a *app) attach(ctx context.Context, b native.Backend, sb node.Sandbox, g *guest.Client, cmd guest.Command, streams ioFlags) error {
	defer g.CloseIdle()
	cmd.Stdin = streams.stdin && !streams.tty
	if streams.tty {
		cmd.PTY = &guest.Size{Cols: 80, Rows: 24}
		if size, ok := a.terminalSize(); ok {
			cmd.PTY = &size
		}
		if _, set := cmd.Env["TERM"]; !set {
			if cmd.Env == nil {
				cmd.Env = map[string]string{}
			}
			cmd.Env["TERM"] = first(os.Getenv("TERM"), "xterm")
		}
	}
	// Once the command runs, an interrupt belongs to it and not to us.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	release := context.AfterFunc(ctx, end)
	p, err := g.Start(life, cmd)
	if err != nil {
		return startError(cmd.Args[0], err)
	}
	defer p.Close()
	if !release() {
		return ctx.Err()
	}
	if streams.detach {
		return nil
	}
	restore, err := a.rawMode(streams)
	if err != nil {
		return err
	}
	defer restore()
	go a.forwardSignals(life, p, streams.tty)
	if streams.stdin {
		go sendInput(life, p, a.stdin, streams.tty)
	}
	result, err := p.Wait(a.stdout, a.stderr)
	restore()
	var broken *os.PathError
	switch {
	case err == nil:
		return a.ended(sb, result)
	case errors.As(err, &broken): // our own output is closed, as by `| head`
		_ = p.Signal(life, syscall.SIGHUP) // it may have ended by now
		return exitError(128 + int(syscall.SIGPIPE))
	}
	return lost(life, b, sb, err)
}

// startError gives a command that could not be started docker's exit codes.
func startError(name string, err error) error {
	var e *sandbox.Err
	if errors.As(err, &e) && e.Op == "guest.Start" {
		switch e.Kind {
		case sandbox.NotFound:
			return coded{127, sandbox.Errorf("atoll", sandbox.NotFound, name, "command not found in the sandbox")}
		case sandbox.Denied:
			return coded{126, sandbox.E("atoll", sandbox.Denied, name, err)}
		case sandbox.Invalid:
			return coded{126, err}
		}
	}
	return err
}

// coded is an error with an exit code of its own.
type coded struct {
	code int
	error
}

func (c coded) Unwrap() error { return c.error }

// ended turns how the command ended into how we end.
func (a *app) ended(sb node.Sandbox, r guest.Result) error {
	code := r.ShellCode()
	if code == 0 {
		return nil
	}
	if r.Message != "" && r.Signal == syscall.SIGKILL {
		hint := ""
		if sb.Spec.Resources.Memory > 0 {
			hint = fmt.Sprintf("; it may use %s", formatBytes(sb.Spec.Resources.Memory))
		}
		fmt.Fprintf(a.stderr, "atoll: %s: %s%s\n", sb.Name, printable(r.Message), hint)
	}
	return exitError(code)
}

// lost says why the connection to a command broke off.
func lost(ctx context.Context, b native.Backend, sb node.Sandbox, err error) error {
	now, gerr := b.Get(ctx, sb.ID)
	switch {
	case sandbox.Is(gerr, sandbox.NotFound):
		return sandbox.Errorf("atoll", sandbox.Unavailable, sb.Name, "the sandbox was removed while the command ran")
	case gerr == nil && now.State != sandbox.Running:
		why := ""
		if now.Reason != "" {
			why = ": " + now.Reason
		}
		return coded{137, sandbox.Errorf("atoll", sandbox.Unavailable, sb.Name, "the sandbox is %s%s; the command ended with it", now.State, why)}
	}
	return err
}

// forwardSignals passes on what we are told until ctx ends. With a terminal,
// ctrl-c reaches the command as a key and not as a signal.
func (a *app) forwardSignals(ctx context.Context, p *guest.Process, tty bool) {
	signals := make(chan os.Signal, 16)
	// SIGPIPE is asked for so that writing to a closed pipe is an error and
	// not our death: the sandbox must still be cleared away.
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH, syscall.SIGPIPE)
	defer signal.Stop(signals)
	for {
		select {
		case <-ctx.Done():
			return
		case s := <-signals:
			switch {
			case s == syscall.SIGPIPE:
			case s == syscall.SIGWINCH:
				if size, ok := a.terminalSize(); ok && tty {
					_ = p.Resize(ctx, size) // it may have ended
				}
			default:
				_ = p.Signal(ctx, s.(syscall.Signal))
			}
		}
	}
}

// sendInput carries our input into the command and then its end.
func sendInput(ctx context.Context, p *guest.Process, in io.Reader, tty bool) {
	buffer := make([]byte, 128<<10)
	for {
		n, err := in.Read(buffer)
		if n > 0 && p.Write(ctx, buffer[:n], tty) != nil {
			return // the command does not read any more
		}
		if err != nil {
			if !tty {
				_ = p.CloseStdin(ctx) // it may have ended
			}
			return
		}
	}
}

// rawMode lets every key reach the command. The returned function undoes it and
// may be called again.
func (a *app) rawMode(streams ioFlags) (restore func(), err error) {
	in, terminal := isTerminal(a.stdin)
	if !streams.tty || !streams.stdin || !terminal {
		return func() {}, nil
	}
	state, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return nil, err
	}
	return func() { _ = term.Restore(int(in.Fd()), state) }, nil
}

// terminalSize is that of the terminal we write to, or read from.
func (a *app) terminalSize() (guest.Size, bool) {
	for _, v := range []any{a.stdout, a.stdin, a.stderr} {
		if f, ok := isTerminal(v); ok {
			if cols, rows, err := term.GetSize(int(f.Fd())); err == nil && cols > 0 && rows > 0 {
				return guest.Size{Cols: uint32(cols), Rows: uint32(rows)}, true
			}
		}
	}
	return guest.Size{}, false
}
