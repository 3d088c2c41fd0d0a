package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// exact asks for exactly the named arguments.
func exact(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return usageError("", "usage: "+cmd.UseLine(), "%s is missing", names[len(args)])
		}
		if len(args) > len(names) {
			return usageError("", "usage: "+cmd.UseLine(), "%q is one argument too many", args[len(names)])
		}
		return nil
	}
}

// atLeast asks for the named arguments and allows more.
func atLeast(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return usageError("", "usage: "+cmd.UseLine(), "%s is missing", names[len(args)])
		}
		return nil
	}
}

// each does the same to every ref, prints the refs that worked, and goes on
// after a failure, so that one bad name does not spare the others.
func (a *app) each(cmd *cobra.Command, refs []string, do func(b native.Backend, ref string) error) error {
	return a.eachSays(cmd, refs, func(b native.Backend, ref string) (string, error) { return ref, do(b, ref) })
}

// eachSays is each with words of do's own.
func (a *app) eachSays(cmd *cobra.Command, refs []string, do func(b native.Backend, ref string) (string, error)) error {
	b, err := a.openDaemon(cmd.Context())
	if err != nil {
		return err
	}
	failed := false
	for _, ref := range refs {
		said, err := do(b, ref)
		if err != nil {
			a.complain(cmd, a.suggest(cmd.Context(), b, ref, err))
			failed = true
			continue
		}
		fmt.Fprintln(a.stdout, said)
	}
	if failed {
		return exitError(1)
	}
	return nil
}

// suggest names similar sandboxes in the error about an unknown one.
func (a *app) suggest(ctx context.Context, b native.Backend, ref string, err error) error {
	if !sandbox.Is(err, sandbox.NotFound) {
		return err
	}
	all, _ := b.List(ctx, node.Filter{})
	names := make([]string, len(all))
	for i, sb := range all {
		names[i] = sb.Name
	}
	if close := near(ref, names); len(close) > 0 {
		return sandbox.Errorf("atoll", sandbox.NotFound, ref, "no such sandbox").WithHint("did you mean " + strings.Join(close, " or ") + "?")
	}
	return err
}

// get looks a sandbox up.
func (a *app) get(ctx context.Context, ref string) (native.Backend, node.Sandbox, error) {
	b, err := a.openDaemon(ctx)
	if err != nil {
		return nil, node.Sandbox{}, err
	}
	sb, err := b.Get(ctx, ref)
	if err != nil {
		return nil, sb, a.suggest(ctx, b, ref, err)
	}
	a.known, a.ref = sb.ID, ref
	return b, sb, nil
}

// removeTimeout bounds the removal of a sandbox that we made for ourselves.
const removeTimeout = 30 * time.Second

func sandboxID(sb node.Sandbox) string { return sb.ID }

// sandboxColumns are the columns of `atoll ls`; now is when it was asked.
func sandboxColumns(now time.Time) []column[node.Sandbox] {
	return []column[node.Sandbox]{
		{head: "NAME", cell: func(s node.Sandbox) string { return s.Name }},
		{head: "ID", cell: func(s node.Sandbox) string { return shortID(s.ID) }},
		{head: "IMAGE", cell: func(s node.Sandbox) string { return s.Image }},
		{head: "RUNTIME", cell: func(s node.Sandbox) string { return s.Runtime }},
		{head: "STATE", cell: stateOf},
		{head: "AGE", cell: func(s node.Sandbox) string { return formatAge(now.Sub(s.CreatedAt)) }},
		{head: "ENDS", cell: func(s node.Sandbox) string { return endsIn(s, now) }},
		{head: "PORTS", cell: func(s node.Sandbox) string { return portList(s.Ports) }},
		{head: "COMMAND", wide: true, cell: commandOf},
		{head: "CPUS", wide: true, cell: func(s node.Sandbox) string { return formatCPUs(s.Spec.Resources.CPUs) }},
		{head: "MEMORY", wide: true, cell: func(s node.Sandbox) string { return limit(s.Spec.Resources.Memory) }},
		{head: "DISK", wide: true, cell: func(s node.Sandbox) string { return limit(s.Spec.Resources.Disk) }},
		{head: "NETWORK", wide: true, cell: func(s node.Sandbox) string { return string(s.Spec.Network) }},
		{head: "PARENT", wide: true, cell: func(s node.Sandbox) string { return shortID(s.Parent) }},
		{head: "TEAM", wide: true, cell: func(s node.Sandbox) string { return s.Team }},
		{head: "METADATA", wide: true, cell: func(s node.Sandbox) string { return pairList(s.Metadata) }},
	}
}

func stateOf(s node.Sandbox) string {
	switch {
	case s.State == sandbox.Paused && s.Suspended != "":
		return "paused (disk)"
	case s.State == sandbox.Error && s.Reason != "":
		return "error: " + s.Reason
	case s.State == sandbox.Running && s.Main != nil && s.Main.State == node.MainExited:
		return fmt.Sprintf("running (exited %d)", s.Main.ExitCode)
	}
	return string(s.State)
}

// commandOf is the main command and how it is.
func commandOf(s node.Sandbox) string {
	if s.Main == nil {
		return ""
	}
	return fmt.Sprintf("%.40q %s", strings.Join(s.Main.Args, " "), s.Main)
}

func endsIn(s node.Sandbox, now time.Time) string {
	if s.EndAt == nil || s.State == sandbox.Terminated {
		return ""
	}
	return "in " + formatAge(s.EndAt.Sub(now))
}

func portList(ports []node.Port) string {
	words := make([]string, len(ports))
	for i, p := range ports {
		words[i] = p.HostIP + ":" + strconv.Itoa(p.Host) + ">" + strconv.Itoa(p.Guest)
	}
	return strings.Join(words, " ")
}

func formatCPUs(n float64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatFloat(n, 'g', 3, 64)
}

func limit(n int64) string {
	if n == 0 {
		return ""
	}
	return formatBytes(n)
}

func (a *app) listCommand() *cobra.Command {
	var f format
	var filter node.Filter
	var states, metadata []string
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list", "ps"}, Short: "List sandboxes, newest first", Args: exact(),
		Example: "  atoll ls\n  atoll ls -a --state error\n  atoll rm -f $(atoll ls -q)",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return err
			}
			var err error
			if filter.Metadata, err = parsePairs("metadata", metadata); err != nil {
				return err
			}
			for _, s := range states {
				filter.States = append(filter.States, sandbox.State(s))
			}
			b, err := a.openDaemon(cmd.Context())
			if err != nil {
				return err
			}
			all, err := b.List(cmd.Context(), filter)
			if err != nil {
				return err
			}
			return list(a.stdout, &f, all, sandboxID, sandboxColumns(time.Now()))
		},
	}
	f.flags(cmd, "print IDs only")
	cmd.Flags().BoolVarP(&filter.All, "all", "a", false, "those that have ended too")
	cmd.Flags().StringArrayVar(&states, "state", nil, "only in this `state`: running, paused, error ...")
	cmd.Flags().StringArrayVar(&metadata, "metadata", nil, "only with this `KEY=VALUE`")
	cmd.Flags().StringVar(&filter.Template, "template", "", "only from this `template`")
	_ = cmd.RegisterFlagCompletionFunc("state", cobra.FixedCompletions([]string{"running", "paused", "error", "terminated"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (a *app) inspectCommand() *cobra.Command {
	f := format{form: "json"}
	cmd := &cobra.Command{
		Use: "inspect SANDBOX...", Short: "Show all that is known of sandboxes", Args: atLeast("a sandbox"),
		RunE: func(cmd *cobra.Command, refs []string) error {
			var found []node.Sandbox
			for _, ref := range refs {
				_, sb, err := a.get(cmd.Context(), ref)
				if err != nil {
					return err
				}
				found = append(found, sb)
			}
			return a.show(&f, found)
		},
	}
	cmd.Flags().StringVarP(&f.form, "output", "o", "json", "print as `json` or yaml")
	a.completes(cmd, -1, sandboxNames())
	return cmd
}

// show prints one value by itself and several as a list.
func (a *app) show(f *format, values any) error {
	if f.form != "yaml" {
		f.form = "json"
	}
	if found, ok := values.([]node.Sandbox); ok && len(found) == 1 {
		values = found[0]
	}
	_, err := f.structured(a.stdout, values)
	return err
}

func (a *app) removeCommand() *cobra.Command {
	var force, all bool
	cmd := &cobra.Command{
		Use: "rm [-f] SANDBOX...", Aliases: []string{"remove", "kill"}, Short: "Remove sandboxes",
		Example: "  atoll rm brave-otter\n  atoll rm --all -f",
		RunE: func(cmd *cobra.Command, refs []string) error {
			b, err := a.openDaemon(cmd.Context())
			if err != nil {
				return err
			}
			if all {
				found, err := b.List(cmd.Context(), node.Filter{})
				if err != nil {
					return err
				}
				for _, sb := range found {
					refs = append(refs, sb.ID)
				}
			} else if err := atLeast("a sandbox")(cmd, refs); err != nil && !force {
				return err // `rm -f $(atoll ls -q)` with nothing there is no error
			}
			return a.each(cmd, refs, func(b native.Backend, ref string) error {
				if !force {
					if sb, err := b.Get(cmd.Context(), ref); err == nil && sb.State == sandbox.Running {
						return sandbox.Errorf("atoll rm", sandbox.Conflict, ref, "the sandbox is running").
							WithHint("remove it all the same with `atoll rm -f " + ref + "`")
					}
				}
				err := b.Remove(cmd.Context(), ref)
				if force && sandbox.Is(err, sandbox.NotFound) {
					return nil
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "running ones too, and no error for those that are gone")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "every sandbox of this node")
	a.completes(cmd, -1, sandboxNames())
	return cmd
}

func (a *app) pauseCommand() *cobra.Command {
	var memory, files bool
	cmd := &cobra.Command{
		Use: "pause SANDBOX...", Short: "Stop sandboxes so that they can go on later", Args: atLeast("a sandbox"),
		Long: "Pause saves a sandbox's whole state to disk and frees its memory. With --memory it is only frozen: it resumes\n" +
			"at once but still takes its memory. With --files only its files are kept, and it boots anew when it is resumed.",
		RunE: func(cmd *cobra.Command, refs []string) error {
			mode := node.PauseDisk
			switch {
			case memory:
				mode = node.PauseFrozen
			case files:
				mode = node.PauseFiles
			}
			return a.each(cmd, refs, func(b native.Backend, ref string) error {
				_, err := b.Pause(cmd.Context(), ref, mode)
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&memory, "memory", false, "freeze in memory, do not save")
	cmd.Flags().BoolVar(&files, "files", false, "keep the files only")
	cmd.MarkFlagsMutuallyExclusive("memory", "files")
	a.completes(cmd, -1, sandboxNames(sandbox.Running))
	return cmd
}

func (a *app) resumeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "resume SANDBOX...", Aliases: []string{"unpause", "start"}, Short: "Let paused sandboxes go on", Args: atLeast("a sandbox"),
		RunE: func(cmd *cobra.Command, refs []string) error {
			return a.each(cmd, refs, func(b native.Backend, ref string) error {
				_, err := b.Resume(cmd.Context(), ref)
				return err
			})
		},
	}
	a.completes(cmd, -1, sandboxNames(sandbox.Paused))
	return cmd
}

func (a *app) renameCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "rename SANDBOX NAME", Short: "Give a sandbox another name", Args: exact("a sandbox", "its new name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, sb, err := a.get(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return b.Rename(cmd.Context(), sb.ID, args[1])
		},
	}
	a.completes(cmd, 1, sandboxNames())
	return cmd
}

func (a *app) ttlCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "ttl SANDBOX DURATION", Short: "Set how long a sandbox may go on from now; 0 is without end", Args: exact("a sandbox", "a duration"),
		Example: "  atoll ttl brave-otter 2h",
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := parseTTL(args[1])
			if err != nil {
				return err
			}
			b, sb, err := a.get(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return b.SetTimeout(cmd.Context(), sb.ID, d)
		},
	}
	a.completes(cmd, 1, sandboxNames())
	return cmd
}

func (a *app) waitCommand() *cobra.Command {
	var states []string
	var timeout ttl
	cmd := &cobra.Command{
		Use: "wait SANDBOX...", Short: "Wait until sandboxes or their commands have ended", Args: atLeast("a sandbox"),
		Long: "Wait returns when the command that `atoll run` gave a sandbox has ended, and prints its exit code; for a sandbox\n" +
			"without such a command when the sandbox has ended, and prints its name.",
		Example: "  atoll run -d --name job base -- make -j2\n  atoll wait job && atoll logs job",
		RunE: func(cmd *cobra.Command, refs []string) error {
			ctx := cmd.Context()
			if timeout > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, time.Duration(timeout))
				defer cancel()
			}
			var want []sandbox.State // none: the end
			for _, s := range states {
				want = append(want, sandbox.State(s))
			}
			return a.eachSays(cmd, refs, func(b native.Backend, ref string) (string, error) {
				sb, err := b.Wait(ctx, ref, want...)
				if err == nil && len(want) == 0 && sb.Main != nil && sb.Main.State == node.MainExited {
					return strconv.Itoa(sb.Main.ExitCode), nil
				}
				return ref, err
			})
		},
	}
	cmd.Flags().StringArrayVar(&states, "state", nil, "wait for this `state` instead, may be given several times")
	cmd.Flags().Var(&timeout, "timeout", "give up after this long")
	a.completes(cmd, -1, sandboxNames())
	return cmd
}
