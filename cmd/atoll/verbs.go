package main

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/api/native"
)

// opener is a.open, which makes a node where there is none, or a.openDaemon.
type opener func(context.Context) (native.Backend, error)

// listVerb makes a noun's `ls`: what fetch finds, a line each. quiet says what -q prints, which is id of each; columns is called
// with the time that ages are told from.
func listVerb[T any](a *app, open opener, short, quiet string, fetch func(native.Backend, context.Context) ([]T, error), id func(T) string, columns func(now time.Time) []column[T]) *cobra.Command {
	var f format
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: short, Args: exact(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return err
			}
			b, err := open(cmd.Context())
			if err != nil {
				return err
			}
			all, err := fetch(b, cmd.Context())
			if err != nil {
				return err
			}
			return list(a.stdout, &f, all, id, columns(time.Now()))
		},
	}
	f.flags(cmd, quiet)
	return cmd
}

// inspectVerb makes a noun's `inspect`: all that is known of one. what is the noun with its article, such as "an image"; names
// completes it.
func inspectVerb[T any](a *app, open opener, what string, names completer, get func(native.Backend, context.Context, string) (T, error)) *cobra.Command {
	f := format{form: "json"}
	_, noun, _ := strings.Cut(what, " ")
	cmd := &cobra.Command{
		Use: "inspect " + strings.ToUpper(noun), Short: "Show all that is known of " + what, Args: exact(what),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := open(cmd.Context())
			if err != nil {
				return err
			}
			v, err := get(b, cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.show(&f, v)
		},
	}
	cmd.Flags().StringVarP(&f.form, "output", "o", "json", "print as `json` or yaml")
	a.completes(cmd, 1, names)
	return cmd
}
