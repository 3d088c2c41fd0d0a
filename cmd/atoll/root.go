package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/sandbox"
)

// app is one run of the command line.
type app struct {
	stdin       io.Reader
	stdout      io.Writer
	stderr      io.Writer
	home        string // where state lies; $ATOLL_HOME
	addr        string // of the daemon; "" looks for one, see open
	key         string
	debug       bool
	interactive bool // stderr is a terminal: progress may be drawn

	backend   native.Backend // nil until a command has asked for it
	daemonURL string         // of the daemon in use; "" for a node of our own
	known     string         // ID of the sandbox looked up last
	ref       string         // what the user calls it
}

// exitError ends the process with a code and without another word: a command's
// own exit code, or one whose reason has been printed.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// exitOurs is the exit code of run, exec and shell when it is not the command
// inside that failed but we, as docker has it.
const exitOurs = 125

// execute runs one command line and returns the process's exit code.
func execute(ctx context.Context, a *app, args []string) int {
	root := a.root()
	root.SetArgs(args)
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if a.backend != nil {
		if cerr := a.backend.Close(); err == nil {
			err = cerr
		}
	}
	var exit exitError
	var own coded
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return int(exit)
	}
	a.complain(cmd, err)
	if errors.As(err, &own) {
		return own.code
	}
	if cmd != nil && passesExitCode(cmd) {
		return exitOurs
	}
	return 1
}

// passesExitCode reports whether a command's exit code is that of a command in
// the sandbox, so that our own failures need a code of their own.
func passesExitCode(cmd *cobra.Command) bool {
	return cmd.Annotations["exit"] == "inner"
}

// complain says what happened, why, and what to do next.
func (a *app) complain(cmd *cobra.Command, err error) {
	if errors.Is(err, context.Canceled) {
		fmt.Fprintln(a.stderr, "atoll: interrupted")
		return
	}
	var known *sandbox.Err
	if !errors.As(err, &known) { // cobra's and pflag's own
		message := err.Error()
		fmt.Fprintln(a.stderr, "atoll: "+message)
		if cmd != nil && !strings.Contains(message, "Did you mean") {
			fmt.Fprintf(a.stderr, "  Run '%s --help' for how it is used.\n", cmd.CommandPath())
		}
		return
	}
	p := native.ProblemOf(err)
	fmt.Fprintln(a.stderr, "atoll: "+printable(a.inUsersWords(causeOf(err))))
	if p.Hint != "" {
		fmt.Fprintln(a.stderr, "  "+sentence(printable(p.Hint)))
	}
	if a.debug {
		fmt.Fprintf(a.stderr, "  [%s] %v\n", p.Kind, err)
	}
}

// inUsersWords puts what the user wrote where an error has a sandbox's ID.
func (a *app) inUsersWords(text string) string {
	if a.ref == "" {
		return text
	}
	return strings.ReplaceAll(text, a.known, a.ref)
}

// sentence gives a hint a capital and a full stop.
func sentence(s string) string {
	s = strings.ToUpper(s[:1]) + s[1:]
	if strings.HasSuffix(s, ".") || strings.HasSuffix(s, "?") {
		return s
	}
	return s + "."
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "atoll",
		Short: "A machine for every AI agent",
		Long: "Atoll runs untrusted code in isolated sandboxes, snapshots them while they run, and forks them.\n" +
			"It works by itself; with a daemon (`atoll up`) sandboxes keep their ports, time-outs and pools.",
		SilenceErrors:     true,
		SilenceUsage:      true,
		DisableAutoGenTag: true,
		Args:              cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return unknownCommand(cmd, args[0])
		},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return err })
	pf := root.PersistentFlags()
	pf.StringVar(&a.home, "home", a.home, "the `directory` that holds the node's state ($ATOLL_HOME)")
	pf.StringVar(&a.addr, "addr", a.addr, "the `address` of a daemon ($ATOLL_ADDR)")
	pf.BoolVar(&a.debug, "debug", false, "print how an error came about, and log")
	root.AddGroup(
		&cobra.Group{ID: "run", Title: "Run:"},
		&cobra.Group{ID: "state", Title: "Save, copy, go back:"},
		&cobra.Group{ID: "look", Title: "Look:"},
		&cobra.Group{ID: "things", Title: "Manage:"},
		&cobra.Group{ID: "node", Title: "This node:"},
	)
	root.SetHelpCommandGroupID("node")
	root.SetCompletionCommandGroupID("node")
	in := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	in("run", a.runCommand(), a.createCommand(), a.execCommand(), a.shellCommand(), a.cpCommand(), a.syncCommand(),
		a.portCommand(), a.removeCommand())
	in("state", a.pauseCommand(), a.resumeCommand(), a.snapshotCommand(), a.restoreCommand(), a.forkCommand(),
		a.diffCommand(), a.mergeCommand(), a.migrateCommand())
	in("look", a.listCommand(), a.inspectCommand(), a.logsCommand(), a.statsCommand(), a.topCommand(), a.eventsCommand(),
		a.waitCommand())
	in("things", a.imageCommand(), a.templateCommand(), a.modelCommand(), a.poolCommand(), a.keyCommand(), a.nodeCommand(), a.storeCommand(), a.renameCommand(), a.ttlCommand(),
		a.pruneCommand())
	in("node", a.upCommand(), a.downCommand(), a.infoCommand(), a.runtimeCommand(), a.doctorCommand(), a.benchCommand(), versionCommand())
	return root
}

// group makes a command that only has others below it.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.ArbitraryArgs, RunE: func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		return unknownCommand(cmd, args[0])
	}}
	cmd.AddCommand(subs...)
	return cmd
}

// unknownCommand names the commands that were perhaps meant.
func unknownCommand(cmd *cobra.Command, name string) error {
	cmd.SuggestionsMinimumDistance = 2
	hint := "run `" + cmd.CommandPath() + " --help` for the list"
	if near := cmd.SuggestionsFor(name); len(near) > 0 {
		hint = "did you mean `" + cmd.CommandPath() + " " + strings.Join(near, "` or `"+cmd.CommandPath()+" ") + "`?"
	}
	return usageError("", hint, "there is no command `%s %s`", cmd.CommandPath(), name)
}

// isTerminal reports whether v is a terminal, and gives its file.
func isTerminal(v any) (*os.File, bool) {
	f, ok := v.(*os.File)
	return f, ok && term.IsTerminal(int(f.Fd()))
}

// causeOf is the innermost reason of an error, and what it is about.
func causeOf(err error) string {
	p := native.ProblemOf(err)
	p.Detail = strings.ReplaceAll(strings.TrimSpace(p.Detail), "\n", "; ")
	if p.Subject == "" || says(p.Detail, p.Subject) {
		return p.Detail
	}
	return p.Subject + ": " + p.Detail
}

// says reports whether a text names a subject, as a word or words.
func says(text, subject string) bool {
	letter := func(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' }
	for i := 0; ; i++ {
		at := strings.Index(text[i:], subject)
		if at < 0 {
			return false
		}
		i += at
		end := i + len(subject)
		if (i == 0 || !letter(text[i-1])) && (end == len(text) || !letter(text[end])) {
			return true
		}
	}
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
