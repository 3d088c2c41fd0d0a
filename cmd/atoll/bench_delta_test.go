package main

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// bencher runs atoll in this process and returns its exit code and output.
func bencher(t *testing.T, args ...string) (int, string, string) {
	t.Helper()
	var out, errs bytes.Buffer
	a := &app{stdin: bytes.NewReader(nil), stdout: &out, stderr: &errs, home: t.TempDir()}
	code := execute(t.Context(), a, append([]string{"bench", "delta"}, args...))
	return code, out.String(), errs.String()
}

// conformance: W2
func TestBenchDeltaVerifiesWhatItMeasures(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	r := rand.New(rand.NewPCG(1, 1))
	old := make([]byte, 1<<20)
	for i := range old {
		old[i] = byte(r.IntN(20))
	}
	next := slices.Concat([]byte("inserted"), old[:300_000], old[500_000:])
	oldFile, newFile := filepath.Join(dir, "old"), filepath.Join(dir, "new")
	for name, b := range map[string][]byte{oldFile: old, newFile: next} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, method := range []string{"delta", "dedup", "whole", "auto"} {
		code, out, errs := bencher(t, oldFile, newFile, "--method", method, "-o", "json")
		var got deltaReport
		if err := json.Unmarshal([]byte(out), &got); err != nil || code != 0 {
			t.Fatalf("%s: %d, %v, %s", method, code, err, errs)
		}
		if !got.Verified || got.Bytes == 0 || got.RawBytes != int64(len(next)) || got.Method != method && method != "auto" || len(got.Beside) != 2 || len(got.Predicted) != 3 {
			t.Errorf("%s: %+v", method, got)
		}
		if blocks := got.Beside[1].Bytes; method == "delta" && blocks < 50*got.Bytes {
			t.Errorf("%d bytes, %d with blocks", got.Bytes, blocks)
		}
	}
	if code, out, errs := bencher(t, oldFile, newFile, "--peers", "--thirty-percent", "--method", "auto"); code != 0 || !bytes.Contains([]byte(out), []byte("whole: ")) || !bytes.Contains([]byte(out), []byte("xdelta3")) {
		t.Errorf("%d: %s%s", code, out, errs)
	}
	left, err := filepath.Glob(filepath.Join(dir, "atoll-bench-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	pipe := filepath.Join(dir, "pipe") // to which nobody writes
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{oldFile}, {oldFile, "nosuch"}, {dir, newFile}, {oldFile, newFile, "--method", "magic"}, {oldFile, newFile, "--bandwidth", "0"},
		{oldFile, newFile, "--frame", "1"}, {oldFile, newFile, "-o", "xml"}, {pipe, newFile}, {oldFile, newFile, "--bandwidth", "nan"},
		{oldFile, newFile, "--thirty-percent"}, {oldFile, newFile, "--random", "--method", "whole"},
	} {
		if code, _, errs := bencher(t, args...); code != 1 || errs == "" {
			t.Errorf("%v: %d, %q", args, code, errs)
		}
	}
}
