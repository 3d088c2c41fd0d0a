package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// format is how a command prints what it found: -o and -q.
type format struct {
	form  string // "", "wide", "json" or "yaml"
	quiet bool
}

func (f *format) flags(cmd *cobra.Command, quiet string) {
	cmd.Flags().StringVarP(&f.form, "output", "o", "", "print as `json`, yaml or wide")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"json", "yaml", "wide"}, cobra.ShellCompDirectiveNoFileComp))
	if quiet != "" {
		cmd.Flags().BoolVarP(&f.quiet, "quiet", "q", false, quiet)
	}
}

func (f *format) check() error {
	switch f.form {
	case "", "wide", "json", "yaml":
		return nil
	}
	return usageError(f.form, "use -o json, -o yaml or -o wide", "there is no such output format")
}

// structured prints v if JSON or YAML is wanted and reports whether it was.
func (f *format) structured(w io.Writer, v any) (bool, error) {
	switch f.form {
	case "json":
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		return true, enc.Encode(v)
	case "yaml":
		data, err := json.Marshal(v)
		if err != nil {
			return true, err
		}
		return true, writeYAML(w, data)
	}
	return false, nil
}

// column is one column of a table over values of type T.
type column[T any] struct {
	head string
	wide bool // shown with -o wide only
	cell func(T) string
}

// list prints values as a table, as IDs, or as JSON or YAML.
func list[T any](w io.Writer, f *format, values []T, id func(T) string, columns []column[T]) error {
	if values == nil {
		values = []T{} // "[]", not "null"
	}
	if done, err := f.structured(w, values); done {
		return err
	}
	if f.quiet {
		for _, v := range values {
			fmt.Fprintln(w, id(v))
		}
		return nil
	}
	t := newTable(w)
	var row []string
	shown := columns[:0:0]
	for _, c := range columns {
		if !c.wide || f.form == "wide" {
			shown = append(shown, c)
			row = append(row, c.head)
		}
	}
	t.row(row...)
	for _, v := range values {
		row = row[:0]
		for _, c := range shown {
			row = append(row, c.cell(v))
		}
		t.row(row...)
	}
	return t.flush()
}

// table aligns columns.
type table struct{ w *tabwriter.Writer }

func newTable(w io.Writer) table { return table{tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)} }

func (t table) row(cells ...string) {
	for i, c := range cells {
		if c == "" {
			cells[i] = "-"
		} else {
			cells[i] = printable(c)
		}
	}
	fmt.Fprintln(t.w, strings.Join(cells, "\t"))
}

func (t table) flush() error { return t.w.Flush() }

// printable keeps what a sandbox or an image named itself from moving the
// cursor or breaking the table.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}

// shortID is how an ID is shown where there is little room; it is accepted
// wherever an ID is, as long as it is unique.
func shortID(id string) string {
	if digest, ok := strings.CutPrefix(id, "sha256:"); ok {
		id = digest
	}
	if len(id) > 12 {
		return id[:12]
	}
	return id
}

// formatBytes prints a size with three digits and a unit: "1.50 GiB".
func formatBytes(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n), 0
	for v >= 1024 && unit < 5 {
		v /= 1024
		unit++
	}
	digits := 2
	if v >= 100 {
		digits = 0
	} else if v >= 10 {
		digits = 1
	}
	return fmt.Sprintf("%.*f %ciB", digits, v, " KMGTP"[unit])
}

// formatAge prints how long ago something was, in the largest unit that fits twice.
func formatAge(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", max(0, int(d.Seconds())))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// writeYAML prints a JSON document as YAML, keeping the order of the members.
// A JSON string is a valid YAML scalar, so quoting is JSON's wherever a plain
// word could be mistaken for something else.
func writeYAML(w io.Writer, document []byte) error {
	dec := json.NewDecoder(bytes.NewReader(document))
	dec.UseNumber()
	var b bytes.Buffer
	if err := yamlValue(&b, dec, 0, false); err != nil {
		return err
	}
	_, err := w.Write(b.Bytes())
	return err
}

// yamlValue prints the next value. Scalars and empty collections stay on the
// line; others begin a new one unless an item's dash has just been printed.
func yamlValue(b *bytes.Buffer, dec *json.Decoder, indent int, dash bool) error {
	tok, err := dec.Token()
	if err != nil {
		return err
	}
	open, nested := tok.(json.Delim)
	if !nested {
		b.WriteString(" " + yamlScalar(tok) + "\n")
		return nil
	}
	if !dec.More() {
		b.WriteString(" " + string(open) + map[json.Delim]string{'{': "}", '[': "]"}[open] + "\n")
		_, err = dec.Token()
		return err
	}
	if !dash && b.Len() > 0 {
		b.WriteByte('\n')
	}
	for first := true; dec.More(); first = false {
		if dash && first {
			b.WriteByte(' ')
		} else {
			b.WriteString(strings.Repeat("  ", indent))
		}
		if open == '[' {
			b.WriteByte('-')
			err = yamlValue(b, dec, indent+1, true)
		} else {
			var key json.Token
			if key, err = dec.Token(); err == nil {
				b.WriteString(yamlScalar(key) + ":")
				err = yamlValue(b, dec, indent+1, false)
			}
		}
		if err != nil {
			return err
		}
	}
	_, err = dec.Token()
	return err
}

func yamlScalar(tok json.Token) string {
	s, ok := tok.(string)
	if !ok {
		if tok == nil {
			return "null"
		}
		return fmt.Sprint(tok)
	}
	if plainYAML(s) {
		return s
	}
	quoted, _ := json.Marshal(s) // a string cannot fail
	return string(quoted)
}

// plainYAML reports whether a string means itself without quotes: a word of
// letters that is not one of YAML's words for null and truth.
func plainYAML(s string) bool {
	switch strings.ToLower(s) {
	case "", "null", "true", "false", "yes", "no", "on", "off", "y", "n":
		return false
	}
	for i, r := range s {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r == '_' || r == '/' && i == 0
		if !letter && (i == 0 || !(r >= '0' && r <= '9' || r == '-' || r == '.' || r == '/')) {
			return false
		}
	}
	return true
}
