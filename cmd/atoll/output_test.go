package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/runtime/microvm/qemu"
	"github.com/atoll-run/atoll/sandbox"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares with testdata/NAME.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; look at it and run with -update:\n%s", path, got)
	}
}

func TestHelpOfEveryCommand(t *testing.T) {
	a := &app{home: "/var/lib/atoll"}
	var out bytes.Buffer
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
			return
		}
		out.WriteString("## " + c.CommandPath() + "\n\n")
		c.SetOut(&out)
		if err := c.Help(); err != nil {
			t.Fatal(err)
		}
		out.WriteByte('\n')
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(a.root())
	golden(t, "help.txt", out.Bytes())
}

// someSandboxes are records with and without everything that a column shows.
func someSandboxes(now time.Time) []node.Sandbox {
	end := now.Add(90 * time.Minute)
	return []node.Sandbox{{
		ID: "abcdefghij0123456789", Name: "brave-otter", Team: "default", State: sandbox.Running, Runtime: "gvisor", Image: "base",
		Spec: sandbox.Spec{ID: "abcdefghij0123456789", Network: sandbox.NetworkSandbox,
			Resources: sandbox.Resources{CPUs: 0.5, Memory: 512 << 20, Disk: 3 << 29, Pids: 64}},
		Metadata: map[string]string{"job": "7", "a": "b"}, Ports: []node.Port{{HostIP: "127.0.0.1", Host: 8080, Guest: 80}},
		CreatedAt: now.Add(-30 * time.Second), StartedAt: now.Add(-30 * time.Second), EndAt: &end, Parent: "zyxwvutsrqponm",
	}, {
		ID: "klmnopqrst0123456789", Name: "evil\x1b[2Jname", Team: "blue", State: sandbox.Error, Reason: "ran out of memory", Runtime: "gvisor",
		Image: "python:3.12", CreatedAt: now.Add(-72 * time.Hour),
	}, {
		ID: "uvwxyz", Name: "calm-reef", Team: "default", State: sandbox.Paused, Suspended: "snap", Runtime: "worktree", Image: "/src", CreatedAt: now.Add(-5 * time.Hour),
	}}
}

func TestListingsInEveryFormat(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	var out bytes.Buffer
	for _, f := range []format{{}, {form: "wide"}, {quiet: true}, {form: "json"}, {form: "yaml"}} {
		out.WriteString("## " + f.form + "\n")
		if err := list(&out, &f, someSandboxes(now), sandboxID, sandboxColumns(now)); err != nil {
			t.Fatal(err)
		}
	}
	golden(t, "ls.txt", out.Bytes())
}

func TestNothingToListIsAnEmptyList(t *testing.T) {
	var out bytes.Buffer
	if err := list(&out, &format{form: "json"}, nil, sandboxID, sandboxColumns(time.Time{})); err != nil || out.String() != "[]\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
	out.Reset()
	if err := list(&out, &format{quiet: true}, nil, sandboxID, sandboxColumns(time.Time{})); err != nil || out.Len() != 0 {
		t.Errorf("%q, %v", out.String(), err)
	}
}

func TestYAMLMeansTheSameAsJSON(t *testing.T) {
	for _, document := range []string{
		`{}`, `[]`, `null`, `"x"`, `{"a":[],"b":{},"c":null}`, `[[1,[2,3]],{"a":[{"b":"c","d":[]}]}]`,
		`{"on":"yes","n":"1","e":"1e3","empty":"","colon":"a: b","hash":"a #b","nl":"a\nb","uni":"\u2028\ud83d\ude00","star":"*x","t":"2026-11-21","v":1.5,"big":12345678901234567890}`,
	} {
		sameAsJSON(t, []byte(document))
	}
}

func sameAsJSON(t *testing.T, document []byte) {
	t.Helper()
	var out bytes.Buffer
	if err := writeYAML(&out, document); err != nil {
		t.Fatalf("%s: %v", document, err)
	}
	var got, want any
	if err := yaml.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatalf("%s became\n%s\nwhich is no YAML: %v", document, out.Bytes(), err)
	}
	if err := yaml.Unmarshal(document, &want); err != nil { // JSON is YAML
		return
	}
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("%s became\n%s\n%#v, not %#v", document, out.Bytes(), got, want)
	}
}

func FuzzYAML(f *testing.F) {
	f.Add("key", "value", 1.5)
	f.Add("on", "- x\n", 0.0)
	f.Add("y", "~", -1.0)
	f.Fuzz(func(t *testing.T, key, value string, n float64) {
		document, err := json.Marshal(map[string]any{key: []any{value, n, map[string]any{value: key}}})
		if err != nil {
			return
		}
		sameAsJSON(t, document)
	})
}

func TestFormatsForPeople(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 1536: "1.50 KiB", 10 << 20: "10.0 MiB", 500 << 30: "500 GiB", 1 << 62: "4096 PiB"} {
		if got := formatBytes(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{-time.Second: "0s", 119 * time.Second: "119s", 2 * time.Minute: "2m", 3 * time.Hour: "3h", 49 * time.Hour: "2d"} {
		if got := formatAge(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
	if got := shortID("sha256:0123456789abcdef"); got != "0123456789ab" {
		t.Errorf("%q", got)
	}
}

func TestBarFitsAnyTerminal(t *testing.T) {
	stages := []stage{{"sha256:aaaa", 5 << 20, 10 << 20}, {"sha256:bbbb", 0, 0}}
	for width := 2; width < 200; width++ {
		line := barLine("pulling python:3.12", stages, "x", 3*time.Second, width)
		if n := len([]rune(line)); n >= width {
			t.Errorf("width %d: %d characters", width, n)
		}
	}
	if got := barLine("pulling x", stages, "", 2*time.Second, 80); got != "pulling x  [===============               ]  5.00 MiB / 10.0 MiB  2.50 MiB/s" &&
		!strings.Contains(got, "5.00 MiB / 10.0 MiB  2.50 MiB/s") {
		t.Errorf("%q", got)
	}
	if got := barLine("making base", []stage{{name: "installing"}}, "installing", 4*time.Second, 80); got != "making base  installing  4s" {
		t.Errorf("%q", got)
	}
}

func TestBarIsSilentWithoutATerminal(t *testing.T) {
	var out bytes.Buffer
	b := (&app{stderr: &out}).bar("pulling")
	b.report(image.Progress{Stage: "x", Done: 1, Total: 2})
	b.done()
	if out.Len() != 0 {
		t.Errorf("%q", out.String())
	}
}

func TestTopFillsTheScreenAndNoMore(t *testing.T) {
	var rows []usage
	for range 50 {
		rows = append(rows, usage{ID: "abcdefghij0123456789", Name: "x", Percent: 1})
	}
	for _, size := range [][2]int{{80, 24}, {20, 5}, {200, 100}, {10, 3}} {
		screen := screenOf(rows, size[0], size[1], time.Time{})
		if n := strings.Count(screen, "\r\n") + 1; n > size[1] {
			t.Errorf("%v: %d lines", size, n)
		}
	}
}

func TestFiguresAreNearestRanks(t *testing.T) {
	var times []time.Duration
	for i := range 20 {
		times = append(times, time.Duration(20-i)*time.Millisecond)
	}
	if got := figureOf(times); *got != (figure{P50: 10, P95: 19, N: 20}) {
		t.Errorf("%+v", got)
	}
	if got := figureOf(times[:1]); *got != (figure{P50: 20, P95: 20, N: 1}) {
		t.Errorf("%+v", got)
	}
	if figureOf(nil) != nil {
		t.Error("a figure of nothing")
	}
}

func TestDoctorJudgesTheHost(t *testing.T) {
	good := host{root: true, kernel: "6.1", memory: 8 << 30, disk: 100 << 30, cgroup: "v2", tools: map[string]bool{"git": true, "mmdebstrap": true, qemu.Program: true},
		landlock: true, daemonURL: "http://127.0.0.1:7700", runtimes: map[string]string{"gvisor": "", "worktree": ""}}
	for _, f := range diagnose(good) {
		if f.Status != checkOK || f.Fix != "" {
			t.Errorf("on a good host: %+v", f)
		}
	}
	bad := host{tools: map[string]bool{}, runtimes: map[string]string{"gvisor": "no /proc"}, node: sandbox.Errorf("x", sandbox.Denied, "/x", "no").WithHint("do y"), networkErr: "no nftables"}
	failed := 0
	for _, f := range diagnose(bad) {
		if f.Status != checkOK && f.Fix == "" {
			t.Errorf("nothing to do about %+v", f)
		}
		if f.Status == checkFailed {
			failed++
		}
	}
	if failed == 0 {
		t.Error("nothing failed on a host that can do nothing")
	}
}
