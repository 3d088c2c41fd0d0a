package fake

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/atoll-run/atoll/guest/guesttest"
	"github.com/atoll-run/atoll/runtime/runtimetest"
	"github.com/atoll-run/atoll/sandbox"
)

func TestMain(m *testing.M) { os.Exit(guesttest.Main(m)) }

func newWorld(t *testing.T) *World {
	w := NewWorld(t.TempDir(), guesttest.Binary(t))
	t.Cleanup(w.Close)
	return w
}

// conformance: FR1.4
func TestFakeKeepsTheRuntimeContract(t *testing.T) {
	runtimetest.Run(t, func(t *testing.T) runtimetest.Subject {
		w := newWorld(t)
		return runtimetest.Subject{
			Runtime: w.Open(Config{}),
			Spec:    sandbox.Spec{Root: sandbox.Root{Kind: sandbox.RootHost}, Network: sandbox.NetworkHost},
			Reopen:  func(*testing.T) sandbox.Runtime { return w.Open(Config{}) },
			Kill:    func(_ *testing.T, id string) { w.Kill(id, "killed by the test") },
			Traces: func(t *testing.T) []string {
				names, err := filepath.Glob(filepath.Join(w.dir, "*"))
				if err != nil {
					t.Fatal(err)
				}
				return names
			},
		}
	})
}
