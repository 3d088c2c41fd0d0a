package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

func (a *app) snapshotCommand() *cobra.Command {
	var f format
	var name string
	cmd := &cobra.Command{
		Use: "snapshot SANDBOX", Short: "Save a sandbox's state; list and remove saved ones", Args: exact("a sandbox"),
		Long: "Snapshot saves memory, processes and files of a sandbox, which goes on running. `atoll restore` makes new\n" +
			"sandboxes from it, any number of them.",
		Example: "  atoll snapshot brave-otter --name before-upgrade\n  atoll restore before-upgrade",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			b, sb, err := a.get(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			began := time.Now()
			snap, err := b.Snapshot(cmd.Context(), sb.ID, name)
			if err != nil {
				return err
			}
			if done, err := f.structured(a.stdout, snap); done {
				return err
			}
			fmt.Fprintln(a.stdout, snap.ID)
			if !f.quiet && a.interactive {
				fmt.Fprintf(a.stderr, "%s of %s in %s\n", formatBytes(snap.Size), sb.Name, time.Since(began).Round(time.Millisecond))
			}
			return nil
		},
	}
	f.flags(cmd, "print the ID only")
	cmd.Flags().StringVarP(&name, "name", "n", "", "a `name` for the snapshot")
	a.completes(cmd, 1, sandboxNames(sandbox.Running, sandbox.Paused))
	cmd.AddCommand(a.snapshotListCommand(), a.snapshotInspectCommand(), a.snapshotRemoveCommand(),
		a.carryCommand("push", carry.Snapshot, "Copy a snapshot to another node, as little of it as need be", false, snapshotNames),
		a.carryCommand("pull", carry.Snapshot, "Copy a snapshot from another node, as little of it as need be", true, snapshotNames))
	return cmd
}

func snapshotColumns(now time.Time) []column[node.Snapshot] {
	return []column[node.Snapshot]{
		{head: "ID", cell: func(s node.Snapshot) string { return shortID(s.ID) }},
		{head: "NAME", cell: func(s node.Snapshot) string { return s.Name }},
		{head: "SANDBOX", cell: func(s node.Snapshot) string { return first(s.Source.Name, shortID(s.Sandbox)) }},
		{head: "IMAGE", cell: func(s node.Snapshot) string { return s.Image }},
		{head: "RUNTIME", cell: func(s node.Snapshot) string { return s.Runtime }},
		{head: "SIZE", cell: func(s node.Snapshot) string { return formatBytes(s.Size) }},
		{head: "AGE", cell: func(s node.Snapshot) string { return formatAge(now.Sub(s.Created)) }},
		{head: "FOR", cell: func(s node.Snapshot) string { return s.Auto }},
		{head: "PARENT", wide: true, cell: func(s node.Snapshot) string { return shortID(s.Parent) }},
		{head: "MEMORY", wide: true, cell: func(s node.Snapshot) string { return fmt.Sprint(s.Memory) }},
		{head: "TEAM", wide: true, cell: func(s node.Snapshot) string { return s.Team }},
	}
}

func (a *app) snapshotListCommand() *cobra.Command {
	var f format
	var all bool
	cmd := &cobra.Command{
		Use: "ls [SANDBOX]", Aliases: []string{"list"}, Short: "List snapshots", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			b, err := a.openDaemon(cmd.Context())
			if err != nil {
				return err
			}
			found, err := b.Snapshots(cmd.Context(), strings.Join(args, ""))
			if err != nil {
				return err
			}
			shown := found[:0]
			for _, s := range found {
				if all || s.Auto == "" {
					shown = append(shown, s)
				}
			}
			return list(a.stdout, &f, shown, func(s node.Snapshot) string { return s.ID }, snapshotColumns(time.Now()))
		},
	}
	f.flags(cmd, "print IDs only")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "those too that the node made for itself")
	a.completes(cmd, 1, sandboxNames())
	return cmd
}

func (a *app) snapshotInspectCommand() *cobra.Command {
	return inspectVerb(a, a.openDaemon, "a snapshot", snapshotNames, native.Backend.GetSnapshot)
}

func (a *app) snapshotRemoveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "rm SNAPSHOT...", Aliases: []string{"remove"}, Short: "Remove snapshots", Args: atLeast("a snapshot"),
		RunE: func(cmd *cobra.Command, refs []string) error {
			return a.each(cmd, refs, func(b native.Backend, ref string) error { return b.RemoveSnapshot(cmd.Context(), ref) })
		},
	}
	a.completes(cmd, -1, snapshotNames)
	return cmd
}

func (a *app) restoreCommand() *cobra.Command {
	var f format
	var o createOptions
	cmd := &cobra.Command{
		Use: "restore SNAPSHOT", Short: "Make a sandbox from a snapshot", Args: exact("a snapshot"),
		Example: "  atoll restore before-upgrade --name try-again",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			req, err := o.request("")
			if err != nil {
				return err
			}
			b, err := a.openDaemon(cmd.Context())
			if err != nil {
				return err
			}
			sb, err := b.Restore(cmd.Context(), args[0], req)
			if err != nil {
				return err
			}
			return a.printCreated(&f, []node.Sandbox{sb})
		},
	}
	f.flags(cmd, "print the ID only")
	o.childFlags(cmd)
	cmd.Flags().StringVarP(&o.name, "name", "n", "", "the sandbox's `name`; default: one is made up")
	a.completes(cmd, 1, snapshotNames)
	return cmd
}

// maxForks bounds one fork; a larger number is a slip of the finger.
const maxForks = 1000

func (a *app) forkCommand() *cobra.Command {
	var f format
	var o createOptions
	var count int
	cmd := &cobra.Command{
		Use: "fork SANDBOX", Short: "Make copies of a running sandbox that go on from here", Args: exact("a sandbox"),
		Long: "Fork makes children with the memory, processes and files that the sandbox has at this moment. The sandbox itself\n" +
			"goes on.",
		Example: "  atoll fork brave-otter -n 10\n  for id in $(atoll fork brave-otter -n 3 -q); do atoll exec $id -- ./try; done",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			if count < 1 || count > maxForks {
				return usageError("", "", "-n must be from 1 to %d", maxForks)
			}
			req, err := o.request("")
			if err != nil {
				return err
			}
			b, sb, err := a.get(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			results, err := b.Fork(cmd.Context(), sb.ID, count, req)
			if err != nil {
				return err
			}
			var made []node.Sandbox
			var failed error
			for _, r := range results {
				if r.Err != nil {
					failed = errors.Join(failed, r.Err)
					a.complain(cmd, r.Err)
					continue
				}
				made = append(made, *r.Sandbox)
			}
			if err := a.printCreated(&f, made); err != nil {
				return err
			}
			if failed != nil {
				return exitError(1)
			}
			return nil
		},
	}
	f.flags(cmd, "print IDs only")
	o.childFlags(cmd)
	cmd.Flags().IntVarP(&count, "count", "n", 1, "how many `children`")
	a.completes(cmd, 1, sandboxNames(sandbox.Running))
	return cmd
}

// printCreated tells of new sandboxes: names on a terminal, IDs with -q.
func (a *app) printCreated(f *format, made []node.Sandbox) error {
	var v any = made
	if len(made) == 1 {
		v = made[0]
	}
	if done, err := f.structured(a.stdout, v); done {
		return err
	}
	for _, sb := range made {
		if f.quiet {
			fmt.Fprintln(a.stdout, sb.ID)
		} else {
			fmt.Fprintln(a.stdout, sb.Name)
		}
	}
	return nil
}

func (a *app) diffCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "diff SANDBOX", Short: "Show what a sandbox changed", Args: exact("a sandbox"),
		Long: "Diff lists the files that a sandbox changed in its root: A added or changed, D deleted. For a worktree sandbox\n" +
			"it is git's diff against the commit that the sandbox began with.",
		RunE: func(cmd *cobra.Command, args []string) error {
			b, sb, err := a.get(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if sb.Spec.Root.Kind == sandbox.RootRepository {
				return b.Diff(cmd.Context(), sb.ID, a.stdout)
			}
			return printChanges(cmd.Context(), b, sb.ID, a.stdout)
		},
	}
	a.completes(cmd, 1, sandboxNames())
	return cmd
}

// printChanges lists the entries of a sandbox's layer.
func printChanges(ctx context.Context, b native.Backend, id string, w io.Writer) error {
	r, layer := io.Pipe()
	defer r.Close()
	go func() { layer.CloseWithError(b.Changes(ctx, id, layer)) }()
	for entries := tar.NewReader(r); ; {
		h, err := entries.Next()
		if errors.Is(err, io.EOF) {
			_, err = io.Copy(io.Discard, r) // an error of the sender comes after the archive's end
			return err
		}
		if err != nil {
			return err
		}
		if kind, name := changeOf(h); kind != "" {
			fmt.Fprintln(w, kind, printable(name))
		}
	}
}

// The names by which a layer says that something is gone.
const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
)

// changeOf says what an entry of a layer means; directories are only told of
// when they are emptied, as a layer names every parent of what changed.
func changeOf(h *tar.Header) (kind, name string) {
	name = path.Join("/", h.Name)
	dir, base := path.Split(name)
	switch {
	case base == opaque:
		return "D", dir + "*"
	case strings.HasPrefix(base, whiteout):
		return "D", dir + strings.TrimPrefix(base, whiteout)
	case h.Typeflag == tar.TypeDir:
		return "", ""
	}
	return "A", name
}

func (a *app) mergeCommand() *cobra.Command {
	var f format
	var squash, apply bool
	var req native.MergeRequest
	cmd := &cobra.Command{
		Use: "merge SANDBOX", Short: "Bring a worktree sandbox's work back into its repository", Args: exact("a sandbox"),
		Long: "Merge commits what was done in a sandbox that was made from a git repository and merges it into the branch which\n" +
			"that repository has checked out. On a conflict nothing is changed and the files are named.",
		Example: "  atoll create --runtime worktree --name fix .\n  atoll diff fix\n  atoll merge fix --squash -m 'fix the parser'",
		RunE: func(cmd *cobra.Command, args []string) error {
			if squash && apply {
				return usageError("", "choose one", "--squash makes a commit and --apply makes none")
			}
			if squash {
				req.Mode = native.MergeSquash
			} else if apply {
				req.Mode = native.MergeApply
			}
			b, sb, err := a.get(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			result, err := b.Merge(cmd.Context(), sb.ID, req)
			if err != nil {
				return err
			}
			if done, err := f.structured(a.stdout, result); done {
				return err
			}
			for _, name := range result.Files {
				fmt.Fprintln(a.stdout, "M", printable(name))
			}
			if result.Head != "" {
				fmt.Fprintf(a.stderr, "the repository is at %s now\n", shortID(result.Head))
			}
			return nil
		},
	}
	f.flags(cmd, "")
	cmd.Flags().BoolVar(&squash, "squash", false, "as one commit")
	cmd.Flags().BoolVar(&apply, "apply", false, "into the working tree, without a commit")
	cmd.Flags().BoolVarP(&req.Force, "force", "f", false, "although the repository has changes that are not committed")
	cmd.Flags().StringVarP(&req.Message, "message", "m", "", "the commit's `message`")
	a.completes(cmd, 1, sandboxNames())
	return cmd
}
