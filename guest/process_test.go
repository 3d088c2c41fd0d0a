package guest_test

import (
	"os"
	"testing"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/guest/guesttest"
)

func TestMain(m *testing.M) { os.Exit(guesttest.Main(m)) }

// conformance: SPEC2
func TestRunReturnsOutputAndExitCode(t *testing.T) {
	a := guesttest.Start(t)
	out, err := a.Run(t.Context(), sh("echo out; echo err >&2; exit 7"))
	if err != nil {
		t.Fatal(err)
	}
	if string(out.Stdout) != "out\n" || string(out.Stderr) != "err\n" || out.ExitCode != 7 || out.Signal != 0 {
		t.Fatalf("got %+v", out)
	}
}

func sh(script string) guest.Command { return guest.Command{Args: []string{"sh", "-c", script}} }
