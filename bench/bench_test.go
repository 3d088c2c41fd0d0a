package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestQuantileIsTheNearestRank(t *testing.T) {
	var samples []time.Duration
	for i := 20; i >= 1; i-- {
		samples = append(samples, time.Duration(i)*time.Millisecond)
	}
	for q, want := range map[float64]float64{0.5: 10, 0.95: 19, 1: 20, 0: 1} {
		if got := quantile(samples, q); got != want {
			t.Errorf("quantile %g is %g, want %g", q, got, want)
		}
	}
	if got := quantile(samples[:1], 0.95); got != 20 {
		t.Errorf("of one sample: %g", got)
	}
}

func TestSubjectsTakeTurnsAndTheFirstRoundIsNotCounted(t *testing.T) {
	var order []string
	take := func(name string) subject {
		return subject{name: name, run: func(context.Context) (time.Duration, error) {
			order = append(order, name)
			return time.Duration(len(order)) * time.Millisecond, nil
		}}
	}
	got, err := interleave(t.Context(), []subject{take("a"), take("b")}, 2)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Join(order, "") != "ababab" {
		t.Errorf("order %q", order)
	}
	if want := (series{"a", 2, 3, 5}); got[0] != want {
		t.Errorf("a: %+v, want %+v", got[0], want)
	}
	failing := subject{name: "c", run: func(context.Context) (time.Duration, error) { return 0, errors.New("broken") }}
	if _, err := interleave(t.Context(), []subject{failing}, 1); err == nil || err.Error() != "c: broken" {
		t.Errorf("error %v", err)
	}
}

func TestCommandLineIsMeasuredOnlyWhenItSaysWhatItShould(t *testing.T) {
	if d, err := commandLine(nil, "echo", said)(t.Context()); err != nil || d <= 0 {
		t.Errorf("echo: %v, %v", d, err)
	}
	for _, args := range [][]string{{"echo", "else"}, {"true"}, {"false"}, {"sh", "-c", "echo " + said + "; exit 3"}} {
		if d, err := commandLine(nil, args[0], args[1:]...)(t.Context()); err == nil {
			t.Errorf("%q was measured: %v", args, d)
		}
	}
}

func TestTheTableHasWhatWasMeasuredAndSaysWhatWasNot(t *testing.T) {
	r := report{Date: "2026-01-02", Machine: "a machine", Version: "atoll 1",
		Sandbox: map[string]json.RawMessage{"gvisor": json.RawMessage(`{"cold":{"p50_ms":53.24,"p95_ms":75},"idle_mb":8.3}`)},
		Beside:  []series{{"atoll run", 3, 30, 40}, {"runc run", 3, 60, 80}},
		Absent:  []string{"bubblewrap is not installed"}}
	table, err := r.table()
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"| create to first output, cold | 53.2 | 75.0 |",
		"An idle sandbox takes 8.3 MB of memory.",
		"| atoll run | 3 | 30.0 | 40.0 | 0.50 |",
		"Not measured: bubblewrap is not installed.",
	} {
		if !strings.Contains(table, line+"\n") {
			t.Errorf("no line %q in\n%s", line, table)
		}
	}
	r.Sandbox["gvisor"] = json.RawMessage(`{"cold":[]}`)
	if _, err := r.table(); err == nil {
		t.Error("a malformed figure was taken")
	}
}

func TestTheReadmesTableIsReplacedBetweenItsMarks(t *testing.T) {
	r := report{Machine: "a machine", Beside: []series{{"runc run", 3, 60, 80}}}
	dir := t.TempDir()
	readme := filepath.Join(dir, "README.md")
	write := func(text string) error {
		if err := os.WriteFile(readme, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return r.write(filepath.Join(dir, "new", "bench.json"), filepath.Join(dir, "performance.md"), readme)
	}
	if err := write("# A\n" + figuresBegin + "| stale |\n" + figuresEnd + "rest\n"); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(text); !strings.HasSuffix(got, "| runc run | 60.0 | 80.0 |\n"+figuresEnd+"rest\n") || strings.Contains(got, "stale") {
		t.Errorf("README:\n%s", got)
	}
	if err := write("# A\n"); err == nil {
		t.Error("a README without a place for figures was taken")
	}
}
