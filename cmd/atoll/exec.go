package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

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
			return a.attach(cmd.Context(), b, sb, guestAs(b, sb, user), guest.Command{Args: guest.LoginShell, Dir: workdir}, ioFlags{stdin: true, tty: terminal})
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
		cmd.PTY, cmd.Env = a.terminal(cmd.Env)
	}
	// Once the command runs, an interrupt belongs to it and not to us.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	release := context.AfterFunc(ctx, end)
	p, err := g.Start(life, cmd)
	if err != nil {
		return startError(a.whyLost(life, b, sb, err))
	}
	defer p.Close()
	if !release() {
		return ctx.Err()
	}
	if streams.detach {
		return nil
	}
	s := session{a: a, streams: streams, end: end}
	s.begin(life, p.Control)
	defer s.restore()
	for !s.broken {
		ev, err := p.Next()
		switch {
		case err != nil:
			s.restore()
			return withSandbox(a.whyLost(life, b, sb, err))
		case ev.Kind == guest.End:
			s.restore()
			return a.ended(sb, ev.Result.ShellCode(), ev.Result.Message)
		case ev.Kind == guest.Stderr:
			s.write(a.stderr, ev.Data)
		default:
			s.write(a.stdout, ev.Data)
		}
	}
	return exitError(128 + int(syscall.SIGPIPE))
}

// session is our side of a command that runs in a sandbox.
type session struct {
	a       *app
	streams ioFlags
	end     context.CancelFunc // ends our view of it
	begun   bool
	broken  bool // our own output is closed, as by `| head`
	process guest.Control
	life    context.Context
	undo    func() // of the terminal; nil unless begun
}

// begin carries input and signals from now on, until life ends.
func (s *session) begin(life context.Context, process guest.Control) {
	s.begun, s.life, s.process = true, life, process
	s.undo = s.a.rawMode(s.streams)
	go s.a.forwardSignals(life, process, s.streams.tty)
	if s.streams.stdin {
		go sendInput(life, process, s.a.stdin, s.streams.tty)
	}
}

// write passes output on. When nobody takes it the command is hung up.
func (s *session) write(to io.Writer, data []byte) {
	if len(data) == 0 || s.broken {
		return
	}
	if _, err := to.Write(data); err != nil {
		s.broken = true
		_ = s.process.Signal(s.life, syscall.SIGHUP) // it may have ended by now
		s.end()
	}
}

// restore gives the terminal back. It may be called again.
func (s *session) restore() {
	if s.undo != nil {
		s.undo()
	}
}

// terminal is what a command with a terminal gets: ours, as far as we have one.
func (a *app) terminal(env map[string]string) (*guest.Size, map[string]string) {
	size, ok := a.terminalSize()
	if !ok {
		size = guest.Size{Cols: 80, Rows: 24}
	}
	if _, set := env["TERM"]; !set {
		if env == nil {
			env = map[string]string{}
		}
		env["TERM"] = first(os.Getenv("TERM"), "xterm")
	}
	return &size, env
}

// startError gives a command that could not be started docker's exit codes.
func startError(err error) error {
	var e *sandbox.Err
	if errors.As(err, &e) && e.Op == "guest.Start" {
		switch e.Kind {
		case sandbox.NotFound:
			return coded{127, sandbox.Errorf("atoll", sandbox.NotFound, e.Subject, "command not found in the sandbox")}
		case sandbox.Denied:
			return coded{126, sandbox.E("atoll", sandbox.Denied, e.Subject, err)}
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
func (a *app) ended(sb node.Sandbox, code int, reason string) error {
	if code == 0 {
		return nil
	}
	if strings.Contains(reason, "out of memory") {
		hint := ""
		if sb.Spec.Resources.Memory > 0 {
			hint = fmt.Sprintf("; it may use %s", formatBytes(sb.Spec.Resources.Memory))
		}
		fmt.Fprintf(a.stderr, "atoll: %s: %s%s\n", sb.Name, printable(reason), hint)
	}
	return exitError(code)
}

// noticeTime is how long the node may take to notice what cut a connection.
const noticeTime = 3 * time.Second

// whyLost asks the node why a connection into a sandbox broke off or was not
// made. It returns err itself when the sandbox runs on.
func (a *app) whyLost(ctx context.Context, b native.Backend, sb node.Sandbox, err error) error {
	if err == nil || !sandbox.Is(err, sandbox.Unavailable) {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), noticeTime)
	defer cancel()
	now, werr := b.Wait(ctx, sb.ID, sandbox.Paused, sandbox.Error, sandbox.Terminating, sandbox.Terminated)
	if sandbox.Is(werr, sandbox.NotFound) {
		now, werr = sb, nil
		now.State, now.Reason = sandbox.Terminated, "its record is gone"
	}
	if werr != nil {
		return err
	}
	return node.Stopped(now)
}

// withSandbox gives the end of a sandbox under its command the exit code of a
// command that was killed.
func withSandbox(err error) error {
	var e *sandbox.Err
	if errors.As(err, &e) && e.Op == node.OpStopped && e.Kind != sandbox.Conflict { // paused: it is not at its end
		return coded{128 + int(syscall.SIGKILL), err}
	}
	return err
}

// forwardSignals passes on what we are told until ctx ends. With a terminal,
// ctrl-c reaches the command as a key and not as a signal.
func (a *app) forwardSignals(ctx context.Context, p guest.Control, tty bool) {
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
func sendInput(ctx context.Context, p guest.Control, in io.Reader, tty bool) {
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
func (a *app) rawMode(streams ioFlags) (restore func()) {
	in, terminal := isTerminal(a.stdin)
	if !streams.tty || !streams.stdin || !terminal {
		return func() {}
	}
	state, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return func() {} // keys are then lines, which is better than no command
	}
	return func() { _ = term.Restore(int(in.Fd()), state) }
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
