package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/sandbox"
)

// nodeNames completes the nodes that this one trusts.
func nodeNames(ctx context.Context, a *app) []string {
	b, err := a.openDaemon(ctx)
	if err != nil {
		return nil
	}
	nodes, _ := b.Nodes(ctx)
	var names []string
	for _, n := range nodes {
		names = append(names, n.Name+"\t"+n.Addr)
	}
	return names
}

func (a *app) nodeCommand() *cobra.Command {
	return group("node", "Join other nodes, to which snapshots, images and sandboxes can move", a.nodeTokenCommand(), a.nodeJoinCommand(),
		a.nodeListCommand(), a.nodeRemoveCommand())
}

func (a *app) nodeTokenCommand() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use: "token", Short: "Print a token with which one node can join this one, once, within 15 minutes", Args: exact(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, err := a.openDaemon(cmd.Context())
			if err != nil {
				return err
			}
			t, err := b.NodeToken(cmd.Context())
			if err != nil {
				return err
			}
			fmt.Fprintln(a.stdout, t.Token)
			if !quiet && a.interactive {
				fmt.Fprintf(a.stderr, "On the other node:\n  atoll node join %s %s\n", t.Addr, t.Token)
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print the token only")
	return cmd
}

func (a *app) nodeJoinCommand() *cobra.Command {
	var f format
	cmd := &cobra.Command{
		Use: "join ADDRESS TOKEN", Short: "Make this node and another trust each other", Args: exact("the address of a node", "its token"),
		Long: "Join makes the daemon here and the one at ADDRESS trust each other, both ways: each may copy snapshots and images\n" +
			"to the other and move sandboxes there. The token is from `atoll node token` on the other node, and says which\n" +
			"node it is, so that no third one can pose as it.",
		Example: "  atoll node join 10.0.0.7:7700 $(ssh east atoll node token)",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			b, err := a.openDaemon(cmd.Context())
			if err != nil {
				return err
			}
			n, err := b.JoinNode(cmd.Context(), args[0], args[1])
			if err != nil {
				return err
			}
			if done, err := f.structured(a.stdout, n); done {
				return err
			}
			fmt.Fprintln(a.stdout, n.ID)
			return nil
		},
	}
	f.flags(cmd, "print the ID only")
	return cmd
}

func (a *app) nodeListCommand() *cobra.Command {
	return listVerb(a, a.openDaemon, "List the nodes that this one trusts, and whether they answer", "print IDs only", native.Backend.Nodes, func(n native.NodeInfo) string { return n.ID }, func(now time.Time) []column[native.NodeInfo] {
		return []column[native.NodeInfo]{
			{head: "ID", cell: func(n native.NodeInfo) string { return shortID(n.ID) }},
			{head: "NAME", cell: func(n native.NodeInfo) string { return n.Name }},
			{head: "ADDRESS", cell: func(n native.NodeInfo) string { return n.Addr }},
			{head: "SITE", cell: func(n native.NodeInfo) string { return n.Site }},
			{head: "ANSWERS", cell: func(n native.NodeInfo) string {
				if n.Error != "" {
					return "no: " + n.Error
				}
				return "in " + n.Answers.Round(100*time.Microsecond).String()
			}},
			{head: "MOVING THERE", cell: func(n native.NodeInfo) string { return cmp.Or(strings.Join(n.Moving, " "), "-") }},
			{head: "JOINED", cell: func(n native.NodeInfo) string { return formatAge(now.Sub(n.Joined)) }},
		}
	})
}

func (a *app) nodeRemoveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "rm NODE...", Aliases: []string{"remove"}, Short: "End the trust in nodes", Args: atLeast("a node"),
		RunE: func(cmd *cobra.Command, refs []string) error {
			return a.each(cmd, refs, func(b native.Backend, ref string) error { return b.ForgetNode(cmd.Context(), ref) })
		},
	}
	a.completes(cmd, -1, nodeNames)
	return cmd
}

// carryCommand makes push and pull of snapshots and models, which names lists.
func (a *app) carryCommand(use string, kind carry.Kind, short string, pull bool, names completer) *cobra.Command {
	var (
		f    format
		lazy bool
	)
	cmd := &cobra.Command{
		Use: use + " " + strings.ToUpper(string(kind)) + " NODE", Short: short, Args: exact("a "+string(kind), "a node"),
		Long: short + ".\nInstead of a node, `store` is the object store that the daemon was given by `atoll up --store`.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.carry(cmd.Context(), &f, native.CarryRequest{Kind: kind, Ref: args[0], Node: args[1], Pull: pull, Lazy: lazy})
		},
	}
	f.flags(cmd, "print the ID only")
	if !pull {
		a.completes(cmd, 1, names)
	} else if kind == carry.Snapshot {
		cmd.Flags().BoolVar(&lazy, "lazy", false, "return as soon as it can be restored; the memory of machines comes page by page, what is needed first")
	}
	return cmd
}

// carry copies something between nodes and says what it took.
func (a *app) carry(ctx context.Context, f *format, req native.CarryRequest) error {
	if err := f.check(); err != nil {
		return err
	}
	b, err := a.openDaemon(ctx)
	if err != nil {
		return err
	}
	verb := "pushing "
	if req.Pull {
		verb = "pulling "
	}
	shown := a.bar(verb + req.Ref)
	res, err := b.Carry(ctx, req, a.moving(shown))
	shown.done()
	if err != nil {
		return err
	}
	if done, err := f.structured(a.stdout, res); done {
		return err
	}
	fmt.Fprintln(a.stdout, res.ID)
	if !f.quiet && a.interactive {
		fmt.Fprintf(a.stderr, "%s of %s sent in %s\n", formatBytes(res.Wire), formatBytes(res.Size), res.Took.Round(time.Millisecond))
	}
	return nil
}

// moving returns what shows how far a move is, and says, without a terminal too, why it waits: once for each reason.
func (a *app) moving(shown *bar) func(carry.Progress) {
	said := ""
	return func(p carry.Progress) {
		if p.Waiting != "" && p.Waiting != said {
			said = p.Waiting
			shown.done()
			fmt.Fprintf(a.stderr, "atoll: waiting, and trying again: %s\n", printable(said))
		}
		shown.report(progressOf(p))
	}
}

// progressOf is what a bar shows of a move.
func progressOf(p carry.Progress) image.Progress {
	stage := p.Stage + ", " + formatBytes(p.Wire) + " sent"
	if p.Left > 0 {
		stage += ", " + p.Left.String() + " left"
	}
	return image.Progress{Stage: stage, Done: p.Done, Total: p.Total}
}

func (a *app) migrateCommand() *cobra.Command {
	var (
		f       format
		resolve bool
		o       carry.ResolveOptions
	)
	cmd := &cobra.Command{
		Use: "migrate SANDBOX NODE", Short: "Move a running sandbox to another node",
		Args: func(cmd *cobra.Command, args []string) error {
			if resolve || o.Abort {
				return exact("a sandbox")(cmd, args)
			}
			return exact("a sandbox", "a node")(cmd, args)
		},
		Long: "Migrate copies a sandbox's state to another node while it runs, stops it, sends what has changed since, and lets it\n" +
			"go on there under the same ID and name. It runs in one place at any time; when something fails, it goes on here.\n" +
			"Connections into it through this node stay open, and whoever asks this node for it later is led to where it is.\n\n" +
			"When a node is lost in the one moment that matters, only the other one knows where the sandbox runs, and the sandbox\n" +
			"stands still until that node answers: see `atoll node ls`. That node is asked again and again; --resolve asks at\n" +
			"once. --abort gives up a move that is under way. With --force the sandbox goes on here without the other node having\n" +
			"been asked: only when that node is gone for ever, since otherwise the sandbox may run twice from then on.",
		Example: "  atoll migrate web east\n  atoll migrate --abort web",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			if o.Force && !o.Abort {
				return sandbox.Errorf("migrate", sandbox.Invalid, "", "--force goes with --abort")
			}
			if resolve || o.Abort {
				return a.resolveMove(cmd.Context(), &f, args[0], o)
			}
			b, err := a.openDaemon(cmd.Context())
			if err != nil {
				return err
			}
			shown := a.bar("moving " + args[0])
			res, err := b.Migrate(cmd.Context(), args[0], args[1], a.moving(shown))
			shown.done()
			if err != nil {
				return err
			}
			if done, err := f.structured(a.stdout, res); done {
				return err
			}
			fmt.Fprintln(a.stdout, res.Sandbox)
			if !f.quiet && a.interactive {
				fmt.Fprintf(a.stderr, "it stood still for %s; %s sent in %s\n", res.Downtime.Round(time.Millisecond), formatBytes(res.Wire), res.Took.Round(time.Millisecond))
				if res.Way != carry.Live {
					fmt.Fprintf(a.stderr, "it was moved by snapshots: %s\n", res.Why)
				}
			}
			return nil
		},
	}
	f.flags(cmd, "print the ID only")
	cmd.Flags().BoolVar(&resolve, "resolve", false, "ask the other node how a move went that is in doubt")
	cmd.Flags().BoolVar(&o.Abort, "abort", false, "give up a move; should the sandbox run there already, it stays there")
	cmd.Flags().BoolVar(&o.Force, "force", false, "with --abort: do not ask the other node, which is gone for ever")
	a.completes(cmd, 1, sandboxNames(sandbox.Running))
	return cmd
}

// resolveMove ends a move and says where the sandbox is.
func (a *app) resolveMove(ctx context.Context, f *format, ref string, o carry.ResolveOptions) error {
	b, err := a.openDaemon(ctx)
	if err != nil {
		return err
	}
	if o.Force {
		fmt.Fprintln(a.stderr, "warning: the other node is not asked; should the sandbox run there, it runs twice from now on")
	}
	res, err := b.ResolveMove(ctx, ref, o)
	if err != nil {
		return err
	}
	if done, err := f.structured(a.stdout, res); done {
		return err
	}
	fmt.Fprintln(a.stdout, res.Sandbox)
	if !f.quiet && a.interactive {
		where := "it is here"
		if res.Moved != "" {
			where = "it has moved to node " + res.Moved
		}
		fmt.Fprintln(a.stderr, where)
	}
	return nil
}
