package server

import (
	"os"
	"path/filepath"
	"testing"
)

func TestTheIdentityIsLeftInFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "e2b")
	if err := leaveIdentity(dir, map[string]string{"OTHER": "x"}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("a directory was made for nothing")
	}
	for _, id := range []string{"first", "second"} { // as after a restore under another ID
		if err := leaveIdentity(dir, map[string]string{"E2B_SANDBOX": "true", "E2B_SANDBOX_ID": id}); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(dir, ".E2B_SANDBOX_ID")); err != nil || string(got) != id {
			t.Errorf("got %q, %v", got, err)
		}
	}
}
