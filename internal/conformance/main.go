// Command conformance writes docs/conformance.md, which says for each requirement
// which tests prove it and what they measured.
//
// With -run it runs every tagged test and keeps the results in
// docs/conformance.json. With -check it changes nothing and fails when the table is
// not what requirements, tags and kept results give. Without either it writes
// the table from the kept results.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/atoll-run/atoll/internal/machine"
)

const (
	requirementsFile = "docs/requirements.md"
	resultsFile      = "docs/conformance.json"
	tableFile        = "docs/conformance.md"
)

func main() {
	run := flag.Bool("run", false, "run the tagged tests")
	check := flag.Bool("check", false, "compare, write nothing")
	flag.Parse()
	if err := conformance(*run, *check); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
}

// conformance does the work in the working directory, the root of the module.
func conformance(run, check bool) error {
	markdown, err := os.ReadFile(requirementsFile)
	if err != nil {
		return err
	}
	reqs, err := parseRequirements(string(markdown))
	if err != nil {
		return err
	}
	found, err := collect(os.DirFS("."))
	if err != nil {
		return err
	}
	last, err := readResults()
	if err != nil {
		return err
	}
	if run {
		if last, err = runAll(found); err != nil {
			return err
		}
	}
	if problems := inconsistent(reqs, found, last); len(problems) > 0 {
		return errors.New(strings.Join(problems, "\n"))
	}
	table := render(reqs, found, last)
	if check {
		have, err := os.ReadFile(tableFile)
		if err != nil {
			return err
		}
		// A row that was not run since its tests changed says so, which is honest.
		if string(have) != table || strings.Contains(table, failing) {
			return errors.New(tableFile + " is out of step with the tests: run make conformance")
		}
		return nil
	}
	if err := os.WriteFile(tableFile, []byte(table), 0o644); err != nil {
		return err
	}
	if strings.Contains(table, failing) {
		return errors.New("tests that prove requirements fail, see above and " + tableFile)
	}
	return nil
}

// runAll runs the tagged tests and keeps their results on disk.
func runAll(found tags) (results, error) {
	module, err := exec.Command("go", "list", "-m").Output()
	if err != nil {
		return results{}, err
	}
	all, err := runTests(strings.TrimSpace(string(module)), found.tests(), os.Stderr)
	if err != nil {
		return results{}, err
	}
	last := results{Machine: machine.Describe(), Date: time.Now().UTC().Format(time.DateOnly), Tests: keep(all, found.tests())}
	text, err := json.MarshalIndent(last, "", "  ")
	if err != nil {
		return results{}, err
	}
	return last, os.WriteFile(resultsFile, append(text, '\n'), 0o644)
}

// readResults returns the kept results; none when there was no run yet.
func readResults() (results, error) {
	var last results
	text, err := os.ReadFile(resultsFile)
	if errors.Is(err, fs.ErrNotExist) {
		return last, nil
	}
	if err != nil {
		return last, err
	}
	return last, json.Unmarshal(text, &last)
}
