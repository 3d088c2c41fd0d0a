package e2b

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/sandbox"
)

// uploaded finds every archive but the one whose hash is all zeros.
func uploaded(hash string) (string, bool) { return "/files/" + hash, strings.Trim(hash, "0") != "" }

func TestInstructionsBecomeSteps(t *testing.T) {
	hash := strings.Repeat("a1", 32)
	in := []buildStep{
		{Type: "RUN", Args: []string{"make all", "root"}, Force: true},
		{Type: "ENV", Args: []string{"A", "1", "B", "x=y z"}},
		{Type: "COPY", Args: []string{"src/*.txt", "dst/", "", "0644"}, FilesHash: hash},
		{Type: "USER", Args: []string{"app"}},
		{Type: "COPY", Args: []string{"a", "b"}, FilesHash: hash},
		{Type: "COPY", Args: []string{"a", "b", "root", ""}, FilesHash: hash},
		{Type: "WORKDIR", Args: []string{"/srv"}},
	}
	got, err := toSteps(in, "user", uploaded)
	must(t, err)
	for i := range got {
		got[i].Text = ""
	}
	want := []image.Step{
		{Op: image.OpRun, Args: []string{"make all"}, User: "root", NoCache: true},
		{Op: image.OpEnv, Args: []string{"A=1", "B=x=y z"}},
		{Op: image.OpCopy, Args: []string{"src/*.txt", "dst/"}, Archive: "/files/" + hash, Chown: "user", Chmod: "0644"},
		{Op: image.OpUser, Args: []string{"app"}},
		{Op: image.OpCopy, Args: []string{"a", "b"}, Archive: "/files/" + hash, Chown: "app"},
		{Op: image.OpCopy, Args: []string{"a", "b"}, Archive: "/files/" + hash, Chown: "root"},
		{Op: image.OpWorkdir, Args: []string{"/srv"}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestInstructionsThatCannotBeCarriedOutAreRefused(t *testing.T) {
	for _, s := range []buildStep{
		{Type: "RUN"}, {Type: "EXPOSE", Args: []string{"80"}}, {Type: "ENV", Args: []string{"A"}}, {Type: "ENV", Args: []string{"A=B", "c"}},
		{Type: "COPY", Args: []string{"a", "b"}}, {Type: "COPY", Args: []string{"a", "b"}, FilesHash: "../../etc/passwd"},
		{Type: "COPY", Args: []string{"a"}, FilesHash: strings.Repeat("a1", 32)},
		{Type: "COPY", Args: []string{"a", "b"}, FilesHash: strings.Repeat("0", 64)}, {Type: "RUN", Args: []string{"a\x00b"}},
	} {
		if _, err := toSteps([]buildStep{s}, "user", uploaded); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%+v: %v", s, err)
		}
	}
}

func TestTheBaseImageIsKnownByItsNames(t *testing.T) {
	for name, want := range map[string]bool{"e2bdev/base": true, "e2bdev/base:latest": true, "docker.io/e2bdev/base": true, "e2bdev/base2": false, "debian:12": false} {
		if isBaseImage(name) != want {
			t.Errorf("%s: %v", name, !want)
		}
	}
}

func FuzzSteps(f *testing.F) {
	f.Add(`[{"type":"COPY","args":["a","b","",""],"filesHash":"00"},{"type":"ENV","args":["A","1"]}]`)
	f.Fuzz(func(t *testing.T, text string) {
		var in []buildStep
		if json.Unmarshal([]byte(text), &in) != nil {
			return
		}
		steps, err := toSteps(in, "user", uploaded)
		if err != nil {
			return
		}
		for _, s := range steps {
			if s.Archive != "" && strings.Contains(s.Archive, "..") || len(s.Args) == 0 {
				t.Fatalf("%+v", s)
			}
		}
	})
}
