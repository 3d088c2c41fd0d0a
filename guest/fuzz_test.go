package guest

import (
	"strings"
	"testing"

	"github.com/atoll-run/atoll/guest/wire"
)

func FuzzLogs(f *testing.F) {
	f.Add(`{"seq":1,"event":"exit","exitCode":-1}` + "\n")
	f.Add("{\n\n")
	f.Fuzz(func(_ *testing.T, text string) {
		_ = readLogs(strings.NewReader(text), func(wire.LogEntry) error { return nil })
	})
}

func FuzzResult(f *testing.F) {
	f.Add("signal: killed", int32(-1), false)
	f.Add("exit status 3", int32(3), true)
	f.Add("signal: segmentation fault (core dumped)", int32(-1), false)
	f.Fuzz(func(t *testing.T, status string, code int32, exited bool) {
		r := newResult(exited, int(code), status, "")
		if r.Signal != 0 && (exited || r.ExitCode != -1 || r.ShellCode() <= 128) {
			t.Fatalf("got %+v", r)
		}
	})
}
