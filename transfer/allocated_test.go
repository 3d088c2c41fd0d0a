package transfer

import (
	"testing"

	"golang.org/x/sys/unix"
)

// allocated returns how many bytes of disk a file takes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var s unix.Stat_t
	if err := unix.Stat(path, &s); err != nil {
		t.Fatal(err)
	}
	return s.Blocks * 512
}
