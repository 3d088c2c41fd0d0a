package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// The marks between which the README has its table.
const (
	figuresBegin = "<!-- figures: written by make bench -->\n"
	figuresEnd   = "<!-- end of figures -->\n"
)

// write writes the figures, the table, and a short table into the README.
func (r report) write(jsonFile, tableFile, readmeFile string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	table, err := r.table()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(jsonFile), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(jsonFile, append(text, '\n'), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(tableFile, []byte(table), 0o644); err != nil {
		return err
	}
	readme, err := os.ReadFile(readmeFile)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(readme), figuresBegin)
	_, after, closed := strings.Cut(rest, figuresEnd)
	if !ok || !closed {
		return fmt.Errorf("%s has no place for figures", readmeFile)
	}
	short, err := r.short()
	if err != nil {
		return err
	}
	return os.WriteFile(readmeFile, []byte(before+figuresBegin+short+figuresEnd+after), 0o644)
}

// meanings says in words what `atoll bench sandbox` measures, in the order in
// which the table has them.
var meanings = []struct{ key, text string }{
	{"cold", "create to first output, cold"},
	{"template", "create to first output, clone of the template"},
	{"spawned", "create to first output, clone into a monitor started ahead of need"},
	{"ready", "create to first output, machine started ahead of need"},
	{"snapshot", "create to first output, from a snapshot"},
	{"pool", "create to first output, from the pool"},
	{"exec", "command in a running sandbox"},
	{"fork10", "fork of ten from a running sandbox, in all"},
}

// figures returns what `atoll bench sandbox` measured for a runtime as rows of a
// table, and the memory of an idle sandbox in MB, 0 when it was not measured.
func (r report) figures(runtime string) (rows string, idle float64, err error) {
	fail := func(what string, err error) (string, float64, error) {
		return "", 0, fmt.Errorf("atoll bench sandbox --runtime %s: %s: %w", runtime, what, err)
	}
	var figures map[string]json.RawMessage
	if err := json.Unmarshal(r.Sandbox[runtime], &figures); err != nil {
		return fail("the report", err)
	}
	var b strings.Builder
	for _, m := range meanings {
		if figures[m.key] == nil {
			continue
		}
		var s struct {
			P50 float64 `json:"p50_ms"`
			P95 float64 `json:"p95_ms"`
		}
		if err := json.Unmarshal(figures[m.key], &s); err != nil {
			return fail(m.key, err)
		}
		fmt.Fprintf(&b, "| %s | %.1f | %.1f |\n", m.text, s.P50, s.P95)
	}
	if figures["idle_mb"] != nil {
		if err := json.Unmarshal(figures["idle_mb"], &idle); err != nil {
			return fail("idle_mb", err)
		}
	}
	return b.String(), idle, nil
}

// short returns the table for the README: the default runtime, and what others
// need for the same.
func (r report) short() (string, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "Milliseconds on %s; `make bench` measures another machine and writes this table and,\nwith more, [docs/performance.md](docs/performance.md).\n\n"+
		"| what | p50 | p95 |\n|---|---:|---:|\n", r.Machine)
	if r.Sandbox["gvisor"] != nil {
		rows, idle, err := r.figures("gvisor")
		if err != nil {
			return "", err
		}
		b.WriteString(rows)
		if idle > 0 {
			fmt.Fprintf(&b, "| memory of an idle sandbox: %.1f MB | | |\n", idle)
		}
	}
	for _, s := range r.Beside {
		fmt.Fprintf(&b, "| %s | %.1f | %.1f |\n", s.Name, s.P50, s.P95)
	}
	return b.String(), nil
}

// table returns docs/performance.md.
func (r report) table() (string, error) {
	var b strings.Builder
	b.WriteString("# Performance\n\nWritten by `make bench`; do not edit. Times are wall-clock milliseconds: median and 95th percentile.\n\n")
	fmt.Fprintf(&b, "Measured %s with %s, on %s.\n", r.Date, r.Version, r.Machine)

	for _, runtime := range slices.Sorted(maps.Keys(r.Sandbox)) {
		rows, idle, err := r.figures(runtime)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "\n## Inside the node: %s\n\n`atoll bench sandbox --runtime %s`\n\n| what | p50 | p95 |\n|---|---:|---:|\n%s", runtime, runtime, rows)
		if idle > 0 {
			fmt.Fprintf(&b, "\nAn idle sandbox takes %.1f MB of memory.\n", idle)
		}
	}

	b.WriteString("\n## Beside others\n\nFrom the start of a command to its first output, all on the root of the image `base`, in turn within one run. " +
		"bubblewrap and runc share the host's kernel\nwith what they run; a sandbox of Atoll does not. The SDK's row is its own `Sandbox.create` and `commands.run`.\n\n" +
		"| what | n | p50 | p95 | p50 against runc |\n|---|---:|---:|---:|---:|\n")
	against := 0.0
	for _, s := range r.Beside {
		if s.Name == "runc run" {
			against = s.P50
		}
	}
	for _, s := range r.Beside {
		ratio := ""
		if against > 0 {
			ratio = fmt.Sprintf("%.2f", s.P50/against)
		}
		fmt.Fprintf(&b, "| %s | %d | %.1f | %.1f | %s |\n", s.Name, s.N, s.P50, s.P95, ratio)
	}
	for _, why := range r.Absent {
		fmt.Fprintf(&b, "\nNot measured: %s.\n", why)
	}
	return b.String(), nil
}
