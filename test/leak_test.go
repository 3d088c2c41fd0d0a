package test

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash/fnv"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
)

const (
	crowdEnv = "ATOLL_TEST_SANDBOXES" // how many TestACrowdOfSandboxesLeavesNothing makes
	crowd    = 40
	makers   = 4 // at once
	settle   = 2 * time.Minute
)

// conformance: NFR3.3
func TestACrowdOfSandboxesLeavesNothingOnTheHost(t *testing.T) {
	number := crowd
	if s := os.Getenv(crowdEnv); s != "" {
		var err error
		if number, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	var n *node
	t.Cleanup(func() { // after the node's own, which ends it
		if n == nil {
			return
		}
		for kind, left := range n.traces(t) {
			if left > 0 {
				t.Errorf("%s: %d are left by a node that has ended", kind, left)
			}
		}
	})
	n = startNode(t)
	n.makeSandboxes(1) // so that what is made once is there
	n.removeAll(t)
	before := n.settled(t, nil)

	n.makeSandboxes(number / 2)
	made := n.sandboxes(t)
	if len(made) != number/2 {
		t.Errorf("%d sandboxes, want %d", len(made), number/2)
	}
	// Killed while it makes more of them.
	making := make(chan struct{})
	go func() {
		defer close(making)
		n.makeSandboxes(number - number/2)
	}()
	for len(n.sandboxes(t)) < len(made)+max(1, number/10) {
		time.Sleep(10 * time.Millisecond)
	}
	_ = n.cmd.Process.Kill()
	<-n.exited
	<-making
	n.start(t)
	there := n.sandboxes(t)
	for _, id := range made {
		if !slices.Contains(there, id) {
			t.Errorf("sandbox %s is lost", id)
		}
	}
	n.makeSandboxes(number - len(there))
	most := n.traces(t)
	n.removeAll(t)
	after := n.settled(t, before)
	for _, kind := range kinds {
		t.Logf("measured: NFR3.3 %s: %d before, %d with %d sandboxes, %d after", kind, before[kind], most[kind], number, after[kind])
		if after[kind] != before[kind] {
			t.Errorf("%s: %d before, %d after", kind, before[kind], after[kind])
		}
		// A sandbox's mounts are in a namespace of its own, unless something is wrong.
		if kind != "mounts" && most[kind] < before[kind]+number/2 {
			t.Errorf("%s are not counted: %d before, %d with %d sandboxes", kind, before[kind], most[kind], number)
		}
	}
}

// makeSandboxes makes some, several at once; that it fails while the daemon is
// away is seen by who counts them.
func (n *node) makeSandboxes(count int) {
	var group sync.WaitGroup
	slots := make(chan struct{}, makers)
	for range count {
		slots <- struct{}{}
		group.Go(func() {
			_ = n.command("create", "base", "--memory", "64M").Run()
			<-slots
		})
	}
	group.Wait()
}

func (n *node) sandboxes(t *testing.T) []string {
	t.Helper()
	out, err := n.command("ls", "-q").Output()
	if err != nil {
		t.Fatalf("atoll ls: %v", describe(err))
	}
	return strings.Fields(string(out))
}

func (n *node) removeAll(t *testing.T) {
	t.Helper()
	if out, err := n.command("rm", "--all", "-f").CombinedOutput(); err != nil {
		t.Errorf("atoll rm --all -f: %v\n%s", err, out)
	}
}

// kinds of things that a node makes on its host.
var kinds = []string{"processes", "mounts", "namespaces", "links", "nft rules", "control groups"}

// settled counts what the node has on the host once that is what is wanted, or
// else no longer changes: a node prepares kernels and links on its own.
func (n *node) settled(t *testing.T, want map[string]int) map[string]int {
	t.Helper()
	const steady = 25 // looks at which it is the same
	last, same := n.traces(t), 0
	for end := time.Now().Add(settle); same < steady && !maps.Equal(last, want) && time.Now().Before(end); {
		time.Sleep(200 * time.Millisecond)
		now := n.traces(t)
		if same++; !maps.Equal(now, last) {
			same = 0
		}
		last = now
	}
	return last
}

// traces counts what the node has on the host, by kind. All of it carries the
// prefix of the state directory.
func (n *node) traces(t *testing.T) map[string]int {
	t.Helper()
	sum := sha256.Sum256([]byte(n.home))
	prefix := "at" + hex.EncodeToString(sum[:3])
	group := fnv.New32a()
	group.Write([]byte("atoll/" + prefix))
	count := map[string]int{"nft rules": rules(t, "atoll_"+prefix)}
	for _, left := range n.left() {
		if kind, _, _ := strings.Cut(left, " "); kind == "process" {
			count["processes"]++
		} else {
			count["mounts"]++
		}
	}
	for kind, pattern := range map[string]string{
		"namespaces":     "/run/netns/atoll-" + prefix + "-*",
		"control groups": "/sys/fs/cgroup/pids/" + prefix + "*/*/cgroup.procs", // version 1, else 2
	} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		count[kind] = len(found)
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		found, err := filepath.Glob("/sys/fs/cgroup/" + prefix + "*/*/cgroup.procs")
		if err != nil {
			t.Fatal(err)
		}
		count["control groups"] = len(found)
	}
	links, err := filepath.Glob("/sys/class/net/atl*/netdev_group")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range links {
		if text, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(text)) == fmt.Sprint(int32(group.Sum32()|1<<30)) { //nolint:gosec // signed, as the kernel prints it
			count["links"]++
		}
	}
	return count
}

// rules counts the rules of a table, and what its sets and maps hold. What is
// removed meanwhile cannot be read, and does not count.
func rules(t *testing.T, name string) (count int) {
	t.Helper()
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range tables {
		if table.Name != name {
			continue
		}
		chains, _ := c.ListChainsOfTableFamily(table.Family)
		for _, chain := range chains {
			if chain.Table.Name == name {
				found, _ := c.GetRules(table, chain)
				count += 1 + len(found)
			}
		}
		sets, _ := c.GetSets(table)
		for _, set := range sets {
			elements, _ := c.GetSetElements(set)
			count += 1 + len(elements)
		}
	}
	return count
}
