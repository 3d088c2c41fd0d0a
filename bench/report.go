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

// write writes the figures and the table.
func (r report) write(jsonFile, tableFile string) error {
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
	return os.WriteFile(tableFile, []byte(table), 0o644)
}

// meanings says in words what `atoll bench sandbox` measures, in the order in
// which the table has them.
var meanings = []struct{ key, text string }{
	{"cold", "create to first output, cold"},
	{"snapshot", "create to first output, from a snapshot"},
	{"pool", "create to first output, from the pool"},
	{"exec", "command in a running sandbox"},
	{"fork10", "fork of ten from a running sandbox, in all"},
}

func (r report) table() (string, error) {
	var b strings.Builder
	b.WriteString("# Performance\n\nWritten by `make bench`; do not edit. Times are wall-clock milliseconds: median and 95th percentile.\n\n")
	fmt.Fprintf(&b, "Measured %s with %s, on %s.\n", r.Date, r.Version, r.Machine)

	for _, runtime := range slices.Sorted(maps.Keys(r.Sandbox)) {
		var figures map[string]json.RawMessage
		if err := json.Unmarshal(r.Sandbox[runtime], &figures); err != nil {
			return "", fmt.Errorf("atoll bench sandbox --runtime %s: %w", runtime, err)
		}
		fmt.Fprintf(&b, "\n## Inside the node: %s\n\n`atoll bench sandbox --runtime %s`\n\n| what | p50 | p95 |\n|---|---:|---:|\n", runtime, runtime)
		for _, m := range meanings {
			var s struct {
				P50 float64 `json:"p50_ms"`
				P95 float64 `json:"p95_ms"`
			}
			if figures[m.key] == nil {
				continue
			}
			if err := json.Unmarshal(figures[m.key], &s); err != nil {
				return "", fmt.Errorf("atoll bench sandbox --runtime %s: %s: %w", runtime, m.key, err)
			}
			fmt.Fprintf(&b, "| %s | %.1f | %.1f |\n", m.text, s.P50, s.P95)
		}
		var idle float64
		if figures["idle_mb"] != nil {
			if err := json.Unmarshal(figures["idle_mb"], &idle); err != nil {
				return "", fmt.Errorf("atoll bench sandbox --runtime %s: idle_mb: %w", runtime, err)
			}
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
