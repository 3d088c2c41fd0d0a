package main

import (
	"fmt"
	"slices"
	"strings"
)

// The states of a requirement.
const (
	proven  = "proven"
	partly  = "partly"
	failing = "**failing**"
	notRun  = "**not run**"
	away    = "not proven here"
	open    = "open"
)

// judge says how a requirement stands, by its tests and how they ended.
func judge(r requirement, tests []testID, last results) string {
	if len(tests) == 0 {
		if strings.HasPrefix(r.remains, notHere) {
			return away
		}
		return open
	}
	ran := true
	for _, t := range tests {
		switch last.Tests[t.String()].Status {
		case "pass":
		case "fail":
			return failing
		default: // skipped, or not there: nothing is known
			ran = false
		}
	}
	switch {
	case !ran:
		return notRun
	case r.remains != "":
		return partly
	}
	return proven
}

// render writes the conformance table. It is a function of its arguments alone, so
// that a check can compare.
func render(reqs []requirement, found tags, last results) string {
	var body strings.Builder
	count := map[string]int{}
	section := ""
	for _, r := range reqs {
		if r.section != section {
			section = r.section
			fmt.Fprintf(&body, "\n## %s\n\n| id | requirement | status | proven by | measured |\n|---|---|---|---|---|\n", section)
		}
		status := judge(r, found[r.id], last)
		count[status]++
		if rest := strings.TrimPrefix(r.remains, notHere); rest != "" && status != open {
			status += ": " + rest
		}
		var by []string
		for _, t := range found[r.id] {
			by = append(by, "`"+t.String()+"`")
		}
		fmt.Fprintf(&body, "| %s | %s | %s | %s | %s |\n", r.id, r.text, status,
			strings.Join(by, "<br>"), strings.Join(figures(r.id, last), "<br>"))
	}

	var doc strings.Builder
	doc.WriteString("# Conformance\n\n" +
		"Written by `make conformance`; do not edit. Each requirement of [requirements.md](requirements.md), the tests that\n" +
		"prove it by doing the real thing, and what they measured on the last full run. `open` has no test yet.\n\n")
	if last.Machine != "" {
		fmt.Fprintf(&doc, "Last full run: %s, on %s.\n\n", last.Date, last.Machine)
	}
	for _, status := range []string{proven, partly, failing, notRun, away, open} {
		if count[status] > 0 {
			fmt.Fprintf(&doc, "- %s: %d of %d\n", status, count[status], len(reqs))
		}
	}
	return doc.String() + body.String()
}

// figures returns what was measured for a requirement, by any tagged test.
func figures(id string, last results) []string {
	var all []string
	for _, test := range last.Tests {
		for _, f := range test.Measured[id] {
			all = append(all, strings.ReplaceAll(f, "|", "\\|"))
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// inconsistent returns the tags that name no requirement and the results that
// belong to no tagged test.
func inconsistent(reqs []requirement, found tags, last results) []string {
	var problems []string
	for id, tests := range found {
		if !slices.ContainsFunc(reqs, func(r requirement) bool { return r.id == id }) {
			problems = append(problems, fmt.Sprintf("%s: no requirement %s", tests[0], id))
		}
	}
	for name := range last.Tests {
		if !slices.ContainsFunc(found.tests(), func(t testID) bool { return t.String() == name }) {
			problems = append(problems, fmt.Sprintf("%s: has a result and no tag", name))
		}
	}
	slices.Sort(problems)
	return problems
}
