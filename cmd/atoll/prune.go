package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/node"
)

func (a *app) pruneCommand() *cobra.Command {
	var f format
	var force bool
	cmd := &cobra.Command{
		Use: "prune", Short: "Remove what nothing needs any more", Args: exact(),
		Long: "Prune removes the records of ended sandboxes, snapshots that the node made for itself and no longer needs, and\n" +
			"images that nothing uses. Named snapshots, templates and live sandboxes stay.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.confirm(force, "Remove everything that nothing needs any more?"); err != nil {
				return err
			}
			b, err := a.openDaemon(cmd.Context())
			if err != nil {
				return err
			}
			report, err := b.Prune(cmd.Context())
			if err != nil {
				return err
			}
			if done, err := f.structured(a.stdout, report); done {
				return err
			}
			return a.printPrune(report)
		},
	}
	f.flags(cmd, "")
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not ask")
	return cmd
}

// confirm asks on a terminal and goes ahead without one.
func (a *app) confirm(force bool, question string) error {
	in, terminal := isTerminal(a.stdin)
	if force || !terminal {
		return nil
	}
	fmt.Fprint(a.stderr, question+" [y/N] ")
	if answer := readAnswer(in); answer != "y" && answer != "yes" {
		return exitError(1)
	}
	return nil
}

// readAnswer reads one line, at most 64 bytes of it.
func readAnswer(in *os.File) string {
	var line [64]byte
	n, _ := in.Read(line[:])
	return strings.ToLower(strings.TrimSpace(string(line[:n])))
}

func (a *app) printPrune(r node.PruneReport) error {
	_, err := fmt.Fprintf(a.stdout, "%d ended sandboxes, %d snapshots, %s of images\n", len(r.Sandboxes), len(r.Snapshots), formatBytes(r.Images.Bytes))
	return err
}
