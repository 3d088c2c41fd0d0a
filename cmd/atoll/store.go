package main

import (
	"cmp"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/carry"
)

func (a *app) storeCommand() *cobra.Command {
	ls := listVerb(a, a.openDaemon, "List what is in the object store that the daemon was given by `atoll up --store`", "print IDs only",
		native.Backend.Stored, func(s carry.Stored) string { return s.ID }, func(now time.Time) []column[carry.Stored] {
			return []column[carry.Stored]{
				{head: "KIND", cell: func(s carry.Stored) string { return cmp.Or(string(s.Kind), "damaged") }},
				{head: "ID", cell: func(s carry.Stored) string { return shortID(s.ID) }},
				{head: "NAMES", cell: func(s carry.Stored) string { return cmp.Or(strings.Join(s.Names, " "), "-") }},
				{head: "SIZE", cell: func(s carry.Stored) string { return formatBytes(s.Size) }},
				{head: "AGE", cell: func(s carry.Stored) string { return formatAge(now.Sub(s.Created)) }},
				{head: "ERROR", wide: true, cell: func(s carry.Stored) string { return s.Error }},
			}
		})
	rm := &cobra.Command{
		Use: "rm NAME|ID...", Aliases: []string{"remove"}, Short: "Remove things from the object store", Args: atLeast("a name or an ID"),
		Long: "Rm takes things out of the object store. Their bytes go when a daemon collects them, once a day, unless something\n" +
			"else there has them in common.",
		RunE: func(cmd *cobra.Command, refs []string) error {
			return a.each(cmd, refs, func(b native.Backend, ref string) error { return b.Unstore(cmd.Context(), ref) })
		},
	}
	return group("store", "Manage what is in the object store", ls, rm)
}
