package image

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/sandbox"
)

func TestTheWorkingDirectoryOfAnImageIsMadeWhenItsLayersLackIt(t *testing.T) {
	s := openStore(t)
	layer := testLayer(t, dir("app"), file("app/a", "1"), symlink("current", "/data/app"))
	for workdir, want := range map[string]string{
		"/app":      "/app 40755 0:0 0.000000000\n/app/a", // as it was
		"/srv/new":  "/srv/new 40755 0:0 0.000000000\n",
		"/current":  "/data/app 40755 0:0 0.000000000\n",  // where the link points to
		"work/here": "/work/here 40755 0:0 0.000000000\n", // relative to the root
		"":          "/app 40755",
	} {
		i, err := s.Import(context.Background(), bytes.NewReader(layer), ImportOptions{Name: "x", Config: Config{WorkingDir: workdir}})
		if err != nil {
			t.Fatal(err)
		}
		if got := rootDescription(t, i); !strings.Contains(got, want) {
			t.Errorf("%q: no %q in\n%s", workdir, want, got)
		}
	}
	for _, workdir := range []string{"/app/a", "/app/a/b", "/../x"} {
		_, err := s.Import(context.Background(), bytes.NewReader(layer), ImportOptions{Name: "x", Config: Config{WorkingDir: workdir}})
		if !sandbox.Is(err, sandbox.Invalid) || !strings.Contains(err.Error(), "working directory") {
			t.Errorf("%q: %v", workdir, err)
		}
	}
}
