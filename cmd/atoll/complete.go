package main

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// completionTimeout bounds a press of the tab key.
const completionTimeout = 2 * time.Second

// completer completes one argument. Where it fails the shell stays silent,
// since a half-typed line is no place for an error.
type completer func(ctx context.Context, a *app) []string

// completes gives a command dynamic completion of its first n arguments; n < 0
// means all of them.
func (a *app) completes(cmd *cobra.Command, n int, c completer) {
	cmd.ValidArgsFunction = func(_ *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
		if n >= 0 && len(args) >= n {
			return nil, cobra.ShellCompDirectiveDefault
		}
		ctx, cancel := context.WithTimeout(context.Background(), completionTimeout)
		defer cancel()
		var found []string
		for _, s := range c(ctx, a) {
			if strings.HasPrefix(s, typed) {
				found = append(found, s)
			}
		}
		return found, cobra.ShellCompDirectiveNoFileComp
	}
}

// sandboxNames completes sandboxes in any of the states, or all.
func sandboxNames(states ...sandbox.State) completer {
	return func(ctx context.Context, a *app) []string {
		b, err := a.openDaemon(ctx)
		if err != nil {
			return nil
		}
		all, _ := b.List(ctx, node.Filter{States: states})
		names := make([]string, len(all))
		for i, sb := range all {
			names[i] = sb.Name + "\t" + sb.Image + ", " + string(sb.State)
		}
		return names
	}
}

func snapshotNames(ctx context.Context, a *app) []string {
	b, err := a.openDaemon(ctx)
	if err != nil {
		return nil
	}
	all, _ := b.Snapshots(ctx, "")
	names := make([]string, len(all))
	for i, s := range all {
		names[i] = first(s.Name, s.ID) + "\tof " + first(s.Source.Name, shortID(s.Sandbox))
	}
	return names
}

func first(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// near returns the candidates that differ from word by at most two letters, so
// that an error about an unknown name can say what was perhaps meant.
func near(word string, candidates []string) []string {
	var found []string
	for _, c := range candidates {
		if d := distance(word, c); d <= 2 && d < len(word) {
			found = append(found, c)
		}
	}
	return found
}

// distance is the number of letters to change, add or drop to get from a to b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(diagonal+cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
