package microvm_test

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/atoll-run/atoll/runtime/microvm"
	"github.com/atoll-run/atoll/runtime/microvm/vmm"
)

// clones is how many machines TestManyClonesRunAtOnce starts.
var clones = flag.Int("clones", 4, "how many clones of one template are started at once")

// private is what a process has of the host's memory that no other has, in bytes,
// by what it is for.
func private(t testing.TB, pid int) map[string]int64 {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sums := make(map[string]int64)
	kind := ""
	for s := bufio.NewScanner(f); s.Scan(); {
		var kib int64
		if n, _ := fmt.Sscanf(s.Text(), "Private_Dirty: %d kB", &kib); n == 1 {
			sums[kind] += kib << 10
			continue
		}
		if fields := strings.Fields(s.Text()); !strings.HasSuffix(fields[0], ":") {
			kind = purpose(fields[1], strings.Join(fields[5:], " "))
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		var kib int64
		if n, _ := fmt.Sscanf(line, "VmPTE: %d kB", &kib); n == 1 {
			sums["page tables"] = kib << 10
		}
	}
	return sums
}

// purpose tells what a mapping is for by its rights and its name.
func purpose(rights, name string) string {
	switch {
	case strings.Contains(name, "memfd:"):
		return "guest memory"
	case strings.Contains(name, "qemu-system"):
		return "QEMU's variables"
	case strings.HasPrefix(name, "/"):
		return "libraries' variables"
	case name == "[heap]":
		return "heap"
	case name == "[stack]":
		return "stack"
	case strings.Contains(rights, "x"):
		return "translated code"
	}
	return "anonymous"
}

func sum(parts map[string]int64) (total int64) {
	for _, n := range parts {
		total += n
	}
	return total
}

// conformance: FR5.2 FR5.3
func TestManyClonesRunAtOnce(t *testing.T) {
	r, _ := start(t) // which makes the template
	begin := time.Now()
	// Few at a time, or all wait for each other.
	ids, errs := make(chan string), make(chan error, *clones)
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for id := range ids {
				errs <- r.Create(t.Context(), spec(t, id))
			}
		})
	}
	for i := range *clones {
		ids <- fmt.Sprintf("clone%d", i)
	}
	close(ids)
	workers.Wait()
	for range *clones {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	took := time.Since(begin)
	total := make(map[string]int64)
	for i := range *clones {
		for kind, n := range private(t, r.MonitorPID(fmt.Sprintf("clone%d", i))) {
			total[kind] += n
		}
	}
	t.Logf("measured: FR5.3 %d clones in %v; each idle one has %.1f MB of its own", *clones, took.Round(time.Millisecond), float64(sum(total))/float64(*clones)/1e6)
	for _, kind := range slices.Sorted(maps.Keys(total)) {
		t.Logf("measured: FR5.3 of that %s: %.1f MB", kind, float64(total[kind])/float64(*clones)/1e6)
	}
	for i := range *clones {
		id := fmt.Sprintf("clone%d", i)
		if got := sh(t, r, id, "hostname"); got != id+"\n" {
			t.Errorf("%s calls itself %q", id, got)
		}
	}
}

// conformance: FR2.5 FR5.3
func TestWhatAGuestFreesGoesBackToItsHostAndNotOutOfItsTemplate(t *testing.T) {
	t.Parallel()
	r, s := start(t, func(c *microvm.Config) { c.Defaults.Memory = 320 << 20 })
	pid := r.MonitorPID(s.ID)
	guest := func() int64 { return private(t, pid)["guest memory"] }
	before, idle, peak := memoryDigest(t, pid), guest(), int64(0)
	// tail keeps its last line, and there is only one.
	done := make(chan error, 1)
	go func() {
		_, err := run(t.Context(), r, s.ID, "head -c 200000000 /dev/zero | tail -n 1 | wc -c")
		done <- err
	}()
	for running := true; running; {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		case <-time.After(10 * time.Millisecond):
			peak = max(peak, guest())
		}
	}
	const taken, slack = 200e6, 50e6
	if peak < idle+taken-slack {
		t.Fatalf("a guest that takes %d MB has %d MB, and had %d MB before", int64(taken/1e6), peak/1e6, idle/1e6)
	}
	now := guest()
	for end := time.Now().Add(time.Minute); now > idle+slack; now = guest() {
		if time.Now().After(end) {
			t.Fatalf("a minute after a guest freed %d MB it has %d MB still, and had %d MB before", int64(taken/1e6), now/1e6, idle/1e6)
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Logf("measured: FR2.5 of the guest's memory the host holds %d MB when idle, %d MB with 200 MB in use, %d MB after they were freed", idle/1e6, peak/1e6, now/1e6)
	if got := memoryDigest(t, pid); got != before {
		t.Error("the template's memory changed")
	}
	if got := sh(t, r, s.ID, "echo alive"); got != "alive\n" {
		t.Errorf("the guest says %q", got)
	}
}

// memoryDigest is the digest of the memory that a machine maps, of which it must
// have a descriptor.
func memoryDigest(t *testing.T, pid int) string {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		if name, err := os.Readlink(path); err != nil || !strings.HasPrefix(name, "/memfd:"+vmm.MemoryName+" ") {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		hash := sha256.New()
		if n, err := io.Copy(hash, f); n == 0 || err != nil {
			t.Fatalf("read %d bytes of memory: %v", n, err)
		}
		return hex.EncodeToString(hash.Sum(nil))
	}
	t.Fatal("the machine has no memory")
	return ""
}
