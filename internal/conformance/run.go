package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
)

// A result is how a test ended, and the figures it logged.
type result struct {
	Status   string              `json:"status"`             // pass, fail or skip, as go test says
	Measured map[string][]string `json:"measured,omitempty"` // by id of the requirement
}

// results are those of the last full run, kept in docs/conformance.json so that the
// table can be checked without running everything again.
type results struct {
	Machine string            `json:"machine"`
	Date    string            `json:"date"`  // day of the run
	Tests   map[string]result `json:"tests"` // by testID
}

// An event is what go test -json prints, one a line.
type event struct {
	Action, Package, Test, Output string
}

// runTests runs the tagged tests, one package after another, and returns how each
// ended. What go test says of failures goes to log.
func runTests(module string, tests []testID, log io.Writer) (map[string]result, error) {
	byDir := map[string][]string{}
	for _, t := range tests {
		top, _, _ := strings.Cut(t.name, "/")
		byDir[t.dir] = append(byDir[t.dir], regexp.QuoteMeta(top))
	}
	all := map[string]result{}
	for _, dir := range slices.Sorted(maps.Keys(byDir)) {
		names := slices.Compact(slices.Sorted(slices.Values(byDir[dir])))
		pattern := "^(" + strings.Join(names, "|") + ")$"
		fmt.Fprintf(log, "== %s: %d tests\n", dir, len(names))
		cmd := exec.Command("go", "test", "-json", "-count=1", "-timeout=30m", "-run", pattern, module+"/"+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			return nil, err
		}
		if err := cmd.Start(); err != nil {
			return nil, err
		}
		read, readErr := readEvents(out, dir, log)
		maps.Copy(all, read)
		// A failed test is a result; the exit code adds nothing to it.
		_ = cmd.Wait()
		if readErr != nil {
			return nil, fmt.Errorf("%s: %w", dir, readErr)
		}
	}
	return all, nil
}

// readEvents reads the stream of go test -json for the package in dir. Lines that
// are no events (a build that failed) go to log, as does the output of what failed.
func readEvents(r io.Reader, dir string, log io.Writer) (map[string]result, error) {
	all := map[string]result{}
	output := map[string]*strings.Builder{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			fmt.Fprintln(log, lines.Text())
			continue
		}
		id := testID{dir, e.Test}.String()
		res := all[id]
		switch e.Action {
		case "output", "build-output":
			if output[e.Test] == nil {
				output[e.Test] = new(strings.Builder)
			}
			output[e.Test].WriteString(e.Output)
			if req, figure, ok := measured(e.Output); ok {
				if res.Measured == nil {
					res.Measured = map[string][]string{}
				}
				res.Measured[req] = append(res.Measured[req], figure)
				all[id] = res
			}
		case "pass", "fail", "skip":
			if e.Test != "" {
				res.Status = e.Action
				all[id] = res
			}
			if e.Action == "fail" && output[e.Test] != nil {
				fmt.Fprint(log, output[e.Test].String())
			}
			delete(output, e.Test)
		}
	}
	return all, lines.Err()
}

// measuredLine is what a test logs: "measured: FR5.1 snapshot of 100 MB: 160 ms".
var measuredLine = regexp.MustCompile(`measured: (\S+) (.+)`)

func measured(line string) (id, figure string, ok bool) {
	m := measuredLine.FindStringSubmatch(line)
	if m == nil {
		return "", "", false
	}
	return m[1], strings.TrimSpace(m[2]), true
}

// keep returns of all results those of the tagged tests, with the figures of their
// subtests added to their own. A test that left out a part of itself has not run.
func keep(all map[string]result, tests []testID) map[string]result {
	kept := map[string]result{}
	for _, t := range tests {
		sum, ok := all[t.String()]
		if !ok {
			continue
		}
		sum.Measured = maps.Clone(sum.Measured)
		for _, name := range slices.Sorted(maps.Keys(all)) {
			if !strings.HasPrefix(name, t.String()+"/") {
				continue
			}
			if all[name].Status == "skip" && sum.Status == "pass" {
				sum.Status = "skip"
			}
			for id, figures := range all[name].Measured {
				if sum.Measured == nil {
					sum.Measured = map[string][]string{}
				}
				sum.Measured[id] = append(slices.Clone(sum.Measured[id]), figures...)
			}
		}
		kept[t.String()] = sum
	}
	return kept
}
