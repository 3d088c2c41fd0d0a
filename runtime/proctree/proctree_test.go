package proctree

import (
	"os"
	"os/exec"
	"syscall"
	"testing"
)

func TestATreeIsStoppedContinuedAndKilledAsOne(t *testing.T) {
	cmd := exec.Command("sh", "-c", "sleep 300 & sleep 300 & wait")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	root := cmd.Process.Pid
	for len(Of(root)) < 3 {
	}
	if err := Signal(root, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for _, p := range Of(root) {
		for p.State != 'T' { // a signal takes its moment
			p = Of(p.PID)[0]
		}
		if p.Memory <= 0 {
			t.Errorf("process %d has no memory", p.PID)
		}
	}
	if err := Signal(root, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	Kill(root)
	if err := cmd.Wait(); err == nil {
		t.Error("the killed process ended well")
	}
	if left := Of(root); len(left) > 0 {
		t.Errorf("left over: %+v", left)
	}
}

func TestParseStat(t *testing.T) {
	for text, want := range map[string]int{
		"": 0, "12": 0, "12 (sh": 0, "x (sh) S 1": 0, "7 (a) b) S 1 2 3": 0,
		"7 (a) S) R 5 7 7 0 -1 4194560 1 2 3 4 10 20 30 40 20 0 1 0 99 1000 3 0": 7,
	} {
		p, ok := parseStat([]byte(text))
		if ok != (want != 0) || ok && (p.PID != want || p.Parent != 5 || p.State != 'R' || p.CPU != 100*clockTick || p.Memory != 3*int64(os.Getpagesize())) {
			t.Errorf("%q is read as %+v, %v", text, p, ok)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("7 (a) S) R 5 7 7 0 -1 4194560 1 2 3 4 10 20 30 40 20 0 1 0 99 1000 3 0"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if p, ok := parseStat(text); ok && p.PID <= 0 {
			t.Errorf("process %d from %q", p.PID, text)
		}
	})
}
