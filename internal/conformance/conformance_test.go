package main

import (
	"io"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
)

const requirements = `# Requirements

## A. First

| id | requirement | what remains |
|---|---|---|
| A1 | proven whole | |
| A2 | proven in part | the other half |
| A3 | not built | |

## B. Second

| id | requirement | what remains |
|---|---|---|
| B1 | out of reach | not here: needs a GPU |
`

func parsed(t *testing.T) []requirement {
	t.Helper()
	reqs, err := parseRequirements(requirements)
	if err != nil {
		t.Fatal(err)
	}
	return reqs
}

func TestRequirementsAreReadInOrderWithTheirSections(t *testing.T) {
	reqs := parsed(t)
	if len(reqs) != 4 || reqs[3] != (requirement{"B. Second", "B1", "out of reach", "not here: needs a GPU"}) {
		t.Fatalf("read %+v", reqs)
	}
	for _, bad := range []string{"", requirements + "| A1 | again | |\n", "| A1 | no heading | |\n"} {
		if got, err := parseRequirements(bad); err == nil {
			t.Errorf("%q was taken as %+v", bad, got)
		}
	}
}

func TestTagsAreCollectedFromTestsAndScripts(t *testing.T) {
	fsys := fstest.MapFS{
		"a/a_test.go": {Data: []byte("package a\n\n// TestX does.\n//\n// conformance: A1 A2\nfunc TestX(t *testing.T) {}\n\n// conformance: A1\nfunc TestB(t *testing.T) {}\n")},
		"a/a.go":      {Data: []byte("package a\n")},
		"test/cli/run.sh": {Mode: 0o755, Data: []byte(
			"#!/bin/sh\n# conformance: A2\n" + strings.Repeat("#\n", 40) + "# conformance: A3\n")},
		"test/cli/data.json":           {Data: []byte("# conformance: A3\n")},
		"test/e2b/node_modules/x/a.sh": {Mode: 0o755, Data: []byte("# conformance: A3\n")},
		"test/e2b/suite/a.mjs":         {Data: []byte("// conformance: A4\n")},
	}
	found, err := collect(fsys)
	if err != nil {
		t.Fatal(err)
	}
	x, b, script, folder := testID{"a", "TestX"}, testID{"a", "TestB"}, testID{"test", "TestScripts/cli/run.sh"}, testID{"test", "TestScripts/e2b"}
	if !slices.Equal(found["A1"], []testID{b, x}) || !slices.Equal(found["A2"], []testID{x, script}) ||
		!slices.Equal(found["A4"], []testID{folder}) || len(found) != 3 {
		t.Fatalf("found %v", found)
	}
	if !slices.Equal(found.tests(), []testID{b, x, script, folder}) {
		t.Errorf("tests %v", found.tests())
	}
}

func TestATagAboveAnythingButATestIsRefused(t *testing.T) {
	for name, src := range map[string]string{
		"a/a.go":      "package a\n\n// conformance: A1\nfunc TestX() {}\n",
		"a/a_test.go": "package a\n\n// conformance: A1\nfunc check() {}\n",
		"b/a_test.go": "package b\n\n// conformance: A1\n\nfunc TestX() {}\n",
	} {
		if _, err := collect(fstest.MapFS{name: {Data: []byte(src)}}); err == nil {
			t.Errorf("%s: no error for %q", name, src)
		}
	}
}

func TestResultsCarryTheFiguresOfSubtests(t *testing.T) {
	stream := `{"Action":"output","Test":"TestX/one","Output":"    a_test.go:3: measured: A1 first: 12 ms\n"}
{"Action":"pass","Test":"TestX/one"}
{"Action":"output","Test":"TestX","Output":"measured: A1 second\n"}
{"Action":"pass","Test":"TestX"}
{"Action":"skip","Test":"TestPart/one"}
{"Action":"pass","Test":"TestPart"}
not an event
{"Action":"output","Test":"TestB","Output":"it broke\n"}
{"Action":"fail","Test":"TestB"}
{"Action":"pass"}
`
	var log strings.Builder
	all, err := readEvents(strings.NewReader(stream), "a", &log)
	if err != nil {
		t.Fatal(err)
	}
	if log.String() != "not an event\nit broke\n" {
		t.Errorf("log %q", log.String())
	}
	kept := keep(all, []testID{{"a", "TestX"}, {"a", "TestB"}, {"a", "TestGone"}, {"a", "TestPart"}})
	if len(kept) != 3 || kept["a.TestB"].Status != "fail" || kept["a.TestPart"].Status != "skip" {
		t.Errorf("kept %v", kept)
	}
	if got := kept["a.TestX"].Measured["A1"]; !slices.Equal(got, []string{"second", "first: 12 ms"}) {
		t.Errorf("figures %q", got)
	}
}

func TestTheTableTellsProvenPartlyFailingAndOpen(t *testing.T) {
	reqs := parsed(t)
	x, b := testID{"a", "TestX"}, testID{"a", "TestB"}
	found := tags{"A1": {x}, "A2": {b, x}}
	last := results{Machine: "a machine", Date: "2026-01-02", Tests: map[string]result{
		"a.TestX": {Status: "pass", Measured: map[string][]string{"A1": {"3 ms | 4 ms"}}},
		"a.TestB": {Status: "pass"},
	}}
	table := render(reqs, found, last)
	for _, line := range []string{
		"| A1 | proven whole | proven | `a.TestX` | 3 ms \\| 4 ms |",
		"| A2 | proven in part | partly: the other half | `a.TestB`<br>`a.TestX` |  |",
		"| A3 | not built | open |  |  |",
		"| B1 | out of reach | not proven here: needs a GPU |  |  |",
		"Last full run: 2026-01-02, on a machine.",
		"- proven: 1 of 4",
	} {
		if !strings.Contains(table, line+"\n") {
			t.Errorf("no line %q in\n%s", line, table)
		}
	}
	for status, want := range map[string]string{"fail": failing, "skip": notRun, "": notRun} {
		last.Tests["a.TestB"] = result{Status: status}
		if got := judge(reqs[1], found["A2"], last); got != want {
			t.Errorf("a test that ended %q gives %q, want %q", status, got, want)
		}
	}
}

func TestTagsAndResultsThatBelongToNothingAreReported(t *testing.T) {
	found := tags{"A9": {{"a", "TestX"}}}
	last := results{Tests: map[string]result{"a.TestGone": {}, "a.TestX": {}}}
	got := inconsistent(parsed(t), found, last)
	if !slices.Equal(got, []string{"a.TestGone: has a result and no tag", "a.TestX: no requirement A9"}) {
		t.Errorf("reported %q", got)
	}
}

func TestTestsThatDoNotBuildHaveNoResult(t *testing.T) {
	stream := `{"Action":"build-output","Output":"a.go:1: undefined: x\n"}` + "\n" + `{"Action":"fail"}` + "\n"
	var log strings.Builder
	all, err := readEvents(strings.NewReader(stream), "a", &log)
	if err != nil || len(all) != 0 || !strings.Contains(log.String(), "undefined: x") {
		t.Errorf("read %v, %v; log %q", all, err, log.String())
	}
}

func TestAnEndlessLineOfOutputIsAnError(t *testing.T) {
	if _, err := readEvents(strings.NewReader(strings.Repeat("x", 2<<20)), "a", io.Discard); err == nil {
		t.Error("no error")
	}
}
