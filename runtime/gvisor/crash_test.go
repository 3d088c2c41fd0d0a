package gvisor_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/runtime/gvisor"
	"github.com/atoll-run/atoll/sandbox"
)

// crowd is how many sandboxes the process that is killed has made.
const crowd = 12

// makerEnv makes the test binary a process that opens a runtime in the directory
// that it names, fills it with sandboxes and waits to be killed.
const makerEnv = "ATOLL_TEST_GVISOR_MAKER"

// maker is the program of that process.
func maker(dir string) error {
	guest, root, _ := strings.Cut(os.Getenv(makerEnv+"_FILES"), ":")
	r, err := gvisor.New(gvisor.Config{Dir: dir, Guest: guest, Prewarm: 2})
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	errs := make(chan error, crowd)
	for i := range crowd {
		wg.Go(func() {
			errs <- r.Create(context.Background(), sandbox.Spec{
				ID: "c" + strconv.Itoa(i), Network: sandbox.NetworkNone,
				Root: sandbox.Root{Kind: sandbox.RootEROFS, Path: root, Digest: "blake3:test"},
			})
		})
	}
	wg.Wait()
	for range crowd {
		if err := <-errs; err != nil {
			return err
		}
	}
	// One more is being made when the end comes.
	go func() {
		for i := 0; ; i++ {
			_ = r.Create(context.Background(), sandbox.Spec{ID: "late" + strconv.Itoa(i), Network: sandbox.NetworkNone,
				Root: sandbox.Root{Kind: sandbox.RootEROFS, Path: root, Digest: "blake3:test"}})
		}
	}()
	fmt.Println("ready")
	select {}
}

// conformance: FR1.4 NFR3.3
func TestSandboxesOutliveTheKilledProcessThatMadeThemAndGoWithoutATrace(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir) // so that a lack of privilege skips
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	before := traces(t, dir)
	agent, err := agentPath()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	cmd.Env = append(os.Environ(), makerEnv+"="+dir, makerEnv+"_FILES="+agent+":"+erofsSpec(t, "").Root.Path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err != nil || line != "ready\n" {
		t.Fatalf("the process that makes sandboxes said %q, %v", line, err)
	}

	r = open(t, dir)
	defer r.Close()
	kill(t, r, "c0")
	all, err := r.List(t.Context())
	if err != nil || len(all) < crowd {
		t.Fatalf("List: %d sandboxes, %v; want at least %d", len(all), err, crowd)
	}
	for _, st := range all {
		if st.ID == "c0" {
			continue
		}
		if st.State != sandbox.Running {
			t.Errorf("%s is %s: %s", st.ID, st.State, st.Reason)
		}
		if got := sh(t, r, st.ID, "echo alive"); got != "alive\n" {
			t.Errorf("%s says %q", st.ID, got)
		}
	}
	state := t.TempDir()
	if err := r.Snapshot(t.Context(), "c1", state, sandbox.SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := r.Restore(t.Context(), erofsSpec(t, "fork"), state); err != nil {
		t.Fatal(err)
	}
	if all, err = r.List(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, st := range all {
		if err := r.Destroy(t.Context(), st.ID); err != nil {
			t.Errorf("Destroy %s: %v", st.ID, err)
		}
	}
	if after := traces(t, dir); !slices.Equal(before, after) {
		t.Errorf("left behind:\n%s", strings.Join(after, "\n"))
	}
}

// sh runs a shell command in a sandbox and returns what it printed.
func sh(t testing.TB, r sandbox.Runtime, id, command string) string {
	t.Helper()
	out, err := agent(r, id).Run(t.Context(), guest.Command{Args: []string{"/bin/sh", "-c", command}})
	if err != nil {
		t.Fatalf("%s: %q: %v", id, command, err)
	}
	return string(out.Stdout) + string(out.Stderr)
}
